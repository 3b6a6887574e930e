"""A function of many jobs on several cores, by torch's data loader."""
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CHUNK = 4  # jobs that a process does at a time


def in_processes(function: Callable, jobs: Sequence, title: str, unit: str = "sample",
                 workers: int | None = None, shown: bool = True) -> Iterator:
    """`function` of every job, in order, on all cores or by so many `workers`; how far it is may be `shown`.
    Only some results wait at any time. Raises what `function` raises, and ChildProcessError, an OSError,
    when one of the processes was killed."""
    chunks = [jobs[start:start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    with tqdm(total=len(jobs), desc=title, unit=unit, leave=False, disable=not shown) as progress:
        for results in in_batches(function, chunks, min(workers or worker_count(0), len(chunks))):
            for result in results:
                progress.update()
                yield result


def in_batches(function: Callable, batches: Iterable[Sequence], workers: int) -> Iterator[list]:
    """The results of `function` for each job of batch after batch, two batches ahead per process. Raises as
    `in_processes`."""
    loader = DataLoader(Jobs(function), batch_sampler=batches, collate_fn=list, num_workers=workers,
                        worker_init_fn=outlive_signals, generator=torch.Generator(),
                        # A thread then fetches what they have made, while this one keeps the GPU busy.
                        pin_memory=torch.cuda.is_available())
    try:
        for results in loader:
            for result in results:
                if isinstance(result, Failure):
                    raise result.error
            yield results
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError("one of the reading processes was killed: is there too little memory?"
                                ) from error


class Jobs(Dataset):
    """`function` of a job, or what it raised, which torch would raise with another text."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, job):
        try:
            return self.function(job)
        except Exception as error:
            return Failure(error)


class Failure:
    """What a job raised."""

    def __init__(self, error: Exception):
        self.error = error


def outlive_signals(number: int) -> None:
    """Who stops a program signals all its processes, and the one that reads the results may still want some.
    It usually ends the others; otherwise they end by themselves a moment later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # any other end torch reports as an error


def worker_count(spared: int = 1) -> int:
    """How many suit this process and those that train beside it on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // processes - spared)
