"""Picture files of a data set: who is where on one, and a person cut out of it."""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image


@contextmanager
def open_picture(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """A picture file in one of these formats; one of more than Pillow's 89 million pixels is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=formats) as image:
            yield image


def mask_of(picture: Path) -> Path:
    """The file that says who is where on a picture, if it is there."""
    return picture.with_name(f"{picture.stem}_mask.png")


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) integers or bool: the number of the person that a pixel belongs to, 0 where nobody is.

    A PNG in greyscale or with a palette, of the picture's `size` (width, height). White (255) alone is person
    1, transparent is nobody. Raises ValueError, and OSError for what is no PNG.
    """
    with open_picture(path, ("PNG",)) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"a mask is greyscale or palette, not {image.mode}")
        if image.size != size:
            raise ValueError(f"the mask has {image.width} x {image.height} pixels, the picture (turned as "
                             f"its EXIF data say) {size[0]} x {size[1]}")
        mask = np.array(image).astype(np.int64)
        if image.mode == "P" and "transparency" in image.info:
            clear = image.info["transparency"]
            clear = [clear] if isinstance(clear, int) else [i for i, a in enumerate(clear) if a < 128]
            mask[np.isin(mask, clear)] = 0
    if not mask.any():
        raise ValueError("there is nobody on the mask")
    return mask > 0 if (mask[mask > 0] == 255).all() else mask


def cut_out(picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator,
            bbox: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A person alone, on noise, cropped: what training shows of a subject (FastComposer's way).

    picture: (H, W, 3) uint8. mask: (H, W) bool, not empty. bbox: x1, y1, x2, y2 of the crop, by default the
    mask's. Returns (h, w, 3) uint8.
    """
    if bbox is None:
        ys, xs = np.nonzero(mask)
        bbox = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    x1, y1, x2, y2 = bbox
    pixels = picture[y1:y2, x1:x2]
    noise = rng.integers(0, 255, pixels.shape, np.uint8)
    return np.where(mask[y1:y2, x1:x2, None], pixels, noise)
