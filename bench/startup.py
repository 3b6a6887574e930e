"""How long one waits: from the start of a process to its first picture, and for the `--help` of each command.

    python bench/startup.py --output runs/bench
    python bench/startup.py --output runs/bench --cores 1 --commands sample.py

The pictures are the small world's, by `sample.py` with its defaults. Seconds are those of the wall clock, on
the first `--cores` cores that this process may use; beside them is the processor time, which other programs
on the machine change less. Medians and quartiles.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import ROOT, positive, report, spread

FOLDERS = ("", "apps", "weights", "bench", "data")
PICTURES = {"a picture": [], "a picture with a person": ["--subject", "examples/zoe.png"]}


def commands() -> list[str]:
    """The files that can be run."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in files
            if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the JSON goes")
    add("--cores", type=positive, default=2, help="of each process (default 2)")
    add("--repeats", type=positive, default=3, help="starts of each (default 3)")
    add("--steps", type=positive, help="of the pictures (default: the weights')")
    add("--commands", nargs="+", choices=commands(), default=commands(), metavar="FILE",
        help="whose --help is asked for (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    import torch
    cores = sorted(os.sched_getaffinity(0))[:args.cores]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = [sys.executable, "sample.py", "--prompt", "a woman standing on the beach", "--seed", "0",
                "--output", f"{folder}/picture.png"]
        if args.steps:
            base += ["--steps", str(args.steps)]
        asked = {name: [*base, *flags] for name, flags in PICTURES.items()}
        for command in args.commands:
            name = ["-m", command[:-3].replace("/", ".")] if command.startswith("data/") else [command]
            asked[f"{command} --help"] = [sys.executable, *name, "--help"]
        for what, command in asked.items():
            found = [run(command, cores) for _ in range(args.repeats)]
            wall, processor = (spread(values) for values in zip(*found, strict=True))
            rows.append({"what": what, "seconds": wall, "processor seconds": processor})
    report("startup", rows, args, torch.device("cpu"))


def run(command: list[str], cores: list[int]) -> tuple[float, float]:
    """Wall clock and processor time of a command on these cores. Raises CalledProcessError."""
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, started = spent(), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
                   preexec_fn=partial(os.sched_setaffinity, 0, cores))
    return time.perf_counter() - started, spent() - before


if __name__ == "__main__":
    main()
