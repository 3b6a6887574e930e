"""The apps from their flags to their files, with two tiny worlds of random weights and the shipped ones."""
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from apps import routing, swap, traverse, variations
from models.unet import UNet
from moa import record_routing, record_subject_attention
from images import labelled, pairwise_distance, read_picture
from pipeline import Pipeline, Subject
from subjects import bind_rows

ROOT = Path(sample.__file__).parent
APPS = {"swap": swap, "routing": routing, "variations": variations, "traverse": traverse}
PROMPT = "a woman on the beach"
PAIR = "a woman and a man on the beach"


@pytest.fixture
def place(place):
    """With a photo that the tiny world tells apart: noises look alike to it."""
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    Image.fromarray(np.dstack([np.tile(ramp, (40, 1)), np.zeros((40, 40), np.uint8),
                               np.tile(ramp[::-1, None], (1, 40))])).save("bob.png")
    return place


@pytest.fixture
def app(place, world, capsys):
    """Run an app; returns the lines of stdout."""
    def run(name, *flags, prompt=PROMPT, weights=world) -> list[str]:
        APPS[name].main(["--weights", str(weights), "--prompt", prompt, *map(str, flags)])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()
    return run


@pytest.fixture
def refuse(app, place, capsys):
    """Run an app that cannot work; returns its one line of complaint, seen that it left nothing."""
    def run(*arguments, **more) -> str:
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as stopped:
            app(*arguments, **more)
        err = capsys.readouterr().err
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
        assert stopped.value.code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err
        return err
    return run


@pytest.fixture
def drawn(place, world, capsys):
    """What sample.py draws: (H, W, 3)."""
    def run(*flags, prompt=PROMPT, weights=world) -> np.ndarray:
        sample.main(["--weights", str(weights), "--prompt", prompt, "--output", "sampled.png",
                     *map(str, flags)])
        capsys.readouterr()
        return pixels("sampled.png")
    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def settings(path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["moa"])


def tile(sheet: np.ndarray, row: int, column: int, top: int = 26, size: int = 64) -> np.ndarray:
    """A picture of a sheet whose heading is `top` pixels high."""
    y, x = top + 8 + row * (size + 26), 8 + column * (max(128, size) + 8)
    return sheet[y:y + size, x:x + size]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to rounding, and no plain areas."""
    return a.std() > 1 and np.abs(a - b).max() <= 1


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """By more than rounding; people are small differences in the tiny worlds."""
    return np.abs(a - b).max() >= 4


# Rows of people


def test_rows_of_several_people():
    (kept, swapped), = bind_rows(PAIR, ["ada.png"], ["woman=bob.png"])
    assert (kept.word, kept.files, swapped.word, swapped.files) == ("woman", ["bob.png"], "man", ["ada.png"])
    first, second = bind_rows(PAIR, ["ada.png+bob.png", "man=ada.png+woman=bob.png"])
    assert [one.word for one in first] == [one.word for one in second] == ["woman", "man"]  # as in the prompt
    assert [one.name for one in second] == ["bob.png", "ada.png"]


# swap.py


def test_swap_shows_the_pictures_of_sample(app, drawn):
    out = app("swap", "--subjects", "ada.png", "bob.png", "--seeds", 3, 8, "--output", "new/x.png")
    assert [line.split(":")[0] for line in out] == ["ada.png", "bob.png", "new/x.png"]
    sheet = pixels("new/x.png")
    for column, seed in enumerate((3, 8), 1):
        assert close(tile(sheet, 0, column), drawn("--prior-only", "--seed", seed))
        for row, name in enumerate(("ada.png", "bob.png"), 1):
            assert close(tile(sheet, row, column), drawn("--subject", name, "--seed", seed))
    assert differ(tile(sheet, 1, 1), tile(sheet, 2, 1))
    assert (tile(sheet, 0, 0) == 255).all() and tile(sheet, 1, 0).std() > 1
    found, alone = settings("new/x.png"), settings("sampled.png")
    assert found.pop("rows") == [["woman=ada.png"], ["woman=bob.png"]] and found.pop("seeds") == [3, 8]
    assert found == {**{k: v for k, v in alone.items() if k != "prior_only"}, "seed": 3,
                     "subjects": ["woman=ada.png", "woman=bob.png"]}
    assert os.listdir("new") == ["x.png"]


def test_swap_draws_common_steps_once_and_equal_rows_once(app, monkeypatch):
    rows, forward = [], UNet.forward

    def counted(self, x, *rest):
        rows.append(len(x))
        return forward(self, x, *rest)
    monkeypatch.setattr(UNet, "forward", counted)
    shutil.copy("ada.png", "copy.png")
    app("swap", "--subjects", "ada.png", "bob.png", "copy.png", "--seeds", 0, 1)
    # Two seeds, with and without the prompt. At t = 999 for everybody; then two people, and the prior.
    assert rows == [4, 8, 4, 8, 4]
    sheet = pixels("swap.png")
    for column in (1, 2):
        assert np.array_equal(tile(sheet, 1, column), tile(sheet, 3, column))
        assert differ(tile(sheet, 1, column), tile(sheet, 2, column))


def test_swap_one_or_both_of_two_people(app, drawn):
    app("swap", "--keep", "woman=bob.png", "--subjects", "ada.png", "man=bob.png", "--seeds", 4, prompt=PAIR)
    sheet = pixels("swap.png")
    for row, man in enumerate(("ada.png", "bob.png"), 1):
        assert close(tile(sheet, row, 1), drawn("--subject", "woman=bob.png", "--subject", f"man={man}",
                                                "--seed", 4, prompt=PAIR))
    assert differ(tile(sheet, 1, 1), tile(sheet, 2, 1))
    app("swap", "--subjects", "ada.png+bob.png", "--seeds", 4, "--output", "both.png", prompt=PAIR)
    assert settings("both.png")["rows"] == [["woman=ada.png", "man=bob.png"]]
    assert close(tile(pixels("both.png"), 1, 1),
                 drawn("--subject", "ada.png", "--subject", "bob.png", "--seed", 4, prompt=PAIR))


def test_swap_measures_inside_and_outside(capsys):
    """Routers that prefer the left half; changes of 51 of 255 there and of 255 elsewhere."""
    maps = torch.zeros(1, 4, 8)
    maps[..., :4] = 0.9
    other = np.zeros((16, 32, 3), np.uint8)
    other[:, :14], other[:, 18:] = 51, 255
    rows = [[Image.new("RGB", (32, 16))], [Image.fromarray(other)]]
    swap.print_changes(rows, ["who"], maps)
    # 16 of 32 columns are inside, of which 14 change by 0.2; of those outside 14 change by 1.
    assert capsys.readouterr().out == "who: changed 0.175 inside, 0.875 outside\n"


def test_swap_where_the_prior_draws_all(app):
    assert app("swap", "--subjects", "ada.png", "--seeds", 0, "--strength", 0) == ["swap.png"]
    sheet = pixels("swap.png")
    assert np.array_equal(tile(sheet, 0, 1), tile(sheet, 1, 1))


# routing.py


def test_routing_keeps_what_the_routers_and_the_subjects_tokens_got(app, world):
    flags = ["--subject", "woman=ada.png", "--subject", "man=bob.png", "--seed", 6]
    assert app("routing", *flags, "--output", "r.png", prompt=PAIR) == ["seed 6", "r.png", "r.json"]
    found = json.loads(Path("r.json").read_text())
    assert found["settings"] == settings("r.png") and found["timesteps"] == [999, 666, 333]
    names = ["woman 1", "man 2"]
    assert list(found["mean"]) == list(found["maps"]) == ["self", "cross", *names]
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    positions = [pipeline.models.tokenize.word_positions(PAIR, word)[0] for word in ("woman", "man")]
    people = [Subject(position, pipeline.encode_subjects(read_picture(name)[None])[0])
              for position, name in zip(positions, ("ada.png", "bob.png"), strict=True)]
    expected = {}
    with record_routing(pipeline.models.unet) as maps, record_subject_attention(
            pipeline.models.unet, torch.tensor([positions] * 2)) as attention:
        def watch(step, steps, t, x0):
            for (layer, kind), r in maps.items():
                expected[kind, layer, step - 1] = r[1, :, 1].clone()
            for layer, a in attention.items():
                for s, name in enumerate(names):
                    expected[name, layer, step - 1] = a[1, :, :, s].mean(0).clone()
            maps.clear()
            attention.clear()
        pipeline.generate([PAIR], [6], [people], steps=3, guidance_scale=3.0, progress=watch)
    assert len(expected) == 4 * 16 * 2
    for (kind, layer, column), weights in expected.items():
        assert found["mean"][kind][layer][column] == pytest.approx(float(weights.mean()), abs=2e-6)
        flat = torch.tensor(found["maps"][kind][layer][column])
        assert flat.shape[0] ** 2 == len(weights)
        assert (flat.flatten() - weights).abs().max() < 1e-4
    assert all(found[what][kind][layer][0] is None
               for what in ("mean", "maps") for kind in found["mean"] for layer in range(16))


# variations.py


def test_variations_are_pairs_of_one_seed(app, drawn):
    out = app("variations", "--subject", "ada.png", "--seed", 5, "--num", 3)
    assert [line.split(":")[0] for line in out] == ["seed 5", "pixels", "layout", "moved", "variations.png"]
    sheet = pixels("variations.png")
    for k in range(3):
        for column, flag in ((2 * k, ["--prior-only"]), (2 * k + 1, ["--subject", "ada.png"])):
            assert close(tile(sheet, 0, column, top=26 + 64 + 34), drawn("--seed", 5 + k, *flag))
    alone = app("variations", "--seed", 5, "--num", 3, "--output", "alone.png")
    assert alone[1] == out[1].split(", with")[0] and len(alone) == 4
    assert close(tile(pixels("alone.png"), 0, 2), drawn("--prior-only", "--seed", 7))


def test_scores_of_known_pictures(capsys):
    """Seeds that differ by 51 everywhere, with a subject by nothing, but for a fine chequerboard."""
    board = np.indices((16, 16)).sum(0) % 2 * 255
    plain = [Image.new("RGB", (16, 16), (value,) * 3) for value in (0, 51, 102)]
    same = [Image.fromarray(np.repeat((board if k else 255 - board)[..., None], 3, 2).astype(np.uint8))
            for k in range(2)] + [plain[0]]
    variations.print_diversity([plain, same])
    lines = capsys.readouterr().out.splitlines()
    # Pairs differ by 51, 102, 51; the boards by 255 in all, by half of it from black, in cells not at all.
    assert lines[0] == "pixels: base model 0.267, with the subject 0.667 (2.50 of it)"
    assert lines[1] == "layout: base model 0.267, with the subject 0.333 (1.25 of it)"
    assert lines[2] == "moved: 0.400"  # from 0, 0.2 and 0.4 to 0.5, 0.5 and 0
    assert pairwise_distance(torch.tensor([0.0, 1, 3])[:, None, None, None].expand(3, 3, 2, 2)) == 2


# traverse.py


def test_traverse_ends_in_the_pictures_of_the_seeds(app, drawn):
    out = app("traverse", "--subjects", "ada.png", "bob.png", "--seeds", 4, 9, "--frames", 3,
              "--animation", "walk.png")
    assert out == ["traverse.png", "walk.png"]
    sheet = pixels("traverse.png")
    for row, flag in enumerate((["--prior-only"], ["--subject", "ada.png"])):
        for column, seed in ((1, 4), (3, 9)):
            assert close(tile(sheet, row, column), drawn("--seed", seed, *flag))
        middle = tile(sheet, row, 2)
        assert differ(middle, tile(sheet, row, 1)) and differ(middle, tile(sheet, row, 3))
    assert settings("traverse.png")["seeds"] == [4, 9] and settings("traverse.png")["frames"] == 3
    with Image.open("walk.png") as animation:
        assert animation.n_frames == 3
        for k in range(3):
            animation.seek(k)
            names = ["the base model", "ada.png", "bob.png"]
            images = [Image.fromarray(tile(sheet, row, k + 1).astype(np.uint8)) for row in range(3)]
            frame = labelled(list(zip(images, names, strict=True)), 3)
            assert np.array_equal(np.array(animation.convert("RGB")), np.array(frame))


# All of them


def test_another_size_of_weights(app, wide_world):
    app("routing", "--subject", "ada.png", "--seed", 0, "--height", 64, weights=wide_world)
    assert settings("routing.png")["weights"] == "wide" and settings("routing.png")["width"] == 40
    assert np.array(json.loads(Path("routing.json").read_text())["maps"]["cross"][0][1]).shape == (16, 10)


REFUSED = [
    (["swap", "--subjects", "ada.png", "--seeds", "-1"], "--seeds must be in 0"),
    (["swap", "--subjects", "man=ada.png"], "subject man=ada.png: there is no 'man' in the prompt"),
    (["swap", "--subjects", "ada.png+bob.png"], "more subjects than words"),
    (["swap", "--subjects", "ada.png+"], "the name of a file is empty"),
    (["swap", "--subjects", "ada.png", "--output", "x.jpg"], "name ends in .png"),
    (["swap", "--subjects", "notes.png"], "cannot be used as a picture"),
    (["traverse", "--subjects", "ada.png", "--seeds", "1"], "--seeds must be two"),
    (["traverse", "--subjects", "ada.png", "--frames", "1"], "--frames must be in 2..200, not 1"),
    (["traverse", "--subjects", "ada.png", "--animation", "x.mp4"], "name ends in .gif or .png"),
    (["traverse", "--subjects", "ada.png", "--animation", "ada.png"], "would be replaced"),
    (["variations", "--num", "1"], "--num must be at least 2, not 1"),
    (["routing", "--subject", "ada.png", "--output", "notes.png", "--subject", "notes.png"], "more subjects"),
    (["routing", "--subject", "ada.png", "--prompt", " "], "--prompt is empty")]


@pytest.mark.parametrize("arguments, words", REFUSED, ids=lambda value: " ".join(value)[:60])
def test_refuses(refuse, place, arguments, words):
    (place / "notes.png").write_text("no picture")
    assert words in refuse(*arguments)


# paper.sh

TABLE_2 = [
    "a man and a man in the style of Van Gogh painting", "a man and a man sitting on a sofa",
    "a man and a man reading a book",
    "a man and a man in Paris, shaking hands, with the Eiffel Tower in the background",
    "a man and a man standing on a mountain", "a man and a man running in a park",
    "a man and a man in a lavender farm", "a man in a laboratory", "a man riding a bike",
    "a portrait photo of a man dressed as a cowboy in the wild west, in front of a saloon, very high "
    "quality, professional photo, beautiful lighting, 8k",
    "a close up portrait photo of a man dressed in a space suit without helmet, on Mars, in front of "
    "spaceship, beautiful starry sky, very high quality, professional photo, beautiful lighting, 8k",
    "a portrait photo of a man as a race car driver, very high quality, professional photo, beautiful "
    "lighting, 8k"]


@pytest.fixture
def paper(place):
    """Run paper.sh with a `python` that only notes what it should do; returns the commands."""
    (place / "bin").mkdir()
    noted = place / "bin" / "python"
    noted.write_text('#!/bin/bash\n{ printf "%q " "$@"; echo; } >> "$NOTES"\n')
    noted.chmod(0o755)

    def run(*arguments, **environment) -> list[list[str]]:
        found = subprocess.run(
            [ROOT / "apps" / "paper.sh", *arguments], capture_output=True, text=True, check=True,
            env={**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "NOTES": place / "notes",
                 **environment})
        assert found.stderr == ""
        return [shlex.split(line) for line in (place / "notes").read_text().splitlines()]
    return run


def test_paper(paper, capsys):
    """With Stable Diffusion's weights the paper's prompts; without them the small world's, all of which its
    parsers and its vocabulary know."""
    own = {"WEIGHTS": "my weights/sd15", "MEN": "1.jpg 2.jpg 3.jpg", "WOMEN": "4.jpg 5.jpg"}
    for environment in (own, {}):
        commands = paper("out", "--steps", "2", **environment)
        lines = [json.loads(line) for line in Path("out/table2.jsonl").read_text().splitlines()]
        figures = {Path(words[words.index("--output") + 1]).stem for words in commands}
        assert figures == {"table2", "fig3", "fig6a", "fig6b", "fig7a", "fig7b", "fig9a", "fig9b", "fig10",
                           "fig17a", "fig17b", "fig17c", "fig18", "fig19", "fig20"}
        parsed = [(sample if words[0] != "-m" else APPS[words[1].removeprefix("apps.")]).parse_args(
            words[1 + (words[0] == "-m"):]) for words in commands]
        if environment:
            assert all(args.weights == Path("my weights/sd15") for args in parsed)
            assert [line["prompt"] for line in lines] == TABLE_2
            assert [len(line["subjects"]) for line in lines] == [2] * 7 + [1] * 5
        else:
            tokenize = Pipeline.load(sample.SHIPPED).models.tokenize
            prompts = [*(line["prompt"] for line in lines), *(args.prompt for args in parsed if args.prompt)]
            assert tokenize.complaint(" ".join(prompts)) is None
        Path("notes").unlink()


@pytest.mark.parametrize("arguments, environment", [
    ([], {}), (["out"], {"MEN": "a.png"}), (["/proc/out"], {})])
def test_paper_refuses(place, arguments, environment):
    found = subprocess.run([ROOT / "apps" / "paper.sh", *arguments], capture_output=True, text=True,
                           env={**os.environ, **environment})
    assert found.returncode == 2 and found.stderr.startswith("error: ") and found.stdout == ""
