"""Shared by all tests: the repository root on the path, a torchvision that can be imported, a tiny world."""
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# The models are tiny and there is a process for each core (pyproject.toml): more threads only wait for each
# other. Before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.open_clip_import import mend_torchvision

mend_torchvision()  # diffusers and transformers import torchvision where it is installed

from moa import MultimodalPrompt, PromptConfig, add_moa, moa_layers, save_moa
from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import BOS, EOS, CLIPTextConfig, CLIPTextEncoder
from models.load import read_config, save_part, write_json
from models.open_clip_import import open_clip
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig

WORDS = "a and woman man girl old on the beach , riding bike"


# The tests of moa, models and samplers themselves. The others are run without counting lines, which would
# cost a third of their time.
COUNTED = ("test_moa", "test_models", "test_samplers", "test_controlnet", "test_load", "test_promises",
           "test_promises_sampler", "test_promises_encoder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem not in COUNTED:
            item.add_marker("no_cover")


def small_models(dim: int = 16, channels: tuple[int, ...] = (8, 16, 16, 16),
                 cells: tuple[int, ...] = (8, 8, 8, 8)) -> dict[str, torch.nn.Module]:
    encode = open_clip().tokenizer.SimpleTokenizer().encode
    kept = tuple(sorted({*encode(WORDS), BOS, EOS}))
    image = CLIPImageConfig(image_size=32, patch_size=8, dim=dim, layers=1, heads=2, output_dim=dim)
    return {"unet": UNet(UNetConfig(channels=channels, heads=2, context_dim=dim, groups=4)),
            "vae": AutoencoderKL(VAEConfig(channels=cells, layers=1, groups=4)),
            "text_encoder": CLIPTextEncoder(CLIPTextConfig(dim=dim, layers=2, heads=2, kept_tokens=kept)),
            "image_encoder": CLIPImageEncoder(image)}


def seed_and_restore() -> Iterator[None]:
    """A test gives the same result alone, in any order, in any process; the signals that train.py handles
    are the process's own again afterwards."""
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Before what a module makes once, and before each test.
seeded_module = pytest.fixture(scope="module", autouse=True)(seed_and_restore)
seeded = pytest.fixture(autouse=True)(seed_and_restore)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A weights folder whose pictures show every difference: routers and subject tokens act strongly."""
    return save_world(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def wide_world(tmp_path_factory) -> Path:
    """The same with other sizes everywhere."""
    sizes = {"dim": 24, "channels": (16, 8, 24, 24), "cells": (8, 12, 8)}
    return save_world(tmp_path_factory.mktemp("weights") / "wide", 40, **sizes)


def save_world(folder: Path, image_size: int = 64, dim: int = 16, **sizes) -> Path:
    """Random weights, MoA's among them, the same ones each time."""
    torch.manual_seed(0)
    models = small_models(dim, **sizes)
    for part, module in models.items():
        save_part(module, folder, part)
    write_json({**read_config(folder), "image_size": image_size,
                "sampling": {"steps": 3, "guidance_scale": 3.0}}, folder / "config.json")
    unet, prompt = add_moa(models["unet"]), MultimodalPrompt(PromptConfig(dim, dim, 32, 16))
    with torch.no_grad():
        for _, _, layer in moa_layers(unet):
            layer.router.f.weight.normal_()
            for weight in layer.personalized.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        prompt.mlp[-1].weight.normal_(std=5)
    save_moa(unet, prompt, folder / "moa.safetensors")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, but for two photos."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("ada.png", "bob.png"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(name)
    return tmp_path
