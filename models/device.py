"""Where the models compute, and the memory that they compute in."""
import ctypes
import os
import re

import torch

HEAP = ((-4, 0), (-1, -1), (-2, 1 << 28))  # of glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def reuse_memory() -> None:
    """Keep what is freed for the next call of the network, in place of giving it back to the system.

    By default glibc maps every large tensor anew, and the system fills each of its pages with zeros when it
    is touched: up to a quarter of the time of a UNet call on a CPU (see docs/performance.md). Does nothing
    where the C library is another one, and nothing to a GPU's memory.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # not Linux, or another C library
        return
    for option, value in HEAP:
        set_option(option, value)


def pick_device(name: str) -> torch.device:
    """A device by name; `auto` is CUDA where there is one. `cuda` is under `torchrun` this process's own.

    Raises ValueError when it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"(cpu|mps|xpu|cuda(:\d+)?)", name):
        raise ValueError(f"--device {name!r} is unknown: give auto, cpu, cuda, cuda:1, ...")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error)[:90]}") from error
