"""Rows of named tensors on disk, in safetensors files that several processes can make.

A file holds `SIZE` rows and appears whole, so what was interrupted goes on.
"""
import os
import secrets
import shutil
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


class ShardError(ValueError):
    """A folder of shards cannot be used; the message names it."""


def shards_of(count: int) -> list[range]:
    """The rows of each shard."""
    return [range(start, min(start + SIZE, count)) for start in range(0, count, SIZE)]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def build_shards(folder: Path, count: int, make: Callable[[range], Iterable[dict[str, Tensor]]],
                 numbers: Iterable[int]) -> None:
    """Make those of the shards `numbers` that are missing; `make` gives the rows of a range, some at a
    time. Raises ShardError."""
    folder.mkdir(parents=True, exist_ok=True)
    ranges = shards_of(count)
    missing = [n for n in numbers if n < len(ranges) and not shard_path(folder, n).exists()]
    with tqdm(total=sum(len(ranges[n]) for n in missing), desc="filling the cache", unit="sample",
              leave=False, disable=not missing) as progress:
        for number in missing:
            parts = []
            for part in make(ranges[number]):
                parts.append({name: rows.cpu() for name, rows in part.items()})
                progress.update(len(next(iter(part.values()))))
            joined = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            try:
                with whole(shard_path(folder, number)) as temporary:
                    save_file(joined, temporary)
            except (OSError, SafetensorError) as error:
                free = shutil.disk_usage(folder).free / 1e6
                raise ShardError(f"{folder}: shard {number} of {len(ranges)} cannot be written ({error}): "
                                 f"{free:.1f} MB are free there; the others stay") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to; `path` then appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
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
            for name, values in self.open(int(number)).items():
                part = values[torch.from_numpy(places[where])]
                batch = rows.setdefault(name, part.new_empty((len(numbers), *part.shape[1:])))
                batch[torch.from_numpy(where)] = part
        return rows

    def open(self, number: int) -> dict[str, Tensor]:
        """All rows of one file."""
        if number not in self.files:
            path, count = shard_path(self.folder, number), len(shards_of(self.count)[number])
            try:
                with safe_open(path, "pt") as file:
                    rows = {name: file.get_tensor(name) for name in list(file.keys())}
                if any(value.shape[:1] != (count,) for value in rows.values()):
                    raise OSError(f"it does not hold {count} rows")
            except (OSError, SafetensorError) as error:
                raise ShardError(f"{path} cannot be read, remove it: {error}") from error
            self.files[number] = rows
        return self.files[number]
