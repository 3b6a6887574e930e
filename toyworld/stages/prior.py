"""The base model of the small world."""
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import toyworld
from images import to_uint8
from models.clip_text import Tokenizer
from models.load import Models, carry_over, load_part, read_config, save_part, write_json
from models.unet import UNet
from pipeline import Pipeline
from toyworld.presets import SMALL
from training.diffusion import noise_loss, noised
from training.encode import Encoded, Encoder
from training.stage import SHEET_GUIDANCE, SWAP_PROMPTS, Stage, save_grid

SHEET_PROMPTS = [f"a {noun} {what}" for noun in ("woman", "man", "girl") for what in SWAP_PROMPTS] + [
    f"{who} {what}" for who in ("a man and a woman", "a woman and a boy") for what in (
        "standing on the beach", "shaking hands in Paris", "dancing on Mars", "reading a book in the snow",
        "sitting on a sofa in the wild west", "running in a park", "waving in a night market",
        "holding a bouquet of roses in a lavender farm")]


class PriorStage(Stage):
    """The base model: noise prediction on the small world's scenes, text encoder and VAE frozen."""

    reads = ("weights", "data", "cache")
    needs_weights = True
    recordable = True

    def setup(self) -> None:
        vae, text_encoder, image_encoder = (
            load_part(self.weights, part, self.device) for part in ("vae", "text_encoder", "image_encoder"))
        tokenize = Tokenizer(text_encoder.cfg)
        self.module = UNet(SMALL["unet"])
        start_residuals_at_zero(self.module)
        self.module.to(memory_format=torch.channels_last)
        self.models = Models(self.module, vae, text_encoder, tokenize, None, {"image_size": toyworld.SIZE})
        encoder = Encoder(vae, text_encoder, image_encoder, tokenize, self.device)
        self.encoded = Encoded(self, encoder, self.cache)

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        return noised(self, self.encoded(step, turn), self.encoded.null, step, turn)[0]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return noise_loss(self.module(batch["x"], batch["t"], batch["text"]), batch)

    def sheet(self, path: Path) -> None:
        """Every context with a few activities, fixed seeds."""
        pictures = Pipeline(self.models).generate(
            SHEET_PROMPTS, range(len(SHEET_PROMPTS)), steps=20, guidance_scale=SHEET_GUIDANCE)
        save_grid(list(to_uint8(pictures).reshape(5, 8, toyworld.SIZE, toyworld.SIZE, 3)), path)

    def export(self, folder: Path) -> None:
        carry_over(self.weights, folder)
        save_part(self.module, folder, "unet")
        write_json({**read_config(folder), "image_size": toyworld.SIZE, "world": "toyworld",
                    "sampling": {"guidance_scale": SHEET_GUIDANCE, "steps": 20}}, folder / "config.json")


def start_residuals_at_zero(unet: nn.Module) -> None:
    """Every residual branch and the output start at zero: small nets then learn much faster."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
