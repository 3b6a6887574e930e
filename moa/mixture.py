"""Mixture-of-Attention: attention experts, mixed per pixel by a router (MoA paper, Eq. 4-7)."""
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from models.attention import CrossAttention


class ExpertContext(NamedTuple):
    """What the experts of a cross-attention attend to (section 3.2.1).

    The prior sees `prior` (B, M, C), the text alone. All other experts see `personalized` (L, B, M, C), or a
    tuple of its L parts: for each transformer block l the text with the subjects' tokens, made anew for
    every block and timestep (Eq. 8).
    """

    prior: Tensor
    personalized: Tensor | tuple[Tensor, ...]


class Router(nn.Module):
    """R = Softmax(f(Z)) (Eq. 5, 7), one weight per pixel and expert; f is linear, or an MLP.

    The last layer starts at zero: every expert then has the same weight everywhere. Any other module
    (B, N, D) -> (B, N, E) whose weights sum to 1 over the experts can take this one's place.
    """

    def __init__(self, dim: int, num_experts: int = 2, hidden: int | None = None):
        """`hidden`: the width of the MLP; None for a linear f."""
        super().__init__()
        last = nn.Linear(hidden or dim, num_experts)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.f = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last) if hidden else last

    def forward(self, z: Tensor) -> Tensor:
        """(B, N, D) hidden states that enter the attention -> (B, N, E) weights that sum to 1."""
        return self.f(z).softmax(dim=-1)


class MixtureOfAttention(nn.Module):
    """Z' = sum_e R_e * Attention_e(Z) (Eq. 4, 6).

    Expert 0, the prior, is the pretrained attention itself, frozen; the others start as its copies and are
    trained. The residual stays outside, so with R_0 = 1 the layer is the pretrained one, bit for bit.
    """

    def __init__(self, prior: CrossAttention, layer: int, router_hidden: int | None = None):
        """`layer` is the index l of the transformer block, in forward order."""
        super().__init__()
        self.layer = layer
        self.router_hidden = router_hidden
        # By name: another expert is another entry, and its weights are in the files under that name.
        experts = {"prior": prior.requires_grad_(False),
                   "personalized": copy.deepcopy(prior).requires_grad_(True)}
        self.names = tuple(experts)
        for name, expert in experts.items():
            self.add_module(name, expert)
        self.router = Router(prior.to_q.in_features, len(experts), router_hidden)
        self.to(prior.to_q.weight)  # its device and dtype
        # Set by moa/routing.py.
        self.prior_only = False
        self.overrides: list[Callable[[Tensor], Tensor]] = []
        self.watchers: list[Callable[[Tensor], None]] = []

    @property
    def experts(self) -> list[nn.Module]:
        """All experts, the prior first."""
        return [getattr(self, name) for name in self.names]

    def forward(self, z: Tensor, context: Tensor | ExpertContext | None = None) -> Tensor:
        """(B, N, D), and for cross-attention a context -> (B, N, D). A tensor goes to all experts."""
        contexts = self.contexts(context)
        if self.prior_only:
            return self.prior(z, contexts[0])
        r = self.routing(z, context)  # (B, N, E)
        out = r[..., :1] * self.prior(z, contexts[0])
        for e, expert in enumerate(self.experts[1:], 1):
            out = out + r[..., e:e + 1] * expert(z, contexts[e])
        return out

    def routing(self, z: Tensor, context: Tensor | ExpertContext | None = None) -> Tensor:
        """R (B, N, E): the router's weights, after all overrides. The paper's router does not use `context`,
        which is as in `forward`; another one may."""
        r = self.router(z)
        for override in self.overrides:
            r = override(r)
        for watch in self.watchers:
            watch(r)
        return r

    def contexts(self, context: Tensor | ExpertContext | None) -> list[Tensor | None]:
        """What each expert attends to in this layer, (B, M, C); None for self-attention."""
        if isinstance(context, ExpertContext):
            return [context.prior] + [context.personalized[self.layer]] * (len(self.names) - 1)
        return [context] * len(self.names)
