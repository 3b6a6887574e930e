"""Multimodal prompts: a photo fused into the word that names its subject (MoA paper, Eq. 8, Fig. 5)."""
from dataclasses import dataclass

import torch
import torch.nn as nn
from einops import rearrange, repeat
from torch import Tensor


@dataclass(frozen=True)
class PromptConfig:
    """Sizes; the defaults are SD1.5's with CLIP ViT-L/14."""

    text_dim: int = 768
    image_dim: int = 768
    hidden: int = 1536
    layers: int = 16  # transformer blocks of the UNet


class PositionalEncoding(nn.Module):
    """PE(t, l): learned frequencies of the timestep and the layer, as sines and cosines.

    Both axes are scaled to [0, 1]. On raw timesteps one optimizer step of 1e-3 would turn a phase by 1 rad at
    t = 1000, and training would scramble the encoding. The frequencies start random, with the spreads
    that NeTI (arXiv 2305.15391) uses: .03 for each timestep, 2 for each layer.
    """

    # Powers of two: the frequencies of older files, which had raw axes, are then rescaled without rounding.
    units = (1024, 16)

    def __init__(self, dim: int):
        super().__init__()
        self.frequencies = nn.Parameter(
            torch.randn(2, dim // 2) * torch.tensor([0.03, 2.0])[:, None] * torch.tensor(self.units)[:, None])

    def forward(self, t: Tensor, layers: Tensor) -> Tensor:
        """(B,) timesteps in 0..999 and (L,) layer indices -> (L, B, dim)."""
        t, layers = t[None, :, None] / self.units[0], layers[:, None, None] / self.units[1]
        angles = t * self.frequencies[0] + layers * self.frequencies[1]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MultimodalPrompt(nn.Module):
    """Image feature + text token + (t, l) -> the token that only the personalized experts see.

    m = [f, text token]; token = text token + MLP(LN(m) + LN(PE(t, l))). The MLP's last layer starts
    at zero, so at the start the token is the text token and the whole model is the base model.
    """

    def __init__(self, cfg: PromptConfig):
        super().__init__()
        self.cfg = cfg
        dim = cfg.text_dim + cfg.image_dim
        self.norm_m = nn.LayerNorm(dim)
        self.encoding = PositionalEncoding(dim)
        self.norm_pe = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, cfg.hidden), nn.GELU(),
                                 nn.Linear(cfg.hidden, cfg.hidden), nn.GELU(),
                                 nn.Linear(cfg.hidden, cfg.text_dim))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, text: Tensor, features: Tensor, positions: Tensor, present: Tensor,
                t: Tensor) -> Tensor:
        """The personalized experts' context for all layers at one timestep, in one batched call.

        Args:
            text: (B, M, C) encoded prompt. features: (B, S, F) image features f.
            positions: (B, S) int64, the token that each subject is fused into.
            present: (B, S) bool; a slot that is not present changes nothing.
            t: (B,) timesteps.
        Returns: (L, B, M, C).
        """
        index = repeat(positions, "b s -> b s c", c=text.shape[-1])
        words = text.gather(1, index)  # (B, S, C)
        m = self.norm_m(torch.cat([features, words], dim=-1))
        layers = torch.arange(self.cfg.layers, device=text.device)
        pe = self.encoding(t, layers).to(self.norm_pe.weight.dtype)  # angles keep full precision
        pe = self.norm_pe(pe)  # (L, B, C + F)
        change = self.mlp(m[None] + rearrange(pe, "l b c -> l b 1 c"))  # (L, B, S, C), Eq. 8
        change = change * present[None, :, :, None]
        tokens = text.expand(self.cfg.layers, *text.shape)
        return tokens.scatter_add(2, index.expand(self.cfg.layers, *index.shape), change.to(text.dtype))
