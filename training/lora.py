"""A style: low-rank changes of a frozen base UNet, in a file that other programs read."""
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from toyworld.crayon import Crayons
from models import load_models
from models.load import Models, save_tensors
from weights.lora import LoRALayer
from images import to_uint8
from pipeline import Pipeline
from training.encode import Encoder
from training.presets import StageError
from training.prior import PriorStage
from training.stage import SHEET_GUIDANCE, SWAP_PROMPTS, checkpoint_blocks, save_grid


class LoRAStage(PriorStage):
    """LoRA (arXiv 2106.09685) of the UNet: noise prediction on pictures of one style, all else frozen.

    Without --data the style is crayons on paper (`toyworld/crayon.py`).
    """

    def setup(self) -> None:
        if self.weights is None:
            raise StageError("lora needs --weights FOLDER with a complete base model")
        models = load_models(self.weights, self.device)
        self.unet = models.unet.to(memory_format=torch.channels_last)
        self.encode = Encoder(models.vae, models.text_encoder, None, models.tokenize, self.device)
        self.size = models.config.get("image_size", self.size)
        if self.config.checkpointing:
            checkpoint_blocks(self.unet)
        cfg = self.config
        # Kohya's names: web UIs, diffusers and trainers read them, and each layer has its alpha.
        self.module = nn.ModuleDict({
            f"lora_unet_{name.replace('.', '_')}": LoRALayer(layer, cfg.lora_rank, cfg.lora_alpha)
            for name, layer in self.unet.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and set(cfg.lora_layers) & set(name.split("."))})
        self.samples = self.training_samples()
        if self.data is None:
            self.samples = Crayons(self.samples)

    def sheet(self, path: Path) -> None:
        """First row without, second row with the LoRA: same prompts and seeds."""
        encode = self.encode
        pipeline = Pipeline(Models(self.unet, encode.vae, encode.text_encoder, encode.tokenize, None,
                                   {"image_size": self.size}))
        rows = []
        for enabled in (False, True):
            for layer in self.module.values():
                layer.enabled = enabled
            rows.append(to_uint8(pipeline.generate(
                [f"a woman {what}" for what in SWAP_PROMPTS], range(len(SWAP_PROMPTS)), steps=20,
                guidance_scale=SHEET_GUIDANCE)))
        save_grid(rows, path)

    def export(self, folder: Path) -> None:
        # One entry: safetensors writes several in any order, and equal runs shall give equal files.
        metadata = {"settings": json.dumps(asdict(self.config))}
        save_tensors(self.module.state_dict(), folder / "lora.safetensors", torch.float16, metadata)
