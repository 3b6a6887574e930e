"""A ControlNet of the small world that follows poses."""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import toyworld
from images import to_picture, to_uint8
from models import load_models
from models.controlnet import Control, ControlNet
from models.load import carry_over, save_part
from pipeline import Pipeline
from toyworld.presets import SMALL
from toyworld.skeleton import draw_skeletons, scene_joints
from training.diffusion import noise_loss, noised
from training.encode import Encoded, Encoder
from training.presets import StageError
from training.stage import SHEET_GUIDANCE, Stage, save_grid

SHEET_SEEDS = range(8)  # of held-out scenes


class ControlNetStage(Stage):
    """Noise prediction by the frozen base, steered by a copy of its encoder that sees skeletons
    (arXiv 2302.05543). Only the copy is trained."""

    reads = ("weights",)
    needs_weights = True
    recordable = True

    def setup(self) -> None:
        models = self.models = load_models(self.weights, self.device)
        if models.image_encoder is None:
            raise StageError(f"{self.weights} has no image encoder")
        self.unet = models.unet.to(memory_format=torch.channels_last)
        self.module = ControlNet.of(self.unet, SMALL["controlnet"].hint_channels)
        self.module.to(memory_format=torch.channels_last)
        Pipeline(models).check_controlnet(self.module)
        encoder = Encoder(models.vae, models.text_encoder, models.image_encoder, models.tokenize, self.device)
        self.encoded = Encoded(self, encoder, self.cache)

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        batch, _ = noised(self, self.encoded(step, turn), self.encoded.null, step, turn)
        hint = to_hint([skeleton(int(seed), "train") for seed in self.order(step, turn)[:, 0]])
        return {**batch, "hint": hint.to(self.device)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, t, text = (batch[name] for name in ("x", "t", "text"))
        return noise_loss(self.unet(x, t, text, self.module(x, t, text, batch["hint"])), batch)

    def sheet(self, path: Path) -> None:
        """Held-out poses; below each what is drawn with it and, from the same noise, without."""
        hints = np.stack([skeleton(seed, "test") for seed in SHEET_SEEDS])
        captions = [toyworld.sample_scene(seed, "test").caption for seed in SHEET_SEEDS]
        pictures = [Pipeline(self.models).generate(captions, SHEET_SEEDS, steps=20,
                                                   guidance_scale=SHEET_GUIDANCE, controls=controls)
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
