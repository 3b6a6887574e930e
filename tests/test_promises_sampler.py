"""What an editor may rely on: a new sampler is a function and a line in `SAMPLERS`."""
import numpy as np
import pytest
import torch
from parity_full import randomize
from PIL import Image
from torch import Tensor

import sample
from images import read_settings
from models.controlnet import Control, ControlNet
from models.load import load_part, save_part
from samplers import SAMPLERS
from samplers.schedule import Denoise, Progress, noise_level, predict_eps, timesteps

PROMPT = "a woman on the beach"


@torch.no_grad()
def sample_heun(denoise: Denoise, x: Tensor, steps: int = 20, progress: Progress | None = None) -> Tensor:
    """Heun's method, which calls the network twice a step."""
    ts = timesteps(steps, "leading")
    for i, t in enumerate(ts):
        here, t_next = noise_level(t), ts[i + 1] if i + 1 < steps else 0
        there = noise_level(t_next)
        eps = predict_eps(denoise, x, t, x.dtype)
        x0 = (x - here.sigma * eps) / here.alpha
        if progress:
            progress(i + 1, steps, t, x0)
        ahead = there.alpha * x0 + there.sigma * eps
        eps = (eps + predict_eps(denoise, ahead, t_next, x.dtype)) / 2
        x0 = (x - here.sigma * eps) / here.alpha
        x = there.alpha * x0 + there.sigma * eps
    return x


@pytest.fixture
def heun(monkeypatch) -> None:
    monkeypatch.setitem(SAMPLERS, "heun", sample_heun)  # the edit


@pytest.fixture
def control(world, place) -> None:
    """A ControlNet that changes much."""
    net = randomize(ControlNet.of(load_part(world, "unet"), (4, 8, 8, 8)))
    save_part(net, place / "control", "controlnet")


def picture(world, *flags: str) -> np.ndarray:
    sample.main(["--weights", str(world), "--prompt", PROMPT, "--subject", "ada.png", "--seed", "5",
                 "--sampler", "heun", "--steps", "4", "--output", "x.png", *flags])
    return np.array(Image.open("x.png")).astype(int)


def test_it_draws_with_a_controlnet_and_its_metadata(heun, control, world, place, monkeypatch):
    plain = picture(world)
    settings = read_settings(place / "x.png")
    assert settings["sampler"] == "heun" and settings["steps"] == 4
    assert "Sampler: heun" in Image.open("x.png").text["parameters"]

    seen, residuals = [], Control.residuals
    monkeypatch.setattr(Control, "residuals",
                        lambda self, x, t, *rest: seen.append(int(t[0])) or residuals(self, x, t, *rest))
    steer = ["--controlnet", "control", "--control-image", "bob.png"]
    steered = picture(world, *steer, "--control-end", "0.5")
    ts = timesteps(4, "leading")
    assert ts == [751, 501, 251, 1]
    # There are eight calls at five timesteps, these and 0: by timestep it is decided, not by call.
    assert seen == [751, 501, 501]
    assert np.abs(steered - plain).mean() > 1 and np.isfinite(steered).all()
    seen.clear()
    picture(world, *steer, "--control-start", "0.5")
    assert seen == [1, 1, 0]
    assert read_settings(place / "x.png")["controls"][0]["start"] == 0.5
