"""The attention of Stable Diffusion: one class for self- and cross-attention (MoA paper, Eq. 1-3)."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


class CrossAttention(nn.Module):
    """Multi-head attention of pixels over tokens; with no context, of pixels over pixels.

    Anything that has this signature can take its place in a `TransformerBlock`: that is how
    Mixture-of-Attention enters (see `moa/install.py`).
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        """`dim` must be divisible by `heads` (the number of heads, 8 in SD1.5 at every width)."""
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        # A list of one, because the ecosystem's files call this layer `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def split_heads(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, H, N, D/H)
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, N, D), (B, M, C) or None -> (B, N, D)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        out = F.scaled_dot_product_attention(*map(self.split_heads, (q, k, v)))
        return self.to_out[0](rearrange(out, "b h n d -> b n (h d)"))

    def token_maps(self, x: Tensor, context: Tensor, positions: Tensor) -> Tensor:
        """Attention probabilities of a few tokens, without ever storing those of all tokens.

        Softmax(QK^T) times a one-hot value matrix is exactly the columns of the chosen tokens, so
        fused attention gives them, with gradients.

        Args:
            x: (B, N, D) queries' input. context: (B, M, C) keys' input.
            positions: (B, S) int64, token indices in 0..M-1.
        Returns: (B, H, N, S), each in [0, 1].
        """
        q, k = self.split_heads(self.to_q(x)), self.split_heads(self.to_k(context))
        one_hot = F.one_hot(positions, context.shape[1]).to(q.dtype)  # (B, S, M)
        # As wide as a head and contiguous: only then is the attention fused.
        subjects = positions.shape[1]
        value = F.pad(repeat(one_hot, "b s m -> b h m s", h=self.heads),
                      (0, max(q.shape[-1] - subjects, 0))).contiguous()
        return F.scaled_dot_product_attention(q, k, value)[..., :subjects]


class GEGLU(nn.Module):
    """Linear layer whose second half gates the first with an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., hidden)
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back."""

    def __init__(self, dim: int):
        super().__init__()
        # The identity stands where the files' numbering counts a dropout.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with a residual around it.

    `attn1` and `attn2` may be anything with `forward(x, context)`; `moa/install.py` replaces both
    by a `MixtureOfAttention`, which alone looks inside `context`.
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context) -> Tensor:
        """(B, N, D) and the context as given to the UNet -> (B, N, D)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One transformer block over the pixels of a feature map, with a residual around it."""

    def __init__(self, dim: int, context_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)  # 1e-6 here, 1e-5 in the resnets
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, heads)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context) -> Tensor:  # (B, D, h, w) -> (B, D, h, w)
        height = x.shape[2]
        # Contiguous: otherwise all norms and residuals of the block go through memory across its rows.
        tokens = rearrange(self.proj_in(self.norm(x)), "b d h w -> b (h w) d").contiguous()
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(rearrange(tokens, "b (h w) d -> b d h w", h=height))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) timesteps -> (B, dim): [cos | sin] of t over `dim / 2` frequencies from 1 to 1e-4."""
    index = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * index / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
