"""A training step as FastComposer's (arXiv 2305.10431), in diffusers and transformers, with random weights.

For `training.py`, as what to compare with: the whole UNet is trained in fp32 under bf16 autocast, with it the
module that fuses an image feature into a word and the last two layers of the image encoder; VAE, text
encoder and the rest of the image encoder are frozen in bf16 and run in each step, the image encoder on four
pictures of people per sample, used or not. Half of the batches have the masked loss; the cross-attention
of eleven layers keeps its probabilities for the localization loss. Written from the paper and the released
code's settings; data and optimizer are those of our own stages.
"""
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange, repeat
from torch import Tensor

from models.clip_text import Tokenizer
from models.load import build_config, read_config
from models.vae import LATENT_SCALE
from moa.loss import masked_loss, object_loss
from images import to_picture
from samplers import add_noise
from training.encode import Encoder
from training.stage import Stage, step_generator
from tests.parity_full import public

LOCALIZED = ("down_blocks.1.", "down_blocks.2.", "mid_block.", "up_blocks.1.", "up_blocks.2.")
LOCALIZATION_WEIGHT = 1e-3
MASKED_PROBABILITY = 0.5  # of a batch


class Perceptron(nn.Module):
    """LayerNorm and two layers, with a residual or without."""

    def __init__(self, dim_in: int, dim: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(nn.LayerNorm(dim_in), nn.Linear(dim_in, dim), nn.GELU(),
                                    nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.residual else self.layers(x)


class Fuse(nn.Module):
    """Word and image feature -> the token in the word's place, behind the text encoder."""

    def __init__(self, dim: int, image_dim: int):
        super().__init__()
        self.first, self.second = Perceptron(dim + image_dim, dim, False), Perceptron(dim, dim, True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, features: Tensor, positions: Tensor, present: Tensor) -> Tensor:
        """(B, M, C), (B, S, F), (B, S), (B, S) -> (B, M, C)."""
        index = repeat(positions, "b s -> b s c", c=text.shape[-1])
        words = text.gather(1, index)
        tokens = self.norm(self.second(self.first(torch.cat([words, features], -1)) + words))
        change = (tokens - words) * present[..., None]
        return text.scatter_add(1, index, change.to(text.dtype))


class FastComposerStage(Stage):
    """The stage that `training.py` measures beside ours."""

    reads = ("weights", "data")

    def setup(self) -> None:
        sizes = read_config(self.weights)
        parts = {part: build_config(sizes, part) for part in ("unet", "vae", "text_encoder", "image_encoder")}
        models = {part: public(part, cfg).requires_grad_(False).bfloat16() for part, cfg in parts.items()}
        self.resolution = parts["image_encoder"].image_size
        unet, image_encoder = models["unet"].float().requires_grad_(), models["image_encoder"]
        for layer in image_encoder.vision_model.encoder.layers[-2:]:
            layer.float().requires_grad_()
        fuse = Fuse(parts["text_encoder"].dim, parts["image_encoder"].output_dim)
        self.module = nn.ModuleDict({"unet": unet, "image_encoder": image_encoder, "fuse": fuse})
        vae, text_encoder = (models[part].to(self.device) for part in ("vae", "text_encoder"))
        self.encode = Encoder(
            SimpleNamespace(encode=lambda x: vae.encode(x).latent_dist.sample() * LATENT_SCALE),
            lambda tokens: text_encoder(tokens).last_hidden_state, None,
            Tokenizer(parts["text_encoder"]), self.device)
        self.probabilities: list[Tensor] = []
        for name, module in unet.named_modules():
            if name.endswith("attn2") and name.startswith(LOCALIZED):
                self.keep_probabilities(module)

    def keep_probabilities(self, attention: nn.Module) -> None:
        """Fused attention has none: they are computed in the open, as FastComposer does."""
        scores = attention.get_attention_scores

        def kept(*args) -> Tensor:
            self.probabilities.append(scores(*args))
            return self.probabilities[-1]

        attention.get_attention_scores = kept
        attention.set_processor(AttnProcessor())

    def features(self, samples: list) -> Tensor:
        """(B, S, F) of all slots for people, whether somebody is in them or not."""
        slots, size = self.config.max_people, self.resolution
        photos = to_picture(np.concatenate([sample.references for sample in samples]), self.device)
        photos = F.interpolate(photos, (size, size), mode="bilinear", antialias=True)
        return rearrange(self.module["image_encoder"](photos).image_embeds, "(b s) f -> b s f", s=slots)

    def batch(self, step: int, turn: int = 0) -> dict:
        """Only the samples are read ahead: a part of the image encoder is trained."""
        return {"step": step, "samples": self.read(step, turn)}

    def loss(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        step, samples = batch["step"], batch["samples"]
        batch = {**self.encode.images(samples), **self.encode.texts(samples)}
        latents, masks, positions, present = (batch[name] for name in
                                              ("latents", "masks", "positions", "present"))
        context = self.module["fuse"](batch["text"], self.features(samples), positions, present)
        generator = step_generator(self.seed, step)
        eps = self.noise(latents.shape, generator, 0)
        t = torch.randint(0, 1000, (len(samples),), generator=generator).to(self.device)
        eps_hat = self.module["unet"](add_noise(latents, eps, t), t, context).sample.float()
        people = masks.sum(1).clamp(max=1)
        masked = torch.rand((), generator=generator) < MASKED_PROBABILITY
        denoising = masked_loss(eps_hat, eps, people if masked else torch.ones_like(people))
        maps = [self.of_subjects(probabilities, positions) for probabilities in self.probabilities]
        self.probabilities.clear()
        localization = object_loss(maps, masks, present)
        return denoising + LOCALIZATION_WEIGHT * localization, {"localization": localization}

    def of_subjects(self, probabilities: Tensor, positions: Tensor) -> Tensor:
        """(B H, N, M) and (B, S) -> (B, H, N, S)."""
        maps = rearrange(probabilities.float(), "(b h) n m -> b h n m", b=len(positions))
        return maps.gather(3, repeat(positions, "b s -> b h n s", h=maps.shape[1], n=maps.shape[2]))
