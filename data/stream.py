"""The samples of a run in training order, read ahead of the training by other processes."""
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from data.processes import in_batches, worker_count
from data.sample import Sample, Samples


class Stream:
    """The batches of a run, one after the other, from any one on.

    Args:
        order: number of a batch -> (B, 2), index and epoch of its samples.
    """

    def __init__(self, samples: Samples, order: Callable[[int], np.ndarray]):
        self.samples, self.order, self.next = samples, order, -1
        self.batches: Iterator[list[Sample]] = iter(())

    def batch(self, number: int) -> list[Sample]:
        """The samples of one batch; the one after it is the fastest to ask for next. Raises what reading
        them raises, such as DataError."""
        if self.next != number:
            self.batches = in_batches(self.read, map(self.order, count(number)), min(8, worker_count()))
        self.next = number + 1
        return next(self.batches)

    def read(self, place: np.ndarray) -> Sample:
        index, epoch = map(int, place)
        return self.samples.read(index, epoch)

    def close(self) -> None:
        """Let the readers end."""
        self.batches, self.next = iter(()), -1
