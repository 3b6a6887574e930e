"""Who is where on a picture: its mask, and a person cut out by it."""
from itertools import product
from pathlib import Path

import numpy as np
from PIL import ImageOps

from data.files import open_picture, opaque

WHITE = ([255], [65535])  # of 8 and of 16 bits


def beside(picture: Path, ending: str) -> Path:
    """The file of a sample that ends so, in small letters, capitals, or with a capital first."""
    mark, dot, suffix = ending.partition(".")
    spelled = ((text, text.upper(), text.title()) for text in (mark, dot + suffix))
    usual, *others = (picture.with_name(picture.stem + "".join(ends)) for ends in product(*spelled))
    return next((path for path in (usual, *others) if path.exists()), usual)


def mask_of(picture: Path) -> Path:
    """The file that says who is where on a picture, if it is there. One that is no PNG is found, too, for
    `read_mask` to refuse."""
    usual, *others = (beside(picture, f"_mask.{suffix}") for suffix in ("png", "jpg", "jpeg", "webp"))
    return next((path for path in (usual, *others) if path.exists()), usual)


def read_mask(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W) integers or bool: the number of the person that a pixel belongs to, 0 where nobody is.

    A PNG of grey numbers or with a palette, of the picture's `size` (width, height) where that is known.
    White alone is person 1, transparent is nobody. Raises ValueError and OSError.
    """
    with open_picture(path) as image:
        if image.format != "PNG":
            raise ValueError(f"a mask is a PNG, this is {image.format}: save it as PNG")
        image = ImageOps.exif_transpose(image)
        if size and image.size != size:
            raise ValueError(f"the mask has {image.width} x {image.height} pixels, the picture (turned as "
                             f"its EXIF data say) {size[0]} x {size[1]}")
        if image.mode in ("1", "L", "P", "I", "I;16"):
            mask = np.array(image).astype(np.int64) * opaque(image)
        else:
            colours = np.array(image.convert("RGBA"))[..., :3] * opaque(image)[..., None]
            mask = colours[..., 0]
            if (colours != mask[..., None]).any():
                raise ValueError("a mask is greyscale or palette, a number for each person, not in colours")
    if not mask.any():
        raise ValueError("there is nobody on the mask")
    return mask > 0 if np.unique(mask[mask > 0]).tolist() in WHITE else mask


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
