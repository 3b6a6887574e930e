"""From noise to a picture: noise schedule, DDIM, UniPC, classifier-free guidance."""

from .ddim import invert_ddim, sample_ddim
from .guidance import guided
from .schedule import (
    NUM_TIMESTEPS,
    SPACINGS,
    add_noise,
    alpha_bar,
    alpha_sigma,
    noise_level,
    timesteps,
)
from .unipc import sample_unipc

SAMPLERS = {"unipc": sample_unipc, "ddim": sample_ddim}

__all__ = [
    "NUM_TIMESTEPS",
    "SAMPLERS",
    "SPACINGS",
    "add_noise",
    "alpha_bar",
    "alpha_sigma",
    "guided",
    "invert_ddim",
    "noise_level",
    "sample_ddim",
    "sample_unipc",
    "timesteps",
]
