"""The router: how much of each expert every pixel gets (MoA paper, Eq. 5 and 7)."""
import torch.nn as nn
from einops import rearrange
from torch import Tensor
import torch.nn.functional as F


class Router(nn.Module):
    """R = softmax(f(Z)), one weight per pixel and expert; f is linear, or an MLP with a hidden width.

    The last layer starts at zero: every expert then has the same weight everywhere.
    """

    def __init__(self, dim: int, num_experts: int = 2, hidden: int | None = None):
        super().__init__()
        last = nn.Linear(hidden or dim, num_experts)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.f = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last) if hidden else last
        # The prior's weight when it is not to be computed, and a factor of the personalized expert's:
        # see `force_routing` and `scale_personalized` in moa/install.py.
        self.forced: float | Tensor | None = None
        self.strength = 1.0

    @property
    def all_prior(self) -> bool:
        """Is it known without asking that the prior gets everything?"""
        return isinstance(self.forced, float) and self.forced == 1

    def forward(self, z: Tensor) -> Tensor:
        """(B, N, D) hidden states that enter the attention -> (B, N, E) weights that sum to 1."""
        weights = self.f(z).softmax(dim=-1) if self.forced is None else self.forced_weights(z)
        if self.strength == 1:
            return weights
        personalized = (self.strength * weights[..., 1:]).clamp(max=1)
        return F.pad(1 - personalized, (0, 1)) + F.pad(personalized, (1, 0))

    def forced_weights(self, z: Tensor) -> Tensor:
        """The given weight of the prior (expert 0), the rest for expert 1: (B, N, D) -> (B, N, 2)."""
        weight = self.forced
        if isinstance(weight, Tensor):  # a map (h, w) or (B, h, w), brought to this layer's grid
            weight = weight.to(z).reshape(-1, *weight.shape[-2:]).expand(len(z), -1, -1)
            height, width = grid(z.shape[1], weight.shape[-2] / weight.shape[-1])
            weight = F.interpolate(weight[:, None], (height, width), mode="bilinear", antialias=True)
            weight = rearrange(weight, "b 1 h w -> b (h w) 1")
        else:
            weight = z.new_full((*z.shape[:2], 1), weight)
        return F.pad(1 - weight, (1, 0)) + F.pad(weight, (0, 1))


def grid(pixels: int, aspect: float = 1.0) -> tuple[int, int]:
    """Height and width of a feature map of `pixels` pixels whose height / width is about `aspect`."""
    height = max(1, round((pixels * aspect) ** 0.5))
    while pixels % height:  # odd sizes are rounded up on the way down: take the nearest divisor
        height -= 1
    return height, pixels // height
