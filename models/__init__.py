"""The base model: Stable Diffusion 1.5's UNet, VAE, text and image encoder.

Dimensions, here and in `moa`: B batch, N pixels as tokens (h * w), M context tokens (77), D width,
H heads, C context width, F image feature width, E experts, L transformer blocks, S subjects.
"""
import os

from models.errors import check_installed

# Torch's threads would spin while they wait for each other: beside another program that makes a picture of
# the small world take 6 to 26 times as long. Torch reads this once, when it is imported, so commands import
# `models` before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
check_installed()  # before anything that needs a package

from models.load import Models, WeightsError, load_models

__all__ = ["Models", "WeightsError", "load_models"]
