"""The demo page: what it draws, and, where gradio, Playwright and Chromium are installed, how it behaves in a
browser (pip install -r requirements-demo.txt playwright; a `chromium` on the path)."""
import shutil
import subprocess
import sys
import threading
from pathlib import Path

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
    assert [value["done"] for value in shown[:-1]] == [0, 1 / 3, 2 / 3, 1] and "pictures" in shown[1]
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    features = pipeline.encode_subjects(torch.stack([read_picture(photo) for photo in photos]))
    people = [Subject(2, features[0]), Subject(5, features[1])]
    expected = pipeline.generate([VALUES[0]] * 2, [3, 3], [None, people], steps=3, guidance_scale=3.0)
    for image, wanted in zip(shown[-1]["pictures"], to_images(expected), strict=True):
        assert np.array_equal(image, wanted)
    settings = read_settings(Path(shown[-1]["file"]))
    assert settings["prompt"] == VALUES[0] and settings["seed"] == 3
    assert settings["subjects"] == ["woman=a-b-c-1-d.png", "man=bob.png"]
    assert not list(Path(shown[-1]["file"]).parent.glob("*.tmp"))


def test_previews_are_given_to_the_checker(studio, photos, monkeypatch):
    def never(image):
        raise ValueError("not this one")

    monkeypatch.setattr(studio.args, "checker", never)
    shown = studio.live(studio.draw, photos, *VALUES)
    assert "pictures" not in next(shown)
    with pytest.raises(ValueError, match="not this one"):
        next(shown)


def test_two_pictures_have_to_fit_into_a_batch(capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--width", "1024", "--height", "1032"])
    assert "the page draws two pictures at a time" in capsys.readouterr().err


def test_swap_and_morph_start_and_end_with_the_pictures(studio, photos):
    prior, mixed = map(np.array, drawn(studio, studio.draw, photos)["pictures"])
    strip = drawn(studio, studio.swap, photos)["strip"]
    assert [name for _, name in strip] == ["base", "first", "second"]
    assert np.abs(np.array(strip[0][0]) - prior.astype(int)).max() <= 1
    assert np.abs(np.array(strip[1][0]) - mixed.astype(int)).max() <= 1
    assert (np.array(strip[2][0]) != mixed).any()
    frames = drawn(studio, studio.morph, photos)["frames"]
    assert len(frames) == demo.FRAMES and demo.FRAMES % 2  # the slider starts in the middle
    for photo, frame in zip(photos, (frames[0], frames[-1]), strict=True):
        alone = np.array(drawn(studio, studio.draw, [photo])["pictures"][1], dtype=int)
        assert np.abs(np.array(frame) - alone).max() <= 1


def test_heat_map(studio, photos):
    assert demo.heat_map(None, "self-attention", 0, 1) == (None, "Draw a picture first.")
    result = drawn(studio, studio.draw, photos)
    image, said = demo.heat_map(result, "cross-attention", 15, 99)
    t, maps = result["sheet"].columns[-1]
    assert image.size == result["pictures"][1].size
    assert f"l = 15, t = {t}: the personalized expert gets {maps[15, 'cross'].mean():.2f} on average" in said
    assert "t = 999: the prior draws this step alone" in demo.heat_map(result, "self-attention", 0, 1)[1]
    said = demo.heat_map(result, "mean of all", 0, 1)[1]
    assert "mean over all layers and steps: dark 0." in said


def test_visitors_do_not_disturb_each_other(studio, photos):
    alone = [np.array(drawn(studio, studio.draw, [photo])["pictures"][1]).tolist() for photo in photos]
    found = {}

    def visit(k):
        found[k] = np.array(drawn(studio, studio.draw, [photos[k % 2]])["pictures"][1]).tolist()

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
    (("", 0, 3, 1.0), "nobody in the prompt"), (("a bike", 0, 3, 1.0), "nobody in the prompt"),
    (("a woman", -1, 3, 1.0), "--seed must be in"), (("a woman", 0, 0, 1.0), "--steps must be in"),
    (("a woman", 0, 3, 1.0), "more subjects than words")])
def test_refusals(studio, photos, values, said):
    with pytest.raises(ValueError, match=said) as refusal:
        drawn(studio, studio.draw, photos, *values)
    assert str(studio.folder) not in studio.clean(refusal.value)


def test_warnings_are_passed_on(studio, photos):
    said, = drawn(studio, studio.draw, photos[:1], "a woman and an elephant", 0, 3, 1.0)["warnings"]
    assert "do not know the words: an, elephant" in said


def test_without_gradio(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--weights", str(world)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install -r requirements-demo.txt" in error


def test_default_looks_can_be_drawn(studio):
    for looks in (demo.FIRST, demo.SECOND):
        assert read_picture(studio.portrait(*looks)).shape == (3, 128, 128)
    assert all(SHIPPED.parents[1].joinpath("examples", f"{name}.png").is_file()
               for names in demo.OTHERS.values() for name in names)


# --- in a browser ---


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    pytest.importorskip("gradio")
    process = subprocess.Popen([sys.executable, "-m", "apps.demo", "--port", "0", "--steps", "6"],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[1]
    finally:
        process.terminate()
        process.wait(30)


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


def wait(page) -> None:
    page.wait_for_function("document.querySelector('#status').innerText.trim() == 'Done.'", timeout=60_000)
    page.wait_for_timeout(300)


def source(page, name: str) -> str:
    """Of a picture; its address changes with its pixels."""
    return page.get_attribute(f"#{name} img", "src")


def test_a_visit(visit, tmp_path):
    page = visit()
    page.get_by_text("a man reading a book on a mountain").click()
    assert page.input_value("#prompt textarea") == "a man reading a book on a mountain"
    page.get_by_text("a woman standing on the beach").last.click()
    page.get_by_text("Design the first person").click()
    page.get_by_label("hair color").first.click()
    page.get_by_role("option", name="pink").click()
    page.wait_for_function("document.querySelector('.picture img').src.includes('fair-pink')")
    press(page, "#draw")
    wait(page)
    assert source(page, "prior") != source(page, "mixed")
    with page.expect_download() as download:
        page.get_by_text("Download, settings inside").click()
    download.value.save_as(tmp_path / "picture.png")
    settings = read_settings(tmp_path / "picture.png")
    assert settings["prompt"] == "a woman standing on the beach" and settings["steps"] == 6
    assert settings["subjects"] == ["woman=woman-fair-pink-short-yes-no-blue-plain-trousers-black.png"]

    before, heat = page.inner_text("#said"), source(page, "heat")
    page.get_by_role("slider", name="range slider for Transformer block l").fill("13")
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
    press(page, "#morph")
    wait(page)
    middle = source(page, "frame")
    page.get_by_role("slider", name="range slider for How much of the second").fill("1")
    page.wait_for_function(f"document.querySelector('#frame img').src != {middle!r}")


def test_uploads(visit, tmp_path):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    upload = page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "broken.png")
    page.get_by_text("broken.png cannot be used as a picture").wait_for()
    Image.new("RGB", (100, 400), "lightblue").save(tmp_path / "tall.png")
    upload.set_input_files(tmp_path / "tall.png")
    page.wait_for_function("document.querySelector('.portrait img').src.includes('tall.png')")
    portrait = page.locator(".portrait img").first.bounding_box()
    assert portrait["height"] == pytest.approx(portrait["width"], abs=1)
    upload.set_input_files(ROOT / "examples" / "mia.png")
    page.wait_for_timeout(1000)
    press(page, "#draw")
    wait(page)
    page.fill("#prompt textarea", "a house")
    page.click("#draw")
    page.get_by_text("nobody in the prompt").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


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
