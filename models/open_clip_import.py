"""The one place where open_clip is imported: late, because it takes seconds."""
from types import ModuleType

import torch


def open_clip() -> ModuleType:
    """Import open_clip, also beside a CPU-only torch.

    open_clip imports torchvision, whose wheel is built for CUDA torch; beside a CPU torch its
    compiled operators do not load and the import stops at the first one that is missing. Declaring
    the two names lets it go on. Neither operator is ever called here.
    """
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                   "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
        name, arguments = schema.split("(", 1)
        try:
            torch._C._dispatch_find_schema_or_throw(f"torchvision::{name}", "")
        except RuntimeError:
            torch.library.define(f"torchvision::{name}", f"({arguments}")
    import open_clip
    import open_clip.tokenizer
    import open_clip.transformer
    return open_clip
