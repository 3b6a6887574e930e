"""Another image encoder is a class and a name in config.json: the edit, then the commands as ever."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from parity_full import randomize
from safetensors.torch import load_file
from torch import Tensor

import sample
import train
from models import load_models
from models.load import IMAGE_ENCODERS, carry_over, read_config, save_part, write_json
from weights import convert_sd15


@dataclass(frozen=True)
class ColoursConfig:
    """Nothing of CLIP's: no square size, no patches, no heads."""

    cells: int = 2
    output_dim: int = 10


class Colours(nn.Module):
    """The mean colours of a photo's cells, projected; with a buffer."""

    def __init__(self, cfg: ColoursConfig):
        super().__init__()
        self.cfg = cfg
        self.project = nn.Linear(3 * cfg.cells ** 2, cfg.output_dim)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

    def preprocess(self, image: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(image, self.cfg.cells)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project((pixels - self.mean).flatten(1))


@pytest.fixture
def colours(world, tmp_path, monkeypatch) -> Path:
    """The tiny world with this encoder in place of CLIP's."""
    monkeypatch.setitem(IMAGE_ENCODERS, "colours", (Colours, ColoursConfig))
    folder = tmp_path / "colours"
    folder.mkdir()
    carry_over(world, folder)
    save_part(randomize(Colours(ColoursConfig())), folder, "image_encoder", torch.float32)
    write_json({**read_config(folder), "image_size": 128}, folder / "config.json")  # as the scenes have
    return folder


def test_another_image_encoder_is_trained_saved_loaded_and_drawn_with(colours, place, monkeypatch):
    before = load_file(colours / "image_encoder.safetensors")
    assert read_config(colours)["image_encoder"] == {"kind": "colours", "cells": 2, "output_dim": 10}
    monkeypatch.setattr(sys, "argv", ["train.py", "moa", "--weights", str(colours), "--output", "run",
                                      "--samples", "4", "--steps", "2", "--batch-size", "2"])
    train.main()
    models = load_models("run")
    assert isinstance(models.image_encoder, Colours) and models.image_encoder.cfg == ColoursConfig()
    assert all(torch.equal(models.image_encoder.state_dict()[k], v) for k, v in before.items())
    text = models.text_encoder.cfg.dim
    assert load_file("run/moa.safetensors")["prompt.norm_m.weight"].shape == (text + 10,)
    sample.main(["--weights", "run", "--prompt", "a woman on the beach", "--subject", "ada.png",
                 "--steps", "2", "--seed", "0", "--output", "out.png"])
    assert Path("out.png").exists()


def test_a_kind_goes_through_the_converter(colours, tmp_path):
    convert_sd15.main([str(colours), "--output", str(tmp_path / "again")])
    for name in ("image_encoder.safetensors", "unet.safetensors"):
        assert (tmp_path / "again" / name).exists()
    assert read_config(tmp_path / "again")["image_encoder"] == read_config(colours)["image_encoder"]


def test_folders_without_a_kind_have_clip(world, tmp_path):
    carry_over(world, tmp_path)
    config = read_config(tmp_path)
    assert config["image_encoder"].pop("kind") == "clip"
    write_json(config, tmp_path / "config.json")
    assert type(load_models(tmp_path).image_encoder) is IMAGE_ENCODERS["clip"][0]
    config["image_encoder"]["kind"] = "eyes"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no usable sizes for 'image_encoder'.*eyes"):
        load_models(tmp_path)
