"""What trains the personalized experts, the routers and the prompt (MoA paper, Eq. 9-12)."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from moa.routing import grid


def moa_loss(eps_hat: Tensor, eps: Tensor, routing: Tensor, attention: Sequence[Tensor], masks: Tensor,
             present: Tensor, region: Tensor, weight: Tensor | float = 1.0, lambda_router: float = 1e-4,
             lambda_object: float = 1e-4) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_masked + lambda_r L_router + lambda_o L_object (Eq. 11), and its terms by name.

    A new loss is a function below and a term here; training logs each term by its name.

    Args:
        eps_hat, eps: (B, 4, h, w), the noise that was predicted and the one that was added.
        routing: (B, h, w), the prior's mean weight R, by `mean_routing`.
        attention: (B, H, N_l, S) of some layers, attention to each subject's token.
        masks: (B, S, h, w) in [0, 1], where each subject is. present: (B, S) bool, which of them there are.
        region: (B, h, w) in [0, 1], where the masked loss counts. weight: (B,), of each sample in it.
    """
    terms = {
        "masked": (1, masked_loss(eps_hat, eps, region, weight)),
        "router": (lambda_router, router_loss(routing, people_of(masks))),
        "object": (lambda_object, object_loss(attention, masks, present)),
    }
    return sum(factor * loss for factor, loss in terms.values()), {k: loss for k, (_, loss) in terms.items()}


def people_of(masks: Tensor) -> Tensor:
    """Masks (B, S, h, w) of a picture's subjects -> (B, h, w), the share of a cell that they cover."""
    return masks.sum(1).clamp(max=1)


def masked_loss(eps_hat: Tensor, eps: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """L_masked = ||M (eps_hat - eps)||^2, as a mean over all elements.

    Args:
        eps_hat, eps: (B, 4, h, w). mask: (B, h, w) in [0, 1], where the error counts.
        weight: (B,) per-sample weight, such as min-SNR's.
    """
    error = reduce((mask[:, None] * (eps_hat - eps)) ** 2, "b c h w -> b", "mean")
    return (weight * error).mean()


def mean_routing(maps: Sequence[Tensor], height: int, width: int) -> Tensor:
    """R = 1/|L| sum_l R_0^l (Eq. 10): the prior's weights (B, N_l) of several layers, each brought
    to (height, width) -> (B, height, width)."""
    resized = []
    for weights in maps:
        h, w = grid(weights.shape[1], height / width)
        weights = rearrange(weights, "b (h w) -> b 1 h w", h=h, w=w).float()
        resized.append(F.interpolate(weights, (height, width), mode="bilinear", align_corners=False))
    return torch.cat(resized, dim=1).mean(dim=1)


def router_loss(routing: Tensor, mask: Tensor) -> Tensor:
    """||(1 - M) (1 - R)||^2 (Eq. 9): the background belongs to the prior.

    Args: routing: (B, h, w), the prior's mean weight R. mask: (B, h, w), the people.
    Squared sum over pixels, mean over the batch: with a mean over pixels the paper's weight of 1e-4
    would be thousands of times too small to act.
    """
    return reduce(((1 - mask) * (1 - routing)) ** 2, "b h w -> b", "sum").mean()


def subject_attention(attention: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention to each subject's token inside and outside its mask, (B, H, S) each.

    Args: attention: (B, H, N, S), probabilities of one layer. masks: (B, S, h, w) in [0, 1].
    """
    size = grid(attention.shape[2], masks.shape[2] / masks.shape[3])
    inside = F.interpolate(masks, size, mode="bilinear", antialias=True)
    inside = rearrange(inside, "b s h w -> b 1 (h w) s")
    outside = 1 - inside
    return ((attention * inside).sum(2) / (inside.sum(2) + 1e-5),
            (attention * outside).sum(2) / (outside.sum(2) + 1e-5))


def object_loss(maps: Sequence[Tensor], masks: Tensor, present: Tensor) -> Tensor:
    """Mean attention to a subject's token outside its mask, minus that inside (Eq. 12).

    As printed, mean((1 - M)(1 - A)) - mean(M A), the mask cancels out: it is a constant minus the
    mean of A. This is FastComposer's balanced L1 loss (arXiv 2305.10431), which the paper names.

    Args:
        maps: per layer (B, H, N_l, S), attention probabilities of the subjects' tokens.
        masks: (B, S, h, w) in [0, 1]. present: (B, S) bool.
    Returns: per sample the mean over layers, heads and present subjects, 0 when no subject is
        present; of that the mean over the batch.
    """
    total = masks.new_zeros(())
    for attention in maps:
        inside, outside = subject_attention(attention, masks)
        balance = outside - inside
        total = total + ((balance.mean(1) * present).sum(1) / present.sum(1).clamp(min=1)).mean()
    return total / max(len(maps), 1)
