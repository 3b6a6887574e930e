"""What the benchmarks share: sides in turns, ratios with their spread, the machine, a process's memory.

A number of seconds says more about the machine than about the code. So all sides of a question are run in
turns in one process, on the same inputs and weights, and each round gives a ratio; what is reported is the
median of these ratios and their quartiles. On one CPU thread the clock is the processor time of the process,
which other programs change little; on more threads it is the wall clock, on a GPU events.
"""
import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn as nn

from models.device import pick_device, reuse_memory
from models.errors import Parser
from models.load import PARTS, write_json
from toyworld.presets import SMALL

ROOT = Path(__file__).resolve().parents[1]
Sides = dict[str, Callable[[], object]]


def make_parser(doc: str, repeats: int = 5) -> argparse.ArgumentParser:
    """With the flags of all benchmarks of models; `repeats` is the default."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the JSON goes")
    add("--size", default="sd15", choices=["sd15", "small"],
        help="of the models: SD1.5's, or the small world's (default sd15)")
    add("--device", default="auto", help="cpu, cuda, ... (default auto)")
    add("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"],
        help="of weights and inputs (default fp32)")
    add("--repeats", type=positive, default=repeats, metavar="N",
        help=f"rounds after the warm-up (default {repeats})")
    return parser


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def pick(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that the flags name. Freed memory stays, as in all commands. Raises ValueError
    if there is no such device."""
    reuse_memory()
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose events `seconds` reads
    return device, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]


def sizes(name: str) -> dict:
    """Part of a base model -> its sizes."""
    return {part: SMALL[part] if name == "small" else config() for part, (_, config) in PARTS.items()}


def twin(module: nn.Module) -> nn.Module:
    """A copy whose parameters share the memory of the module's, until one of them is changed as a whole."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, shared)


# --- time ---


def clock(device: torch.device) -> str:
    """Which clock `seconds` reads."""
    return "GPU events" if device.type == "cuda" else (
        "processor time" if torch.get_num_threads() == 1 else "wall clock")


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """What one call takes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = now()
    function()
    return now() - started


def in_turns(sides: Sides, repeats: int, device: torch.device,
             warm_up: Sides | None = None) -> dict[str, list[float]]:
    """Seconds of each side, round by round, after a round to warm up, of `warm_up` where it is given.
    Rounds begin with another side each."""
    names, taken = list(sides), {name: [] for name in sides}
    with torch.no_grad():
        for function in (warm_up or sides).values():
            function()
        for _ in range(repeats):
            for name in names:
                taken[name].append(seconds(sides[name], device))
            names = names[1:] + names[:1]
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def compare(sides: Sides, pairs: Sequence[tuple[str, str]], repeats: int, device: torch.device,
            warm_up: Sides | None = None, **labels) -> list[dict]:
    """A line for each pair (side, against) of sides: the ratio of their times, and the side's seconds."""
    taken = in_turns(sides, repeats, device, warm_up)
    return [{**labels, "side": side, "against": against, "seconds": statistics.median(taken[side]),
             "ratio": spread([a / b for a, b in zip(taken[side], taken[against], strict=True)])}
            for side, against in pairs]


# --- memory ---


def reset_peak(device: torch.device) -> None:
    """Forget what loading took."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # give back what loading has freed
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew


def peak_memory(device: torch.device) -> float:
    """GB since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def in_child(module: str, arguments: Sequence[str]) -> dict:
    """Run a benchmark in a process of its own; its last line is JSON. Raises CalledProcessError."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE,
                          text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- what is written ---


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on."""
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), "unknown")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    versions = {}
    for package in ("torch", "diffusers", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"device": name, "threads": torch.get_num_threads(), "clock": clock(device),
            "cores": len(os.sched_getaffinity(0)), **versions}


def cell(value) -> str:
    """A number, a ratio with its quartiles, or text, as a table shows it."""
    if isinstance(value, dict):
        return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[dict]) -> str:
    """In Markdown; the columns are those of the first row."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(name, "")) for name in rows[0]) + " |"
                              for row in rows])


def report(name: str, rows: list[dict], args: argparse.Namespace, device: torch.device) -> None:
    """Print the rows and write them to NAME.json in --output, with the machine and the flags."""
    found = machine(device)
    args.output.mkdir(parents=True, exist_ok=True)
    flags = {k: v for k, v in vars(args).items() if k != "output"}
    write_json({"machine": found, "flags": flags, "rows": rows}, args.output / f"{name}.json")
    print(table(rows))
    print(", ".join(f"{k} {v}" for k, v in found.items()))
