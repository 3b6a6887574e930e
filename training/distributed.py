"""One training run in several processes, started by `torchrun`; alone, everything here does nothing.

Every process knows which samples the whole batch has and draws its noise, both functions of the step, and
reads and works on its share, in one micro-batch or in several (turns), to save memory. So a run is the same
run for any number of processes and turns, up to the order of sums.

A process that dies ends the others: `torchrun` ends those of its machine, closed connections those of
all others. One that hangs, or whose machine is gone, ends them after `PATIENCE`.
"""
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
# Before there is a group: default arguments in there would hold it for good, `stop` could not end its
# threads, and one of them that is late ends the process with SIGABRT while the interpreter goes.
import torch.distributed.nn  # noqa: F401

# Rank 0 writes a checkpoint and draws a sample sheet between two exchanges while the others wait.
PATIENCE = timedelta(minutes=30)
# Rank 0 renders or checks the data, or each encodes its part, while the others wait.
DATA_PATIENCE = timedelta(hours=12)
Batch = TypeVar("Batch")
_patient: dist.ProcessGroup | None = None


def start(device: torch.device) -> torch.device:
    """Join the processes that `torchrun` started, if it did; returns this process's own device.

    Raises ConnectionError.
    """
    global _patient
    launched = "WORLD_SIZE" in os.environ
    if device.type == "cuda":
        if launched:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # streams and graphs are the current one's
    if launched:
        with together():
            store, rank, size = next(dist.rendezvous("env://"))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, rank=rank,
                                    world_size=size, store=dist.PrefixStore(meet(store, rank, size), store))
            _patient = dist.new_group(backend="gloo", timeout=DATA_PATIENCE)
    return device


def meet(store: dist.Store, rank: int, size: int) -> str:
    """A name that all processes of this start share, and no earlier start had.

    `torchrun` keeps one store through its restarts, where the processes would find the addresses of
    dead ones. How often it restarted is no name: on several machines it counts differently.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"hello {rank}", mine)
        while not store.check([f"welcome {mine}"]):
            time.sleep(0.05)
        name = store.get(f"welcome {mine}").decode()
        store.set(f"{name} {rank}", "")
        return name
    for other in range(1, size):
        while not store.check([f"{mine} {other}"]):
            if store.check([f"hello {other}"]):  # perhaps of a process that is dead: then again
                store.set(f"welcome {store.get(f'hello {other}').decode()}", mine)
            time.sleep(0.05)
    return mine


def stop() -> None:
    """Leave the other processes."""
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is; rank 0 alone writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Batch, turn: int, turns: int) -> Batch:
    """What this process works on in one of its turns: every n-th element along the first axis."""
    return batch[rank() * turns + turn::world_size() * turns]


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


def wait() -> None:
    """Until all processes are here, for hours. Raises ConnectionError."""
    if _patient is not None:
        with together():
            dist.barrier(_patient)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 goes through the block, then all others do, and find in the cache what it made."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


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
