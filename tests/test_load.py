"""Weights folders: what is written comes back, and what is broken is refused by name."""
import json
import os
import time

import pytest
import torch
from parity_full import random, randomize
from safetensors.torch import load_file, save_file

from models import WeightsError, load_models
from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import BOS, EOS, CLIPTextConfig, CLIPTextEncoder
from models.load import (LEFT_ALONE, carry_over, load_part, read_checkpoint, read_config, read_tensors,
                         remove_leftovers, save_part, write_json, write_whole)
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig

CONFIGS = {
    "unet": (UNet, UNetConfig(channels=(16, 24), layers=1, heads=4, context_dim=12, groups=8)),
    "vae": (AutoencoderKL, VAEConfig(channels=(8, 16), layers=1, groups=4)),
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig(
        dim=12, layers=1, heads=2, kept_tokens=(320, 786, BOS, EOS))),
    "image_encoder": (CLIPImageEncoder, CLIPImageConfig(
        image_size=16, patch_size=8, dim=16, layers=1, heads=2, output_dim=10))}


@pytest.fixture(scope="module")
def modules():
    return {part: randomize(cls(cfg)) for part, (cls, cfg) in CONFIGS.items()}


@pytest.fixture
def folder(tmp_path, modules):
    for part in ("unet", "vae", "text_encoder"):
        save_part(modules[part], tmp_path / "weights", part, torch.float32)
    return tmp_path / "weights"


@torch.no_grad()
@pytest.mark.parametrize("images", [False, True])
def test_round_trip(folder, modules, images):
    if images:
        save_part(modules["image_encoder"], folder, "image_encoder", torch.float32)
    models = load_models(folder)
    for part in CONFIGS if images else ("unet", "vae", "text_encoder"):
        loaded = getattr(models, part)
        assert loaded.cfg == CONFIGS[part][1]
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        for k, v in modules[part].state_dict().items():
            assert torch.equal(loaded.state_dict()[k], v), k
    assert (models.image_encoder is not None) == images
    assert models.config == json.loads((folder / "config.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_interface_held_fixed(folder, modules, dtype):
    save_part(modules["image_encoder"], folder, "image_encoder")
    models = load_models(str(folder), device="cpu", dtype=dtype)
    tokens = models.tokenize(["a man", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64
    context = models.text_encoder(tokens)
    assert context.shape == (2, 77, 12)
    latents = models.vae.encode(random(2, 3, 8, 12).to(dtype))
    assert latents.shape == (2, 4, 4, 6)
    eps = models.unet(latents, torch.tensor([0, 999]), context)
    assert eps.shape == latents.shape
    picture = models.vae.decode(latents)
    assert picture.shape == (2, 3, 8, 12)
    features = models.image_encoder(models.image_encoder.preprocess(random(2, 3, 20, 30).sigmoid()).to(dtype))
    assert features.shape == (2, 10)
    for value in (context, latents, eps, picture, features):
        assert value.dtype == dtype and value.isfinite().all()
    for part in CONFIGS:
        assert {p.dtype for p in getattr(models, part).parameters()} == {dtype}


def test_files_are_half_precision_by_default_and_readable_by_all(tmp_path, modules):
    save_part(modules["vae"], tmp_path, "vae")
    assert {v.dtype for v in load_file(tmp_path / "vae.safetensors").values()} == {torch.float16}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "vae.safetensors"]
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644


def test_saving_a_part_keeps_the_rest_of_the_config(folder, modules):
    write_json({**read_config(folder), "training": {"steps": 3}}, folder / "config.json")
    save_part(modules["vae"], folder, "vae")
    assert read_config(folder).keys() == {"unet", "vae", "text_encoder", "training"}


def test_carry_over(folder, modules, tmp_path):
    write_json({**read_config(folder), "training": {"steps": 3}}, folder / "config.json")
    target = tmp_path / "target"
    target.mkdir()
    write_json({"training": {"steps": 9}}, target / "config.json")
    carry_over(folder, target)
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert read_config(target)["training"] == {"steps": 9}
    assert torch.equal(load_models(target).unet.conv_in.weight, modules["unet"].conv_in.weight)


# What is broken is refused

def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def rename_all(state):
    for k in list(state):
        state["model." + k] = state.pop(k)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("conv_in.weight"), r"1 missing \(conv_in.weight\)"),
    (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
    (lambda s: s.update({"conv_in.bias": torch.zeros(())}),
     r"1 of another shape \(conv_in.bias is \(\), expected \(16,\)\)"),
    (rename_all, r"unet.safetensors does not fit its config.json: \d+ missing \(conv_in.bias, "
                 r"conv_in.weight, conv_norm_out.bias, ...\); \d+ unexpected \(model.conv_in.bias, .*\)$")])
def test_tensors_must_agree_exactly(folder, change, message):
    edit(folder / "unet.safetensors", change)
    with pytest.raises(WeightsError, match=message):
        load_models(folder)


BROKEN = [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1", "is a git-LFS pointer.*git lfs pull"),
    (b"\n<html>", "is a web page"), (b"PK\x03\x04" * 9, "is a pickle"), (b"\x80\x02}q\0.", "is a pickle"),
    (b"\x89PNG\r\n", "is a picture"), (b"junk" * 9, "is not a model file"), (b"{}", "is not a model file"),
    (b"<\0\0\0\0\0\0\0{", "is truncated"),  # 60 is the length of a header and "<"
    (b"\x10\0\0\0\0\0\0\0{" + b" " * 50, "is damaged"), (None, "is truncated"),
]


@pytest.mark.parametrize("content, message", BROKEN, ids=[message for _, message in BROKEN])
def test_files_that_hold_no_tensors_are_named(folder, content, message):
    path = folder / "text_encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(WeightsError, match=f"text_encoder.safetensors {message}"):
        load_models(folder)


@pytest.mark.parametrize(("metadata", "size", "match"), [
    (b'{"step":3,"a":"b"}', 4, r"has {'step': 3} in its __metadata__, where only text may be"),
    (b"[1]", 4, r"has \[1\] in its __metadata__"), (b'{"step":3}', 3, "is truncated")])
def test_metadata_that_is_no_text_is_named(metadata, size, match, tmp_path):
    """As other writers leave it; safetensors itself reads no such file."""
    header = b'{"__metadata__":%s,"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' % metadata
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    with pytest.raises(WeightsError, match=match):
        read_tensors(tmp_path / "x.safetensors")


def test_missing_file(folder):
    (folder / "vae.safetensors").unlink()
    with pytest.raises(WeightsError, match="vae.safetensors not found"):
        load_models(folder)


@pytest.mark.parametrize("text, message", [
    (b"{", "not valid JSON"), (b"[]", "must hold a JSON object"), (b"{}", "no usable sizes for 'unet'"),
    (b'{"unet": {"colour": 1}}', "no usable sizes for 'unet'.*colour")])
def test_bad_config(folder, text, message):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(WeightsError, match=message):
        load_models(folder)


def test_a_byte_order_mark_changes_nothing(folder):
    path = folder / "config.json"
    before = read_config(folder)
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(before), encoding=encoding)
        assert read_config(folder) == before


@pytest.mark.parametrize("part, sizes", [
    ("unet", {"channels": "wide"}), ("unet", {"channels": [15, 24]}), ("unet", {"heads": 5}),
    ("vae", {"groups": 0}), ("text_encoder", {"length": -3}),
    ("image_encoder", {"heads": 3})])
def test_sizes_that_make_no_model(folder, modules, part, sizes):
    save_part(modules["image_encoder"], folder, "image_encoder")
    config = read_config(folder)
    write_json({**config, part: {**config[part], **sizes}}, folder / "config.json")
    with pytest.raises(WeightsError, match="no usable sizes|make no model"):
        load_models(folder)


def test_no_folder(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(WeightsError, match="is not a weights folder"):
            load_models(path)


# Writing

@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_that_fails_leaves_nothing_behind(tmp_path, before):
    path = tmp_path / "file"
    if before:
        path.write_text(before)

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    with pytest.raises(OSError):
        write_whole(path, lambda temporary: None)  # wrote nothing
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("file", "old")] if before else [])


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old and long")
    write_whole(path, lambda temporary: temporary.write_text("new"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "new")]


def test_leftovers_of_killed_processes_are_deleted(tmp_path):
    """Not what may still be being written, nor what belongs to others."""
    def leave(name, seconds=2 * LEFT_ALONE):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - seconds,) * 2)

    leave(".a.png.123.tmp")
    for name, seconds in ((".a.png.124.tmp", 0), (".b.png.123.tmp", 99), (".a.png.tmp", 99), ("a.png", 99)):
        leave(name, seconds)
    remove_leftovers(tmp_path, {tmp_path / "a.png"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.png.124.tmp", ".a.png.tmp", ".b.png.123.tmp", "a.png"]


def test_a_checkpoint_comes_back_or_is_refused(tmp_path):
    state = {"run": {}, "step": 3, "parameters": {"w": torch.ones(2)}, "average": {}, "optimizer": {},
             "moa": None}
    path = tmp_path / "x.pt"
    torch.save(state, path)
    assert read_checkpoint(path)["parameters"]["w"].tolist() == [1, 1]
    torch.save(state | {"step": "3", "moa": []}, path)
    with pytest.raises(WeightsError, match=r"x\.pt is not a checkpoint that can be read: no step, no moa in"):
        read_checkpoint(path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(WeightsError, match="damaged, no file of torch, or a pickle that could run code"):
        read_checkpoint(path)
    with pytest.raises(WeightsError, match="is not a file: give a checkpoint"):
        read_checkpoint(tmp_path / "absent.pt")


def test_load_part_loads_one_part_alone(tmp_path, modules):
    save_part(modules["vae"], tmp_path, "vae")
    assert isinstance(load_part(tmp_path, "vae"), AutoencoderKL)
