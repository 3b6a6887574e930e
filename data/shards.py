"""Rows of named tensors on disk, in safetensors files that can be made in parallel and checked.

A file holds `SIZE` rows and is named after its number and the checksum of its bytes, so that a damaged
one is found and made again, and what was interrupted goes on. `description.json` beside them says what
the rows were made from; a folder with another description is never touched.
"""
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

SIZE = 1024
DESCRIPTION = "description.json"


class ShardError(ValueError):
    """A folder of shards cannot be used; the message names it."""


def shards_of(count: int) -> list[range]:
    """The rows of each shard."""
    return [range(start, min(start + SIZE, count)) for start in range(0, count, SIZE)]


def describe(folder: Path, description: dict) -> None:
    """Take a new or empty folder, or one of the same description. Raises ShardError."""
    path = folder / DESCRIPTION
    if not path.exists():
        held = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        # Another process may have written the description meanwhile.
        if any(not name.startswith(".") for name in held - {DESCRIPTION}):
            raise ShardError(f"{folder} holds other files: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            temporary.write_text(json.dumps(description, indent=2), encoding="utf-8")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [f"{k} {found.get(k)}, not {v}" for k, v in description.items() if found.get(k) != v]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from error
    if different:
        raise ShardError(f"{folder} was made of something else ({'; '.join(different)}): "
                         "give another folder, or remove this one")


def build_shards(folder: Path, count: int, make: Callable[[range], Iterable[dict[str, Tensor]]],
                 numbers: Iterable[int]) -> None:
    """Make those of the shards `numbers` that are missing or damaged; `make` gives the rows of a range,
    some at a time."""
    ranges = shards_of(count)
    wanted = [number for number in numbers if number < len(ranges)]
    checked = tqdm(wanted, "checking the cache", unit="file", leave=False)
    missing = [number for number in checked if not intact(folder, number)]
    with tqdm(total=sum(len(ranges[n]) for n in missing), desc="filling the cache", unit="sample",
              leave=False, disable=not missing) as progress:
        for number in missing:
            for damaged in files_of(folder, number):
                damaged.unlink()
            parts = []
            for part in make(ranges[number]):
                parts.append({name: rows.cpu() for name, rows in part.items()})
                progress.update(len(next(iter(part.values()))))
            path = folder / f".{number:06d}.{secrets.token_hex(6)}"
            try:
                joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                save_file({name: rows.contiguous() for name, rows in joined.items()}, path)
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                path.rename(folder / f"{number:06d}-{checksum(path):08x}.safetensors")
            except (OSError, SafetensorError) as error:
                free = shutil.disk_usage(folder).free / 1e6
                raise ShardError(f"{folder}: shard {number} of {len(ranges)} cannot be written ({error}): "
                                 f"{free:.1f} MB are free there; the others stay") from error
            finally:
                path.unlink(missing_ok=True)


def intact(folder: Path, number: int) -> bool:
    """Whether a shard is there and its bytes are those that were written."""
    files = files_of(folder, number)
    return len(files) == 1 and files[0].stem.endswith(f"{checksum(files[0]):08x}")


def files_of(folder: Path, number: int) -> list[Path]:
    return sorted(folder.glob(f"{number:06d}-*.safetensors"))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to; `path` then appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Shards:
    """`count` rows, mapped from disk."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.files: dict[int, dict[str, Tensor]] = {}  # number -> name -> mapped rows, opened when first read

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Name -> (B, ...). Raises ShardError."""
        numbers, places = np.divmod(np.asarray(indices), SIZE)
        rows: dict[str, Tensor] = {}
        # All rows of a file at once: one by one, a small model on a GPU would wait for its batches.
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            for name, part in self.part(int(number), torch.from_numpy(places[where])).items():
                batch = rows.setdefault(name, part.new_empty((len(numbers), *part.shape[1:])))
                batch[torch.from_numpy(where)] = part
        return rows

    def part(self, number: int, places: Tensor) -> dict[str, Tensor]:
        """Rows of one file."""
        try:
            if number not in self.files:
                path, = files_of(self.folder, number)
                file = safe_open(path, "pt")
                self.files[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {name: rows[places] for name, rows in self.files[number].items()}
        except (ValueError, IndexError, OSError, SafetensorError) as error:
            raise ShardError(f"{self.folder}: shard {number:06d} cannot be read: {error}") from error
