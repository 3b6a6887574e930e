"""weights/convert_sd15.py: every layout gives the public models' outputs, all else is refused by name."""
import argparse
import collections
import datetime
import json
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
import types
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import parity_full
import pytest
import torch
from layouts import (CONTROLNET_LAYOUTS, LAYOUTS, WEIGHTS, ema_copies, extras, half, hugging_face_names, ldm,
                     ldm_unet, ldm_vae, old_vae, openai_names, own, put, under)
from parity_full import LIMIT, OUTPUTS, ROOT, SMALL, errors, measure, prove, public, randomize
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from models import load_models
from models.clip_text import BOS, EOS, CLIPTextConfig
from models.load import carry_over, read_config, save_part, write_json
from models.unet import UNet, UNetConfig
from weights import checkpoints, convert_sd15, parts
from weights.checkpoints import Lazy, Notes, WrongKind, WrongTensors, choose
from weights.parts import Part, split

SCRIPT = Path(convert_sd15.__file__)
UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def swift(monkeypatch, tmp_path):
    """Do not wait for the disk, and do not fill it."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    yield
    shutil.rmtree(tmp_path)


IMAGE_SIZES = SMALL["image_encoder"]
SIZES = {part: SMALL[part] for part in ("unet", "vae", "text_encoder")}


# What the layouts are made of

@pytest.fixture(scope="module")
def theirs():
    """The public models with random weights."""
    return {part: public(part, cfg) for part, cfg in SMALL.items()}


@pytest.fixture(scope="module")
def states(theirs):
    """Their tensors by their modern names."""
    states = {part: dict(model.state_dict()) for part, model in theirs.items()}
    for part in ("text_encoder", "image_encoder"):
        states[part] = {k: v for k, v in states[part].items() if not k.endswith("position_ids")}
    states["text_encoder"] = {f"text_model.{k.removeprefix('text_model.')}": v
                              for k, v in states["text_encoder"].items()}
    return states


def run_theirs(models: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {part: OUTPUTS[part](models[part], cfg) for part, cfg in SMALL.items()}


@pytest.fixture(scope="module")
def expected(theirs):
    return run_theirs(theirs)


def agree(folder, expected, limit=LIMIT, parts=SIZES):
    """Every converted model computes what the public one does."""
    models = load_models(folder)
    for part in parts:
        found = OUTPUTS[part](getattr(models, part), SMALL[part])
        for name, error in errors(found, expected[part]).items():
            assert error < limit, f"{part}, {name}: {error}"


def convert(*arguments) -> dict:
    convert_sd15.main([str(a) for a in arguments])
    return read_config(Path(arguments[arguments.index("--output") + 1]))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "weights"


@pytest.fixture
def refused(capsys, out, tmp_path):
    """Run, expect an exit code, return the message; nothing may have been left behind."""
    def run(code, *arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            convert_sd15.main([*map(str, arguments), "--output", str(out)])
        message = capsys.readouterr().err
        assert exit_.value.code == code, message
        assert "Traceback" not in message
        assert sorted(tmp_path.rglob("*")) == before
        return message
    return run


# One LDM file

def test_ldm_names_are_those_that_diffusers_reads(states):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    unet = convert_ldm_unet_checkpoint(
        under("model.diffusion_model.", ldm_unet(states["unet"])), {"layers_per_block": 2})
    vae = convert_ldm_vae_checkpoint(
        under("first_stage_model.", ldm_vae(states["vae"])),
        {"down_block_types": [0] * 4, "up_block_types": [0] * 4, "block_out_channels": [0] * 4})
    for found, wanted in ((unet, states["unet"]), (vae, states["vae"])):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k].squeeze(), wanted[k].squeeze()) for k in wanted)


@pytest.mark.parametrize("dimensions, flat", [(4, False), (3, True), (2, False)])
def test_ldm_safetensors(tmp_path, out, states, expected, dimensions, flat):
    source = tmp_path / "model.safetensors"
    save_file(own(ldm(states, dimensions, flat) | extras()), source)
    config = convert(source, "--output", out)
    agree(out, expected)
    record = config["conversion"]
    assert record["source"] == "model.safetensors"
    assert record["ema"] == "none in the source" and record["prediction_type"] == "epsilon"
    assert {"betas", "scale_factor", "position_ids", "control_model"} <= record["dropped"].keys()
    reshaped = [line for line in record["repaired"] if line.startswith("8 tensors of the VAE")]
    assert len(reshaped) == len(record["repaired"]) == (dimensions != 2)
    assert config["image_size"] == 512 and config["sampling"] == {"guidance_scale": 5.0, "steps": 20}
    models = load_models(out)
    assert {part: getattr(models, part).cfg for part in SIZES} == SIZES
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "text_encoder.safetensors", "unet.safetensors", "vae.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "new"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("zipped, wrap", [
    (False, lambda s: s), (True, lambda s: {"state_dict": {"state_dict": s}, "global_step": 840000})])
def test_ldm_ckpt(tmp_path, out, states, expected, wrap, zipped):
    source = tmp_path / "model.ckpt"
    torch.save(wrap(ldm(states) | extras()), source, _use_new_zipfile_serialization=zipped)
    config = convert(source, "--output", out)
    agree(out, expected)
    assert ("global_step" in config["conversion"]["dropped"]) == ("global_step" in wrap({}))


@pytest.mark.parametrize("dtype, limit, suffix", [
    (torch.float16, 5e-3, "ckpt"), (torch.bfloat16, 5e-2, "safetensors")])
def test_half_precision(tmp_path, out, states, expected, dtype, limit, suffix):
    source, state = tmp_path / f"model.{suffix}", half(ldm(states), dtype)
    torch.save(state, source) if suffix == "ckpt" else save_file(own(state), source)
    convert(source, "--output", out)
    assert {v.dtype for v in load_file(out / "unet.safetensors").values()} == {dtype}
    agree(out, expected, limit)


def test_dtype(saved, out, expected):
    convert(saved, "--output", out, "--dtype", "fp16")
    assert {v.dtype for v in load_file(out / "unet.safetensors").values()} == {torch.float16}
    agree(out, expected, 5e-3)
    convert(out, "--output", out, "--dtype", "fp32")
    assert {v.dtype for v in load_file(out / "vae.safetensors").values()} == {torch.float32}
    agree(out, expected, 5e-3)


@pytest.mark.parametrize("ids, warns, flat", [
    (torch.arange(77)[None].float() * 0.999, True, True), (torch.arange(77).half()[None], False, False)])
def test_position_ids_are_never_used(tmp_path, out, states, expected, ids, warns, flat):
    source = tmp_path / "model.safetensors"
    name = "cond_stage_model.transformer." + ("" if flat else "text_model.") + "embeddings.position_ids"
    save_file(own(ldm(states, 2, flat) | {name: ids}), source)
    record = convert(source, "--output", out)["conversion"]
    assert any("76 of 77 position_ids were wrong" in line for line in record["repaired"]) == warns
    assert record["dropped"] == {"position_ids": 1}
    agree(out, expected)


@pytest.mark.parametrize("ema, averaged", [("auto", True), ("off", False)])
def test_ema(tmp_path, out, states, expected, ema, averaged):
    plain, copies = ldm_unet(states["unet"]), ldm_unet(states["unet"])
    wrong = copies if not averaged else plain
    wrong |= {k: v + 1 for k, v in wrong.items()}
    source = tmp_path / "model.safetensors"
    save_file(own(ldm(states) | under("model.diffusion_model.", plain) | ema_copies(copies)), source)
    record = convert(source, "--output", out, "--ema", ema)["conversion"]
    agree(out, expected)
    assert record["ema"] == f"{ema}: {'EMA' if averaged else 'plain'} weights"
    assert record["dropped"]["model_ema"] == 688


def test_ema_that_is_not_there(tmp_path, states, refused):
    source, state = tmp_path / "model.safetensors", ldm(states)
    save_file(own(state), source)
    assert "lacks 686 EMA copies" in refused(3, source, "--ema", "on")
    copies = ema_copies(ldm_unet(states["unet"]))
    del copies["model_ema.diffusion_modelout2bias"]
    save_file(own(state | copies), source)
    assert "lacks 1 EMA copies (model_ema.diffusion_modelout2bias): give --ema off" in refused(3, source)


WRAPPERS = {
    "torch.compile": lambda state: {name.replace(UNET, UNET + "_orig_mod."): v for name, v in state.items()},
    "DistributedDataParallel": lambda state: under("module.", state),
    "a trainer": lambda state: under("trainer.net.", state),
    "ComfyUI": lambda state: {name.replace(UNET, "diffusion_model.").replace(
        "cond_stage_model.", "text_encoders.clip_l."): v for name, v in state.items()}}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_taken_off(tmp_path, states, wrapper):
    found = split(lazy(WRAPPERS[wrapper](ldm(states))), tmp_path, {}, "auto", Notes())
    assert found.keys() == SIZES.keys()
    assert all(found[part].tensors.keys() == states[part].keys() for part in found)


def test_added_rows_of_the_token_embedding_are_said_and_left_out(tmp_path, states, out, expected):
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state, source = ldm(states), tmp_path / "model.safetensors"
    save_file(own(state | {name: torch.cat([state[name], torch.ones(2, 32)])}), source)
    said = convert(source, "--output", out)["conversion"]["repaired"]
    assert any("2 added rows of text_model.embeddings.token_embedding.weight" in line for line in said)
    agree(out, expected)


def lazy(state: dict) -> dict[str, Lazy]:
    return {name: Lazy(tuple(v.shape), v.dtype, lambda v=v: v) for name, v in state.items()}


def test_a_text_encoder_of_another_tokenizer_is_refused(tmp_path, states):
    name = "text_model.embeddings.token_embedding.weight"
    part, = split(lazy(states["text_encoder"] | {name: torch.ones(32000, 32)}), tmp_path, {}, "auto",
                  Notes()).values()
    with pytest.raises(WrongTensors, match="32000 rows, CLIP's tokenizer 49408 words"):
        parts.fit("text_encoder", part, Notes())


def test_another_number_of_positions_is_said(tmp_path, states):
    """As in LongCLIP."""
    name, notes = "text_model.embeddings.position_embedding.weight", Notes()
    longer = lazy(states["text_encoder"] | {name: torch.ones(248, 32)})
    part, = split(longer, tmp_path, {}, "auto", notes).values()
    parts.fit("text_encoder", part, notes)
    assert part.cfg.length == 248 and f"{name} has 248 rows, Stable Diffusion 1.5's 77" in notes.repaired[0]


def test_half_a_vae_is_told_what_it_lacks(tmp_path, states):
    half = {k: v for k, v in states["vae"].items() if k.startswith("decoder.")}
    part, = split(lazy(half), tmp_path, {}, "auto", Notes()).values()
    with pytest.raises(WrongTensors, match=r"missing \(encoder.conv_in.bias"):
        parts.fit("vae", part, Notes())


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [1, 6])
def test_weights_of_8_bits_are_multiplied_by_their_scales(tmp_path, scale, rows):
    weight, scales = torch.rand(6, 4).to(torch.float8_e4m3fn), torch.rand(rows) * 100
    save_file({"a.weight": weight, f"a.{scale}": scales, "a.scale_input": torch.ones(1),
               "a.bias": torch.ones(6), "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)},
              tmp_path / "a.safetensors")
    state = checkpoints.open_file(tmp_path / "a.safetensors", Notes())
    assert state.keys() == {"a.weight", "a.bias"} and state["a.weight"].dtype == torch.float16
    assert torch.equal(state["a.weight"].read(), weight.float() * scales[:, None])


@pytest.mark.parametrize("mark, message", [
    ({"alphas_cumprod": torch.zeros(1000)}, r"alphas_cumprod ends at 0, not at 0.00466"),
    ({"ztsnr": torch.zeros(0)}, "zero terminal SNR .ztsnr found")])
def test_another_noise_schedule_is_refused(tmp_path, states, mark, message):
    with pytest.raises(WrongKind, match=message):
        split(lazy(under(UNET, ldm_unet(states["unet"])) | mark), tmp_path, {}, "auto", Notes())


# diffusers folders

@pytest.fixture(scope="module")
def saved(tmp_path_factory, theirs, states):
    """A folder as diffusers writes it, the text encoder with its prefix."""
    folder = tmp_path_factory.mktemp("diffusers")
    theirs["unet"].save_pretrained(folder / "unet")
    theirs["vae"].save_pretrained(folder / "vae")
    theirs["text_encoder"].save_pretrained(folder / "text_encoder")
    save_file(own(states["text_encoder"]), folder / "text_encoder" / "model.safetensors")
    (folder / "scheduler").mkdir()
    write_json({"prediction_type": "epsilon"}, folder / "scheduler" / "scheduler_config.json")
    write_json({"_class_name": "StableDiffusionPipeline"}, folder / "model_index.json")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"junk")
    return folder


@pytest.fixture
def folder(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "sd")
    return tmp_path / "sd"


def test_diffusers_folder(folder, out, expected):
    config = convert(folder, "--output", out)
    agree(out, expected)
    record = config["conversion"]
    assert record["source"] == "sd"
    assert config["unet"] == {**vars(SIZES["unet"]), "channels": [32, 64, 96, 96]}


def test_heads_come_from_the_configs(folder, out, states, theirs):
    from diffusers import UNet2DConditionModel
    other = public("text_encoder", replace(SMALL["text_encoder"], heads=4))
    unet = UNet2DConditionModel.from_config({**theirs["unet"].config, "attention_head_dim": 4}).eval()
    unet.load_state_dict(states["unet"])
    for part in ("text_encoder", "unet"):
        config = read_config(folder / part)
        heads = {"num_attention_heads": 4} if part == "text_encoder" else {"attention_head_dim": [4, 4, 4, 4]}
        write_json({**config, **heads}, folder / part / "config.json")
    convert(folder, "--output", out)
    agree(out, run_theirs({**theirs, "unet": unet, "text_encoder": other}))


@pytest.mark.parametrize("names, chosen", [
    ("model.safetensors pytorch_model.bin model.fp16.safetensors", "model.safetensors"),
    ("pytorch_model.bin pytorch_model.fp16.bin", "pytorch_model.bin"),
    ("diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.bin",
     "diffusion_pytorch_model.fp16.safetensors"),
    ("diffusion_pytorch_model.non_ema.safetensors", ""),
    ("model.bf16.safetensors model.fp16.safetensors model.fp32.safetensors", "model.fp32.safetensors"),
    ("model.bf16.safetensors model.FP16.SAFETENSORS Model.bin", "model.FP16.SAFETENSORS"),
    ("model-00001-of-00002.safetensors model-00002-of-00002.safetensors config.json",
     "model-00001-of-00002.safetensors model-00002-of-00002.safetensors")])
def test_which_files_of_a_folder_are_taken(names, chosen):
    assert choose(names.split()) == chosen.split()


def test_shards(folder, out, theirs, expected):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    theirs["unet"].save_pretrained(folder / "unet", max_shard_size="4MB")
    convert(folder, "--output", out)
    agree(out, expected)
    with pytest.raises(WrongTensors, match="1 of 2 shards found"):
        choose(["model-00001-of-00002.fp16.safetensors"])
    with pytest.raises(WrongTensors, match="several savings are mixed, as model-00001-of-00001.safetensors"):
        choose([f"model-0000{i}-of-0000{n}.safetensors" for n in (1, 2) for i in range(1, n + 1)])


def test_a_folder_of_hugging_face_s_cache(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert checkpoints.locate(str(tmp_path / "models--a--b")) == snapshot
    (snapshot / "model.safetensors").symlink_to("../../blobs/never-finished")
    with pytest.raises(WrongKind, match="leads to no file, as after a download that was stopped"):
        parts.open_source(str(snapshot), "auto", Notes())


def test_files_that_are_not_taken_are_named(folder, refused):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    said = refused(2, folder)
    assert "no UNet; what it has (unet/diffusion_pytorch_model.non_ema.safetensors) can only be given" in said


def test_the_schedule_of_a_folder_is_its_unets_alone(folder):
    write_json({"prediction_type": "v_prediction"}, folder / "scheduler" / "scheduler_config.json")
    parts.fit("vae", parts.open_part(str(folder), "vae", "off", Notes()), Notes())


@pytest.mark.parametrize("part, change, code, message", [
    ("unet", {"cross_attention_dim": 768}, 3, "says cross_attention_dim 768, the tensors 32"),
    ("unet", {"attention_head_dim": 7}, 3, "32 is not divisible by 7"),
    ("unet", {"attention_head_dim": [2, 4, 8, 8]}, 3, "[2, 4, 8, 8], not one whole number"),
    ("unet", {"block_out_channels": 32}, 3, "says block_out_channels 32, not a list of them"),
    ("vae", {"scaling_factor": 0.13025}, 2, "has scaling_factor 0.13025"),
    ("text_encoder", {"hidden_act": "gelu"}, 2, "has hidden_act 'gelu'"),
    ("text_encoder", {"num_hidden_layers": 12}, 3, "says num_hidden_layers 12, the tensors 3"),
    ("scheduler", {"beta_schedule": "linear"}, 2, "has beta_schedule 'linear'"),
    ("scheduler", {"rescale_betas_zero_snr": True}, 2, "has rescale_betas_zero_snr True"),
    ("scheduler", {"prediction_type": "v_prediction"}, 2, "has prediction_type 'v_prediction'")])
def test_configs_that_say_something_else(folder, refused, part, change, code, message):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    write_json({**json.loads(path.read_text()), **change}, path)
    assert message in refused(code, folder)


@pytest.mark.parametrize("kind, message", [
    ("StableDiffusionXLPipeline", "an SDXL folder"), ("StableDiffusion3Pipeline", "an SD3 folder"),
    ("FluxPipeline", "a Flux folder"), ("LatentConsistencyModelPipeline", "an LCM folder")])
def test_folders_of_other_models(tmp_path, refused, kind, message):
    write_json({"_class_name": kind}, tmp_path / "model_index.json")
    assert f"is {message} (model_index.json says {kind})" in refused(2, tmp_path)


def test_folders_with_nothing_or_with_broken_configs(folder, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "is no model folder" in refused(2, tmp_path / "empty")
    (folder / "unet" / "config.json").write_text("{")
    assert "is not valid JSON" in refused(3, folder)


# Parts by flag

def test_parts_by_flag(tmp_path, out, states, expected):
    files = {"unet": ldm_unet(states["unet"]), "vae": old_vae(states["vae"]),
             "text-encoder": states["text_encoder"]}
    flags = []
    for part, state in files.items():
        save_file(own(state), tmp_path / f"{part}.safetensors")
        flags += [f"--{part}", tmp_path / f"{part}.safetensors"]
    record = convert(*flags, "--output", out)["conversion"]
    agree(out, expected)
    assert record["source"] == "unet.safetensors"


@pytest.mark.parametrize("kind", ["bare", "full", "pt"])
def test_replacement_vae(tmp_path, out, states, expected, kind):
    source, vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    state, broken = states["vae"], {k: v + 1 for k, v in states["vae"].items()}
    save_file(own(ldm({**states, "vae": broken})), source)
    leftovers = {"loss.logvar": torch.zeros(1), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
                 "model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(10)}
    layouts = {"bare": ldm_vae(state, 3) | leftovers, "full": ldm(states),
               "pt": {"state_dict": ldm_vae(state) | leftovers}}
    if kind == "pt":
        vae = tmp_path / "vae.pt"
        torch.save(layouts[kind], vae)
    else:
        save_file(own(layouts[kind]), vae)
    convert(source, "--vae", vae, "--output", out)
    agree(out, expected)


def test_a_missing_part_is_asked_for(tmp_path, states, out, expected, refused):
    source, vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    state = ldm(states)
    save_file(own({k: v for k, v in state.items() if not k.startswith("first_stage")}), source)
    save_file(own(states["vae"]), vae)
    assert "has no VAE: add --vae FILE" in refused(3, source)
    convert(source, "--vae", vae, "--output", out)
    agree(out, expected)
    shutil.rmtree(out.parent)
    save_file(own({k: v for k, v in state.items() if k.startswith("model.")}), source)
    assert "has no VAE and no text encoder: add --vae FILE and --text-encoder FILE" in refused(3, source)
    assert "has no text encoder: it holds VAE only" in refused(2, source, "--text-encoder", vae)
    assert "give SOURCE, or all of" in refused(2, "--unet", source)


def test_parts_that_do_not_belong_together(tmp_path, states, refused):
    source, text = tmp_path / "model.safetensors", tmp_path / "text.safetensors"
    save_file(own(ldm(states)), source)
    other = public("text_encoder", CLIPTextConfig(dim=48, layers=2, heads=1)).state_dict()
    save_file(own(other), text)
    assert "the text encoder's width is 48, the UNet reads 32" in refused(3, source, "--text-encoder", text)


# The image encoder

def check_image_encoder(folder, expected):
    agree(folder, expected, parts=SMALL)
    assert load_models(folder).image_encoder.cfg == IMAGE_SIZES


@pytest.mark.parametrize("layout", ["openai", "hugging face", "vision alone", "folder"])
def test_image_encoder(tmp_path, saved, out, states, theirs, expected, layout):
    source = tmp_path / "clip.safetensors"
    if layout == "folder":
        source = tmp_path / "clip"
        source.mkdir()
        save_file(own(hugging_face_names(states)), source / "model.safetensors")
        write_json({"vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2, "image_size": 32},
                    "text_config": {"hidden_act": "quick_gelu"}}, source / "config.json")
    elif layout == "vision alone":
        save_file(own(states["image_encoder"]), source)
    else:
        names = openai_names if layout == "openai" else hugging_face_names
        save_file(own(names(states)), source)
    convert(saved, "--image-encoder", source, "--output", out)
    check_image_encoder(out, expected)


def test_a_clip_with_another_activation(tmp_path, saved, states, refused):
    clip = tmp_path / "clip"
    clip.mkdir()
    save_file(own(hugging_face_names(states)), clip / "model.safetensors")
    write_json({"vision_config": {"hidden_act": "gelu"}, "text_config": {}}, clip / "config.json")
    assert "has hidden_act 'gelu'" in refused(2, saved, "--image-encoder", clip)


# Its own output

def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_own_output_converts_to_itself(tmp_path, saved, out, states):
    clip = tmp_path / "clip.safetensors"
    save_file(own(openai_names(states)), clip)
    convert(saved, "--image-encoder", clip, "--output", out)
    before = contents(out)
    convert(out, "--output", tmp_path / "again")
    assert contents(tmp_path / "again") == before
    convert(out, "--output", out)
    assert contents(out) == before


def test_an_image_encoder_is_added_to_own_output(tmp_path, saved, out, states, theirs, expected):
    clip = tmp_path / "clip.safetensors"
    save_file(own(openai_names(states)), clip)
    first = convert(saved, "--output", out)
    second = convert(out, "--image-encoder", clip, "--output", out)
    check_image_encoder(out, expected)
    assert second["conversion"]["source"] == first["conversion"]["source"]


def test_other_weights_folders_keep_their_settings(tmp_path, saved, out):
    convert(saved, "--output", out)
    small = tmp_path / "small"
    small.mkdir()
    carry_over(out, small)
    models = load_models(out)
    rows = (5, 320, 786, BOS, EOS)
    text = randomize(type(models.text_encoder)(CLIPTextConfig(dim=32, layers=1, heads=2, kept_tokens=rows)))
    save_part(text, small, "text_encoder")
    write_json({**read_config(small), "image_size": 64, "world": "toyworld"}, small / "config.json")
    config = convert(small, "--output", tmp_path / "again")
    assert config["image_size"] == 64 and config["world"] == "toyworld"
    assert load_models(tmp_path / "again").text_encoder.cfg.kept_tokens == rows


def test_files_of_other_weights_are_not_mixed_in(saved, out, refused):
    out.mkdir(parents=True)
    (out / "moa.safetensors").write_bytes(b"mine")
    assert "holds moa.safetensors, which would not belong" in refused(2, saved)
    (out / "moa.safetensors").rename(out / "notes.txt")
    convert(saved, "--output", out)
    assert (out / "notes.txt").read_bytes() == b"mine" and len(list(out.iterdir())) == 5
    convert(saved, "--output", out)  # again over itself


# Repositories

def test_repository(monkeypatch, saved, out, expected):
    import huggingface_hub
    siblings = [types.SimpleNamespace(rfilename=str(p.relative_to(saved)))
                for p in saved.rglob("*") if p.is_file()]
    siblings += [types.SimpleNamespace(rfilename=name) for name in (
        "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors")]
    asked = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info",
                        lambda self, repo, timeout: types.SimpleNamespace(siblings=siblings))

    def download(repo, allow_patterns):
        asked.update(repo=repo, files=allow_patterns)
        return str(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = convert("some/model", "--output", out)
    agree(out, expected)
    assert asked["repo"] == config["conversion"]["source"] == "some/model"
    wanted = [f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()]
    assert sorted(asked["files"]) == sorted([*wanted, "*config.json", "model_index.json"])


def test_repository_without_a_network(monkeypatch, refused):
    import huggingface_hub

    def fail(self, repo, timeout):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    message = refused(2, "some/model")
    assert "some/model is no file or folder here" in message and "no route to host" in message
    assert "download it where there is a network and give its path" in message


def test_a_source_that_does_not_exist(refused):
    for name in ("absent.safetensors", "folder/absent.ckpt", "/no/such/folder", "a/b/c"):
        assert f"{name} does not exist" in refused(2, name)


# Other kinds of files

ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FOREIGN = [
    ({UNET + ATTENTION: (320, 1024), UNET + "input_blocks.0.0.weight": (320, 4, 3, 3)}, "an SD2 checkpoint"),
    ({"cond_stage_model.model.ln_final.weight": (8,), UNET + "out.2.bias": (4,)}, "an SD2 checkpoint"),
    ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
      "conv_in.weight": (320, 4, 3, 3)}, "an SD2 checkpoint"),
    ({"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (8,),
      UNET + "out.2.bias": (4,)},
     "an SDXL checkpoint"),
    ({UNET + "label_emb.0.0.weight": (8, 8)}, "an SDXL checkpoint"),
    ({"add_embedding.linear_1.weight": (8, 8), "conv_in.weight": (320, 4, 3, 3)}, "an SDXL checkpoint"),
    ({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)},
     "an SDXL checkpoint"),
    ({UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280)},
     "an SDXL refiner checkpoint"),
    ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "an SD3 checkpoint"),
    ({"pos_embed.proj.weight": (8, 16, 2, 2), "transformer_blocks.0.attn.to_q.weight": (8, 8)},
     "an SD3 checkpoint"),
    ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a Flux checkpoint"),
    ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a Flux checkpoint"),
    ({"single_transformer_blocks.0.attn.to_q.weight": (8, 8)}, "a Flux checkpoint"),
    ({UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting checkpoint"),
    ({"conv_in.weight": (320, 9, 3, 3), "down_blocks.0.resnets.0.norm1.weight": (8,)},
     "an inpainting checkpoint"),
    ({UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)}, "an instruct-pix2pix checkpoint"),
    ({UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)}, "a depth-to-image checkpoint"),
    ({UNET + "input_blocks.0.0.weight": (320, 7, 3, 3)}, "an upscaler checkpoint"),
    ({UNET + "input_blocks.0.0.weight": (320, 11, 3, 3)}, "an unknown checkpoint"),
    ({"time_embedding.cond_proj.weight": (8, 8), "conv_in.weight": (320, 4, 3, 3)}, "an LCM"),
    ({"v_pred": (0,), UNET + "out.2.bias": (4,)}, "a v-prediction checkpoint"),
    ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8),
      "lora_unet_mid_block_attentions_0_proj_in.alpha": ()}, "a LoRA"),
    ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "a LoRA"),
    ({"unet.mid_block.attn1.processor.to_q_lora.down.weight": (4, 8)}, "a LoRA"),
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (4, 8)}, "a LoHa"),
    ({"oft_unet_x.oft_blocks": (4, 8), "y": (2,)}, "an OFT"), ({"x.lokr_w1": (4, 8), "y": (2,)}, "a LoKr"),
    ({"diffusion_model.input_blocks.0.0.diff": (4, 8), "y": (2,)}, "a full difference"),
    ({"encoder.layers.0.weight": (64, 3, 3, 3), "decoder.layers.1.weight": (8,)}, "a TAESD"),
    ({"vae.decoder.layers.1.weight": (64, 64, 3, 3), "vae.decoder.layers.1.bias": (64,)}, "a TAESD"),
    ({"vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14)}, "a ViT-H of OpenCLIP"),
    ({"module.double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a Flux checkpoint"),
    ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3), "control_model.zero_convs.0.0.bias": (8,)},
     "a ControlNet"),
    ({"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3), "conv_in.weight": (8, 4, 3, 3)},
     "a ControlNet"),
    ({"input_hint_block.0.weight": (8, 3, 3, 3), "input_blocks.0.0.weight": (8, 4, 3, 3)}, "a ControlNet"),
    ({"ip_adapter.1.to_k_ip.weight": (8, 8), "image_proj.proj.weight": (8, 8)}, "an IP-Adapter"),
    ({"emb_params": (2, 768)}, "a textual inversion"), ({"<cat-toy>": (768,)}, "a textual inversion"),
    ({"string_to_param.*": (2, 768)}, "a textual inversion"),
    ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (8,)},
     "an AnimateDiff motion module"),
    ({"lllite_unet_input_blocks_1_1.conditioning1.0.weight": (8, 8)}, "a control-LoRA"),
    ({"adapter.body.0.in_conv.weight": (8, 8)}, "a T2I-Adapter"),
    ({"decoder.conv_in.weight": (512, 16, 3, 3), "decoder.norm_out.bias": (8,)}, "the VAE of another model"),
    ({"layer1.0.weight": (8, 8), "fc.weight": (2, 2)}, "no model that this project knows"),
]


@pytest.mark.parametrize("shapes, message", FOREIGN, ids=[f"{m}-{i}" for i, (_, m) in enumerate(FOREIGN)])
def test_other_models_are_named(shapes, message):
    """What it is, the evidence, what to do."""
    state = {name: Lazy(shape, torch.float16, None) for name, shape in shapes.items()}
    with pytest.raises(WrongKind, match=f"other.bin is {message}.*takes Stable Diffusion 1.5 only") as found:
        split(state, Path("other.bin"), {}, "auto", Notes())
    assert any(name.removeprefix("module.") in str(found.value) for name in shapes)


@pytest.mark.parametrize("name, part", [
    ("decoder.conv_in.weight", "VAE"), ("text_model.final_layer_norm.weight", "text encoder"),
    ("visual.conv1.weight", "image encoder")])
def test_a_part_alone_says_which_flag_takes_it(tmp_path, refused, name, part):
    save_file({name: torch.zeros(8, 4, 3, 3)}, tmp_path / "part.safetensors")
    message = refused(2, tmp_path / "part.safetensors")
    assert f"holds {part} only, no UNet: give it as --{part.lower().replace(' ', '-')} beside" in message


def test_names_of_no_part_are_said_where_one_is_missing(tmp_path, refused):
    file = tmp_path / "a.safetensors"
    save_file({"first_stage_model.x": torch.ones(2), "student.x": torch.ones(2)}, file)
    assert "holds VAE only, no UNet; of no part are its student (1): give" in refused(2, file)


def test_nested_bins_are_named(tmp_path, refused):
    torch.save({"image_proj": {"proj.weight": torch.ones(2)},
                "ip_adapter": {"1.to_k_ip.weight": torch.ones(2)}},
               tmp_path / "ip.bin")
    assert "is an IP-Adapter (image_proj.proj.weight found)" in refused(2, tmp_path / "ip.bin")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}, "name": "cat"},
               tmp_path / "cat.pt")
    assert "is a textual inversion" in refused(2, tmp_path / "cat.pt")


BROKEN = [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-LFS pointer"),
    (b"\n  <html>", "is a web page"), (b"junk" * 9, "is not a model file"), (b"GGUF\x03", "is a GGUF file"),
    (b"7z\xbc\xaf'\x1c", "is an archive: unpack it"),
    (b"\xff\xff\xff\x00\x00\x00\x00\x00{" + b" " * 50, "is truncated"),
    (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b" " * 50, "is damaged"),
    (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no named tensors"),
    (b"\x80\x02}q\x00.", "truncated or damaged"), (b"PK\x03\x04" * 9, "damaged")]


@pytest.mark.parametrize("content, message", BROKEN, ids=[message for _, message in BROKEN])
def test_broken_files(tmp_path, refused, content, message):
    (tmp_path / "model.ckpt").write_bytes(content)
    assert message in refused(2, tmp_path / "model.ckpt")


@pytest.mark.parametrize("zipped", [None, True, False])
def test_truncated_files(tmp_path, states, refused, zipped):
    path, state = tmp_path / "model", states["vae"]
    if zipped is None:
        save_file(own(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * 0.9)])
    assert "is truncated" in refused(2, path)


def test_an_archive_of_other_files_is_to_be_unpacked(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/unet/config.json", " " * 999)
    assert "an archive of other files: unpack it" in refused(2, tmp_path / "model.zip")


def test_torchscript(tmp_path, refused):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-L-14.pt")
    assert "is a TorchScript program" in refused(2, tmp_path / "ViT-L-14.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": {}}, {"a": {"b": 3}}])
def test_pickles_without_named_tensors(tmp_path, refused, content):
    torch.save(content, tmp_path / "model.ckpt")
    assert "holds no named tensors" in refused(2, tmp_path / "model.ckpt")


# The right kind with wrong tensors

def drop(state, name):
    del state[name]


@pytest.mark.parametrize("change, message", [
    (lambda s: drop(s, UNET + "out.2.bias"),
     "its UNet is not Stable Diffusion 1.5's: 1 missing (conv_out.bias)"),
    (lambda s: s.update({UNET + "extra.weight": torch.ones(1)}), "1 unexpected (extra.weight)"),
    (lambda s: s.update({UNET + "out.2.bias": torch.ones(5)}), "conv_out.bias is (5,), expected (4,)"),
    (lambda s: drop(s, "first_stage_model.decoder.conv_in.weight"), "missing (decoder.conv_in.weight"),
    (lambda s: drop(s, "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
     "missing (text_model.embeddings.token_embedding.weight"),
    (lambda s: s.update({"cond_stage_model.transformer.final_layer_norm.bias": torch.ones(32)}),
     "has text_model.final_layer_norm.bias twice"),
    (lambda s: s.update({UNET + "out.2.bias": torch.ones(4, dtype=torch.int8)}),
     "conv_out.bias is I8, not floating point"),
    (lambda s: s.update({UNET + "out.2.bias": torch.tensor([1, 2, float("nan"), 4])}),
     "conv_out.bias has values that")])
def test_wrong_tensors(tmp_path, states, refused, change, message):
    state = own(ldm(states))
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    assert message in refused(3, tmp_path / "model.safetensors")


def test_values_that_half_precision_cannot_hold(tmp_path, states, refused):
    state = own(ldm(states))
    state[UNET + "out.2.bias"][0] = 1e6
    save_file(state, tmp_path / "model.safetensors")
    assert "not finite (as torch.float16)" in refused(3, tmp_path / "model.safetensors", "--dtype", "fp16")


def test_tensors_that_share_memory(tmp_path, out, states, expected):
    state = ldm(states)
    ones = torch.ones(32)
    names = ["cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight",
             "cond_stage_model.transformer.text_model.encoder.layers.1.layer_norm1.weight"]
    torch.save(state | dict.fromkeys(names, ones), tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", "--output", out)
    found = load_file(out / "text_encoder.safetensors")
    assert all((found[name.removeprefix("cond_stage_model.transformer.")] == 1).all() for name in names)


# Pickles

class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call, name", [
    (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
    (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "eval"),
    (lambda marker: Call(subprocess.check_call, ["touch", str(marker)]), ".check_call")])
@pytest.mark.parametrize("kind", ["zip", "legacy", 2])
def test_pickles_never_run_code(tmp_path, refused, call, name, kind):
    marker, path = tmp_path / "marker", tmp_path / "model.ckpt"
    value = {"state_dict": {UNET + "out.2.bias": torch.ones(4)}, "callbacks": call(marker)}
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps({"x": call(marker)}, protocol=kind))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(4, path)
    assert name in message and "Nothing was run" in message
    assert not marker.exists()


@pytest.fixture
def lightning(monkeypatch):
    """Modules with the names of pytorch_lightning's, gone before the file is read."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks",
             "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules[names[-1]]
    for cls in (type("ModelCheckpoint", (), {}), type("AttributeDict", (dict,), {})):
        cls.__module__ = names[-1]
        setattr(module, cls.__name__, cls)
    yield module
    assert "pytorch_lightning.callbacks" not in sys.modules


def settings() -> dict:
    """What training scripts leave beside the tensors, as the real libraries write it."""
    found = {"args": argparse.Namespace(lr=1e-4, output=Path("runs/a")), "started": datetime.datetime.now(),
             "counts": collections.defaultdict(int, {"a": 1}), "loss": np.float64(0.5), "rate": np.arange(3),
             "seen": {1, 2}, "counter": collections.Counter("ab"), "last": collections.deque([1], 9),
             "run": uuid.uuid4(), "steps": range(9), "torch": torch.__version__,
             "more": types.SimpleNamespace(a=1)}
    try:
        import omegaconf
    except ImportError:
        return found
    return {**found, "config": omegaconf.OmegaConf.create({"lr": 1e-4, "layers": [1, 2], "net": {"dim": 3}})}


@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_checkpoints(tmp_path, out, states, expected, lightning, monkeypatch, zipped):
    state = lightning.ModelCheckpoint()
    state.best_model_score = np.float64(0.5)
    value = {"state_dict": ldm(states), "epoch": 3, "settings": settings(),
             "hyper_parameters": lightning.AttributeDict(lr=1e-4, names=["a"]),
             "callbacks": {lightning.ModelCheckpoint: {"best": np.float64(0.5)}, "x": state}}
    torch.save(value, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    record = convert(tmp_path / "model.ckpt", "--output", out)["conversion"]
    agree(out, expected)
    assert record["dropped"] == {"callbacks": 1, "epoch": 1, "hyper_parameters": 1, "settings": 1}
    assert not any(isinstance(name, tuple) for name in torch.serialization.get_safe_globals())


def test_lightning_names_hide_no_call(tmp_path, refused, lightning, monkeypatch):
    marker = tmp_path / "marker"
    value = {"a": lightning.ModelCheckpoint(), "b": Call(os.system, f"touch {marker}")}
    torch.save(value, tmp_path / "model.ckpt")
    assert "posix.system" in refused(4, tmp_path / "model.ckpt")
    assert not marker.exists()
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)


# Writing

def test_a_failure_leaves_nothing(monkeypatch, saved, tmp_path, refused):
    real, calls = parts.write_tensors, []

    def write(part, path, *rest):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        real(part, path, *rest)
    monkeypatch.setattr(parts, "write_tensors", write)
    refused(1, saved)
    assert len(calls) == 2 and not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_folder(monkeypatch, saved, out, refused):
    convert(saved, "--output", out)
    before = contents(out)

    def fail(value, path):
        raise OSError("No space left on device")
    monkeypatch.setattr(convert_sd15, "write_json", fail)
    assert "No space left" in refused(1, saved)
    assert contents(out) == before


def test_an_interrupt_leaves_nothing(monkeypatch, saved, refused):
    def interrupt(*rest):
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints, "read_tensor", interrupt)
    refused(130, saved)


def test_values_are_read_only_after_all_checks(tmp_path, states, refused, monkeypatch):
    state = {k: v for k, v in ldm(states).items() if k != UNET + "out.2.bias"}
    save_file(own(state), tmp_path / "model.safetensors")

    def forbidden(*rest):
        raise AssertionError("read")
    monkeypatch.setattr(parts, "read_value", forbidden)
    refused(3, tmp_path / "model.safetensors")


def test_the_script_runs_from_anywhere(tmp_path, saved):
    command = [sys.executable, str(SCRIPT), str(saved), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "UNet: 686 tensors" in done.stdout and "written to" in done.stdout
    assert "Traceback" not in done.stderr
    assert load_models(tmp_path / "out").config["conversion"]["source"] == saved.name


def test_a_full_disk_leaves_nothing(tmp_path, saved):
    limit = 1 << 20  # bytes of a file, past which writing fails as on a full disk
    done = subprocess.run(
        [sys.executable, str(SCRIPT), saved, "--output", tmp_path / "new" / "out"], capture_output=True,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == []


def test_a_termination_leaves_nothing(tmp_path, saved):
    code = ("import os, runpy, signal, sys; import models.load\n"
            "models.load.write_whole = lambda *rest: os.kill(os.getpid(), signal.SIGTERM)\n"
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, saved, "--output", tmp_path / "out"],
                          cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr == "" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("types", [[torch.float64, torch.float16, torch.float32], [torch.bfloat16]])
def test_files_are_as_safetensors_writes_them(tmp_path, types):
    state = {f"t{i}": torch.randn(shape).to(types[i % len(types)])
             for i, shape in enumerate([(3,), (), (2, 5), (0, 4), (7, 1, 1), (1,)])}
    lazy = {k: Lazy(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in state.items()}
    part = Part(lazy, tmp_path, {})
    parts.write_tensors(part, tmp_path / "ours.safetensors", None, tqdm(disable=True))
    save_file(state, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in theirs.items())
    assert (tmp_path / "ours.safetensors").stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size


def test_memory(tmp_path, states):
    """What a larger file takes beyond a small one: a part of itself."""
    with torch.device("meta"):
        wide = UNet(UNetConfig(channels=(128, 256, 384, 384), context_dim=32)).state_dict()
    larger = {**states, "unet": {k: torch.zeros(v.shape) for k, v in wide.items()}}
    peaks, sizes = [], []
    for number, source in enumerate((states, larger)):
        file = put(ldm(source), tmp_path / f"{number}.safetensors")
        peaks.append(measure("weights/convert_sd15.py", file, "--output", tmp_path / f"out{number}")[1])
        sizes.append(file.stat().st_size / 1e9)
    assert sizes[1] - sizes[0] > 0.25
    assert peaks[1] - peaks[0] < 0.3 * (sizes[1] - sizes[0])


def test_a_file_of_the_small_world_is_called_so(refused):
    folder = ROOT / "weights" / "toyworld"
    said = refused(2, folder / "unet.safetensors")
    assert "is a part of the small world" in said and f"ready as it is: give --weights {folder}" in said


# Everything at once, as at full size

def test_proof_at_small_sizes(tmp_path, capfd, monkeypatch):
    """Of one layout, as each has its tests above; `parity_full.py --small` takes all."""
    for name, layouts in (("LAYOUTS", LAYOUTS), ("CONTROLNET_LAYOUTS", CONTROLNET_LAYOUTS)):
        first = next(iter(layouts))
        monkeypatch.setattr(parity_full, name, {first: layouts[first]})

    def in_this_process(script: str, *arguments) -> tuple[float, float]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return 0.0, 0.0

    monkeypatch.setattr(parity_full, "measure", in_this_process)
    prove(SMALL, tmp_path, 64)
    rows = capfd.readouterr().out
    assert all(f"| {name}" in rows for name in (next(iter(LAYOUTS)), next(iter(CONTROLNET_LAYOUTS))))
    assert "with MoA" in rows
