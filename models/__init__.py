"""The base model: Stable Diffusion 1.5's UNet, VAE, text and image encoder.

Dimensions, here and in `moa`: B batch, N pixels as tokens (h * w), M context tokens (77), D width,
H heads, C context width, F image feature width, E experts, L transformer blocks, S subjects.
"""
from models.errors import check_installed

check_installed()  # before anything that needs a package

from models.load import Models, WeightsError, load_models

__all__ = ["Models", "WeightsError", "load_models"]
