"""Reads a folder in FastComposer's layout (github.com/mit-han-lab/fastcomposer) as `Sample`s.

    image_ids_train.txt, image_ids_test.txt    one id of digits per line
    {id[:5]}/{id}.jpg    the picture
    {id[:5]}/{id}.npy    (H, W) integers: which segment a pixel belongs to
    {id[:5]}/{id}.json   {"caption", "segments": [{"id", "end", "bbox": [x1, y1, x2, y2]}, ...]}

`caption[:end]` ends with the phrase that names the segment; its last token is the subject's. Of more
than `MAX_SUBJECTS` segments the largest are kept. Needs numpy and pillow only.
"""
import json
import zlib
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import toyworld
from data.dataset import CACHE_ROOT, MAX_SUBJECTS, Cache, Sample, pad_subjects, write_cache


class DataError(ValueError):
    """A dataset cannot be used; the message names the file."""


@contextmanager
def naming(path: Path):
    """Whatever is wrong with a file becomes a DataError that names it."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, EOFError, RecursionError,
            Image.DecompressionBombError) as error:
        missing = "missing: " if isinstance(error, KeyError) else ""
        raise DataError(f"{path}: {missing}{getattr(error, 'strerror', None) or error}") from error


def folder_cache(folder: Path, count: int, size: int, split: str = "train") -> Cache:
    """The first `count` samples of a folder, `size` pixels square. Raises DataError.

    They are read once: a new path or another list of ids is noticed, a changed picture is not.
    """
    ids = read_ids(folder, split)[:count]
    key = f"{Path(folder).resolve()} {' '.join(ids)}".encode() + Path(__file__).read_bytes()
    cached = CACHE_ROOT / f"folder-{split}-{len(ids)}-{size}-{zlib.crc32(key):08x}"
    return write_cache(cached, partial(read_indexed, Path(folder), split, size), range(len(ids)))


@cache
def read_ids(folder: Path, split: str) -> list[str]:
    """The ids of a split, at least one. Raises DataError."""
    path = Path(folder) / f"image_ids_{split}.txt"
    with naming(path):
        ids = path.read_text(encoding="utf-8").split()
        for image_id in ids:
            if not (image_id.isascii() and image_id.isdigit()):
                raise ValueError(f"{image_id!r} is not an image id (digits only)")
        if not ids:
            raise ValueError("there is no image id in it")
    return ids


def read_indexed(folder: Path, split: str, size: int, index: int) -> Sample:
    """Sample `index` of a split."""
    image_id = read_ids(folder, split)[index]
    return read_sample(folder / image_id[:5] / image_id, size)


def read_sample(stem: Path, size: int) -> Sample:
    """The sample in `stem`.jpg, .npy and .json, its shorter side resized and its center cut out.

    A subject without a pixel in the cut is left out. Raises DataError.
    """
    with naming(path := stem.with_suffix(".jpg")), Image.open(path) as image:
        picture = image.convert("RGB")
    with naming(path := stem.with_suffix(".npy")):
        instances = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may lie
        shape = (picture.height, picture.width)
        if getattr(instances, "shape", None) != shape or instances.dtype.kind not in "iu":
            raise ValueError(f"not an array of integers of the picture's shape {shape}")
    with naming(path := stem.with_suffix(".json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        check_record(record, picture.width, picture.height)
    subjects = []
    for segment in record["segments"]:
        mask = np.uint8(instances == segment["id"])
        mask = np.array(ImageOps.fit(Image.fromarray(mask), (size, size), Image.Resampling.NEAREST))
        if mask.any():
            subjects.append((segment, mask))
    subjects = sorted(subjects, key=lambda subject: -subject[1].sum(dtype=int))[:MAX_SUBJECTS]
    subjects.sort(key=lambda subject: subject[0]["end"])
    segments = [segment for segment, _ in subjects]
    noise = np.random.default_rng(int(stem.name)).integers(0, 255, (*shape, 3), np.uint8)
    references = []
    for segment in segments:
        alone = np.where((instances == segment["id"])[..., None], picture, noise)
        cut = Image.fromarray(alone).crop(segment["bbox"])
        references.append(np.array(ImageOps.pad(cut, (size, size), Image.Resampling.BILINEAR)))
    return Sample(np.array(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)),
                  pad_subjects([mask for _, mask in subjects], (size, size), bool),
                  pad_subjects(references, (size, size, 3), np.uint8), record["caption"],
                  [segment["end"] for segment in segments], read_labels(record, segments))


def check_record(record: dict, width: int, height: int) -> None:
    """Raise ValueError, TypeError or KeyError unless caption and segments fit the picture."""
    if not isinstance(record["caption"], str):
        raise TypeError("the caption is not a text")
    for segment in record["segments"]:
        x1, y1, x2, y2 = segment["bbox"]
        if not all(type(v) is int for v in (segment["id"], segment["end"], x1, y1, x2, y2)):
            raise ValueError("id, end and bbox of a segment must be integers")
        if not 0 < segment["end"] <= len(record["caption"]):
            raise ValueError(f"end {segment['end']} is not within the caption")
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(f"bbox {segment['bbox']} is not within the picture, {width} x {height}")


def read_labels(record: dict, segments: list[dict]) -> dict:
    """The labels of `dataset.scene_labels` where the small world wrote them, else {}."""
    try:
        people = [record["attributes"][str(segment["id"])] for segment in segments]
        return {"activity": toyworld.ACTIVITIES.index(record["activity"]),
                "context": toyworld.CONTEXTS.index(record["context"]),
                "style": toyworld.STYLES.index(record["style"]),
                "attributes": [[classes.index(person[name]) if name in person else -1
                                for name, classes in toyworld.ATTRIBUTES.items()] for person in people]}
    except (KeyError, TypeError, ValueError):
        return {}
