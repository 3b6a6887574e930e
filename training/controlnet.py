"""A ControlNet of the small world that follows poses."""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import toyworld
from toyworld.skeleton import draw_skeletons, scene_joints
from models import load_models
from models.controlnet import ControlNet
from models.load import Models, carry_over, save_part
from images import to_picture, to_uint8
from pipeline import Control, Pipeline
from training.encode import Encoder
from training.presets import SMALL, StageError
from training.prior import PriorStage
from training.stage import SHEET_GUIDANCE, save_grid

SHEET_SEEDS = range(8)  # of held-out scenes


class ControlNetStage(PriorStage):
    """Noise prediction by the frozen base, steered by a copy of its encoder that sees skeletons
    (arXiv 2302.05543). Only the copy is trained."""

    reads = ("weights",)

    def setup(self) -> None:
        if self.weights is None:
            raise StageError("controlnet needs --weights FOLDER with a complete base model")
        models = load_models(self.weights, self.device)
        if models.image_encoder is None:
            raise StageError(f"{self.weights} has no image encoder")
        self.size = models.config.get("image_size", self.size)
        if self.size != toyworld.SIZE:
            raise StageError(f"{self.weights} draws {self.size} pixels, the small world's skeletons have "
                             f"{toyworld.SIZE}: only its own base model can be given a ControlNet here")
        self.unet = models.unet.to(memory_format=torch.channels_last)
        self.encode = Encoder(models.vae, models.text_encoder, models.image_encoder, models.tokenize,
                              self.device)
        self.module = ControlNet.of(self.unet, SMALL["controlnet"].hint_channels)
        self.module.to(memory_format=torch.channels_last)
        Pipeline(models).check_controlnet(self.module)
        self.samples = self.training_samples()

    def inputs(self, step: int) -> dict[str, Tensor]:
        hint = to_hint([skeleton(int(seed), "train") for seed in self.order(step)[:, 0]])
        return {**super().inputs(step), "hint": hint.to(self.device)}

    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        x, t, text = (inputs[name] for name in ("x", "t", "text"))
        return self.unet(x, t, text, self.module(x, t, text, inputs["hint"]))

    def sheet(self, path: Path) -> None:
        """Held-out poses; below each what is drawn with it and, from the same noise, without."""
        encode = self.encode
        models = Models(self.unet, encode.vae, encode.text_encoder, encode.tokenize, encode.image_encoder,
                        {"image_size": self.size})
        hints = np.stack([skeleton(seed, "test") for seed in SHEET_SEEDS])
        captions = [toyworld.sample_scene(seed, "test").caption for seed in SHEET_SEEDS]
        pictures = [Pipeline(models).generate(captions, SHEET_SEEDS, steps=20, guidance_scale=SHEET_GUIDANCE,
                                              controls=controls)
                    for controls in ([Control(self.module, to_hint(hints))], [])]
        save_grid([hints, *map(to_uint8, pictures)], path)

    def export(self, folder: Path) -> None:
        carry_over(self.weights, folder)
        save_part(self.module, folder, "controlnet")


def skeleton(seed: int, split: str) -> np.ndarray:
    """(S, S, 3) uint8, of the people of a scene."""
    return draw_skeletons(scene_joints(toyworld.sample_scene(seed, split)))


def to_hint(pictures) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [0, 1]."""
    return to_picture(np.stack(pictures)) / 2 + 0.5
