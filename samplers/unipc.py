"""UniPC (Zhao et al. 2023, arXiv 2302.04867): multistep, in x0, with B(h) = e^h - 1 ("bh2").

One network call per step. The predictor UniP-p extrapolates from the last p predictions of x0. The
corrector UniC-p then takes the prediction made at the new point and does the step that led there
once more, one order better. It calls no network.
"""

import math

import torch
from torch import Tensor

from .schedule import Denoise, NoiseLevel, Progress, noise_level, predict_eps, timesteps


def _weights(r: list[float], h: float) -> list[float]:
    """Weights rho_k of the differences between here and the nodes r_k, which are in units of h.

    For n = 1..K they solve sum_k r_k^(n-1) rho_k = h n! phi_(n+1)(h) / B(h), where
    phi_1(h) = (e^h - 1) / h and phi_(n+1)(h) = (phi_n(h) - 1/n!) / h. Because x0 is predicted, -h
    stands for h. For K = 1, the weight 1/2 keeps the order without depending on h.
    """
    if len(r) < 2:
        return [0.5] * len(r)
    h, phi, right = -h, math.expm1(-h) / -h, []
    for n in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(n)) / h
        right.append(h * math.factorial(n) * phi / math.expm1(h))
    powers = [[r_k**n for r_k in r] for n in range(len(r))]
    options = {"dtype": torch.float64, "device": "cpu"}
    solution = torch.linalg.solve(torch.tensor(powers, **options), torch.tensor(right, **options))
    return solution.tolist()


def _update(
    x: Tensor,
    past: list[tuple[NoiseLevel, Tensor]],
    there: NoiseLevel,
    x0_there: Tensor | None = None,
) -> Tensor:
    """Step x to the level `there`, with order p = len(past): UniP-p, or UniC-p given x0_there.

    x: (B, ...) at the level of past[0]. past: levels and their x0 (B, ...), newest first.
    """
    (here, x0), older = past[0], past[1:]
    h = there.lam - here.lam
    r = [(level.lam - here.lam) / h for level, _ in older]
    differences = [(x0_old - x0) / r_k for r_k, (_, x0_old) in zip(r, older, strict=True)]
    if x0_there is not None:
        r, differences = r + [1.0], differences + [x0_there - x0]
    for rho, difference in zip(_weights(r, h), differences, strict=True):
        x0 = x0 + rho * difference
    return there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * x0


@torch.no_grad()
def sample_unipc(
    denoise: Denoise,
    x: Tensor,
    steps: int = 20,
    spacing: str = "linspace",
    order: int = 2,
    progress: Progress | None = None,
) -> Tensor:
    """Bring the noise x down to sigma = 0, in `steps` calls of the network.

    denoise: (x (B, ...), t (B,) int64) -> eps (B, ...). It is given x in the dtype of x; between
        the calls x and the past predictions are kept in float32 (in float64 if x came so).
    x: (B, ...) standard normal noise; left as it is.
    spacing: "leading", "linspace" or "trailing"; one more node, sigma = 0, comes last.
    order: 1, 2 or 3. The first steps and the last have less: 1, 2, 3, ..., 3, 2, 1.
    progress: called after each step as progress(step, steps, t, x0), with step from 1 and the clean
        latents x0 predicted at t (not to be edited).
    Returns (B, ...) in the dtype of x. Raises ValueError for another order or as `timesteps` does.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    ts = timesteps(steps, spacing, end_node=True)
    history: list[tuple[NoiseLevel, Tensor]] = []  # newest first
    x_before = x
    for i, t in enumerate(ts):
        here = noise_level(t)
        x0 = (x - here.sigma * predict_eps(denoise, x, t, dtype)) / here.alpha
        if progress:
            progress(i + 1, steps, t, x0)
        if i == steps - 1:
            break  # the last step has order 1, and with sigma = 0 it goes to x0 itself
        if i > 0:  # x0 stays as it is: the network is not called again at the corrected x
            x = _update(x_before, history, here, x0)
        history = [(here, x0), *history[: order - 1]]
        x_before, x = x, _update(x, history[: steps - i], noise_level(ts[i + 1]))
    return x0.to(dtype)
