"""A look that the small world's renderer does not have, for a style LoRA to learn: crayons on paper."""
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

import toyworld
from data.sample import Sample
from toyworld.rendered import Cache

PAPER = np.array((0.98, 0.96, 0.90))
WASH = 0.42  # how much of its own colour a surface keeps


def crayon(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the same scene in pale colours with grey outlines, on warm paper."""
    grey = Image.fromarray(picture).convert("L")
    around = grey.filter(ImageFilter.GaussianBlur(picture.shape[0] / 43))
    # Darker than its surroundings: an outline.
    outlines = np.clip(np.asarray(grey, float) / np.maximum(np.asarray(around, float), 1), 0, 1) ** 2
    colours = PAPER * (1 - WASH) + WASH * picture / 255
    return np.uint8(255 * np.clip(colours * outlines[..., None], 0, 1))


class Crayons:
    """Scenes of the small world that no word styles, with crayons. Masks and captions stay."""

    def __init__(self, scenes: Cache):
        self.scenes = scenes
        self.indices = np.flatnonzero(scenes.labels("style") == toyworld.STYLES.index(""))
        self.size, self.key = scenes.size, f"{scenes.key}-crayons"

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, epoch: int = 0) -> Sample:
        """One sample, the same in every epoch."""
        sample = self.scenes.read(self.indices[index], epoch)
        return replace(sample, image=crayon(sample.image))

    def held_out(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.scenes.held_out()
