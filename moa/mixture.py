"""Mixture-of-Attention: a frozen and a trained attention, mixed per pixel (MoA paper, Eq. 4-7)."""
import copy
from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from models.attention import CrossAttention
from moa.router import Router


class ExpertContext(NamedTuple):
    """What the two experts of a cross-attention attend to (section 3.2.1).

    `prior` (B, M, C) is the text alone; `personalized` (L, B, M, C), or a tuple of its L parts, has the
    subjects' tokens, which are different ones in each transformer block l and at each timestep (Eq. 8).
    """

    prior: Tensor
    personalized: Tensor | tuple[Tensor, ...]


class MixtureOfAttention(nn.Module):
    """Z = R_0 * Attention_prior(Z) + R_1 * Attention_personalized(Z) (Eq. 6).

    `prior` is the pretrained attention itself, frozen; `personalized` starts as its copy and is
    trained. The residual stays outside, so with R_0 = 1 the layer is the pretrained one, bit for bit.
    """

    def __init__(self, prior: CrossAttention, layer: int, router_hidden: int | None = None):
        """`layer` is the index l of the transformer block, in forward order."""
        super().__init__()
        self.layer = layer
        self.prior = prior.requires_grad_(False)
        self.personalized = copy.deepcopy(prior).requires_grad_(True)
        self.router = Router(prior.to_q.in_features, hidden=router_hidden).to(prior.to_q.weight)

    def forward(self, z: Tensor, context: Tensor | ExpertContext | None = None) -> Tensor:
        """(B, N, D), and for cross-attention a context -> (B, N, D). A tensor goes to both experts."""
        prior_context, personalized_context = self.contexts(context)
        if self.router.all_prior:
            return self.prior(z, prior_context)
        r = self.router(z)  # (B, N, 2)
        return (r[..., :1] * self.prior(z, prior_context)
                + r[..., 1:] * self.personalized(z, personalized_context))

    def contexts(self, context: Tensor | ExpertContext | None) -> tuple[Tensor | None, Tensor | None]:
        """What the prior and what the personalized expert attend to in this layer, each (B, M, C)."""
        if isinstance(context, ExpertContext):
            return context.prior, context.personalized[self.layer]
        return context, context
