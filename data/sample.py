"""One training sample, where samples come from, and in which order a run reads them."""
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

CACHE_ROOT = Path(".cache")
ENCODED = CACHE_ROOT / "encoded"  # rendered scenes, as models see them


@dataclass
class Sample:
    """A picture and its caption, and for each subject the place of its noun, its mask and a reference
    picture. Arrays have room for P subjects; absent subjects are zero."""

    image: np.ndarray  # (S, S, 3) uint8
    masks: np.ndarray  # (P, S, S) bool, the visible pixels of each subject
    references: np.ndarray  # (P, R, R, 3) uint8
    caption: str
    ends: list[int]  # per subject, the exclusive character index at which its noun ends
    labels: dict = field(default_factory=dict)  # what only a rendered world knows


class Samples(Protocol):
    """Where training reads from: a folder (`data/fastcomposer.py`), or rendered scenes (`toyworld/`)."""

    size: int  # pixels of a picture's side
    key: str  # changes with the samples

    def __len__(self) -> int: ...

    def read(self, index: int, epoch: int = 0) -> Sample: ...

    def held_out(self) -> Iterator[tuple[str, np.ndarray]]:
        """Noun and reference (R, R, 3) of people for sample sheets, whom training does not see where that
        can be had."""


def pad_subjects(arrays: list[np.ndarray], shape: tuple[int, ...], dtype, count: int) -> np.ndarray:
    """Stack per-subject arrays and fill up with zeros to `count`."""
    out = np.zeros((count, *shape), dtype)
    for i, array in enumerate(arrays[:count]):
        out[i] = array
    return out


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """The samples of one step, (batch_size,) int64: a pure function of (seed, step).

    Epoch after epoch of fresh permutations, so that a resumed run goes on exactly where it stopped.
    """
    start = step * batch_size
    positions = np.arange(start, start + batch_size)
    return np.array([permutation(seed, int(p // count), count)[p % count] for p in positions])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the samples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)
