"""One training run in several processes, started by `torchrun`; alone, everything here does nothing.

Every process knows which samples the whole batch has and draws its noise, both functions of the step, and
reads and works on its share, in one turn or in several to save memory. So a run is the same run for any
number of processes and turns, up to the order of sums.

A process that dies ends the others: `torchrun` ends those of its machine, closed connections those of
all others. One that hangs, or whose machine is gone, ends them after `PATIENCE`.
"""
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
# Before there is a group: default arguments in there would hold it for good, `stop` could not end its
# threads, and one of them that is late ends the process with SIGABRT while the interpreter goes.
import torch.distributed.nn  # noqa: F401

# Rank 0 writes a checkpoint and draws a sample sheet between two exchanges while the others wait.
PATIENCE = timedelta(minutes=30)
# Rank 0 renders and encodes the data while the others wait.
DATA_PATIENCE = timedelta(hours=12)
Batch = TypeVar("Batch")
_turn = (0, 1)
_store: dist.Store | None = None  # of this start of the run
_launch: str | None = None


def start(device: torch.device) -> torch.device:
    """Join the processes that `torchrun` started, if it did; returns this process's own device.

    Raises ConnectionError.
    """
    global _store, _launch
    launched = "WORLD_SIZE" in os.environ
    if device.type == "cuda":
        if launched:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # streams and graphs are the current one's
    if not launched:
        return device
    Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with together():
        store, rank, size = next(dist.rendezvous("env://"))
        _launch = os.environ.get("TORCHELASTIC_RUN_ID")
        if _launch == "none":  # --rdzv-id was not given
            _launch = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        _store = dist.PrefixStore(meet(store, rank, size), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=_store, rank=rank,
                                world_size=size, timeout=PATIENCE)
    return device


def end_with(torchrun: int) -> None:
    """End this process when `torchrun` was killed: it would train on beside the run's next start."""
    while os.getppid() == torchrun:
        time.sleep(1)
    print("error: torchrun was killed; the last checkpoint stands, go on with --resume", file=sys.stderr,
          flush=True)
    os._exit(2)


def meet(store: dist.Store, rank: int, size: int) -> str:
    """A name that all processes of this start share, and no earlier start had.

    `torchrun` keeps one store through its restarts, where the processes would find the addresses of
    dead ones. How often it restarted is no name: on several machines it counts differently.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"hello {rank}", mine)
        until(lambda: store.check([f"welcome {mine}"]))
        name = store.get(f"welcome {mine}").decode()
        store.set(f"{name} {rank}", "")
        return name

    def here(other: int) -> bool:
        if store.check([f"hello {other}"]):  # perhaps of a process that is dead: then again
            store.set(f"welcome {store.get(f'hello {other}').decode()}", mine)
        return store.check([f"{mine} {other}"])

    for other in range(1, size):
        until(lambda other=other: here(other))
    return mine


def launch() -> str | None:
    """The name of this `torchrun`, the same in all its processes and after its restarts; None without."""
    return _launch


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
        cause = (f"did not answer for {PATIENCE}" if "timed out" in str(error).lower()
                 else "has ended, its own message or torchrun's says why")
        raise ConnectionError(f"another process of this run {cause}; the last checkpoint stands, "
                              "go on with --resume") from error


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition of the store for hours. Raises ConnectionError.

    It looks now and then, since a wait inside of torch would not hear that `torchrun` ends the run.
    """
    end = time.monotonic() + DATA_PATIENCE.total_seconds()
    with together():
        while not condition():
            if time.monotonic() > end:
                raise ConnectionError(f"another process of this run was not ready after {DATA_PATIENCE}")
            time.sleep(0.05)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 goes through the block, then all others do, and find in the cache what it made; then all
    go on. Raises ConnectionError."""
    if rank():
        until(lambda: _store.check(["prepared"]))
    yield
    if _store is not None:
        _store.set("prepared", "")
        wait("ready")


def wait(place: str) -> None:
    """Until all processes are at a place of the program, for hours. Raises ConnectionError."""
    if _store is not None:
        _store.add(place, 1)
        until(lambda: _store.add(place, 0) == world_size())


def average_gradients(parameters: Sequence[torch.nn.Parameter], flag: bool) -> bool:
    """Replace all gradients by their mean over the processes, in one message.

    Returns whether `flag` was true in any process, so that all stop after the same step.
    """
    if not dist.is_initialized():
        return flag
    for p in parameters:
        if p.grad is None:  # nothing of this process's share reached it
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters]
    message = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([float(flag)])])
    with together():  # between GPUs an exchange fails where its result is asked for
        dist.all_reduce(message)
        flag = bool(message[-1] > 0)
    parts = (message[:-1] / world_size()).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return flag


def mean(values: dict[str, torch.Tensor]) -> dict[str, float | list[float]]:
    """Scalars and vectors by name, averaged over the processes."""
    parts = [v.detach().float() for v in values.values()]
    message = torch.cat([part.flatten() for part in parts])
    if dist.is_initialized():
        with together():
            dist.all_reduce(message)
        message /= world_size()
    means = message.split([part.numel() for part in parts])
    return {name: m.view_as(part).tolist() for name, m, part in zip(values, means, parts, strict=True)}
