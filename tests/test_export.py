"""weights/export_diffusers.py: diffusers loads what it writes and draws the same pictures."""
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_full import LIMIT, random, randomize, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from test_shipped import ROOT, documented

import sample
from models import load_models
from models.clip_text import CLIPTextConfig, CLIPTextEncoder
from models.load import build_config, read_config, save_part, write_json
from models.unet import UNet, UNetConfig
from models.vae import LATENT_SCALE, AutoencoderKL, VAEConfig
from pipeline import Pipeline
from weights import convert_sd15, export_diffusers
from weights.export_diffusers import TABLE
from weights.names import LABELS

SIZES = {"unet": (UNet, UNetConfig(channels=(32, 64, 96, 96), context_dim=32)),
         "vae": (AutoencoderKL, VAEConfig(channels=(32, 64, 96, 96))),
         "text_encoder": (CLIPTextEncoder, CLIPTextConfig(dim=32, layers=3, heads=2))}


def export(folder, output) -> Path:
    export_diffusers.main([str(folder), "--output", str(output)])
    return Path(output)


def open_pipeline(folder):
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A weights folder with random values in SD1.5's 686 + 248 names."""
    folder = tmp_path_factory.mktemp("weights")
    for part, (cls, cfg) in SIZES.items():
        save_part(randomize(cls(cfg)), folder, part, torch.float32)
    write_json({**read_config(folder), "image_size": 64}, folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory) -> Path:
    return export(weights, tmp_path_factory.mktemp("exported") / "new" / "folder")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """diffusers' pipeline of the small world that ships with the code."""
    return open_pipeline(export(sample.SHIPPED, tmp_path_factory.mktemp("exported") / "world"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.std() > 10
    return -10 * np.log10(max(np.square((a.astype(float) - b) / 255).mean(), 1e-12))


# What diffusers makes of it

@torch.no_grad()
def skip_one(pipe, prompts: list[str]) -> torch.Tensor:
    """What diffusers' pipeline computes for clip_skip=1, where it finds the norm in its old place."""
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-(1 + 1)]
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm(hidden)


@pytest.mark.parametrize("prompt, flags, settings", [
    ("a woman in a red shirt riding a bike on the beach", [], {}),
    ("a man and a boy sitting on a sofa", ["--negative-prompt", "a photo of a woman at night"],
     {"negative_prompt": "a photo of a woman at night"}),
    ("a girl with curly hair in the park", ["--width", "160", "--height", "96"],
     {"width": 160, "height": 96}),
    ("a person reading a book", ["--clip-skip", "2"], {"clip_skip": 1})])
def test_diffusers_draws_the_pictures_of_sample(world, tmp_path, prompt, flags, settings):
    file = tmp_path / "ours.png"
    sample.main(["--prior-only", "--prompt", prompt, "--seed", "3", "--output", str(file), *flags])
    shipped = Pipeline.load(sample.SHIPPED)
    sampling, size = shipped.models.config["sampling"], shipped.models.config["image_size"]
    noise = shipped.noise([3], (settings.get("height", size), settings.get("width", size)))
    texts = {"prompt": prompt, **settings}
    if "clip_skip" in settings:
        text, null = skip_one(world, [prompt, ""]).split(1)
        texts = {"prompt_embeds": text, "negative_prompt_embeds": null}
    (theirs,) = world(**texts, latents=noise, num_inference_steps=sampling["steps"],
                      guidance_scale=sampling["guidance_scale"]).images
    with Image.open(file) as ours:
        assert psnr(np.asarray(ours), np.asarray(theirs)) > 50


def test_scheduler_is_our_sampler_with_its_defaults(world):
    from samplers import timesteps
    for steps in (5, 20, 48):
        world.scheduler.set_timesteps(steps)
        assert world.scheduler.timesteps.tolist() == timesteps(steps, "linspace", end_node=True)


@torch.no_grad()
def test_models_are_the_same(weights, exported):
    pipe, ours = open_pipeline(exported), load_models(weights)
    image, x, t = random(1, 3, 64, 64).tanh(), random(1, 4, 8, 8), torch.tensor([321])
    context, tokens = random(1, 77, 32, seed=2), ours.tokenize(["a man riding a bike"])
    pairs = {"unet": (ours.unet(x, t, context), pipe.unet(x, t, context).sample),
             "encode": (ours.vae.encode(image), pipe.vae.encode(image).latent_dist.mean * LATENT_SCALE),
             "decode": (ours.vae.decode(x), pipe.vae.decode(x / LATENT_SCALE).sample),
             "text": (ours.text_encoder(tokens), pipe.text_encoder(tokens).last_hidden_state)}
    for name, (mine, theirs) in pairs.items():
        assert relative_error(mine, theirs) < LIMIT, name
    assert pipe.unet.config.sample_size == 8 and pipe.vae.config.sample_size == 64


def test_no_tensor_is_lost_or_invented(exported):
    from diffusers import AutoencoderKL as TheirVAE
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
    for cls, name in ((TheirVAE, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        _, found = cls.from_pretrained(exported / name, output_loading_info=True)
        assert not any(found.values()), found
    for name, count in (("unet", 686), ("vae", 248)):
        assert len(load_file(exported / name / "diffusion_pytorch_model.safetensors")) == count


def test_tokens_are_the_same(world):
    tokenize = load_models(sample.SHIPPED).tokenize
    tokenize.kept_tokens = frozenset()  # all of CLIP's words
    texts = ["", "a woman and a man, dancing!", "It's 2024: naïve café", "Zoë 笑 🙂", "  A\tB\nC ", "x" * 90,
             "a man " * 60]
    theirs = world.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the last is longer than 75 tokens
        assert torch.equal(tokenize(texts), theirs)


def test_rows_of_a_small_world_go_to_their_places(world):
    table = world.text_encoder.state_dict()
    (name,) = [key for key in table if key.endswith("token_embedding.weight")]
    kept = list(read_config(sample.SHIPPED)["text_encoder"]["kept_tokens"])
    ours = load_file(sample.SHIPPED / "text_encoder.safetensors")[TABLE]
    assert table[name].shape == (49408, 128) and torch.equal(table[name][kept], ours.float())
    assert table[name].abs().sum() == ours.float().abs().sum()


# What the converter makes of it

def test_converts_back(weights, exported, tmp_path):
    convert_sd15.main([str(exported), "--output", str(tmp_path / "back")])
    for part, (_, cfg) in SIZES.items():
        there = load_file(weights / f"{part}.safetensors")
        back = load_file(tmp_path / "back" / f"{part}.safetensors")
        assert there.keys() == back.keys() and all(torch.equal(there[k], back[k]) for k in there)
        assert build_config(read_config(tmp_path / "back"), part) == cfg
    assert read_config(tmp_path / "back")["image_size"] == 64


# What it refuses

@pytest.fixture
def broken(weights, tmp_path):
    """A copy of the weights to be broken."""
    return Path(shutil.copytree(weights, tmp_path / "broken"))


@pytest.fixture
def refused(tmp_path, capsys):
    """Run, expect an exit code, return the one line; nothing may have been left behind."""
    def run(code, folder, output=tmp_path / "new" / "out"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            export(folder, output)
        message = capsys.readouterr().err
        assert stopped.value.code == code, message
        assert message.startswith("error: ") and message.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return message
    return run


def test_refuses_what_is_no_weights_folder(refused, exported, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file", exported, exported / "unet"):
        assert f"{folder} is no weights folder" in refused(2, folder)


def test_refuses_broken_parts(refused, broken):
    file = broken / "vae.safetensors"
    whole, state = file.read_bytes(), {k: v.clone() for k, v in load_file(file).items()}
    name = sorted(state)[0]
    file.write_bytes(whole[:-9])
    assert "is truncated" in refused(2, broken)
    for change, message in (({name: state[name][:1]}, f"{name} is (1"), ({"extra": state[name] + 1}, "extra"),
                            ({name: torch.full_like(state[name], torch.nan)}, "not finite")):
        save_file({**state, **change}, file)
        assert message in refused(3, broken)
    file.unlink()
    assert f"has no {LABELS['vae']}" in refused(3, broken)


@pytest.mark.parametrize("change, message", [
    ({"unet": {}}, "is not Stable Diffusion 1.5's"), ({"unet": 3}, "no usable sizes for 'unet'"),
    ({"image_size": "64"}, "image_size '64'")], ids=str)
def test_refuses_broken_configs(refused, broken, change, message):
    write_json({**read_config(broken), **change}, broken / "config.json")
    assert message in refused(3, broken)


def test_never_writes_over_anything(refused, weights, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "full", weights):
        assert "exists already" in refused(2, weights, output)
    (tmp_path / "empty").mkdir()
    assert (export(weights, tmp_path / "empty") / "model_index.json").exists()


def test_the_script_runs_from_anywhere_without_diffusers(tmp_path, weights):
    code = (f"import sys; sys.path.insert(0, {str(Path(export_diffusers.__file__).parent)!r})\n"
            f"import export_diffusers; export_diffusers.main([{str(weights)!r}, '--output', 'out'])\n"
            "assert 'diffusers' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "written to out" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["unet"][0] == "diffusers"


def test_documented_command(tmp_path, monkeypatch):
    ((folder, *rest),) = documented("weights/export_diffusers.py")
    monkeypatch.chdir(tmp_path)
    export_diffusers.main([str(ROOT / folder), *rest])
    assert (tmp_path / rest[-1] / "model_index.json").exists()
