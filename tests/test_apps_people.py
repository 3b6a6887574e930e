"""The apps about people: morph, timelapse, story, edit; with a tiny world and with the shipped weights."""
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import images
import sample
import subjects
from pipeline import Pipeline, Subject, interpolate
from samplers import invert_ddim, sample_ddim

ROOT = Path(__file__).parents[1]
APPS = ("morph", "timelapse", "story", "edit")
PROMPT = "a woman on the beach"
COUPLE = "a woman and a man"
# Flags with which each works, but for --output.
FLAGS = {"morph": ["--prompt", PROMPT, "--subjects", "ada.png", "bob.png", "--frames", "3"],
         "timelapse": ["--prompt", PROMPT, "--subject", "ada.png", "--words", "woman", "man",
                       "--frames", "3"],
         "story": ["story.json"],
         "edit": ["--image", "couple.png", "--source-prompt", COUPLE, "--keep", "1", "--mask", "mask.png",
                  "--subject", "2=ada.png"]}
STORY = {"characters": {"Ada": {"word": "a woman", "photos": ["ada.png"]},
                        "Bob": {"word": "old man", "photos": ["bob.png", "ada.png"]}},
         "scenes": [{"prompt": "{Ada} and a {Bob} on the beach"}, {"prompt": "{Ada} riding a bike"},
                    {"prompt": "the beach", "seed": 77}]}


@pytest.fixture
def draw(place, world, capsys):
    """Run an app, or sample.py, in a folder with photos, a picture of two people and a story; returns the
    lines of stdout and of stderr."""
    Image.new("RGB", (40, 40), (250, 30, 10)).save("ada.png")
    Image.linear_gradient("L").convert("RGB").save("bob.png")
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)).save("couple.png")
    mask = np.zeros((48, 96), np.uint8)
    mask[10:40, 5:20], mask[8:44, 50:70] = 2, 1
    Image.fromarray(mask).save("mask.png")
    Path("story.json").write_text(json.dumps(STORY))

    def run(app, *flags, weights=world):
        main = sample.main if app == "sample" else importlib.import_module(f"apps.{app}").main
        seed = [] if app == "edit" else ["--seed", "5"]
        main(["--weights", str(weights), *seed, *map(str, flags)])
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()
    return run


@pytest.fixture
def refuse(draw, place, capsys):
    """Run a command that cannot work; returns its one line of complaint, seen that it left nothing."""
    def run(*flags) -> str:
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        with pytest.raises(SystemExit) as stopped:
            draw(*flags)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
        assert len(err.splitlines()) == 1 and err.startswith("error: ") and len(err) < 600, err
        return err
    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.array(image).astype(int)


def change(path, other) -> float:
    """The largest difference of two pictures."""
    return np.abs(pixels(path) - pixels(other)).max()


def settings(path) -> dict:
    with Image.open(path) as image:
        assert image.text["parameters"]
        return json.loads(image.text["moa"])


# What they draw


def test_morph_goes_through_the_features_between(draw, world):
    """The middle is not a blend of pictures: it is drawn with the mean feature."""
    draw("morph", *FLAGS["morph"], "--output", "m")
    draw("sample", "--prompt", PROMPT, "--subject", "ada.png,bob.png", "--output", "mean.png")
    assert change("m/001.png", "mean.png") <= 1
    a, b = torch.randn(2, 16)
    line, arc = interpolate(a, b, 5), interpolate(a, b, 5, spherical=True)
    assert torch.equal(line[[0, 4]], torch.stack([a, b])) and torch.equal(arc[[0, 4]], torch.stack([a, b]))
    assert torch.allclose(line[1], 0.75 * a + 0.25 * b, atol=1e-6) and not torch.allclose(line[1], arc[1])


def test_timelapse_moves_prior_and_subject_token(world):
    """Either alone changes the picture: text states without a subject, and the token fused from them."""
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    text = interpolate(*pipeline.encode_text([PROMPT, "a man on the beach"]), 3)
    person = [Subject(2, torch.randn(16))]
    context = pipeline.context_at(text, [person] * 3)(torch.full((3,), 500))
    fused = (context.personalized - context.prior)[:, :, 2]  # (L, B, C), what the photo adds
    assert (fused[:, 1] - fused[:, 0]).abs().max() > 1e-3 < (fused[:, 2] - fused[:, 1]).abs().max()
    prior = pipeline.generate(text, [5] * 3, steps=2, prior_only=True)
    assert (prior[1] - prior[0]).abs().max() > 1e-3 < (prior[2] - prior[1]).abs().max()
    drawn = pipeline.generate(text, [5] * 3, [person] * 3, steps=2)
    assert torch.allclose(drawn[:1], pipeline.generate([PROMPT], [5], [person], steps=2), atol=1e-3)


def test_timelapse_finds_either_word(draw):
    flags = ["--subject", "ada.png", "--frames", 2, "--output"]
    draw("timelapse", "--prompt", "a woman and a girl", "--words", "girl", "man", *flags, "a")
    draw("timelapse", "--prompt", "a woman and a man", "--words", "girl", "man", *flags, "b")
    assert all(change(f"a/00{k}.png", f"b/00{k}.png") == 0 for k in range(2))


def test_story_draws_what_sample_draws(draw):
    out, err = draw("story", "story.json", "--output", "s/t")
    assert out == ["seed 5", "s/t/000.png", "s/t/001.png", "s/t/002.png", "s/t/sheet.png"] and err == []
    scenes = [("a woman and a old man on the beach", 5, ["a woman=ada.png", "old man=bob.png,ada.png"]),
              ("a woman riding a bike", 6, ["a woman=ada.png"]), ("the beach", 77, [])]
    for k, (prompt, seed, named) in enumerate(scenes):
        flags = [flag for subject in named for flag in ("--subject", subject)]
        draw("sample", "--prompt", prompt, *flags, "--output", "x.png", "--seed", seed)
        assert change(f"s/t/00{k}.png", "x.png") <= 1
        found = settings(f"s/t/00{k}.png")
        assert (found["prompt"], found["seed"], found["subjects"]) == (prompt, seed, named)
    assert settings("s/t/sheet.png")["prompt"].splitlines() == [prompt for prompt, _, _ in scenes]


def by_hand(world, keep, box, steps=3, guidance_scale=1.0, iterations=3, negative=""):
    """The round trip and the edit of couple.png, from the parts: a box of the first person, bob.png."""
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    picture, bob = images.read_picture("couple.png"), images.read_picture("bob.png")
    cut = subjects.on_noise(subjects.cut_person(picture, subjects.box_mask(",".join(map(str, box)), picture)))
    photos = (cut, bob) if keep == 1 else (bob, cut)
    features = [pipeline.encode_subjects(photo[None])[0] for photo in photos]
    people = [Subject(*pair) for pair in zip((2, 5), features, strict=True)]
    square = Image.open("couple.png").resize((128, 64), Image.Resampling.BICUBIC).crop((32, 0, 96, 64))
    latents = pipeline.encode(images.to_picture(np.array(square)[None]))
    text, null = pipeline.encode_text([COUPLE, negative]).split(1)
    prior = pipeline.denoiser(text, [[]], prior_only=True)
    noise = invert_ddim(prior, latents, steps, iterations)
    edited = pipeline.sample(noise, text, null, [people], steps=steps, guidance_scale=guidance_scale,
                             sampler="ddim")
    both = torch.cat([sample_ddim(prior, noise, steps), edited])
    return [np.array(image).astype(int) for image in images.to_images(pipeline.decode(both))]


def test_edit_without_moa_is_the_round_trip(draw):
    """Where the prior draws every step, the edit is the round trip; guidance from the source prompt to the
    source prompt changes nothing."""
    for flags in ([], ["--inversion", "negative-prompt", "--guidance-scale", 5]):
        draw("edit", *FLAGS["edit"], "--prior-above", 0, "--output", "e", *flags)
        assert change("e/001.png", "e/002.png") <= 1
    draw("edit", *FLAGS["edit"], "--prior-above", 0, "--guidance-scale", 5, "--output", "e")
    assert change("e/001.png", "e/002.png") > 5


def test_people_are_counted_from_the_left(draw):
    """By mask and by box; a lone box is the kept person's, whoever that is."""
    picture = images.read_picture("couple.png")
    left, right = (subjects.cut_person(picture, subjects.box_mask(box, picture))
                   for box in ("5,10,20,40", "50,8,70,44"))

    def cut(keep: list[int], *boxes: str) -> list[torch.Tensor]:
        found = subjects.cut_people(picture, keep, None if boxes else Path("mask.png"), boxes)
        return [photo for photo, in found]
    for found, expected in ((cut([1]), left), (cut([1], "50,8,70,44", "5,10,20,40"), left),
                            (cut([2], "50,8,70,44"), right), (cut([2]), right)):
        assert torch.equal(found[0], expected)


def test_a_cut_person_stands_on_noise_or_on_grey():
    picture, mask = torch.rand(3, 20, 30), torch.zeros(20, 30, dtype=torch.bool)
    mask[4:14, 6:9] = True
    mask[5, 7] = False
    person = subjects.cut_person(picture, mask)
    assert torch.equal(person[:3], picture[:, 4:14, 6:9]) and person.shape == (4, 10, 3)
    noise, grey, there = subjects.on_noise(person), subjects.on_grey(person), mask[4:14, 6:9]
    assert noise.shape == (3, 10, 3) and (noise - picture[:, 4:14, 6:9])[:, there].abs().max() < 1 / 255
    assert grey.shape == (3, 11, 11) and torch.equal(grey[:, 2:10, 4:7], picture[:, 6:14, 6:9])
    assert bool((grey[:, 1, 5] == 0.85).all()) and bool((grey[:, :, :4] == 0.85).all())


def test_a_picture_is_scaled_and_cut_around_its_middle():
    picture = torch.zeros(3, 32, 96)
    picture[:, :, 32:64] = 1
    fitted = images.fit(picture, (64, 64))
    assert fitted.shape == (1, 3, 64, 64) and fitted[..., 1:-1].min() > 0.9
    assert images.fit(picture, (16, 48)).shape == (1, 3, 16, 48)


@pytest.mark.parametrize("flags", [[], ["--interpolation", "spherical"]], ids=str)
def test_morph_begins_and_ends_with_what_sample_draws(draw, flags):
    out, err = draw("morph", *FLAGS["morph"], *flags, "--output", "m", "--animation", "a/m.png")
    assert out == ["seed 5", "m/000.png", "m/001.png", "m/002.png", "m/sheet.png", "a/m.png"] and err == []
    for frame, name in (("m/000.png", "ada"), ("m/002.png", "bob")):
        draw("sample", "--prompt", PROMPT, "--subject", f"{name}.png", "--output", "drawn.png")
        assert change(frame, "drawn.png") <= 1 and change(frame, "m/001.png") > 4
    with Image.open("a/m.png") as image:
        assert image.n_frames == 3
        for k in range(3):
            image.seek(k)
            assert np.array_equal(np.array(image.convert("RGB")), pixels(f"m/00{k}.png"))
    assert [settings(f"m/00{k}.png")["amount"] for k in range(3)] == [0, 0.5, 1]
    assert settings("m/sheet.png")["subjects"] == ["woman=ada.png", "woman=bob.png"]


def test_timelapse_begins_and_ends_with_what_sample_draws(draw):
    out, err = draw("timelapse", *FLAGS["timelapse"], "--output", "t", "--clip-skip", 2)
    assert out == ["seed 5", "t/000.png", "t/001.png", "t/002.png", "t/sheet.png"] and err == []
    for frame, word in (("t/000.png", "woman"), ("t/002.png", "man")):
        draw("sample", "--prompt", f"a {word} on the beach", "--subject", "ada.png", "--output", "x.png",
             "--clip-skip", 2)
        assert change(frame, "x.png") <= 1 and change(frame, "t/001.png") > 2
    assert settings("t/001.png")["words"] == ["woman", "man"] and settings("t/001.png")["amount"] == 0.5


@pytest.mark.parametrize("keep, box, flags, more", [
    (2, (50, 8, 70, 44), [], {}),
    (1, (5, 10, 20, 40), ["--inversion", "negative-prompt", "--guidance-scale", 2, "--steps", 5],
     {"iterations": 0, "negative": COUPLE, "guidance_scale": 2.0, "steps": 5})],
    ids=lambda value: str(value)[:30])
def test_edit_is_inversion_then_moa(draw, world, keep, box, flags, more):
    out, err = draw("edit", "--image", "couple.png", "--source-prompt", COUPLE, "--keep", keep, "--box",
                    ",".join(map(str, box)), "--subject", f"{3 - keep}=bob.png", "--output", "e", *flags)
    assert out[1:] == ["e/000.png", "e/001.png", "e/002.png", "e/sheet.png"] and err == []
    round_trip, edited = by_hand(world, keep, box, **more)
    assert np.abs(pixels("e/001.png") - round_trip).max() <= 2
    assert np.abs(pixels("e/002.png") - edited).max() <= 2 < np.abs(edited - round_trip).max()
    words = ["woman=couple.png", "man=bob.png"] if keep == 1 else ["man=couple.png", "woman=bob.png"]
    assert settings("e/002.png")["subjects"] == words and settings("e/002.png")["sampler"] == "ddim"


# What they refuse


BOX = ["edit", "--image", "couple.png", "--source-prompt", COUPLE, "--subject", "2=bob.png"]


@pytest.mark.parametrize("flags, words", [
    (["morph", "--frames", "1"], "--frames must be in 2..200, not 1"),
    (["morph", "--subjects", "ada.png", "missing.png"], "missing.png does not exist"),
    (["morph", "--subjects", "beach=ada.png", "bob.png"], "both must stand for one word"),
    (["morph", "--output", "x.jpg"], "saved as .png"),
    (["morph", "--animation", "m.mp4"], "--animation m.mp4 must be a file whose name ends in .gif or .png"),
    (["morph", "--animation", "morph.png"], "morph.png is --output's file"),
    (["timelapse", "--words", "man", "girl"], "--words man girl: neither is in the prompt"),
    (["timelapse", "--words", "woman", "lady"], "do not know the words: lady"),
    (["timelapse", "--words", "woman", "old man"], "'old man' is 2 tokens"),
    (["story", "--output", "ada.png"], "would be replaced"),
    (["edit", "--source-prompt", ""], "--source-prompt is empty"),
    (["edit", "--inversion", "negative-prompt", "--negative-prompt", "x"], "leave one of them out"),
    (["edit", "--keep", "3"], "no word is free for number 3"),
    (["edit", "--mask", "ada.png"], "ada.png has 40 x 40 pixels, the picture 96 x 48"),
    (["edit", "--mask", "couple.png"], "colours besides black"),
    (["edit", "--output", "mask.png"], "would be replaced")], ids=lambda value: " ".join(value)[:60])
def test_refuse(refuse, draw, flags, words):
    assert words in refuse(flags[0], *FLAGS[flags[0]], *flags[1:])


@pytest.mark.parametrize("flags, words", [
    (["--keep", "1"], "--keep and --mask or --box go together"),
    (["--keep", "1", "--box", "0,0,9"], "give four whole numbers"),
    (["--keep", "1", "--box", "0,0,97,48"], "must be an area inside the picture's 96 x 48 pixels")], ids=str)
def test_edit_refuses_areas(refuse, flags, words):
    assert words in refuse(*BOX, *flags)


@pytest.mark.parametrize("change, words", [
    ("{", "not valid JSON"), ({"scenes": []}, "'scenes' must be a list that is not empty"),
    ({"characters": {"Ada": {"word": "woman"}}}, "character 'Ada': an object with word, photos is needed"),
    ({"title": "Ada"}, "an object with characters, scenes is needed"),
    ({"scenes": [{"prompt": "a"}, {"prompt": "a", "steps": 3}]},
     "story.json: scene 1: an object with prompt and, if you like, seed is needed"),
    ({"scenes": [{"prompt": "{Eve}"}]}, "scene 0: there is no character 'Eve'"),
    ({"scenes": [{"prompt": "a", "seed": -1}]}, "seed must be in")],
    ids=lambda value: str(value)[:40])
def test_story_refuses(refuse, draw, change, words):
    Path("story.json").write_text(change if isinstance(change, str) else json.dumps({**STORY, **change}))
    assert words in refuse("story", "story.json")


def test_nan_leaves_nothing(refuse, monkeypatch):
    monkeypatch.setattr(Pipeline, "decode", lambda self, x: torch.full((len(x), 3, 64, 64), torch.nan))
    assert "NaN" in refuse("edit", *FLAGS["edit"], "--output", "new/folder")


def test_apps_are_short():
    assert all(len((ROOT / "apps" / f"{app}.py").read_text().splitlines()) < 100 for app in APPS)


# With the shipped weights


def page_commands() -> list[list[str]]:
    """App and arguments of docs/apps.md's commands for the apps about people."""
    text = (ROOT / "docs" / "apps.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    starts = tuple(f"python -m apps.{app} " for app in APPS)
    return [shlex.split(line)[2:] for line in lines if line.startswith(starts)]


def test_page_has_every_app():
    assert {command[0].removeprefix("apps.") for command in page_commands()} == set(APPS)


@pytest.mark.parametrize("command", page_commands(), ids=lambda command: command[0])
def test_page_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    importlib.import_module(command[0]).main([*command[1:], "--steps", "2"])
    assert list(tmp_path.rglob("*.png"))


def test_round_trip_of_a_real_picture(tmp_path, capsys):
    """Measured: 63.4 dB to the VAE's reconstruction."""
    examples, edit = ROOT / "examples", importlib.import_module("apps.edit")
    edit.main(["--image", str(examples / "couple.png"), "--mask", str(examples / "couple_mask.png"),
               "--source-prompt", "a person and a person", "--keep", "1", "--subject",
               f"2={examples / 'zoe.png'}", "--output", str(tmp_path / "e")])
    vae, picture = map(float, re.findall(r"([\d.]+) dB", capsys.readouterr().out))
    assert vae > 50 and picture > 24
    changed = np.abs(pixels(tmp_path / "e" / "002.png") - pixels(tmp_path / "e" / "001.png")).mean(-1)
    swapped, edge = changed[20:, 66:120].mean(), changed[:, :16].mean()
    assert swapped > 2 * edge, (swapped, edge)
