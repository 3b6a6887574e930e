"""FastComposer's augmentations of a reference picture, by torchvision (it comes with open_clip)."""
import numpy as np
import torch

# Beside a CPU-only torch the operators of torchvision's usual wheel do not load, and its import stops at
# the first that is missing. Declaring the two lets it go on; neither is called here.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}",
                             "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision.transforms import v2

CHAIN = v2.Compose([
    v2.RandomApply([v2.RandomAffine(30, interpolation=v2.InterpolationMode.BILINEAR)], 0.75),
    v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.5)], 0.5),
    v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.5),
    v2.RandomGrayscale(0.1),
    v2.RandomHorizontalFlip(0.5),
    v2.RandomApply([v2.ElasticTransform()], 0.5),
])


def augment_reference(reference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(R, R, 3) uint8 -> the same, rotated, recoloured, blurred, grayed, mirrored and warped, each
    with FastComposer's range and probability. A pure function of its arguments."""
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
        torch.random.default_generator.manual_seed(int(rng.integers(2**63)))
        return CHAIN(torch.from_numpy(reference).permute(2, 0, 1)).permute(1, 2, 0).numpy()
