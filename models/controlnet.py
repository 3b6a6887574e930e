"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a picture, such as a skeleton, steers the UNet.

A copy of the UNet's encoder reads the latents and the picture; what it finds is added to the UNet's skips
through 1x1 convolutions that start at zero. Module names are those of diffusers' files. With the default
config: 340 tensors, 361,279,120 parameters.
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
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


@dataclass(frozen=True)
class Control:
    """A ControlNet at work: the picture that it follows, how strongly, and in which steps."""

    net: ControlNet
    hint: Tensor  # (1 or B, 3, H, W) in [0, 1], RGB; brought to the size of what is drawn
    scale: float = 1.0
    start: float = 0.0  # shares of the sampler's steps
    end: float = 1.0

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in step 0, 1, ... of `steps`."""
        return self.scale != 0 and self.start <= step / steps and (step + 1) / steps <= self.end

    def residuals(self, x: Tensor, t: Tensor, text: Tensor, prompted: int) -> list[Tensor]:
        """What it adds to the UNet on x (N, 4, h, w), whose last `prompted` samples have the prompt.

        text: (N, M, C) the plain text, with MoA too: subject tokens are unknown to a ControlNet.
        """
        rows = prompted if self.net.cfg.global_pool else len(x)
        found = self.net(x[-rows:], t[-rows:], text[-rows:], self.hint_for(x, rows))
        unsteered = (0,) * 6 + (len(x) - rows, 0)  # zeros in front, for the samples without the prompt
        return [F.pad(residual * self.scale, unsteered) for residual in found]

    def hint_for(self, x: Tensor, rows: int) -> Tensor:
        """The hint, as large as what the latents x will be, for `rows` samples."""
        hint, size = self.hint.to(x.device, torch.float32), [n * self.net.cfg.factor for n in x.shape[-2:]]
        if list(hint.shape[-2:]) != size:
            hint = F.interpolate(hint, size, mode="bilinear", antialias=True)
        return hint.repeat(1 if len(hint) == 1 else rows // len(hint), 1, 1, 1).to(x.dtype)


def steering(controls: Sequence[Control], text: Tensor, prompted: int, timesteps: Sequence[int]
             ) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """What ControlNets add to the UNet at x, t: the sum of those that act, [] of none. text, prompted: as in
    `Control.residuals`. timesteps: the sampler's, falling; how many lie above t says which step it is."""
    def steer(x: Tensor, t: Tensor) -> list[Tensor]:
        step = sum(passed > int(t[0]) for passed in timesteps)
        return add_residuals(control.residuals(x, t, text, prompted)
                             for control in controls if control.acts(step, len(timesteps)))

    return steer
