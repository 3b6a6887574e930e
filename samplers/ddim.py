"""DDIM (Song et al. 2020, arXiv 2010.02502), Eq. 12, and its inversion back to noise."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .schedule import Denoise, NoiseLevel, Progress, noise_level, predict_eps, timesteps


def _step(
    x: Tensor, eps: Tensor, here: NoiseLevel, there: NoiseLevel, s: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Eq. 12 from one level to another, without its term s * noise. Returns x there, and x0."""
    x0 = (x - here.sigma * eps) / here.alpha
    return there.alpha * x0 + math.sqrt(there.sigma**2 - s**2) * eps, x0


def _draw_noise(x: Tensor, generator: Sequence[Generator]) -> Tensor:
    """Noise like x, drawn on the CPU in float32, each image's from its own generator."""
    options = {"dtype": torch.float32, "device": "cpu"}
    noise = [torch.randn(x.shape[1:], generator=own, **options) for own in generator]
    return torch.stack(noise).to(x.device, x.dtype)


@torch.no_grad()
def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    steps: int = 50,
    spacing: str = "leading",
    eta: float = 0.0,
    generator: Sequence[Generator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Bring the noise x down to the level of t = 0, in `steps` calls of the network.

    denoise: (x (B, ...), t (B,) int64) -> eps (B, ...). It is given x in the dtype of x; between
        the calls x is kept in float32 (in float64 if it came so).
    x: (B, ...) standard normal noise; left as it is.
    spacing: "leading", "linspace" or "trailing". A step goes to the next timestep of the list, the
        last one to t = 0. diffusers goes to t - 1000 // steps: for "leading" that is the same, with
        the other two it can miss the next timestep.
    eta: from 0 (no fresh noise) to 1 (as much as DDPM). Above 0, give a `generator` per image.
    generator: a list of B different CPU generators: image k of a batch is then image k alone.
    progress: called after each step as progress(step, steps, t, x0), with step from 1 and the clean
        latents x0 predicted at t (not to be edited).
    Returns (B, ...) in the dtype of x. Raises ValueError for eta outside 0..1, eta without its
    generators, and as `timesteps` does.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0..1, got {eta}")
    if eta > 0 and not (isinstance(generator, Sequence) and len(generator) == len(x)):
        raise ValueError(f"eta {eta} draws noise and needs a list of {len(x)} generators")
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    ts = timesteps(steps, spacing)
    for i, t in enumerate(ts):
        here, there = noise_level(t), noise_level(ts[i + 1] if i + 1 < steps else 0)
        # Eq. 16. Ends at 0 where t = 0 is the last timestep ("linspace"): a step that goes nowhere.
        s = eta * there.sigma / here.sigma * math.sqrt(1 - (here.alpha / there.alpha) ** 2)
        x, x0 = _step(x, predict_eps(denoise, x, t, dtype), here, there, s)
        if eta > 0:
            x = x + s * _draw_noise(x, generator)
        if progress:
            progress(i + 1, steps, t, x0)
    return x.to(dtype)


@torch.no_grad()
def invert_ddim(
    denoise: Denoise,
    x: Tensor,
    steps: int = 50,
    iterations: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Bring clean latents up to noise from which `sample_ddim(denoise, noise, steps)` makes them.

    A step from t up to t_next undoes the sampler's step exactly if eps is that of (x_next, t_next).
    But x_next is what we look for: take eps at (x, t_next), then `iterations` times more at the
    latest x_next. This fixed-point iteration (ReNoise, arXiv 2403.14602) makes
    steps * (1 + iterations) calls of the network; with 0 it is the usual DDIM inversion.

    denoise: as in `sample_ddim`, with the prompt of the picture and without guidance, under which
        the error explodes.
    x: (B, ...) clean latents, taken to be at the level of t = 0; left as they are. Best in float32.
    progress: called after each step as progress(step, steps, t_next, x0), as in `sample_ddim`.
    Returns (B, ...) in the dtype of x. Raises ValueError as `timesteps` does.
    """
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    here = noise_level(0)
    for i, t_next in enumerate(reversed(timesteps(steps, "leading"))):
        there, x_next = noise_level(t_next), x
        for _ in range(1 + iterations):
            x_next, x0 = _step(x, predict_eps(denoise, x_next, t_next, dtype), here, there)
        x, here = x_next, there
        if progress:
            progress(i + 1, steps, t_next, x0)
    return x.to(dtype)
