"""The noise schedule of Stable Diffusion 1.5, x_t = alpha x0 + sigma eps, and its timesteps.

The betas are linear in their square root ("scaled linear"), from 0.00085 to 0.012 in 1000 steps.
alpha_bar[t] is the product of (1 - beta) up to t, alpha = sqrt(alpha_bar),
sigma = sqrt(1 - alpha_bar) and lam = log(alpha / sigma). All of it is computed in float64.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012
SPACINGS = ("leading", "linspace", "trailing")

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t (B,) int64) -> eps (B, ...)
Progress = Callable[[int, int, int, Tensor], object]  # (step 1..total, total, t, x0 (B, ...))
Sampler = Callable[..., Tensor]  # (denoise, x (B, ...), steps, ..., progress) -> x (B, ...)


class NoiseLevel(NamedTuple):
    """One level of the schedule: x = alpha x0 + sigma eps, and lam = log(alpha / sigma)."""

    alpha: float
    sigma: float
    lam: float


@cache
def alpha_bar() -> tuple[float, ...]:
    """alpha_bar[t] for t = 0..999, falling from 0.99915 to 0.00466."""
    # Floats: a cached tensor could be edited, or be born in inference_mode and refuse autograd.
    first, last = math.sqrt(BETA_FIRST), math.sqrt(BETA_LAST)
    products, product = [], 1.0
    for t in range(NUM_TIMESTEPS):
        product *= 1 - (first + (last - first) * t / (NUM_TIMESTEPS - 1)) ** 2
        products.append(product)
    return tuple(products)


def noise_level(t: int) -> NoiseLevel:
    """The level of the integer timestep t in 0..999."""
    alpha, sigma = math.sqrt(alpha_bar()[t]), math.sqrt(1 - alpha_bar()[t])
    return NoiseLevel(alpha, sigma, math.log(alpha / sigma))


def alpha_sigma(t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a batch of timesteps: float32, (B, 1, 1, ...) with `ndim` axes.

    t: (B,) int64 in 0..999. On the CPU a value outside raises a RuntimeError; none wraps around.
    """
    products = torch.tensor(alpha_bar(), dtype=torch.float64, device="cpu")
    table = torch.stack([products.sqrt(), (1 - products).sqrt()]).float().to(t.device)
    alpha, sigma = (row.gather(0, t).view(-1, *[1] * (ndim - 1)) for row in table)
    return alpha, sigma


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps, computed in float32 and returned in the dtype of x0.

    x0, eps: (B, ...). t: (B,) int64 in 0..999. Raises ValueError where these shapes do not match.
    """
    if eps.shape != x0.shape or t.shape != x0.shape[:1]:
        shapes = f"x0 {tuple(x0.shape)}, eps {tuple(eps.shape)}, t {tuple(t.shape)}"
        raise ValueError(f"x0 and eps must have one shape, with one t per sample; got {shapes}")
    alpha, sigma = alpha_sigma(t, x0.ndim)
    return (alpha * x0 + sigma * eps).to(x0.dtype)


def timesteps(steps: int, spacing: str, end_node: bool = False) -> list[int]:
    """`steps` falling timesteps in 0..999, by the three spacings of arXiv 2305.08891, Table 2.

    end_node: the sampler goes on from the last timestep to an end of its own (UniPC: sigma = 0), so
        "leading" and "linspace" place steps + 1 points and leave the last of them to that end.
    "leading" rounds its stride down: with hundreds of steps it starts far below 999 (600: at 600).
    Raises ValueError for an unknown spacing, for steps outside 1..1000, and where timesteps would
    repeat or leave 0..999 ("leading" and "linspace", at the last one or two numbers of steps).
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}, choose one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"steps must be in 1..{NUM_TIMESTEPS}, got {steps}")
    points = steps + end_node
    if spacing == "leading":
        grid = [1 + NUM_TIMESTEPS // points * k for k in range(points)]  # 1: SD1.5's steps_offset
    elif spacing == "linspace":
        grid = [round(k * ((NUM_TIMESTEPS - 1) / max(points - 1, 1))) for k in range(points)]
        grid[-1] = NUM_TIMESTEPS - 1  # a single point is the noisiest one
    else:
        # numpy.arange's stride: halves (937.5 of 48 steps) have to be rounded as diffusers does.
        stride = NUM_TIMESTEPS - (NUM_TIMESTEPS - NUM_TIMESTEPS / steps)
        grid = [round(NUM_TIMESTEPS - stride * k) - 1 for k in reversed(range(steps))]
    grid = grid[::-1][:steps]
    if len(set(grid)) < steps or grid[0] >= NUM_TIMESTEPS:
        raise ValueError(
            f"{steps} {spacing} timesteps would repeat or leave 0..{NUM_TIMESTEPS - 1}, take fewer"
        )
    return grid


def timesteps_of(sampler: Sampler, steps: int) -> list[int]:
    """The timesteps at which a sampler calls the network, each once, falling: it is run on one number."""
    seen = set()

    def note(x: Tensor, t: Tensor) -> Tensor:
        seen.add(int(t[0]))
        return torch.zeros_like(x)

    sampler(note, torch.zeros(1, 1), steps=steps)
    return sorted(seen, reverse=True)


def predict_eps(denoise: Denoise, x: Tensor, t: int, dtype: torch.dtype) -> Tensor:
    """Call the network on x in `dtype`, at t for every sample; eps comes in the dtype of x."""
    batch = torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device)
    return denoise(x.to(dtype), batch).to(x.dtype)
