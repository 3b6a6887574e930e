"""The autoencoder of Stable Diffusion: pictures in [-1, 1] <-> latents, a fraction of their size.

With the default config: 248 tensors, 83,653,863 parameters, latents an eighth as wide and high.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.resnet import Downsample, ResnetBlock, Upsample

LATENT_SCALE = 0.18215  # brings the latents to about unit variance
VAE_EPS = 1e-6  # of every norm in the autoencoder; the UNet's resnets have 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Sizes; the defaults are SD1.5's. The decoder has one resnet more per level."""

    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32

    @property
    def factor(self) -> int:
        """Picture size over latent size."""
        return 2 ** (len(self.channels) - 1)


class VAEAttention(nn.Module):
    """Single-head self-attention over the pixels, with a residual."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, VAE_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w) -> (B, D, h, w)
        tokens = rearrange(self.group_norm(x), "b d h w -> b 1 (h w) d")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "b 1 (h w) d -> b d h w", h=x.shape[2])


class MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim, groups, VAE_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(dim, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets of one resolution, then a change of resolution unless it is the last level."""

    def __init__(self, dim_in: int, dim: int, layers: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(dim if i else dim_in, dim, groups, VAE_EPS) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Encoder(nn.Module):
    """Picture -> the posterior's mean and log-variance, before `quant_conv`."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        channels, last = cfg.channels, len(cfg.channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], dim, cfg.layers, cfg.groups) for i, dim in enumerate(channels))
        for i, level in enumerate(self.down_blocks):
            level.downsamplers = nn.ModuleList(
                [] if i == last else [Downsample(channels[i], symmetric=False)])
        self.mid_block = MidBlock(channels[-1], cfg.groups)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, channels[-1], VAE_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 8, h, w)
        x = self.conv_in(image)
        for level in self.down_blocks:
            x = level(x)
            for downsample in level.downsamplers:
                x = downsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents, after `post_quant_conv` -> picture."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        channels = cfg.channels[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], cfg.groups)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], dim, cfg.layers + 1, cfg.groups)
            for i, dim in enumerate(channels))
        for i, level in enumerate(self.up_blocks):
            level.upsamplers = nn.ModuleList([] if i == last else [Upsample(channels[i])])
        self.conv_norm_out = nn.GroupNorm(cfg.groups, channels[-1], VAE_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, h, w) -> (B, 3, H, W)
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
            for upsample in level.upsamplers:
                x = upsample(x, size=(2 * x.shape[2], 2 * x.shape[3]))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """`encode` and `decode` speak scaled latents, the ones that the UNet denoises."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latents; the latter is clamped to [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4, h, w), the posterior mean, scaled.

        Raises ValueError when H or W is no multiple of the latents' cell.
        """
        if image.shape[-2] % self.cfg.factor or image.shape[-1] % self.cfg.factor:
            raise ValueError(f"picture size {tuple(image.shape[-2:])} must be a multiple of "
                             f"{self.cfg.factor}")
        return self.posterior(image)[0] * LATENT_SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, H, W), in [-1, 1] up to what the decoder overshoots."""
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))

    @torch.no_grad()
    def normalize_latents(self, mean: Tensor, std: Tensor) -> None:
        """Fold per-channel statistics in, so that scaled latents have mean 0 and spread 1.

        `mean` and `std` (4,) are those of the unscaled latents as they are now. `decode` undoes
        what `encode` has gained, so pictures stay the same.
        """
        shift, gain = mean, 1 / (LATENT_SCALE * std)
        weight, bias = self.quant_conv.weight, self.quant_conv.bias
        channels = len(mean)
        weight[:channels] *= gain[:, None, None, None]
        bias[:channels] = (bias[:channels] - shift) * gain
        bias[channels:] += 2 * gain.log()
        self.post_quant_conv.bias += (self.post_quant_conv.weight[:, :, 0, 0] @ shift)
        self.post_quant_conv.weight /= gain[None, :, None, None]
