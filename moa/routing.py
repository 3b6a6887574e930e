"""Watch what routers say, override it, and use it to compute less."""
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from moa.install import moa_layers
from moa.mixture import ExpertContext, MixtureOfAttention

DENSE_FROM = 0.9  # share of the pixels from which gathering them costs more than computing all


class RoutingKey(NamedTuple):
    """Which router a map comes from."""

    layer: int  # l, in forward order
    kind: str  # "self" or "cross"


@contextmanager
def record_routing(unet: nn.Module) -> Iterator[dict[RoutingKey, Tensor]]:
    """Collect the weights that the experts get in each UNet call made inside: {(l, kind): (B, N, E)}.

    Each call overwrites the last one's. Gradients flow through what is collected; reentrant
    checkpointing cuts them.
    """
    routing: dict[RoutingKey, Tensor] = {}
    layers = [(partial(routing.__setitem__, RoutingKey(layer, kind)), moa)
              for layer, kind, moa in moa_layers(unet)]
    for watch, moa in layers:
        moa.watchers.append(watch)
    try:
        yield routing
    finally:
        for watch, moa in layers:
            moa.watchers.remove(watch)


@contextmanager
def record_subject_attention(unet: nn.Module, positions: Tensor,
                             trained: Container[int] | None = None) -> Iterator[dict[int, Tensor]]:
    """Collect how the personalized cross-attentions attend to the subjects' tokens.

    positions: (B, S) int64 token indices. trained: the layers l through whose maps gradients flow, by
    default all. Yields {l: (B, H, N, S)}, filled by a UNet call inside.
    """
    maps: dict[int, Tensor] = {}

    def recorder(layer: int):
        def record(module, args, output):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (trained is None or layer in trained)):
                maps[layer] = module.token_maps(*args, positions)
        return record

    hooks = [moa.personalized.register_forward_hook(recorder(layer))
             for layer, kind, moa in moa_layers(unet) if kind == "cross"]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def force_routing(unet: nn.Module, prior: float | Tensor) -> Iterator[None]:
    """Inside, the prior gets this weight whatever the routers say; the other experts share the rest
    in their usual ratio.

    1.0 is the base model (no other expert is even computed), 0.0 is all personalized; a map (h, w) or
    (B, h, w) of weights in [0, 1] is brought to each layer's grid.
    Raises ValueError for weights outside [0, 1].
    """
    weight = torch.as_tensor(prior, dtype=torch.float32)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        raise ValueError(f"the prior's weight must be in [0, 1], not {prior}")
    with overridden(unet, partial(forced, weight), prior_only=weight.ndim == 0 and bool(weight == 1)):
        yield


def forced(weight: Tensor, r: Tensor) -> Tensor:
    """Weights r (B, N, E) with the prior's replaced: a scalar, or a map (h, w) or (B, h, w)."""
    weight = weight.to(r.device)  # in float32: in others a CPU cannot resize
    if weight.ndim:
        weight = weight.reshape(-1, *weight.shape[-2:]).expand(len(r), -1, -1)
        size = grid(r.shape[1], weight.shape[-2] / weight.shape[-1])
        weight = F.interpolate(weight[:, None], size, mode="bilinear", antialias=True)
        weight = rearrange(weight, "b 1 h w -> b (h w) 1")
    weight = weight.to(r)
    others = r[..., 1:]
    total = others.sum(-1, keepdim=True)
    shares = torch.where(total > 0, others / total, 1 / others.shape[-1])
    return torch.cat([weight.expand_as(total), (1 - weight) * shares], dim=-1)


@contextmanager
def scale_personalized(unet: nn.Module, strength: float) -> Iterator[None]:
    """Inside, all experts but the prior get `strength` times their weight, together at most 1, and the
    prior the rest: 0 is the base model, 1 changes nothing.

    Raises ValueError for a negative or infinite strength.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"the subjects' strength must be 0 or more, not {strength}")
    with overridden(unet, partial(scaled, strength)):
        yield


def scaled(strength: float, r: Tensor) -> Tensor:
    """Weights r (B, N, E) with those of all experts but the prior times `strength`."""
    if strength == 1:
        return r
    others = strength * r[..., 1:]
    others = others / others.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([1 - others.sum(-1, keepdim=True), others], dim=-1)


@contextmanager
def overridden(unet: nn.Module, override: Callable[[Tensor], Tensor], prior_only: bool | None = None
               ) -> Iterator[None]:
    """Inside, every layer's weights (B, N, E) go through `override` last, and `prior_only` is set."""
    layers = [moa for _, _, moa in moa_layers(unet)]
    before = [moa.prior_only for moa in layers]
    for moa in layers:
        moa.overrides.append(override)
        moa.prior_only = moa.prior_only if prior_only is None else prior_only
    try:
        yield
    finally:
        for moa, was in zip(layers, before, strict=True):
            moa.overrides.remove(override)
            moa.prior_only = was


@contextmanager
def sparse_routing(unet: nn.Module, threshold: float) -> Iterator[None]:
    """Inside, weights up to `threshold` go to the prior, and the expert is not computed there.

    Where a router gives an expert next to nothing, its attention costs as much as elsewhere and changes
    nothing. Its keys and values stay dense, so what is computed is what `MixtureOfAttention` computes.
    0 changes nothing but rounding, 1 is the base model. Not together with `record_subject_attention`,
    which needs all pixels. Raises ValueError outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold of sparse routing must be in [0, 1], not {threshold}")
    with replaced([moa for _, _, moa in moa_layers(unet)], sparse_forward, threshold):
        yield


@contextmanager
def replaced(layers: list[MixtureOfAttention], forward: Callable[..., Tensor], option: object
             ) -> Iterator[None]:
    """Inside, these layers compute `forward(layer, option, z, context)` in place of the class's."""
    for moa in layers:
        moa.forward = partial(forward, moa, option)  # shadows the class's
    try:
        yield
    finally:
        for moa in layers:
            del moa.forward


def sparse_forward(moa: MixtureOfAttention, threshold: float, z: Tensor,
                   context: Tensor | ExpertContext | None = None) -> Tensor:
    """`MixtureOfAttention.forward` with all weights R_e, e > 0, of at most `threshold` taken as 0."""
    contexts = moa.contexts(context)
    prior = out = moa.prior(z, contexts[0])
    if moa.prior_only:
        return out
    r = moa.routing(z, context)
    for e, expert in enumerate(moa.experts[1:], 1):
        out = out + weighted_change(expert, r[..., e] * (r[..., e] > threshold), z, contexts[e], prior)
    return out


def weighted_change(expert: nn.Module, weight: Tensor, z: Tensor, context: Tensor | None, prior: Tensor
                    ) -> Tensor:
    """weight (B, N) times (the expert's output - the prior's), computed where the weight is not 0.

    A batch computes as many pixels of each sample as its busiest sample needs.
    """
    count = int((weight > 0).sum(1).max())
    if count == 0:
        return torch.zeros_like(prior)
    if count > DENSE_FROM * z.shape[1]:
        return weight[..., None] * (expert(z, context) - prior)
    weight, index = weight.topk(count, dim=1)
    index = repeat(index, "b k -> b k d", d=z.shape[2])
    out = expert(z.gather(1, index), z if context is None else context)
    change = weight[..., None] * (out - prior.gather(1, index))
    return torch.zeros_like(prior).scatter_add(1, index, change)


@contextmanager
def reuse_self_attention(unet: nn.Module, kept: dict[int, list[Tensor]]) -> Iterator[None]:
    """Inside, the personalized self-attention of every second UNet call is that of the call before.

    What the experts changed stays in `kept`, by layer l, from one call to the next: give each picture or
    batch a dictionary of its own. Routers and cross-attention are computed in every call.
    """
    with replaced([moa for _, kind, moa in moa_layers(unet) if kind == "self"], reusing_forward, kept):
        yield


def reusing_forward(moa: MixtureOfAttention, kept: dict[int, list[Tensor]], z: Tensor) -> Tensor:
    """`MixtureOfAttention.forward` of a self-attention, every second time with the changes of the last."""
    prior = moa.prior(z)
    if moa.prior_only:
        return prior
    r, changes = moa.routing(z), kept.pop(moa.layer, None)
    if changes is None:
        changes = kept[moa.layer] = [expert(z) - prior for expert in moa.experts[1:]]
    return prior + sum(r[..., e, None] * change for e, change in enumerate(changes, 1))


def grid(pixels: int, aspect: float = 1.0) -> tuple[int, int]:
    """Height and width of a feature map of `pixels` pixels whose height / width is about `aspect`."""
    height = max(1, round((pixels * aspect) ** 0.5))
    while pixels % height:  # a side may be odd: take the nearest divisor below
        height -= 1
    return height, pixels // height
