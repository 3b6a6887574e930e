"""What commands take on a busy machine: beside a loop on each core, and alone.

    python -m bench.busy --output runs/bench
    python -m bench.busy --output runs/bench --only "a picture" --repeats 5

Two threads that wait for each other can take many times their share of a busy machine, one thread cannot:
the system gives it its share, whatever runs beside it. So the fair share's time is that of the same command
in one process with one thread (`OMP_NUM_THREADS=1`), in turns with it under the same conditions. Each
command runs as a user starts it, with no variable set and no flag for threads. All processes are those of
this command; what else runs on the machine adds noise, which the quartiles show.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.measure import ROOT, positive, report, spread

PICTURE = [f"{ROOT}/sample.py", "--prompt", "a woman standing on the beach", "--seed", "0", "--output"]
TRAINING = [f"{ROOT}/train.py", "moa", "--weights", f"{ROOT}/weights/toyworld", "--samples", "64", "--steps",
            "12", "--batch-size", "8", "--samples-every", "0", "--device", "cpu", "--output"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# What is run -> the words before it for a process, and the command.
CASES = {"a picture": ([], PICTURE), "training": ([], TRAINING),
         "training, two processes": (TORCHRUN, TRAINING)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the JSON goes")
    add("--repeats", type=positive, default=3, metavar="N", help="rounds of each (default 3)")
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="WHAT", help="default: all")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, rows = parse_args(argv), []
    with tempfile.TemporaryDirectory() as folder:
        run([], TRAINING, folder)  # renders what the others find
        for what in args.only:
            launcher, command = CASES[what]
            for loops in (0, len(os.sched_getaffinity(0))):
                with beside(loops):
                    fair, taken = zip(*[(run([], command, folder, OMP_NUM_THREADS="1"),
                                         run(launcher, command, folder)) for _ in range(args.repeats)],
                                      strict=True)
                ratios = [own / one for own, one in zip(taken, fair, strict=True)]
                rows.append({"what": what, "loops beside it": loops, "seconds": statistics.median(taken),
                             "of the fair share's time": spread(ratios)})
    report("busy", rows, args, torch.device("cpu"))


@contextmanager
def beside(loops: int) -> Iterator[None]:
    """So many programs that do nothing else than to keep a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(launcher: list[str], command: list[str], folder: str, **variables: str) -> float:
    """Seconds that a command takes in a folder. Raises CalledProcessError."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))}
    with tempfile.TemporaryDirectory() as output:
        started = time.perf_counter()
        subprocess.run([sys.executable, *launcher, *command, f"{output}/of"], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**environment, **variables})
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
