"""From noise to a picture: noise schedule, DDIM, UniPC, classifier-free guidance.

A sampler is a function `sample(denoise, x, steps=..., progress=None)` that brings the noise x down to clean
latents. It may call denoise(x, t) -> eps any number of times a step; once a step, after the call at t, it
calls progress(step, steps, t, x0). A new one is a line in `SAMPLERS`, from where `--sampler` knows it.
"""

from .ddim import invert_ddim, sample_ddim
from .guidance import guided
from .schedule import (
    NUM_TIMESTEPS,
    SPACINGS,
    Sampler,
    add_noise,
    alpha_bar,
    alpha_sigma,
    noise_level,
    timesteps,
    timesteps_of,
)
from .unipc import sample_unipc

SAMPLERS: dict[str, Sampler] = {"unipc": sample_unipc, "ddim": sample_ddim}
# What web UIs call them in a picture's metadata; others go by their own names.
LABELS = {"unipc": "UniPC", "ddim": "DDIM"}

__all__ = [
    "LABELS",
    "NUM_TIMESTEPS",
    "SAMPLERS",
    "SPACINGS",
    "Sampler",
    "add_noise",
    "alpha_bar",
    "alpha_sigma",
    "guided",
    "invert_ddim",
    "noise_level",
    "sample_ddim",
    "sample_unipc",
    "timesteps",
    "timesteps_of",
]
