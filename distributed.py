"""One training run in several processes, started by `torchrun`; alone, everything here does nothing.

Every process draws the data of the whole batch, which is a function of the step, and works on its
share, in one turn or in several to save memory. So a run is the same run for any number of processes
and turns, up to the order of sums.
"""
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# Rank 0 renders and encodes the data while the others wait.
PATIENCE = timedelta(hours=12)
Batch = TypeVar("Batch")
_turn = (0, 1)


def start(device: torch.device) -> torch.device:
    """Join the processes that `torchrun` started, if it did; returns this process's own device."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is; rank 0 alone writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def turn(index: int, count: int) -> Iterator[None]:
    """Inside, `share` is the part number `index` of `count` parts: gradient accumulation."""
    global _turn
    before, _turn = _turn, (index, count)
    try:
        yield
    finally:
        _turn = before


def turn_index() -> int:
    """The part that `share` is now."""
    return _turn[0]


def share(batch: Batch) -> Batch:
    """What this process works on in this turn: every n-th element along the first axis."""
    index, count = _turn
    return batch[rank() * count + index::world_size() * count]


@contextmanager
def together() -> Iterator[None]:
    """Name the cause when an exchange fails. Raises ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended, its own message says why; "
                              "the last checkpoint stands, go on with --resume") from error


def wait() -> None:
    """Wait until all processes are here. Raises ConnectionError."""
    if dist.is_initialized():
        with together():
            dist.barrier()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 goes through the block, then all others do, and find in the cache what it made."""
    first = rank() == 0
    if not first:
        wait()
    yield
    if first:
        wait()


def average_gradients(parameters: Sequence[torch.nn.Parameter], flag: bool) -> bool:
    """Replace all gradients by their mean over the processes, in one message.

    Returns whether `flag` was true in any process, so that all stop after the same step.
    """
    if not dist.is_initialized():
        return flag
    gradients = [p.grad for p in parameters]
    message = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([float(flag)])])
    with together():
        dist.all_reduce(message)
    parts = (message[:-1] / world_size()).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return bool(message[-1] > 0)


def mean(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars by name, averaged over the processes."""
    message = torch.stack([v.detach().float() for v in values.values()])
    if dist.is_initialized():
        with together():
            dist.all_reduce(message)
        message /= world_size()
    return dict(zip(values, message.tolist(), strict=True))
