"""sample.py from its flags to its files, with a tiny world of random weights."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pipeline
import sample
from moa import MultimodalPrompt, PromptConfig, add_moa, save_moa
from models.device import pick_device
from models.load import read_config, write_json
from models.unet import UNet, UNetConfig
from images import read_picture, to_images
from pipeline import Pipeline, Subject
from subjects import bind_subjects, split_subject

SCRIPT = Path(sample.__file__)
PROMPT = "a woman on the beach"


@pytest.fixture
def draw(place, world, capsys):
    """Run the command; returns the lines of stdout and of stderr."""
    def run(*flags, prompt=PROMPT, weights=world):
        seed = [] if "--seed" in flags else ["--seed", "5"]
        sample.main(["--weights", str(weights), "--prompt", prompt, *seed, *map(str, flags)])
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()
    return run


@pytest.fixture
def refuse(draw, place, capsys):
    """Run a command that cannot work; returns its one line of complaint, seen that it left nothing."""
    def run(*flags, **more) -> str:
        before = sorted(place.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            draw(*flags, **more)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and sorted(place.rglob("*")) == before
        assert len(err.splitlines()) == 1 and err.startswith("error: ") and len(err) < 600, err
        return err
    return run


@pytest.fixture
def other_world(world, tmp_path):
    """A copy of the weights to be broken."""
    return Path(shutil.copytree(world, tmp_path / "other"))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.array(image).astype(int)


def settings(path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["moa"])


# What it draws


def test_image_k_of_many_is_seed_plus_k_alone(draw, monkeypatch):
    monkeypatch.setattr(sample, "BATCH", 2)  # so that three take two batches
    out, _ = draw("--subject", "ada.png", "--num", 3, "--output", "many.png")
    assert out == ["seed 5", *(f"many/{name}.png" for name in ("000", "001", "002", "sheet"))]
    for k in range(3):
        draw("--subject", "ada.png", "--seed", 5 + k, "--output", "one.png")
        assert np.abs(pixels("one.png") - pixels(f"many/00{k}.png")).max() <= 1
        assert settings(f"many/00{k}.png") == settings("one.png")
    assert np.abs(pixels("many/000.png") - pixels("many/001.png")).mean() > 1


def test_several_pictures_of_one_person_are_one_with_their_mean_feature(draw, world):
    draw("--subject", "woman=ada.png,bob.png", "--output", "both.png")
    assert settings("both.png")["subjects"] == ["woman=ada.png,bob.png"]
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    photos = [read_picture(name)[None] for name in ("ada.png", "bob.png")]
    feature = sum(pipeline.encode_subjects(photo)[0] for photo in photos) / 2
    position, = pipeline.models.tokenize.word_positions(PROMPT, "woman")
    expected = to_images(pipeline.generate([PROMPT], [5], [[Subject(position, feature)]], steps=3,
                                           guidance_scale=3.0))[0]
    assert np.abs(pixels("both.png") - np.array(expected).astype(int)).max() <= 1
    draw("--subject", "ada.png", "--output", "ada_alone.png")
    assert np.abs(pixels("both.png") - pixels("ada_alone.png")).mean() > 0.1
    draw("--subject", "ada.png,ada.png", "--output", "twice.png")
    assert np.abs(pixels("twice.png") - pixels("ada_alone.png")).max() <= 1


def test_a_photo_that_is_not_square_is_seen_whole(world):
    """With black borders, as references are in training."""
    pipeline, photo = Pipeline.load(world, world / "moa.safetensors"), torch.rand(1, 3, 40, 21)
    for image in (photo, photo.mT):
        squared = torch.zeros(1, 3, 40, 40)
        top, left = (40 - image.shape[2]) // 2, (40 - image.shape[3]) // 2
        squared[:, :, top:top + image.shape[2], left:left + image.shape[3]] = image
        feature = pipeline.encode_subjects(image)
        assert torch.equal(feature, pipeline.encode_subjects(squared))
        image[:, :, 0] = 1 - image[:, :, 0]
        assert not torch.equal(feature, pipeline.encode_subjects(image))


def test_strength(draw):
    draw("--prior-only", "--output", "prior.png")
    for strength in (0, 0.5, 1):
        draw("--subject", "ada.png", "--strength", strength, "--output", f"{strength}.png")
    draw("--subject", "ada.png", "--output", "plain.png")
    assert np.array_equal(pixels("0.png"), pixels("prior.png"))
    assert np.array_equal(pixels("1.png"), pixels("plain.png"))
    half, whole = (np.abs(pixels(name) - pixels("prior.png")).mean() for name in ("0.5.png", "1.png"))
    assert 0.5 < half < whole


def test_a_picture_that_is_not_ours_is_not_replaced(refuse, draw, place):
    assert "not drawn by these commands" in refuse("--prior-only", "--output", "bob.png")
    draw("--prior-only", "--output", "ours.png")
    draw("--prior-only", "--output", "ours.png")


def test_reused_self_attention(draw, refuse):
    """Another picture, and one that can be drawn again; not together with sparse routing."""
    for name, *flags in (("dense.png",), ("a.png", "--reuse"), ("b.png", "--reuse")):
        draw("--subject", "ada.png", *flags, "--output", name)
    assert (pixels("a.png") != pixels("dense.png")).any() and (pixels("a.png") == pixels("b.png")).all()
    assert "give one of them" in refuse("--subject", "ada.png", "--reuse", "--sparse", 0.1)


def test_sparse_routing(draw):
    """From the picture with a person to the prior's, the more is left to the prior."""
    draw("--prior-only", "--output", "prior.png")
    draw("--subject", "ada.png", "--output", "dense.png")
    changes = []
    for weight in (1e-6, 0.5, 1):
        draw("--subject", "ada.png", "--sparse", weight, "--output", "sparse.png")
        changes.append([np.abs(pixels("sparse.png") - pixels(name)).mean()
                        for name in ("dense.png", "prior.png")])
    (nothing, _), (some, left), (_, all_prior) = changes
    assert nothing < 0.1 and some > 1 and left > 1 and all_prior == 0


def test_steps_of_the_prior_are_computed_once_for_all_people(world, monkeypatch):
    """And the pictures are those that each person gets alone."""
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    position, = pipeline.models.tokenize.word_positions(PROMPT, "woman")
    people = [[Subject(position, feature)] for feature in torch.randn(3, 16)]
    sizes = []
    hook = pipeline.models.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    together = pipeline.generate([PROMPT] * 3, [5] * 3, people, steps=4)
    hook.remove()
    assert sizes == [2, 6, 6, 6]  # twice, for guidance; the first timestep is 999
    for picture, person in zip(together, people, strict=True):
        alone, = pipeline.generate([PROMPT], [5], [person], steps=4)
        assert (picture - alone).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().mean() > 1e-2


def test_prior_only_is_the_base_model(draw, other_world):
    draw("--subject", "ada.png", "--prior-only", "--output", "prior.png")
    (other_world / "moa.safetensors").unlink()
    draw("--output", "base.png", weights=other_world)
    assert np.array_equal(pixels("prior.png"), pixels("base.png"))
    assert settings("prior.png")["moa"] is None


def test_subjects_words_and_their_order_matter(draw):
    def picture(*subjects):
        flags = [flag for subject in subjects for flag in ("--subject", subject)]
        draw("--output", "x.png", *flags, prompt="a woman and a man and a woman")
        return settings("x.png")["subjects"], pixels("x.png")
    named, first = picture("man=bob.png", "ada.png")
    assert named == ["man=bob.png", "woman=ada.png"]
    assert np.array_equal(first, picture("ada.png", "bob.png")[1])  # in prompt order
    assert not np.array_equal(first, picture("bob.png", "ada.png")[1])


def test_binding_to_words():
    def bind(prompt, *subjects):
        return [(place.word, place.end, *place.files) for place in bind_subjects(prompt, subjects)]
    assert bind("A Woman, a MAN", "a", "b") == [("woman", 7, "a"), ("man", 14, "b")]
    assert bind("a woman and a man", "man=a") == [("man", 17, "a")]  # not the one in "woman"
    assert bind("a man, a woman, a man", "a", "man=b", "c") == [
        ("woman", 14, "a"), ("man", 5, "b"), ("man", 21, "c")]
    assert bind("the old man and a man", "old man=a", "b") == [("old man", 11, "a"), ("man", 21, "b")]
    assert bind("a cat (man's) in w.x", "w.x=a", "b") == [("w.x", 20, "a"), ("man", 10, "b")]
    assert bind("a man, a boy and a man", "3=c", "a") == [("man", 22, "c"), ("man", 5, "a")]
    assert bind("a man", "some/a=b.png") == [("man", 5, "some/a=b.png")]
    assert bind("a man", "man=a,b") == [("man", 5, "a", "b")]


# What it warns of


# What it refuses


def test_refuses_moa_of_other_models(refuse, other_world):
    unet = UNet(UNetConfig(channels=(8, 16, 16, 16), heads=2, context_dim=16, groups=4))
    prompt = MultimodalPrompt(PromptConfig(text_dim=16, image_dim=24, hidden=8, layers=16))
    save_moa(add_moa(unet), prompt, other_world / "wide.safetensors")
    assert "other models" in refuse("--moa", other_world / "wide.safetensors")
    unet = UNet(replace(unet.cfg, channels=(16, 16, 16, 16)))
    save_moa(add_moa(unet), prompt, other_world / "wide.safetensors")
    assert "does not fit" in refuse("--moa", other_world / "wide.safetensors")


@pytest.mark.parametrize("part, value, cause", [
    ("unet", torch.nan, "the UNet's latents of step 1 of 3"),
    ("text_encoder", torch.nan, "the UNet's latents of step 1 of 3"),
    ("vae", torch.inf, "what the VAE makes of finite latents")])
def test_nan_is_an_error_and_no_picture(refuse, other_world, part, value, cause):
    file = other_world / f"{part}.safetensors"
    state = load_file(file)
    name = {"unet": "conv_out.bias", "vae": "decoder.conv_out.bias"}.get(part, sorted(state)[-1])
    save_file({**state, name: torch.full_like(state[name], value)}, file)
    assert f"{cause} came out as NaN" in refuse("--subject", "ada.png", weights=other_world)


def test_pictures_are_decoded_a_few_at_a_time(world, monkeypatch):
    drawing, latents = Pipeline.load(world), torch.randn(5, 4, 8, 8)
    whole, seen, decode = drawing.decode(latents), [], drawing.models.vae.decode
    monkeypatch.setattr(pipeline, "DECODED", 2 * 64)
    monkeypatch.setattr(drawing.models.vae, "decode", lambda z: seen.append(len(z)) or decode(z))
    assert torch.allclose(drawing.decode(latents), whole, atol=1e-5) and seen == [2, 2, 1]
    monkeypatch.setattr(pipeline, "DECODED", 1)
    assert torch.allclose(drawing.decode(latents), whole, atol=1e-5) and seen[3:] == [1] * 5


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for rank, index in ((None, 0), ("3", 3)):
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", index)
        assert pick_device("cuda:1") == torch.device("cuda:1")


def test_a_safety_checker_is_given_every_picture(draw, refuse, place, monkeypatch):
    (place / "mine.py").write_text("def gray(image):\n    return image.convert('L').convert('RGB')\n\n\n"
                                   "def never(image):\n    raise ValueError('not this one')\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    draw("--num", 2, "--output", "plain")
    draw("--num", 2, "--output", "checked", "--checker", "mine:gray")
    for name in ("000.png", "001.png"):
        with Image.open(f"plain/{name}") as image:
            assert "trainedAlgorithmicMedia" in image.text["XML:com.adobe.xmp"]
            assert (np.array(image.convert("L").convert("RGB")) == pixels(f"checked/{name}")).all()
    assert "not this one" in refuse("--checker", "mine:never")
    for name in ("mine:other", "nowhere:gray", "mine", ":"):
        assert f"--checker {name}: " in refuse("--checker", name)


# As a process of its own


def test_interrupted_as_a_process(place, world):
    command = [sys.executable, SCRIPT, "--weights", world, "--prompt", PROMPT, "--seed", "3",
               "--steps", "999", "--width", "512", "--height", "512"]
    # Whatever started the tests may have had SIGINT ignored, which children inherit.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert process.stdout.readline() == "seed 3\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and out == ""
    warning, stopped = err.splitlines()
    assert warning.startswith("warning: pictures of 512 x 512 pixels are far")
    assert stopped == "stopped: what was saved is kept, nothing else was written"
    assert sorted(os.listdir()) == ["ada.png", "bob.png"]


# One picture and its settings


def test_one_picture(draw):
    out, err = draw("--subject", "ada.png", "--output", "new/folder/x.png")
    assert out == ["seed 5", "new/folder/x.png"] and err == []
    assert pixels("new/folder/x.png").shape == (64, 64, 3)
    assert os.listdir("new/folder") == ["x.png"]
    with Image.open("new/folder/x.png") as image:
        assert image.text["parameters"].splitlines() == [
            PROMPT, "Steps: 3, Sampler: UniPC, CFG scale: 3.0, Seed: 5, Size: 64x64, Model: tiny"]
    assert settings("new/folder/x.png") == {
        "prompt": PROMPT, "negative_prompt": "", "steps": 3, "sampler": "unipc", "guidance_scale": 3.0,
        "clip_skip": 1, "width": 64, "height": 64, "prior_only": False, "dtype": "fp32",
        "prior_above": 800, "strength": 1.0, "sparse": 0.0, "reuse": False, "controls": [], "loras": [],
        "lora_scope": None,
        "weights": "tiny", "moa": "moa.safetensors", "subjects": ["woman=ada.png"], "seed": 5}


def test_the_same_picture_from_python(draw, world):
    draw("--subject", "woman=ada.png", "--output", "x.png")
    drawing = Pipeline.load(world, world / "moa.safetensors")
    assert np.array_equal(drawing(PROMPT, {"woman": "ada.png"}, seed=5), pixels("x.png"))


def test_flags_cannot_be_shortened(draw, capsys):
    with pytest.raises(SystemExit) as stopped:
        draw("--guidance", "3")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --guidance 3; see --help\n"


def test_where_moa_and_a_person_start(world):
    """At --prior-above and higher the prior draws all, at their start and higher a person is not there."""
    drawing = Pipeline.load(world, world / "moa.safetensors")

    def picture(start: int | None = None, **options) -> torch.Tensor:
        people = [] if start is None else [Subject(2, torch.ones(16), start)]
        return drawing.generate([PROMPT], [5], [people], steps=3, guidance_scale=3.0, **options)
    with pytest.warns(UserWarning, match="somebody is in no step of the picture"):
        assert torch.equal(picture(1000, prior_above=0), picture(prior_only=True))
    with pytest.warns(UserWarning, match="somebody is in no step of the picture"):
        assert torch.equal(picture(1), picture())
    assert (picture(600) - picture()).abs().mean() > 0.004 < (picture(600) - picture(1000)).abs().mean()


def test_file_names_of_every_kind(draw, place):
    assert split_subject("a.png#2,b") == (None, ["a.png#2", "b"])
    assert split_subject("Man=a,b") == ("man", ["a", "b"]) and split_subject("a@b") == (None, ["a@b"])
    for name in ("a=b.png", "a,b.png", "Zoë 笑.png"):
        shutil.copy("ada.png", name)
        assert split_subject(name) == (None, [name])
        assert split_subject(f"woman={name}") == ("woman", [name])
    draw("--subject", place / "a=b.png", "--output", "Zoë/笑.png")
    assert settings("Zoë/笑.png")["subjects"] == ["woman=a=b.png"]
    assert str(place) not in Image.open("Zoë/笑.png").text["parameters"]


def test_writes_into_folders_and_replaces_files(draw, place):
    (place / "x.png").mkdir()
    assert draw("--output", "x.png")[0][1:] == ["x.png/000.png"]
    (place / "old.PNG").write_text("old")
    draw("--output", "old.PNG")
    assert pixels("old.PNG").shape == (64, 64, 3)


@pytest.mark.parametrize("flags", [
    ["--steps", 5, "--sampler", "ddim", "--guidance-scale", 1], ["--seed", 2 ** 63 - 1, "--num", 2],
    ["--negative-prompt", "man", "--clip-skip", 2], ["--width", 8, "--height", 8],
    ["--width", 136, "--height", 120, "--save-routing", "maps/r.png"], ["--dtype", "bf16"]])
def test_settings_that_work(draw, flags):
    out, err = draw("--subject", "ada.png", "--output", "x.png", *flags)
    assert err == [] and all(Path(path).is_file() for path in out[1:])
    assert all(pixels(path).std() > 1 for path in out[1:])


def test_clip_skip_leaves_out_the_last_layers(draw, other_world):
    draw("--subject", "ada.png", "--output", "last.png")
    draw("--subject", "ada.png", "--output", "second.png", "--clip-skip", 2)
    assert settings("second.png")["clip_skip"] == 2
    assert np.abs(pixels("last.png") - pixels("second.png")).mean() > 1
    config = read_config(other_world)
    config["text_encoder"]["layers"] = 1
    write_json(config, other_world / "config.json")
    file = other_world / "text_encoder.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".layers.1." not in k}, file)
    draw("--subject", "ada.png", "--output", "short.png", weights=other_world)
    assert np.array_equal(pixels("second.png"), pixels("short.png"))


def test_a_vae_that_overflows_in_half_precision(draw, other_world):
    file = other_world / "vae.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"] * 2e4  # finite in fp16, its output not
    save_file(state, file)
    vae = Pipeline.load(other_world).models.vae.half()
    assert not vae.decode(torch.randn(1, 4, 8, 8).half()).isfinite().all()
    draw("--prior-only", "--output", "whole.png", weights=other_world)
    draw("--prior-only", "--output", "half.png", "--dtype", "fp16", weights=other_world)
    assert pixels("half.png").std() > 1 and np.abs(pixels("half.png") - pixels("whole.png")).mean() < 2


def test_random_seed_is_printed_and_kept(world, place, capsys):
    sample.main(["--weights", str(world), "--prompt", PROMPT])
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"seed \d+", first) and settings("sample.png")["seed"] == int(first.split()[1])


@pytest.fixture
def lora(place) -> Path:
    """A LoRA of two layers, one of them in the attention, under a name that has a colon."""
    layers = {"down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": (16, 8),
              "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2": (32, 8)}
    torch.manual_seed(1)
    save_file({f"lora_unet_{name}.lora_{kind}.weight": torch.randn(shape)
               for name, (wide, dim) in layers.items()
               for kind, shape in (("down", (4, wide)), ("up", (dim, 4)))}, place / "a:2.safetensors")
    return place / "a:2.safetensors"


def test_loras(draw, lora):
    """No LoRA, one, less of it, all of it, and two of which one is none."""
    def picture(*flags) -> np.ndarray:
        err = draw("--subject", "ada.png", "--output", "x.png", *flags)[1]
        assert err == [f"warning: {lora}: 1 of its 2 layers are not the UNet's attention, scope attn leaves "
                       "them out; scope all takes them"] * ("--lora" in flags and "all" not in flags)
        return pixels("x.png")
    plain, full = picture(), picture("--lora", lora)
    assert settings("x.png")["loras"] == ["a:2.safetensors:1"] and settings("x.png")["lora_scope"] == "attn"
    with Image.open("x.png") as image:
        assert 'LoRA: "a:2.safetensors:1"' in image.text["parameters"]
    half = picture("--lora", f"{lora}:.5")
    whole = picture("--lora", lora, "--lora-scope", "all")
    for one, other in ((plain, full), (plain, half), (half, full), (full, whole)):
        assert np.abs(one - other).mean() > 0.1
    assert np.array_equal(picture("--lora", f"{lora}:0", "--lora", f"{lora}:1"), full)


# What it warns of


def test_warns_once_in_one_line(draw):
    _, err = draw("--num", 2, prompt="a purple woman on the zebra")
    assert len(err) == 1 and err[0].startswith("warning: ") and "purple, zebra" in err[0]
    flags = "--prior-only", "--negative-prompt", "man", "--guidance-scale", "1", "--steps", 1
    size, negative = draw("--width", 136, "--height", 136, *flags)[1]
    assert size.startswith("warning: pictures of 136 x 136 pixels are far larger than")
    assert negative == "warning: --negative-prompt has no effect with --guidance-scale 1"


def test_refuses_a_foreign_subject_unless_it_is_told_to(draw, refuse, other_world):
    def limit(value: float) -> None:
        save_file({"mean": torch.zeros(16), "precision": torch.eye(16), "limit": torch.tensor(value)},
                  other_world / "subjects.safetensors")

    limit(1e9)
    assert not draw("--subject", "ada.png", weights=other_world)[1]
    limit(0.0)
    said = refuse("--subject", "ada.png", weights=other_world)
    assert "ada.png looks like nobody" in said and "--any-subject" in said
    assert not draw("--subject", "ada.png", "--any-subject", weights=other_world)[1]


# What it refuses


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], "--steps must be in 1..999, not 0"), (["--seed", "-1"], "--seed must be in"),
    (["--guidance-scale", "nan"], "--guidance-scale must be in 0..100, not nan"),
    (["--width", "100"], "--width must be a multiple of 8, not 100: 96 or 104"),
    (["--clip-skip", "3"], "clip skip must be in 1..2, the layers of these weights' text encoder"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--device", "tpu"], "--device 'tpu' is unknown"), (["--prompt", " \n"], "--prompt is empty"),
    (["--subject", "missing.png"], "missing.png does not exist"),
    (["--subject", "woman="], "a file is empty"),
    (["--subject", str(SCRIPT)], "cannot be used as a picture"),
    (["--subject", "man=ada.png"], "there is no 'man' in the prompt"),
    (["--subject", "2=ada.png"], "no word is free for number 2"),
    (["--subject", "ada.png", "--subject", "bob.png"], "more subjects than words"),
    (["--subject", "woman=ada.png", "--subject", "woman=bob.png"], "every 'woman' in the prompt has"),
    (["--subject", "ada.png", "--prompt", "a womanly beach"], "nobody in the prompt"),
    (["--subject", "ada.png", "--prompt", "a womn on the beach"], "womn (perhaps woman)"),
    (["--subject", "womn=ada.png"], "no 'womn' in the prompt (perhaps woman)"),
    (["--subject", "ada.png", "--subject", "bob.png", "--prompt", "two old women on the beach"],
     "write: an old woman and an old woman on the beach"),
    (["--prompt", "a zebra eats grass"], "write half of it with others"),
    (["--subject", "https://example.org/me.jpg"], "me.jpg is an address: download it first"),
    (["--lora", "https://example.org/a.safetensors"], "download it first"),
    (["--subject", "ada.png", "--prompt", "a lady on the beach"], "do not know the word 'lady'"),
    (["--subject", "ada.png", "--prompt", "on the beach " * 40 + "a woman"], "beyond the 77 tokens"),
    (["--output", "x.jpg"], "saved as .png"), (["--output", "/proc/x/y.png"], "cannot be written"),
    (["--output", "ada.png/x.png"], "cannot be written"),
    (["--output", "ada.png", "--subject", "./ada.png"], "is a subject's photo"),
    (["--save-routing", "r.jpg"], "name ends in .png"),
    (["--save-routing", "sample.png"], "give another name"),
    (["--save-routing", "r.png", "--prior-only"], "leave one of them out"),
    (["--moa", "missing.safetensors"], "--moa missing.safetensors does not exist"),
    (["--moa", "ada.png"], "ada.png is not a readable safetensors file"),
    (["--weights", "missing"], "missing is not a weights folder"),
    (["--lora", "missing.safetensors:.5"], "--lora missing.safetensors:.5: missing.safetensors does not"),
    (["--lora", "ada.png:much"], "give FILE[:SCALE]"),
    (["--lora", "ada.png"], "ada.png is a picture: give a .safetensors file"),
    (["--lora-scope", "all"], "--lora-scope means nothing without --lora")],
    ids=lambda value: str(value)[:40])
def test_refuses(refuse, flags, words):
    assert words in refuse(*flags)


@pytest.mark.parametrize("part", ["unet", "image_encoder", "moa"])
def test_refuses_broken_weights(refuse, other_world, part):
    file = other_world / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert file.name in refuse("--subject", "ada.png", weights=other_world)
    file.unlink()
    assert f"{part}.safetensors" in refuse("--subject", "ada.png", weights=other_world)


@pytest.mark.parametrize("change", [{"image_size": 60}, {"sampling": {"steps": 0}}, {"unet": {}}], ids=str)
def test_refuses_a_broken_config(refuse, other_world, change):
    write_json({**read_config(other_world), **change}, other_world / "config.json")
    refuse("--subject", "ada.png", weights=other_world)


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "what was saved is kept"),
    (torch.OutOfMemoryError("Tried to allocate 9 GiB"), 2, "error: not enough memory"),
    (OSError(28, "No space left on device"), 2, "No space left")])
def test_stops_cleanly(draw, place, monkeypatch, capsys, error, code, words):
    def stop(*args, **more):
        raise error
    monkeypatch.setattr(Pipeline, "decode", stop)
    with pytest.raises(SystemExit) as stopped:
        draw("--num", 2, "--output", "new", "--save-routing", "r.png")
    assert stopped.value.code == code and words in capsys.readouterr().err
    assert sorted(os.listdir()) == ["ada.png", "bob.png"]


def test_refuses_more_people_than_training_had(draw, refuse, other_world):
    prompt, three = "a woman and a man and a girl", ["--subject", "ada.png"] * 3
    draw(*three, prompt=prompt, weights=other_world)  # its file does not say how many there were
    state = load_file(other_world / "moa.safetensors")
    with safe_open(other_world / "moa.safetensors", "pt") as file:
        config = json.loads(file.metadata()["moa"])
    config["settings"] = {"preset": {"max_people": 2}}
    save_file(state, other_world / "moa.safetensors", {"moa": json.dumps(config)})
    assert "3 subjects: these weights were trained on at most 2" in refuse(
        *three, prompt=prompt, weights=other_world)
    draw(*three[:4], prompt=prompt, weights=other_world)


def test_a_folder_of_an_earlier_run_is_left_alone(draw, refuse, place):
    draw("--num", 2, "--output", "several")
    assert "holds 000.png of an earlier run" in refuse("--num", 2, "--output", "several")
    (place / "several" / "000.png").unlink()
    (place / "several" / "001.png").unlink()
    assert "holds sheet.png of an earlier run" in refuse("--num", 2, "--output", "several")
