"""Reads a folder in FastComposer's layout (github.com/mit-han-lab/fastcomposer) as `Sample`s.

    image_ids_train.txt, image_ids_test.txt    one id of digits per line
    {id[:5]}/{id}.jpg    the picture
    {id[:5]}/{id}.npy    (H, W) integers: which segment a pixel belongs to
    {id[:5]}/{id}.json   {"caption", "segments": [{"id", "end", "bbox": [x1, y1, x2, y2]}, ...]}

`caption[:end]` ends with the phrase that names the segment; its last token is the subject's. As in
FastComposer's training, segments whose `coco_label` is not "person" are left out. Of too many people the
largest are kept.

A segment may say who it is by `identity`. Where another picture has the same identity, the reference
picture is cut from there, so that it shares the person but not pose and expression with the target.

All draws (noise, flips, augmentations, which other picture) are a function of (seed, image id, epoch), so
a folder gives the same samples wherever and in whatever order it is read.
"""
import json
import re
import secrets
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.augment import augment_reference
from data.files import open_picture, read_text, to_rgb
from data.masks import cut_out
from data.sample import CACHE_ROOT, Sample, pad_subjects
from data.processes import in_processes
from models.errors import one_line

SUFFIXES = (".jpg", ".npy", ".json")
REFERENCE_SIZE = 224  # what CLIP's image encoder sees; references of smaller pictures are smaller
PERSON = "person"
MOST_SEGMENTS = 100  # of one picture, each of which takes the memory of a mask
HELD_OUT = 64  # samples among which people are looked for
FORMAT = 1  # to be raised when a folder gives other samples than before
MAX_PEOPLE = 4  # of one picture, as in FastComposer's training
Places = dict[str | int, list[tuple[str, int]]]  # identity -> (image id, segment id) of its pictures


class DataError(ValueError):
    """A dataset cannot be used; the message names the file."""


@contextmanager
def naming(path: Path):
    """Whatever is wrong with a file becomes a DataError that names it."""
    try:
        yield
    except Exception as error:  # decoders of broken files raise nearly anything
        missing = "missing: " if isinstance(error, KeyError) else ""
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {missing}{' '.join(text.split())}") from error


# One sample --------------------------------------------------------------------------------------


@dataclass
class Opened:
    """The files of a sample as they are, checked, with people only."""

    picture: Image.Image  # RGB
    masks: list[np.ndarray]  # per segment (H, W) bool
    record: dict  # with people only in `segments`


def sample_file(folder: Path, image_id: str, suffix: str) -> Path:
    return folder / image_id[:5] / f"{image_id}{suffix}"


@contextmanager
def sample_path(folder: Path, image_id: str, suffix: str) -> Iterator[Path]:
    """`naming` with the path of a sample's file, which must not lead out of the folder: an archive from
    elsewhere may hold links to anything on this machine."""
    path = sample_file(folder, image_id, suffix)
    with naming(path):
        if not (image_id.isascii() and image_id.isdigit()):
            raise ValueError(f"{image_id!r} is not an image id (digits only)")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError("a link out of the dataset's folder")
        yield path


def open_sample(folder: Path, image_id: str) -> Opened:
    """Read and check the three files of a sample. Raises DataError.

    Everything that can be wrong with a sample is found here.
    """
    with sample_path(folder, image_id, ".jpg") as path, open_picture(path, ("JPEG", "PNG")) as image:
        picture = to_rgb(image)  # not turned: its mask is not
    with sample_path(folder, image_id, ".npy") as path:
        instances = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may lie
        shape = (picture.height, picture.width)
        if getattr(instances, "shape", None) != shape or instances.dtype.kind not in "iu":
            raise ValueError(f"not an array of integers of the picture's shape {shape}")
    record = read_record(folder, image_id)
    masks = [np.asarray(instances == segment["id"]) for segment in record["segments"]]
    with sample_path(folder, image_id, ".json"):
        for segment, mask in zip(record["segments"], masks, strict=True):
            x1, y1, x2, y2 = segment["bbox"]
            if not (0 <= x1 < x2 <= picture.width and 0 <= y1 < y2 <= picture.height):
                raise ValueError(f"bbox {segment['bbox']} is not [x1, y1, x2, y2] within the picture, "
                                 f"{picture.width} x {picture.height}")
            if not mask.any():
                raise ValueError(f"segment {segment['id']} has no pixel in the .npy")
            if not mask[y1:y2, x1:x2].any():
                raise ValueError(f"bbox {segment['bbox']} shows no pixel of segment {segment['id']}")
    return Opened(picture, masks, record)


def read_record(folder: Path, image_id: str) -> dict:
    """The .json of a sample with people only in `segments`. Raises DataError."""
    with sample_path(folder, image_id, ".json") as path:
        record = json.loads(read_text(path))
        caption = record["caption"]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("the caption is not a text, or empty")
        people = [s for s in record["segments"] if s.get("coco_label", PERSON) == PERSON]
        if len(people) > MOST_SEGMENTS:
            raise ValueError(f"{len(people)} people are more than {MOST_SEGMENTS}")
        for segment in people:
            check_segment(segment, caption)
        if len({segment["id"] for segment in people}) < len(people):
            raise ValueError("two segments have one id")
        return {**record, "segments": people}


def check_segment(segment: dict, caption: str) -> None:
    """Raise an error unless a segment's values are what they should be, as far as text can tell."""
    x1, y1, x2, y2 = segment["bbox"]
    end = segment["end"]
    if not all(type(v) is int for v in (segment["id"], end, x1, y1, x2, y2)):
        raise ValueError("id, end and bbox of a segment must be integers")
    if not 0 < end <= len(caption):
        raise ValueError(f"end {end} is not within the caption")
    if not caption[:end].strip():
        raise ValueError(f"there is no word before end {end}")
    if re.fullmatch("[a-zA-Z]{2}", caption[end - 1:end + 1]):
        raise ValueError(f"end {end} is in the middle of a word")
    if not isinstance(segment.get("identity", ""), (str, int)):
        raise TypeError("identity of a segment must be a text")


def read_sample(folder: Path, image_id: str, size: int, max_people: int = MAX_PEOPLE,
                augmented: bool = False, places: Places | None = None, seed: int = 0,
                epoch: int = 0) -> Sample:
    """A sample, `size` pixels square, with room for `max_people`. Raises DataError.

    The picture: its shorter side resized and the middle cut out, or black sides where it is taller
    than wide, as FastComposer does. A subject without a pixel in the cut is left out.

    Args:
        augmented: mirror half of all pictures; references as in `data/augment.py`.
        places: where else a person is to be found. The reference is then cut from one of their other
            pictures, or from this one where that is broken.
        seed, epoch: of the draws.
    """
    opened = open_sample(folder, image_id)
    rng = np.random.default_rng([seed, int(image_id), epoch])
    flip = -1 if augmented and rng.random() < 0.5 else 1
    subjects = []
    for segment, mask in zip(opened.record["segments"], opened.masks, strict=True):
        cut = np.array(square(Image.fromarray(np.uint8(mask)), size, Image.Resampling.NEAREST))[:, ::flip]
        if cut.any():
            subjects.append((segment, mask, cut))
    subjects = sorted(subjects, key=lambda subject: -subject[2].sum(dtype=int))[:max_people]
    subjects.sort(key=lambda subject: subject[0]["end"])
    references = []
    for segment, mask, _ in subjects:
        source = opened.picture, mask, segment["bbox"]
        others = [place for place in (places or {}).get(segment.get("identity"), ()) if place[0] != image_id]
        if others:
            other, number = others[rng.integers(len(others))]
            with suppress(DataError):
                source = find_segment(open_sample(folder, other), number)
        references.append(cut_reference(*source, min(size, REFERENCE_SIZE), rng, augmented))
    image = np.array(square(opened.picture, size, Image.Resampling.BILINEAR))[:, ::flip]
    return Sample(image, pad_subjects([cut for _, _, cut in subjects], (size, size), bool, max_people),
                  pad_subjects(references, (min(size, REFERENCE_SIZE),) * 2 + (3,), np.uint8, max_people),
                  opened.record["caption"], [segment["end"] for segment, _, _ in subjects])


def square(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """(size, size) with all of a tall picture and the middle of a wide one."""
    if image.height > image.width:
        image = ImageOps.pad(image, (image.height, image.height))
    return ImageOps.fit(image, (size, size), resampling)


def find_segment(opened: Opened, number: int) -> tuple[Image.Image, np.ndarray, list[int]]:
    """Picture, mask and bbox of one segment."""
    place = [segment["id"] for segment in opened.record["segments"]].index(number)
    return opened.picture, opened.masks[place], opened.record["segments"][place]["bbox"]


def cut_reference(picture: Image.Image, mask: np.ndarray, bbox: list[int], size: int,
                  rng: np.random.Generator, augmented: bool) -> np.ndarray:
    """A subject alone: on noise, cropped to its bbox, padded to a square. (size, size, 3) uint8."""
    alone = Image.fromarray(cut_out(np.asarray(picture), mask, rng, bbox))
    if augmented and rng.random() < 0.5 and alone.height > alone.width:
        alone = alone.crop((0, 0, alone.width, alone.width))  # what FastComposer's zoom comes down to
    side = max(alone.size)
    padded = ImageOps.pad(alone, (side, side)).resize((size, size), Image.Resampling.BILINEAR)
    return augment_reference(np.array(padded), rng) if augmented else np.array(padded)


# All samples -------------------------------------------------------------------------------------


def read_ids(folder: Path, split: str) -> list[str]:
    """The ids of a split, or of all with "", at least one. Raises DataError."""
    path = Path(folder) / f"image_ids{'_' if split else ''}{split}.txt"
    if not path.is_file():
        raise DataError(f"{folder} is not a dataset, it has no {path.name}: give a folder that "
                        "python -m data.build has written, or another in FastComposer's layout")
    with naming(path):
        ids = read_text(path).split()
        if not ids:
            raise ValueError("there is no image id in it")
    return ids


def repeated_ids(ids: list[str]) -> list[str]:
    """What is wrong with a list of ids: a line for each that is there more than once."""
    return [f"id {image_id} is listed {n} times" for image_id, n in Counter(ids).items() if n > 1]


class Folder:
    """The good samples among the first `count` of a folder, each read when it is asked for.

    Every file is read once to find the broken ones, and that is remembered until a file changes. A line
    on stderr counts them and names the first. Raises DataError when no sample is left.
    """

    def __init__(self, folder: Path, count: int | None, size: int, split: str = "train",
                 max_people: int = MAX_PEOPLE, augmented: bool = False, seed: int = 0):
        self.folder, self.size = Path(folder).resolve(), size
        ids = read_ids(self.folder, split)[:count]
        stamps = [stamp(sample_file(self.folder, i, suffix)) for i in ids for suffix in SUFFIXES]
        found = remembered(CACHE_ROOT / f"checked-{checksum(FORMAT, str(self.folder), ids, stamps)}.json",
                           partial(check_folder, self.folder, ids))
        self.ids, self.people, broken = found["ids"], found["people"], found["broken"]
        self.places = {identity: [tuple(place) for place in places] for identity, places in found["places"]}
        self.options = {"size": size, "max_people": max_people, "augmented": augmented, "seed": seed}
        # Neither path nor times: a copy elsewhere has the same samples.
        sizes = [found and found[0] for found in stamps]
        self.key = checksum(FORMAT, ids, sizes, self.options)  # changes with the samples
        if broken:
            print(f"warning: {len(broken)} of {len(ids)} samples are broken and left out: "
                  f"{one_line('; '.join(broken[:3]))}{'; ...' if len(broken) > 3 else ''} "
                  f"(python -m data.build --check {folder} lists them)", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, epoch: int = 0) -> Sample:
        """One sample with the augmentations of an epoch. Raises DataError if its files broke meanwhile."""
        return read_sample(self.folder, self.ids[index], places=self.places, epoch=epoch, **self.options)

    def held_out(self) -> Iterator[tuple[str, np.ndarray]]:
        """Noun and reference of people of the first samples: of the test list, where there is one."""
        samples = self
        with suppress(DataError):
            test = Folder(self.folder, HELD_OUT, self.size, "test")
            samples = test if test.people else self
        for index in range(min(len(samples), HELD_OUT)):
            sample = samples.read(index)
            if sample.ends:
                yield re.findall(r"\w+", sample.caption[:sample.ends[0]])[-1], sample.references[0]


def check_folder(folder: Path, ids: list[str]) -> dict:
    """Which samples are good, how many people they show, where who is, and what is wrong with the others.
    Raises DataError when none is good."""
    unique = list(dict.fromkeys(ids))
    results = dict(zip(unique, in_processes(partial(check_sample, folder), unique, "checking"), strict=True))
    good = [image_id for image_id in unique if not isinstance(results[image_id], DataError)]
    broken = repeated_ids(ids) + [str(error) for error in results.values() if isinstance(error, DataError)]
    if not good:
        raise DataError(f"none of the {len(broken)} samples can be used: {broken[0]}")
    return {"ids": good, "people": sum(len(results[image_id]) for image_id in good), "broken": broken,
            "places": list(find_places({image_id: results[image_id] for image_id in good}).items())}


def check_sample(folder: Path, image_id: str) -> list[tuple] | DataError:
    """(segment id, identity or None) of a sample's people, or what is wrong with it."""
    try:
        return people_of(open_sample(folder, image_id).record)
    except DataError as error:
        return error


def people_of(record: dict) -> list[tuple]:
    """(segment id, identity or None) of the people of a picture."""
    return [(s["id"], s["identity"] if s.get("identity", "") != "" else None) for s in record["segments"]]


def find_places(people: dict[str, list[tuple]]) -> Places:
    """Image id -> its people -> where else each known person is to be found."""
    places = defaultdict(list)
    for image_id, members in people.items():
        for number, identity in members:
            if identity is not None:
                places[identity].append((image_id, number))
    return dict(places)


def remembered(path: Path, function: Callable[[], dict]) -> dict:
    """The result of `function`, kept in a file, which appears whole or not at all."""
    if not path.exists():
        result = function()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        temporary.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def checksum(*values) -> str:
    return f"{zlib.crc32(repr(values).encode()):08x}"


def stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file: what tells that it was changed."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
