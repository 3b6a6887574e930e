"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a picture, such as a skeleton, steers the UNet.

A copy of the UNet's encoder reads the latents and the picture; what it finds is added to the UNet's skips
through 1x1 convolutions that start at zero. Module names are those of diffusers' files. With the default
config: 340 tensors, 361,279,120 parameters.
"""
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models.unet import UNet, UNetConfig, UNetEncoder


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Sizes; the encoder's are those of the UNet that is steered, the defaults SD1.5's."""

    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool: bool = False  # residuals are means over the pixels, as in lllyasviel's "shuffle"

    @property
    def factor(self) -> int:
        """Pixels of the hint per latent, in height and in width."""
        return 2 ** (len(self.hint_channels) - 1)


class HintEncoder(nn.Module):
    """Brings the hint to the latents' size; its last layer starts at zero."""

    def __init__(self, channels: tuple[int, ...], dim: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, coarser in pairwise(channels):
            self.blocks.append(nn.Conv2d(here, here, 3, padding=1))
            self.blocks.append(nn.Conv2d(here, coarser, 3, stride=2, padding=1))
        self.conv_out = zeroed(nn.Conv2d(channels[-1], dim, 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:  # (B, 3, 8 h, 8 w) -> (B, D, h, w)
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """`controlnet(x, t, context, hint) -> residuals` for `unet(x, t, context, residuals)`."""

    def __init__(self, cfg: ControlNetConfig):
        super().__init__(cfg)
        self.controlnet_cond_embedding = HintEncoder(cfg.hint_channels, cfg.channels[0])
        last = len(cfg.channels) - 1
        # One for each skip: of conv_in, of every resnet and of every downsampler.
        widths = [cfg.channels[0]] + [dim for level, dim in enumerate(cfg.channels)
                                      for _ in range(cfg.layers + (level < last))]
        self.controlnet_down_blocks = nn.ModuleList(zeroed(nn.Conv2d(dim, dim, 1)) for dim in widths)
        self.controlnet_mid_block = zeroed(nn.Conv2d(cfg.channels[-1], cfg.channels[-1], 1))

    @classmethod
    def of(cls, unet: UNet, hint_channels: tuple[int, ...]) -> "ControlNet":
        """A ControlNet to be trained: the encoder of a UNet without MoA, and zero convolutions.

        Raises KeyError for a UNet with MoA.
        """
        net = cls(ControlNetConfig(**asdict(unet.cfg), hint_channels=hint_channels))
        state, base = net.state_dict(), unet.state_dict()
        net.load_state_dict({name: value if name.startswith("controlnet_") else base[name]
                             for name, value in state.items()})
        return net

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """What to add to the UNet's skips and middle: 12 + 1 feature maps in SD1.5.

        Args:
            x, t: the UNet's.
            context: (B, M, C) the prompt's plain tokens, never an `ExpertContext`.
            hint: (B or 1, 3, H, W) in [0, 1], RGB, `cfg.factor` times as high and wide as x.
        """
        _, middle, skips = self.encode(x, t, context, self.controlnet_cond_embedding(hint))
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals.append(self.controlnet_mid_block(middle))
        if self.cfg.global_pool:
            residuals = [residual.mean((2, 3), keepdim=True) for residual in residuals]
        return residuals


def add_residuals(several: Iterable[list[Tensor]]) -> list[Tensor]:
    """The sum over ControlNets; [] of none."""
    return [sum(residuals) for residuals in zip(*several, strict=True)]


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
