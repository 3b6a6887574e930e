"""Batches in training order, read ahead of the training by other processes."""
import atexit
import os
import signal
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from threading import Thread, Timer
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.dataset import Sample
from data.fastcomposer import DataError
from data.processes import end_with

PATIENCE = 20  # broken samples in a row before reading is given up
Place = tuple[int, int]  # step, and turn within it


class Samples(Protocol):
    """What training reads: a folder, or rendered scenes."""

    key: str  # changes with the samples

    def __len__(self) -> int: ...

    def read(self, index: int, epoch: int) -> Sample:
        """Raises DataError where the sample broke after it was checked."""


class Schedule(Protocol):
    """Which samples a run reads when."""

    def order(self, place: Place) -> np.ndarray:
        """(B, 2): index and epoch of the samples at a place."""

    def after(self, place: Place) -> Place | None:
        """The place that follows; None at the end."""


class Reader(Dataset):
    """Reads (index, epoch); in place of a sample that broke, the next one that is whole."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, item: Sequence[int]) -> tuple[Sample | None, list[str]]:
        """The sample, or None, and what was wrong with those in whose place it is."""
        index, epoch = map(int, item)
        problems = []
        while len(problems) < PATIENCE:
            try:
                return self.samples.read((index + len(problems)) % len(self.samples), epoch), problems
            except DataError as error:
                problems.append(str(error))
        return None, problems


def start_reader(trainer: int, number: int) -> None:
    """A job that is stopped signals all its processes. The training one still wants to finish its step,
    so this one goes on for a moment; usually that one ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It holds copies of the training process's connections, which close only when both have ended.
    Thread(target=end_with, args=(trainer,), daemon=True).start()
    end = Timer(10, os._exit, (0,))
    end.daemon = True
    signal.signal(signal.SIGTERM, lambda *_: end.start() if end.ident is None else None)


class Stream:
    """The batches of a run, one after the other, from any place on; `workers` processes read ahead."""

    def __init__(self, samples: Samples, schedule: Schedule, workers: int):
        self.reader, self.schedule, self.workers = Reader(samples), schedule, workers
        self.next: Place | None = None
        self.batches: Iterator = iter(())
        self.broken = 0  # samples that were replaced so far
        streams.add(self)

    def batch(self, place: Place) -> list[Sample]:
        """The samples of one place; the one after it is the fastest to ask for next.

        Raises DataError when many in a row broke since they were checked, as when a disk is gone.
        """
        if self.next != place:
            self.close()
            self.batches = iter(DataLoader(
                self.reader, batch_sampler=batches_from(self.schedule, place), num_workers=self.workers,
                collate_fn=list, worker_init_fn=partial(start_reader, os.getpid()),
                prefetch_factor=2 if self.workers else None,
                # A thread then fetches what they have read, while this one keeps the GPU busy.
                pin_memory=torch.cuda.is_available()))
        results = next(self.batches)
        self.next = self.schedule.after(place)
        self.broken += sum(len(problems) for _, problems in results)
        for sample, problems in results:
            if sample is None:
                raise DataError(f"{PATIENCE} samples in a row broke since they were checked: {problems[-1]}")
        return [sample for sample, _ in results]

    def close(self) -> None:
        """Let the readers end."""
        self.batches = iter(())


def batches_from(schedule: Schedule, place: Place | None) -> Iterator[np.ndarray]:
    """What to read from a place on."""
    while place is not None:
        yield schedule.order(place)
        place = schedule.after(place)


streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def close_streams() -> None:
    """Before the interpreter would wait for their readers."""
    for stream in list(streams):
        stream.close()


def worker_count() -> int:
    """How many readers suit this process and those that train beside it on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, len(os.sched_getaffinity(0)) // processes - 1))
