"""The convolutional blocks that the UNet and the VAE share."""
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual; a time embedding is added between them."""

    def __init__(self, dim_in: int, dim_out: int, groups: int, eps: float, time_dim: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, dim_out)
        self.norm2 = nn.GroupNorm(groups, dim_out, eps)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        if dim_in != dim_out:
            self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """(B, dim_in, h, w) and (B, time_dim) -> (B, dim_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nn.Module):
    """Halve height and width. The VAE pads right and below only, the UNet on all sides."""

    def __init__(self, dim: int, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w) -> (B, D, h/2, w/2)
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat every pixel, then convolve."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, D, h, w) -> (B, D, *size)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
