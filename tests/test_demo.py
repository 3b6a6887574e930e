"""The demo page: what it draws, and, where gradio, Playwright and Chromium are installed, how it behaves in a
browser (pip install -r requirements-demo.txt playwright; a `chromium` on the path)."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from sample import SHIPPED
from apps import demo
from images import read_picture, read_settings, to_images
from pipeline import Pipeline, Subject

VALUES = "a woman and a man riding", 3, 3, 1.0  # prompt, seed, steps, strength


@pytest.fixture(scope="module")
def studio(world, tmp_path_factory):
    return demo.Studio(demo.parse_args(["--weights", str(world)]), tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def photos(studio, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("uploads"), np.random.default_rng(0)
    for name in ("a=b,c@1+d.png", "bob.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / name)
    return [studio.photo(str(file)) for file in sorted(folder.iterdir())]


def drawn(studio, work, photos, *values) -> dict:
    *_, last = studio.live(work, photos, *(values or VALUES))
    return last


def test_pictures_are_those_of_the_pipeline(studio, photos, world):
    shown = list(studio.live(studio.draw, photos, *VALUES))
    assert [value["done"] for value in shown[:-1]] == [0, 1 / 3, 2 / 3, 1] and "mixed" in shown[1]
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    features = pipeline.encode_subjects(torch.stack([read_picture(photo) for photo in photos]))
    people = [Subject(2, features[0]), Subject(5, features[1])]
    expected = pipeline.generate([VALUES[0]] * 2, [3, 3], [None, people], steps=3, guidance_scale=3.0)
    for name, wanted in zip(("prior", "mixed"), to_images(expected), strict=True):
        assert np.array_equal(shown[-1][name], wanted)
    file = Path(shown[-1]["drawn"]["file"])
    settings = read_settings(file)
    assert settings["prompt"] == VALUES[0] and settings["seed"] == 3
    assert settings["subjects"] == ["woman=a-b-c-1-d.png", "man=bob.png"]
    assert not list(file.parent.glob("*.tmp"))


def test_previews_are_given_to_the_checker(studio, photos, monkeypatch):
    def never(image):
        raise ValueError("not this one")

    monkeypatch.setattr(studio.args, "checker", never)
    shown = studio.live(studio.draw, photos, *VALUES)
    assert next(shown).keys() == {"done"}
    with pytest.raises(ValueError, match="not this one"):
        next(shown)


def test_two_pictures_have_to_fit_into_a_batch(capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--width", "1024", "--height", "1032"])
    assert "the page draws two pictures at a time" in capsys.readouterr().err


def test_swap_and_morph_start_and_end_with_the_pictures(studio, photos):
    result = drawn(studio, studio.draw, photos)
    strip = drawn(studio, studio.swap, photos)["strip"]
    assert [name for _, name in strip] == ["base", "first", "second"]
    frames = drawn(studio, studio.morph, [*photos, photos[1]])["frames"]
    assert len(frames) == demo.FRAMES and demo.FRAMES % 2  # the slider starts in the middle
    base, first, second = (np.array(image, dtype=int) for image, _ in strip)
    assert (first != second).any()  # in the first place; in the other one the second person stays
    for image, wanted in ((result["prior"], base), (result["mixed"], first), (frames[0], first),
                          (frames[-1], second)):
        assert np.abs(np.array(image) - wanted).max() <= 1


def test_heat_map(studio, photos):
    assert demo.heat_map(None, "self-attention", 0, 1) == (None, "Draw a picture first.")
    result = drawn(studio, studio.draw, photos)["drawn"]
    image, said = demo.heat_map(result, "cross-attention", 15, 99)
    t, maps = result["sheet"].columns[-1]
    assert image.size == result["picture"].size
    assert f"l = 15, t = {t}: the personalized expert gets {maps[15, 'cross'].mean():.2f} on average" in said
    assert "t = 999: the prior draws this step alone" in demo.heat_map(result, "self-attention", 0, 1)[1]
    said = demo.heat_map(result, "mean of all", 0, 1)[1]
    assert "mean over all layers and steps: dark 0." in said


def test_visitors_do_not_disturb_each_other(studio, photos):
    alone = [np.array(drawn(studio, studio.draw, [photo])["mixed"]).tolist() for photo in photos]
    found = {}

    def visit(k):
        found[k] = np.array(drawn(studio, studio.draw, [photos[k % 2]])["mixed"]).tolist()

    threads = [threading.Thread(target=visit, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    visitor = studio.live(studio.draw, photos, VALUES[0], 0, 999, 1.0)
    next(visitor)
    visitor.close()  # leaves: of 999 steps one more is drawn
    for thread in threads:
        thread.join(60)
    assert found == {k: alone[k % 2] for k in range(4)}


@pytest.mark.parametrize(("values", "said"), [
    (("", 0, 3, 1.0), "Prompt: nobody"), (("a bike", 0, 3, 1.0), "Prompt: nobody"),
    (("a boy, a girl and a man", 0, 3, 1.0), "Prompt: 3 people, .* at most 2"),
    (("a woman", -1, 3, 1.0), "Seed: must be in"), (("a woman", 0, 0, 1.0), "Steps: must be in"),
    (("a woman", 0, 3, 1.0), "more subjects than words")])
def test_refusals(studio, photos, values, said, monkeypatch):
    monkeypatch.setattr(studio.pipeline, "max_people", 2)
    with pytest.raises(ValueError, match=said) as refusal:
        drawn(studio, studio.draw, photos, *values)
    assert str(studio.folder) not in studio.clean(refusal.value)


def test_a_person_is_chosen_by_the_mask(studio, photos, tmp_path, monkeypatch):
    values = np.zeros((40, 30), np.uint8)
    values[:, 10:20], values[:, 20:] = 1, 2
    Image.fromarray(values).save(tmp_path / "who.png")
    photo = studio.mask(f"{photos[1]}#7", str(tmp_path / "who.png"))
    assert np.array_equal(Image.open(photo), Image.open(photos[1]))
    assert np.array_equal(Image.open(Path(photo).parent / "bob_mask.png"), values)
    assert [demo.person_at(f"{photo}#1", x, 5) for x in (0, 15, 25)] == [photo, f"{photo}#1", f"{photo}#2"]
    assert demo.person_at(photos[0], 15, 5) == photos[0]  # has no mask
    Image.fromarray(np.uint8(values == 1) * 255).save(tmp_path / "white.png")
    assert demo.person_at(studio.mask(photos[1], str(tmp_path / "white.png")), 15, 5).endswith("bob.png#1")
    read = []
    monkeypatch.setattr(demo, "read_photos", lambda row: read.extend(row) or [[read_picture(photo)]])
    settings = read_settings(Path(drawn(studio, studio.draw, [f"{photo}#2"])["drawn"]["file"]))
    assert read[0].files == [f"{photo}#2"] and settings["subjects"] == ["woman=bob.png#2"]


@pytest.mark.parametrize(("shape", "value"), [((40, 31), 1), ((40, 30), 0), ((40, 30, 3), (1, 0, 0))])
def test_masks_that_do_not_fit(studio, photos, shape, value, tmp_path):
    Image.fromarray(np.full(shape, value, np.uint8)).save(tmp_path / "who.png")
    with pytest.raises(ValueError, match="who.png must be a greyscale picture of 30 x 40 pixels"):
        studio.mask(photos[0], str(tmp_path / "who.png"))


def test_warnings_are_passed_on(studio, photos):
    said, = drawn(studio, studio.draw, photos[:1], "a woman and an elephant", 0, 3, 1.0)["warnings"]
    assert "do not know the words: an, elephant" in said


def test_without_gradio(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--weights", str(world)])
    said, error = capsys.readouterr()
    assert said.startswith("loading ") and str(world.name) in said
    assert error.count("\n") == 1 and "pip install -r requirements-demo.txt" in error
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--weights", "misspelt"])
    assert "misspelt" in capsys.readouterr().err


def test_port_in_use_and_sigterm(world, monkeypatch, capsys, tmp_path):
    def listen(**options):
        if options["server_port"] == 1:
            raise OSError("Cannot find empty port")
        assert list(tmp_path.glob("moa-demo-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    gradio, before = MagicMock(), signal.getsignal(signal.SIGTERM)
    gradio.Blocks().__enter__().queue().launch = listen
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        for port, status, said in ((1, "2", "another --port N"), (2, "130", "stopped")):
            with pytest.raises(SystemExit, match=status):
                demo.main(["--weights", str(world), "--port", str(port)])
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1
            assert not list(tmp_path.iterdir())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_default_looks_can_be_drawn(studio):
    for looks in (demo.FIRST, demo.SECOND):
        assert read_picture(studio.portrait(*looks)).shape == (3, 128, 128)
    assert all(SHIPPED.parents[1].joinpath("examples", f"{name}.png").is_file()
               for names in demo.OTHERS.values() for name in names)


# --- in a browser ---


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    errors = folder / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "apps.demo", "--port", "0", "--steps", "6"],
                                   env={**os.environ, "TMPDIR": str(folder)}, cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout.readline() == "loading weights/toyworld ...\n"
        yield process.stdout.readline().split()[1]
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in errors.read_text()  # of a visitor's mistake
    assert not list(folder.glob("moa-demo-*"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("no chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, page_url):
    """Opens the page as a new visitor; anything but the page itself may not be asked for."""
    contexts, strangers = [], []

    def check(route):
        if not route.request.url.startswith((page_url, "data:", "blob:")):
            strangers.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].route("**/*", check)
        page = contexts[-1].new_page()
        page.goto(page_url)
        page.wait_for_selector("#draw")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not strangers


def press(page, button: str) -> None:
    page.click(button)
    page.wait_for_function("document.querySelector('#status').innerText.includes('Drawing')", timeout=60_000)


def wait(page, line: str = "Done.") -> None:
    """Until the status begins so."""
    page.wait_for_function("line => document.querySelector('#status').innerText.startsWith(line)", arg=line,
                           timeout=60_000)
    page.wait_for_timeout(300)


def slider(page, name: str):
    return page.get_by_role("slider", name=f"range slider for {name}")


def source(page, name: str) -> str:
    """Of a picture; its address changes with its pixels."""
    return page.get_attribute(f"#{name} img", "src")


def test_a_visit(visit, tmp_path):
    page = visit()
    page.get_by_text("a man reading a book on a mountain").click()
    assert page.input_value("#prompt textarea") == "a man reading a book on a mountain"
    page.get_by_text("a woman standing on the beach").last.click()
    assert slider(page, "Transformer block l").is_disabled()
    page.get_by_text("Design the first person").click()
    page.get_by_label("hair color").first.click()
    page.get_by_role("option", name="pink").click()
    page.wait_for_function("document.querySelector('.picture img').src.includes('fair-pink')")
    slider(page, "Steps").fill("3")  # fewer than the routing map's step, 4
    press(page, "#draw")
    wait(page)
    assert source(page, "prior") != source(page, "mixed")
    with page.expect_download() as download:
        page.get_by_text("Download, settings inside").click()
    download.value.save_as(tmp_path / "picture.png")
    settings = read_settings(tmp_path / "picture.png")
    assert settings["prompt"] == "a woman standing on the beach" and settings["steps"] == 3
    assert settings["subjects"] == ["woman=woman-fair-pink-short-yes-no-blue-plain-trousers-black.png"]

    page.wait_for_selector("#heat img")
    assert slider(page, "Step, from noise to picture").input_value() == "3"
    before, heat = page.inner_text("#said"), source(page, "heat")
    slider(page, "Transformer block l").fill("13")
    page.wait_for_function("document.querySelector('#said').innerText.includes('l = 13')")
    assert page.inner_text("#said") != before
    page.wait_for_function(f"document.querySelector('#heat img').src != {heat!r}")

    page.get_by_role("tab", name="Swap").click()
    press(page, "#swap")
    wait(page)
    assert page.locator("#strip .grid-container img").count() == 5
    assert page.evaluate("(e => e.offsetHeight - e.firstElementChild.offsetHeight)"
                         "(document.querySelector('#strip .grid-wrap'))") < 32  # no empty row below
    page.get_by_role("tab", name="Morph").click()
    assert slider(page, "How much of the second").is_disabled()
    press(page, "#morph")
    wait(page)
    page.wait_for_selector("#frame img")
    middle = source(page, "frame")
    slider(page, "How much of the second").fill("1")
    page.wait_for_function(f"document.querySelector('#frame img').src != {middle!r}")


def test_on_a_phone(visit, tmp_path):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    draw, prior, seed = (page.locator(name).bounding_box() for name in ("#draw", "#prior", "#seed"))
    assert draw["y"] + draw["height"] < 844 and prior["y"] < draw["y"] + 120 and seed["y"] > prior["y"]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    upload = page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "broken.png")
    page.get_by_text("First person: broken.png cannot be used as a picture").wait_for()
    tall = Image.new("RGB", (100, 400), "lightblue")
    tall.save(tmp_path / "tall.png")
    upload.set_input_files(tmp_path / "tall.png")
    page.wait_for_function("document.querySelector('.portrait img').src.includes('tall.png')")
    portrait = page.locator(".portrait img").first.bounding_box()
    assert portrait["height"] == pytest.approx(portrait["width"], abs=1)
    page.click("#draw")
    wait(page, "tall.png looks like nobody that these weights were trained on")
    assert not page.locator("#prior img, #mixed img, #heat img").count()
    page.fill("#prompt textarea", "a house")
    page.click("#draw")
    wait(page, "Prompt: nobody in it")
    assert not page.locator("#prior img, #mixed img, #heat img").count()
    assert slider(page, "Strength of the people (1: as trained)").is_disabled()
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    tall = Image.new("L", tall.size, 1)
    tall.paste(2, (0, 200, 100, 400))
    tall.save(tmp_path / "who.png")
    page.get_by_text("Several in it?").first.click()
    page.get_by_text("Mask: who is where").first.wait_for()
    page.locator("input[type=file]").nth(1).set_input_files(tmp_path / "who.png")
    page.get_by_text("First person: the largest").wait_for()
    foot = {"x": portrait["width"] / 2, "y": portrait["height"] - 9}
    page.locator(".portrait img").first.click(position=foot)
    page.get_by_text("First person: number 2").wait_for()


def test_two_visitors_at_once(visit):
    first, second = visit(), visit()
    pages = first, second
    second.fill("#prompt textarea", "a man reading a book on a mountain")
    for page in pages:
        page.click("#draw")
    for page in pages:
        wait(page)
    together = [pictures(page) for page in pages]
    for page in pages:
        press(page, "#draw")
        wait(page)
    assert together == [pictures(page) for page in pages] and together[0] != together[1]


def pictures(page) -> list[str]:
    """The addresses of the two pictures, which have a digest of their pixels in them."""
    return [source(page, name) for name in ("prior", "mixed")]
