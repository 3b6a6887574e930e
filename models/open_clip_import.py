"""The one place where open_clip is imported: late, because it takes seconds."""
from types import ModuleType

import torch


def mend_torchvision() -> None:
    """Make `import torchvision` possible beside a CPU-only torch.

    Its wheel is built for CUDA torch; beside a CPU torch the compiled operators do not load, and the
    import stops at the first one that is missing. Declaring the two names lets it go on; neither is
    ever called here. Only after the import has failed: where the compiled operators do load, a name
    that is declared already would end the process.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}",
                                 "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def open_clip() -> ModuleType:
    """Import open_clip, which imports torchvision, also beside a CPU-only torch."""
    mend_torchvision()
    import open_clip
    import open_clip.tokenizer
    import open_clip.transformer
    return open_clip
