"""Shared by all tests: the repository root on the path, and a torchvision that can be imported."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.open_clip_import import mend_torchvision

mend_torchvision()  # diffusers and transformers import torchvision where it is installed
