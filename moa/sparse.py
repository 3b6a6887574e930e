"""Sparse routing: the personalized expert only at the pixels whose router asks for it.

Where the router gives the personalized expert next to nothing, its attention costs as much as elsewhere
and changes nothing. Here these pixels get the prior's output alone: the personalized expert's queries,
attention and output are computed for the others only. Its keys and values stay dense, so those see
everything they see in `MixtureOfAttention.forward`.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn as nn
from einops import repeat
from torch import Tensor

from moa.install import moa_layers
from moa.mixture import MixtureOfAttention

DENSE_FROM = 0.9  # share of the pixels: gathering the others costs more than computing all


@contextmanager
def sparse_routing(unet: nn.Module, threshold: float) -> Iterator[None]:
    """Inside, pixels whose personalized weight is at most `threshold` are the prior's.

    0 changes nothing but rounding, 1 is the base model. Not together with `record_subject_attention`,
    which needs all pixels. Raises ValueError outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold of sparse routing must be in [0, 1], not {threshold}")
    layers = [moa for _, _, moa in moa_layers(unet)]
    for moa in layers:
        moa.forward = partial(sparse_forward, moa, threshold)  # shadows the class's
    try:
        yield
    finally:
        for moa in layers:
            del moa.forward


def sparse_forward(moa: MixtureOfAttention, threshold: float, z: Tensor, context=None) -> Tensor:
    """`MixtureOfAttention.forward` with the weights R_1 of at most `threshold` taken as 0.

    A batch computes as many pixels of each sample as its busiest sample needs.
    """
    prior_context, personalized_context = moa.contexts(context)
    out = moa.prior(z, prior_context)
    if moa.router.all_prior:
        return out
    weight = moa.router(z)[..., 1]  # (B, N)
    weight = weight * (weight > threshold)
    count = int((weight > 0).sum(1).max())
    if count == 0:
        return out
    if count > DENSE_FROM * z.shape[1]:
        return out + weight[..., None] * (moa.personalized(z, personalized_context) - out)
    weight, index = weight.topk(count, dim=1)
    index = repeat(index, "b k -> b k d", d=z.shape[2])
    seen = z if personalized_context is None else personalized_context
    personalized = moa.personalized(z.gather(1, index), seen)
    return out.scatter_add(1, index, weight[..., None] * (personalized - out.gather(1, index)))
