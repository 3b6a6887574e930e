"""CLIP's image encoder: a photo of a subject -> one feature vector f (MoA paper, section 3.2.1).

The vision transformer is open_clip's; with the default config it is that of ViT-L-14-quickgelu.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models.open_clip_import import open_clip

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes; the defaults are those of OpenAI's ViT-L/14."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1024
    layers: int = 24
    heads: int = 16
    output_dim: int = 768


class CLIPImageEncoder(nn.Module):
    """`image_encoder(pixels) -> (B, F)`: pooled, projected, not normalised to unit length."""

    def __init__(self, cfg: CLIPImageConfig):
        super().__init__()
        self.cfg = cfg
        transformer = open_clip().transformer
        self.visual = transformer.VisionTransformer(
            image_size=cfg.image_size, patch_size=cfg.patch_size, width=cfg.dim, layers=cfg.layers,
            heads=cfg.heads, mlp_ratio=4.0, output_dim=cfg.output_dim, act_layer=transformer.QuickGELU)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) as `preprocess` gives it -> (B, F)."""
        return self.visual(pixels)

    def preprocess(self, image: Tensor) -> Tensor:
        """`preprocess` for this encoder's size S."""
        return preprocess(image, self.cfg.image_size)


def preprocess(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, S, S): shorter side to the size S, bicubic, centre crop, CLIP's
    mean and spread."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        image = F.interpolate(image, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    image = image[..., top:top + size, left:left + size]
    mean, std = (torch.tensor(v, device=image.device, dtype=image.dtype)[:, None, None]
                 for v in (MEAN, STD))
    return (image - mean) / std
