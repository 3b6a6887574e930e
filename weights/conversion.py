"""Gather the parts of a base model, check that they belong together, write a folder whole or not at all."""
import argparse
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from models.load import PARTS, describe_sizes, write_json, write_whole
from weights.checkpoints import FLOATS, REQUIRED, Notes, WrongKind, WrongTensors
from weights.parts import (FIXED, LABELS, OWN, Part, check_together, fit, open_part, open_source,
                           read_value)

DTYPES = {"keep": None, "fp16": torch.float16, "fp32": torch.float32}
DEFAULTS = {"image_size": 512, "sampling": {"guidance_scale": 5.0, "steps": 20}}


def convert(args: argparse.Namespace) -> None:
    notes = Notes()
    parts, base = gather(args, notes)
    check_output(args, parts)
    for name, part in parts.items():
        fit(name, part, notes)
    check_together(parts)
    config = describe(args, parts, base, notes)
    with staged(args.output) as folder:
        write_parts(parts, {name: folder / f"{name}.safetensors" for name in parts}, DTYPES[args.dtype])
        write_json(config, folder / "config.json")
    for name, part in parts.items():
        print(f"{LABELS[name]}: {len(part.tensors)} tensors from {part.path} ({part.layout})")
    for line in (f"EMA: {parts['unet'].ema}", *notes.repaired, f"written to {args.output}"):
        print(line)


def gather(args: argparse.Namespace, notes: Notes) -> tuple[dict[str, Part], dict]:
    """The parts to convert, and config.json of the source if that is a weights folder. Raises Refusal."""
    parts, base = open_source(args.source, args.ema, notes) if args.source else {}, {}
    if parts and "unet" not in parts and not args.unet:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in parts)
        raise WrongKind(f"{args.source} holds {' and '.join(LABELS[name] for name in parts)} only, no UNet: "
                        f"give it as {flags} beside a checkpoint")
    if parts and next(iter(parts.values())).layout == OWN:
        base = next(iter(parts.values())).settings
        notes.files.clear()  # its record says where they came from
    for name in PARTS:
        if source := getattr(args, name):
            parts[name] = open_part(source, name, args.ema if name == "unet" else "off", notes)
    if missing := [name for name in REQUIRED if name not in parts]:
        raise WrongTensors(f"{args.source} has no {' and no '.join(LABELS[name] for name in missing)}: add "
                           f"{' and '.join('--' + name.replace('_', '-') + ' FILE' for name in missing)}")
    return {name: parts[name] for name in PARTS if name in parts}, base


def check_output(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise Refusal if the folder cannot take the parts, or would keep files that do not belong to them."""
    if args.output.exists() and not args.output.is_dir():
        raise WrongKind(f"--output {args.output} is a file: give a folder")
    stale = {p.name for p in args.output.glob("*.safetensors")} - {f"{name}.safetensors" for name in names}
    if stale and not (args.source and Path(args.source).resolve() == args.output.resolve()):
        raise WrongKind(f"--output {args.output} holds {', '.join(sorted(stale))}, which would not belong to "
                        "these weights: give another folder, or delete it")


def describe(args: argparse.Namespace, parts: dict[str, Part], base: dict, notes: Notes) -> dict:
    """config.json: sizes, defaults and where everything came from. What a weights folder says stays."""
    old = base.get("conversion", {})
    if not isinstance(old, dict) or not all(isinstance(old.get(key, kind()), kind) for key, kind in (
            ("layout", dict), ("sha256", dict), ("dropped", dict), ("repaired", list))):
        old = {}  # not ours
    source = args.source or args.unet
    layouts = {name: part.layout for name, part in parts.items() if part.layout != OWN or not old}
    record = {"source": Path(source).resolve().name if Path(source).exists() else source,
              "prediction_type": FIXED["prediction_type"],
              **old,
              "ema": old["ema"] if "ema" in old and not args.unet else parts["unet"].ema,
              "layout": {**old.get("layout", {}), **layouts},
              "sha256": {**old.get("sha256", {}), **dict(map(digest, dict.fromkeys(notes.files)))},
              "dropped": {**old.get("dropped", {}), **notes.dropped},
              "repaired": [*old.get("repaired", []), *notes.repaired]}
    sizes = {name: describe_sizes(part.cfg) for name, part in parts.items()}
    return {**DEFAULTS, **base, **sizes, "conversion": record}


def digest(path: Path) -> tuple[str, str]:
    """A file's name, after its part's folder if it has one, and its sha256."""
    sha = hashlib.sha256()
    with path.open("rb") as file, tqdm(total=path.stat().st_size, desc="hashing", unit="B", unit_scale=True,
                                       leave=False, disable=None) as bar:
        while block := file.read(1 << 22):
            sha.update(block)
            bar.update(len(block))
    return f"{path.parent.name}/{path.name}" if path.parent.name in PARTS else path.name, sha.hexdigest()


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder whose contents go to `output` at the end: a failure leaves nothing."""
    anchor = next(p for p in (output, *output.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=anchor) as temporary:
        folder = Path(temporary) / "weights"
        folder.mkdir()
        yield folder
        if output.exists():
            for file in sorted(folder.iterdir()):
                os.replace(file, output / file.name)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(output)


def write_parts(parts: dict[str, Part], files: dict[str, Path], dtype: torch.dtype | None) -> None:
    """Write each part to its file. Raises Refusal and OSError."""
    total = sum(len(part.tensors) for part in parts.values())
    with tqdm(total=total, desc="writing", unit="tensor", disable=None) as bar:
        for name, part in parts.items():
            write_tensors(part, files[name], dtype, bar)


def write_tensors(part: Part, path: Path, dtype: torch.dtype | None, bar: tqdm) -> None:
    """Write a safetensors file with one tensor in memory at a time. Raises Refusal and OSError."""
    names, header, end = {dtype: name for name, dtype in FLOATS.items()}, {}, 0
    types = {key: dtype or lazy.dtype for key, lazy in part.tensors.items()}
    order = sorted(types, key=lambda key: (-types[key].itemsize, key))  # so that all are aligned
    for key in order:
        shape = part.tensors[key].shape
        start, end = end, end + math.prod(shape) * types[key].itemsize
        header[key] = {"dtype": names[types[key]], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def stream(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                file.write(read_value(part, key, types[key]).reshape(-1).view(torch.uint8).numpy())
                bar.update()
    write_whole(path, stream)
