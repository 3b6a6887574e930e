"""The UNet of Stable Diffusion 1.5: predicts the noise in a latent from its timestep and a prompt.

Module names are those of the ecosystem's files, so a converted checkpoint, a LoRA or a ControlNet
finds its layers by name. With the default config: 686 tensors, 859,520,964 parameters.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models.attention import SpatialTransformer, TransformerBlock, timestep_embedding
from models.resnet import Downsample, ResnetBlock, Upsample

RESNET_EPS = 1e-5


@dataclass(frozen=True)
class UNetConfig:
    """Sizes; the defaults are SD1.5's. Every level but the last has attention."""

    latent_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    heads: int = 8  # the number of heads, whatever the width
    context_dim: int = 768
    groups: int = 32


class DownBlock(nn.Module):
    """Resnets, each followed by attention where the level has it, then a downsampler."""

    def __init__(self, cfg: UNetConfig, level: int):
        super().__init__()
        dim, dim_in = cfg.channels[level], cfg.channels[max(level - 1, 0)]
        last = level == len(cfg.channels) - 1
        self.resnets = nn.ModuleList(
            ResnetBlock(dim if i else dim_in, dim, cfg.groups, RESNET_EPS, 4 * cfg.channels[0])
            for i in range(cfg.layers))
        self.attentions = nn.ModuleList(
            SpatialTransformer(dim, cfg.context_dim, cfg.heads, cfg.groups)
            for _ in range(0 if last else cfg.layers))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(dim, symmetric=True)])

    def forward(self, x: Tensor, emb: Tensor, context) -> tuple[Tensor, list[Tensor]]:
        """Returns the feature map and the skips that the up path takes back."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the coarsest level."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        dim = cfg.channels[-1]
        self.resnets = nn.ModuleList(
            ResnetBlock(dim, dim, cfg.groups, RESNET_EPS, 4 * cfg.channels[0]) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SpatialTransformer(dim, cfg.context_dim, cfg.heads, cfg.groups)])

    def forward(self, x: Tensor, emb: Tensor, context) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), context)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Resnets over the feature map joined with its skips, attention, then an upsampler."""

    def __init__(self, cfg: UNetConfig, level: int):
        super().__init__()
        dim, channels = cfg.channels[level], cfg.channels
        coarsest = level == len(channels) - 1
        below = dim if coarsest else channels[level + 1]  # width of what comes from the block below
        skips = [dim] * cfg.layers + [channels[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(
            ResnetBlock((dim if i else below) + skip, dim, cfg.groups, RESNET_EPS, 4 * channels[0])
            for i, skip in enumerate(skips))
        self.attentions = nn.ModuleList(
            SpatialTransformer(dim, cfg.context_dim, cfg.heads, cfg.groups)
            for _ in range(0 if coarsest else len(skips)))
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(dim)])

    def forward(self, x: Tensor, emb: Tensor, context, skips: list[Tensor]) -> Tensor:
        """Takes its skips off the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            # The size of the next skip, not twice this one: odd sizes were rounded up on the way down.
            x = upsample(x, size=skips[-1].shape[-2:])
        return x


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the timestep through a two-layer MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, 4 dim)
        features = timestep_embedding(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class UNetEncoder(nn.Module):
    """The UNet's first half, down to its middle: what a ControlNet is a copy of."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.conv_in = nn.Conv2d(cfg.latent_channels, cfg.channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(cfg.channels[0])
        self.down_blocks = nn.ModuleList(DownBlock(cfg, level) for level in range(len(cfg.channels)))
        self.mid_block = MidBlock(cfg)

    def encode(self, x: Tensor, t: Tensor, context, hint: Tensor | None = None
               ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Noisy latents (B, 4, h, w) -> the time embedding, the coarsest feature map, and all skips from
        the finest on, 12 in SD1.5. `hint` (B, D, h, w) is added behind the first convolution."""
        emb = self.time_embedding(t)
        x = self.conv_in(x)
        if hint is not None:
            x = x + hint
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, emb, context)
            skips += block_skips
        return emb, self.mid_block(x, emb, context), skips


class UNet(UNetEncoder):
    """Noise predictor: `unet(x, t, context) -> eps`."""

    def __init__(self, cfg: UNetConfig):
        super().__init__(cfg)
        self.up_blocks = nn.ModuleList(UpBlock(cfg, level) for level in reversed(range(len(cfg.channels))))
        self.conv_norm_out = nn.GroupNorm(cfg.groups, cfg.channels[0], RESNET_EPS)
        self.conv_out = nn.Conv2d(cfg.channels[0], cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context, residuals: Sequence[Tensor] = ()) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, 4, h, w) noisy latents.
            t: (B,) int64 timesteps in 0..999.
            context: (B, M, C) prompt tokens; after `add_moa` also an `ExpertContext`.
            residuals: what a ControlNet adds to the skips and, the last one, to the middle.
        Returns: eps (B, 4, h, w). Raises ValueError for another number of residuals.
        """
        emb, x, skips = self.encode(x, t, context)
        if residuals:
            *beside, middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, beside, strict=True)]
            x = x + middle
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def transformer_blocks(self) -> Iterator[TransformerBlock]:
        """The transformer blocks in forward order: layer l = 0..15 in SD1.5, the middle is 6."""
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for attention in stage.attentions:
                yield attention.transformer_blocks[0]
