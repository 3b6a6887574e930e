"""Shared by all tests: the repository root on the path, and a torchvision that can be imported."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def mend_torchvision() -> None:
    """Declare the two operators that `import torchvision` misses beside a CPU build of torch.

    diffusers and transformers import torchvision where it is installed; neither operator is called.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)


mend_torchvision()
