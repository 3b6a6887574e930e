"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), around the network."""

import torch
from torch import Tensor

from .schedule import Denoise


def guided(denoise: Denoise, guidance_scale: float) -> Denoise:
    """The `denoise` of eps_uncond + guidance_scale * (eps_cond - eps_uncond), one call for both.

    denoise: called with every sample twice, x (2B, ...) and t (2B,): B samples to be taken without
        the condition, then the same B with it. Returns eps (2B, ...) in that order, [uncond; cond].
    guidance_scale: 1 gives eps_cond at twice its price; an unguided `denoise` is better then.
    The result maps x (B, ...), t (B,) to eps (B, ...).
    """

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = denoise(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return denoise_guided
