"""Scenes and portraits of the small world as training samples, rendered once and then mapped from disk."""
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

import toyworld
from data.processes import in_processes
from data.sample import CACHE_ROOT, Sample, pad_subjects

VERSION = 1  # to be raised when the same seeds give other samples than before
MAX_SUBJECTS = 2  # of a scene


def scene_sample(seed: int, split: str) -> Sample:
    """A scene of the small world with a reference picture of each subject.

    Labels: indices of activity, context and style; per subject the attribute indices, -1 where the
    picture does not show the attribute.
    """
    scene = toyworld.sample_scene(seed, split)
    image, masks = toyworld.render_scene(scene)
    size = toyworld.SIZE
    references = [toyworld.render_reference(subject.identity, seed * MAX_SUBJECTS + i)
                  for i, subject in enumerate(scene.subjects)]
    return Sample(image, pad_subjects(list(masks), (size, size), bool, MAX_SUBJECTS),
                  pad_subjects(references, (size, size, 3), np.uint8, MAX_SUBJECTS), scene.caption,
                  [subject.end for subject in scene.subjects], scene_labels(scene))


def scene_labels(scene: toyworld.Scene) -> dict:
    """What a classifier has to read back from the picture of a scene, as class indices."""
    attributes = []
    for subject in scene.subjects:
        labels = toyworld.attribute_labels(subject.identity)
        attributes.append([labels[a] if a in subject.visible else -1 for a in toyworld.ATTRIBUTES])
    return {"activity": toyworld.ACTIVITIES.index(scene.activity),
            "context": toyworld.CONTEXTS.index(scene.context),
            "style": toyworld.STYLES.index(scene.style), "attributes": attributes}


def portrait_sample(seed: int, split: str) -> Sample:
    """A reference picture with its full description, for contrastive training.

    Seeds 2k and 2k + 1 are twins that differ in one attribute: in a batch of many people hair alone
    tells most of them apart, but twins can only be told apart by reading everything.
    """
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed // 2, 7])
    identity = toyworld.sample_identity(rng, split)
    if seed % 2:
        identity = twin(rng, identity, split)
    image = toyworld.render_reference(identity, seed)
    size = toyworld.SIZE
    attributes = [list(toyworld.attribute_labels(identity).values())]
    return Sample(image, pad_subjects([], (size, size), bool, MAX_SUBJECTS),
                  pad_subjects([], (size, size, 3), np.uint8, MAX_SUBJECTS),
                  toyworld.describe(identity), [], {"attributes": attributes})


def twin(rng: np.random.Generator, identity: toyworld.Identity, split: str) -> toyworld.Identity:
    """The same person with one attribute changed; for training one of the training split."""
    while True:
        other = toyworld.sample_identity(rng, split, identity.noun)
        differing = [a for a in toyworld.ATTRIBUTES if getattr(other, a) != getattr(identity, a)]
        if differing:
            name = differing[rng.integers(len(differing))]
            changed = replace(identity, **{name: getattr(other, name)})
            if split == "test" or toyworld.identity_split(changed) == split:
                return changed


WORLDS: dict[str, Callable[[int, str], Sample]] = {"scenes": scene_sample, "portraits": portrait_sample}


class Cache:
    """Samples in a folder: `images`, `masks`, `references` as mapped arrays, the rest as lists."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.images = np.load(self.folder / "images.npy", mmap_mode="r")  # (N, S, S, 3)
        self.references = np.load(self.folder / "references.npy", mmap_mode="r")  # (N, P, S, S, 3)
        self.packed_masks = np.load(self.folder / "masks.npy", mmap_mode="r")  # (N, P, S, S / 8)
        lines = (self.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        self.samples = [json.loads(line) for line in lines]
        self.captions = [sample["caption"] for sample in self.samples]
        self.size = self.images.shape[1]
        self.key = self.folder.name  # changes with the samples

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, epoch: int = 0) -> Sample:
        """One sample, the same in every epoch."""
        return Sample(self.images[index], self.masks(index), self.references[index], **self.samples[index])

    def held_out(self) -> Iterator[tuple[str, np.ndarray]]:
        """Noun and reference (R, R, 3) of three people that training does not see."""
        rng = np.random.default_rng(11)
        people = [toyworld.sample_identity(rng, "test", "woman") for _ in range(3)]
        for i, person in enumerate(people):
            yield "woman", toyworld.render_reference(person, i)

    def masks(self, indices) -> np.ndarray:
        """(B, P, S, S) bool."""
        return np.unpackbits(self.packed_masks[indices], axis=-1).astype(bool)

    def labels(self, name: str) -> np.ndarray:
        """One label of all samples as an int64 array: (N,), or (N, P, A) for the attributes."""
        values = [sample["labels"][name] for sample in self.samples]
        if name != "attributes":
            return np.array(values)
        empty = [-1] * len(toyworld.ATTRIBUTES)
        return np.array([v + [empty] * (MAX_SUBJECTS - len(v)) for v in values])


def render_cache(kind: str, count: int, split: str = "train", first: int = 0,
                 workers: int | None = None) -> Cache:
    """Samples `first`, ..., `first + count - 1` of the small world, rendered unless they are there."""
    folder = CACHE_ROOT / f"{kind}-{split}-{first}-{count}-v{VERSION}"
    return write_cache(folder, partial(WORLDS[kind], split=split), range(first, first + count), workers)


def write_cache(folder: Path, make: Callable[[int], Sample], indices: range,
                workers: int | None = None) -> Cache:
    """Make all samples in parallel and write them to `folder`, whole or not at all. Raises OSError."""
    folder = Path(folder)
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
        temporary.mkdir(parents=True)
        try:
            _fill(temporary, make, indices, workers)
            temporary.rename(folder)
        except OSError as error:
            if not folder.exists():  # else another process was faster
                free = shutil.disk_usage(folder.parent).free / 1e6
                raise OSError(f"{folder} cannot be written ({error.strerror or error}): {free:.1f} MB are "
                              "free there; nothing of it stays") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Cache(folder)


def _fill(folder: Path, make: Callable[[int], Sample], indices: range, workers: int | None) -> None:
    size, count = make(indices[0]).image.shape[0], len(indices)
    shapes = {"images": (count, size, size, 3), "references": (count, MAX_SUBJECTS, size, size, 3),
              "masks": (count, MAX_SUBJECTS, size, size // 8)}
    with ExitStack() as opened:
        # Written, not mapped: where the disk is full, a map ends the process without a word.
        files = {name: opened.enter_context(open(folder / f"{name}.npy", "wb")) for name in shapes}
        for name, shape in shapes.items():
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], header)
            files[name].truncate(files[name].tell() + math.prod(shape))
        lines = opened.enter_context(open(folder / "samples.jsonl", "w", encoding="utf-8"))
        for sample in in_processes(make, indices, "rendering", "picture", workers):
            rows = {"images": sample.image, "references": sample.references,
                    "masks": np.packbits(sample.masks, axis=-1)}
            for name, row in rows.items():
                if name == "images" or sample.references.any():
                    files[name].write(row.tobytes())
                else:  # absent references stay holes in the file
                    files[name].seek(row.nbytes, os.SEEK_CUR)
            record = asdict(sample)
            json.dump({k: record[k] for k in ("caption", "ends", "labels")}, lines)
            lines.write("\n")
