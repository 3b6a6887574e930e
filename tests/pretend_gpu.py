"""Run scripts on a GPU that is none: it computes on the CPU, and refuses what lies there as CUDA does.

    python tests/pretend_gpu.py sample.py --prompt "a woman waving" -- train.py vae --output runs/vae

Its tensors are wrappers around tensors of the CPU. An operation that meets a tensor of each is an error,
but for copies from one to the other, for tensors without dimensions, and for indices, which CUDA takes from
the CPU too. So a machine without a GPU finds what was forgotten there. What it cannot find: autocast knows
a few operations only, nothing is exchanged between processes, and kernels are the CPU's.
"""
import runpy
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

GPU = "gpu"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnGPU(torch.Tensor):
    """A tensor of the GPU, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, strides=raw.stride(), dtype=raw.dtype,
                                                   storage_offset=raw.storage_offset(), device=f"{GPU}:0")

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def tolist(self):
        return self.raw.tolist()

    def __reduce_ex__(self, protocol: int):  # a checkpoint has the numbers alone
        return self.raw.__reduce_ex__(protocol)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, other)  # shape and dtype
        self.raw = other.raw

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """Inside, the device "gpu:0" is there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def tensors_of(values: Iterable) -> Iterator[torch.Tensor]:
    """Those of an operation's arguments, which are nested in lists at most."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def raw(value):
    """An argument as the CPU takes it."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(raw, value))
    return value.raw if isinstance(value, OnGPU) else value


def run(function, args: tuple, kwargs: dict):
    """An operation, on the CPU; its results are where its tensors were, or where `device` says."""
    flat = list(tensors_of((*args, *kwargs.values())))
    inside = [x for x in flat if isinstance(x, OnGPU)]
    outside = any(not isinstance(x, OnGPU) and x.ndim for x in flat)
    to_gpu = bool(inside)
    if function is aten.copy_.default:
        to_gpu = isinstance(args[0], OnGPU)
    elif kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == GPU
    indexed = function in INDEXED and isinstance(args[0], OnGPU)
    if inside and outside and function not in COPIES and not indexed:
        raise RuntimeError(f"{function}: expected all tensors on the same device, found {GPU}:0 and cpu")
    args, kwargs = raw(args), {name: raw(value) for name, value in kwargs.items()}
    if kwargs.get("device") is not None and to_gpu:
        kwargs["device"] = torch.device("cpu")
    known = {id(x.raw): x for x in inside}  # what is changed in place stays itself
    found = function(*args, **kwargs)
    if to_gpu:
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnGPU(x), found)
    return tree_map_only(torch.Tensor, lambda x: x.clone() if id(x) in known else x, found)


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


LOWER = ("conv2d", "linear", "matmul", "mm", "addmm", "bmm", "scaled_dot_product_attention")
FLOAT = ("layer_norm", "group_norm")


def register() -> list[torch.library.Library]:
    """Make the device known to torch, for the rest of the process; keep what is returned."""
    backend_registration._setup_privateuseone_for_python_backend(GPU, Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is a copy, which the mode sees
    others, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, lower in ((LOWER, True), (FLOAT, False)):
        for name in names:
            some.impl(name, partial(autocast, getattr(torch.ops.aten, name), lower), "AutocastPrivateUse1")
    return [others, some]


def autocast(function, lower: bool, *args, **kwargs):
    """An operation in autocast's precision, or in float32, as CUDA's lists have it."""
    dtype = torch.get_autocast_dtype(GPU) if lower else torch.float32
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(key):
        return function(*tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x,
                                       args), **kwargs)


def main() -> None:
    libraries = register()
    from models import device
    device.pick_device = lambda name: torch.device(GPU, 0)
    commands, words = [[]], sys.argv[1:]
    for word in words:
        commands.append([]) if word == "--" else commands[-1].append(word)
    for script, *arguments in commands:
        sys.argv = [script, *arguments]
        with PretendGPU():
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as stop:
                if stop.code:
                    raise
    del libraries


if __name__ == "__main__":
    main()
