"""A style: low-rank changes of a frozen base UNet, in a file that other programs read."""
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from images import to_uint8
from models import load_models
from models.load import save_tensors
from pipeline import Pipeline
from training.diffusion import noise_loss, noised
from training.encode import Encoded, Encoder
from training.stage import SHEET_GUIDANCE, SWAP_PROMPTS, Stage, checkpoint_blocks, save_grid
from weights.lora import LoRALayer


class LoRAStage(Stage):
    """LoRA (arXiv 2106.09685) of the UNet: noise prediction on pictures of one style, all else frozen."""

    reads = ("weights", "data", "cache")
    needs_weights = True
    recordable = True

    def setup(self) -> None:
        models = self.models = load_models(self.weights, self.device)
        self.unet = models.unet.to(memory_format=torch.channels_last)
        cfg = self.config
        if cfg.checkpointing:
            checkpoint_blocks(self.unet)
        # Kohya's names: web UIs, diffusers and trainers read them, and each layer has its alpha.
        self.module = nn.ModuleDict({
            f"lora_unet_{name.replace('.', '_')}": LoRALayer(layer, cfg.lora_rank, cfg.lora_alpha)
            for name, layer in self.unet.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and set(cfg.lora_layers) & set(name.split("."))})
        encoder = Encoder(models.vae, models.text_encoder, None, models.tokenize, self.device)
        self.encoded = Encoded(self, encoder, self.cache)

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        return noised(self, self.encoded(step, turn), self.encoded.null, step, turn)[0]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return noise_loss(self.unet(batch["x"], batch["t"], batch["text"]), batch)

    def sheet(self, path: Path) -> None:
        """First row without, second row with the LoRA: same prompts and seeds."""
        rows = []
        for enabled in (False, True):
            for layer in self.module.values():
                layer.enabled = enabled
            rows.append(to_uint8(Pipeline(self.models).generate(
                [f"a woman {what}" for what in SWAP_PROMPTS], range(len(SWAP_PROMPTS)), steps=20,
                guidance_scale=SHEET_GUIDANCE)))
        save_grid(rows, path)

    def export(self, folder: Path) -> None:
        # One entry: safetensors writes several in any order, and equal runs shall give equal files.
        metadata = {"settings": json.dumps(asdict(self.config))}
        save_tensors(self.module.state_dict(), folder / "lora.safetensors", torch.float16, metadata)
