"""From noise to a picture: noise schedule, DDIM, UniPC, classifier-free guidance."""

from functools import partial

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

# By name: the samplers, and the timesteps at which they call the network in so many steps.
SAMPLERS = {"unipc": sample_unipc, "ddim": sample_ddim}
SCHEDULES = {
    "unipc": partial(timesteps, spacing="linspace", end_node=True),
    "ddim": partial(timesteps, spacing="leading"),
}

__all__ = [
    "NUM_TIMESTEPS",
    "SAMPLERS",
    "SCHEDULES",
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
