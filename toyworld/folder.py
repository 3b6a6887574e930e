"""Scenes of the small world as a dataset in FastComposer's layout."""
import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.processes import in_processes
from models.errors import Parser
from toyworld.render import render_scene
from toyworld.scenes import identity_key, sample_scene

# Image ids are 9 digits; the two splits count from different bases so that they can share a folder.
FIRST_ID = {"train": 100_000_000, "test": 500_000_000}


def _write_sample(seed: int, split: str, output: Path) -> str:
    """Write the .jpg, .json and .npy of one scene and return its id."""
    scene = sample_scene(seed, split)
    picture, masks = render_scene(scene)
    image_id = str(FIRST_ID[split] + seed)
    instances = np.zeros(masks.shape[1:], np.uint8)
    segments, attributes = [], {}
    for number, (subject, mask) in enumerate(zip(scene.subjects, masks, strict=True), start=1):
        if not mask.any():
            continue
        instances[mask] = number
        ys, xs = np.nonzero(mask)
        segments.append({
            "id": number, "word": subject.noun, "start": subject.end - len(subject.noun),
            "end": subject.end, "coco_label": "person", "identity": identity_key(subject.identity),
            "bbox": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]})
        attributes[str(number)] = {
            name: getattr(subject.identity, name) for name in subject.visible}
    record = {"image_id": image_id, "caption": scene.caption, "segments": segments,
              "activity": scene.activity, "context": scene.context, "style": scene.style,
              "attributes": attributes}
    stem = output / image_id[:5] / image_id
    stem.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(stem.with_suffix(".jpg"), quality=95)
    stem.with_suffix(".json").write_text(json.dumps(record))
    np.save(stem.with_suffix(".npy"), instances)
    return image_id


def write_dataset(output: Path, count: int, split: str, workers: int, seed: int) -> None:
    """Write `count` samples; a folder may hold one run of each split."""
    job = partial(_write_sample, split=split, output=output)
    ids = {split: list(in_processes(job, range(seed, seed + count), "rendering", "picture", workers))}
    for name in FIRST_ID:
        path = output / f"image_ids_{name}.txt"
        if name not in ids:
            ids[name] = path.read_text().split() if path.exists() else []
        path.write_text("".join(f"{image_id}\n" for image_id in ids[name]))
    every = ids["train"] + ids["test"]
    (output / "image_ids.txt").write_text("".join(f"{image_id}\n" for image_id in every))


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = Parser("Write a toy world dataset.", prog="toyworld")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER",
                        help="to write into; may hold the other split")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many pictures")
    parser.add_argument("--split", choices=tuple(FIRST_ID), default="train",
                        help="whose people: those of training, or held out (default train)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if not 0 <= options.seed <= 400_000_000 - options.count:
        parser.error("--seed must be at least 0 and leave room for 9-digit image ids")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "image_ids.txt").touch()
        write_dataset(options.output, options.count, options.split, options.workers, options.seed)
    except OSError as error:
        parser.error(f"cannot write to {options.output}: {error.strerror or error}")
