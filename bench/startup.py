"""How long one waits: from the start of a process to its first picture, and for the `--help` of each command.

    python -m bench.startup --output runs/bench
    python -m bench.startup --output runs/bench --cores 1 --only "a picture" "train.py --help"

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

import torch

from models.errors import Parser
from bench.measure import ROOT, positive, report, spread

FOLDERS = ("", "weights", "apps", "bench", "data")
PICTURE = ["sample.py", "--prompt", "a woman standing on the beach", "--seed", "0", "--output"]
PICTURES = {"a picture": PICTURE,
            "a picture with a person": [PICTURE[0], "--subject", "examples/zoe.png", *PICTURE[1:]]}


def starts() -> dict[str, list[str]]:
    """What is started, as a shell in the repository would: the pictures, and every file that can be run."""
    found = dict(PICTURES)
    for path in [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]:
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            name = str(path.relative_to(ROOT))
            script = path.parent in (ROOT, ROOT / "weights")
            found[f"{name} --help"] = [*([name] if script else ["-m", name[:-3].replace("/", ".")]), "--help"]
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the JSON goes")
    add("--cores", type=positive, default=2, metavar="N", help="of each process (default 2)")
    add("--repeats", type=positive, default=3, metavar="N", help="starts of each (default 3)")
    add("--only", nargs="+", choices=starts(), metavar="WHAT",
        help="such as \"a picture\" or \"sample.py --help\" (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[:args.cores]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, words in starts().items():
            if args.only and what not in args.only:
                continue
            output = [f"{folder}/picture.png"] if what in PICTURES else []
            found = [run([sys.executable, *words, *output], cores) for _ in range(args.repeats)]
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
