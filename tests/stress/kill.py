"""Kill a training run again and again, resume it each time, and compare it with an undisturbed one.

    python tests/stress/kill.py --kills 10 --seed 0
    python tests/stress/kill.py --kills 10 --cache
    python tests/stress/kill.py --kills 70 --stage all

Two processes under torchrun train MoA on small random models and on pictures in FastComposer's layout,
which `toyworld` writes and `data.build` checks; one process trains each of the other stages, on
rendered pictures. SIGKILL comes at random moments to

    one process   either of the two: torchrun has to end the other
    torchrun      the two have to notice
    everything    torchrun and both processes, as when a machine fails
    a checkpoint  everything, while a checkpoint is being written
    a start       everything, before the first step of this start

Exit status: 0 the weights, averages, optimizer states and logs are equal bit for bit, 1 they are not,
2 something else went wrong.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch

from models.load import PARTS, read_config, save_part, write_json
from tests.test_train import SMALL, STEPS, assert_same_run
from train import list_checkpoints

KINDS = ("one process", "torchrun", "everything", "a checkpoint", "a start")
ALONE = KINDS[2:]  # what can happen to a run of one process
PROCESSES, KEEP = 2, 2
LIMIT = 300  # seconds until something has to happen


class Unexpected(Exception):
    """What happened is no matter of equal weights; the message says what."""


def write_base(folder: Path) -> None:
    """Small base models of random weights."""
    torch.manual_seed(0)
    for part, (cls, _) in PARTS.items():
        save_part(cls(SMALL[part]), folder, part)
    write_json({**read_config(folder), "image_size": 128}, folder / "config.json")


def write_data(folder: Path) -> None:
    """A dataset in FastComposer's layout, checked."""
    for command in (["toyworld", "--output", folder, "--count", 16], ["data.build", "--check", folder]):
        done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise Unexpected(f"{command[0]}: {done.stderr[-500:]}")


def start(folder: Path, name: str, steps: int, *options: str, torchrun: tuple = (), stage: str = "moa",
          program: Path = ROOT / "tests" / "test_train.py") -> subprocess.Popen:
    """The run `folder`/`name`/run, in a directory with a cache of its own; the output goes to log.txt."""
    place = folder / name
    place.mkdir(exist_ok=True)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES, *torchrun]
    data = ["--data", folder / "world"] if stage == "moa" else ["--samples", 24]
    weights = [] if stage in ("vae", "classifier") else ["--weights", folder / "base"]
    command = [sys.executable, *(several if stage == "moa" else []), program, stage, *weights, *data,
               "--steps", steps, "--batch-size", 4, "--log-every", 1, "--checkpoint-every", 3, "--keep", KEEP,
               "--samples-every", 0,
               "--device", "cpu", "--output", place / "run", *options]
    with open(place / "log.txt", "a") as log:
        return subprocess.Popen([str(c) for c in command], cwd=place, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def steps_logged(run: Path, since: int = 0) -> int:
    """The number of logged steps; 0 as long as the log is the file `since`, of the start before."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() and log.stat().st_ino != since else 0


def find_workers(torchrun: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id of the processes that torchrun has started."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (place / "environ").read_bytes() if parent == torchrun.pid else b""
        except OSError:  # it has ended meanwhile
            continue
        ranks = [entry[5:] for entry in environment.split(b"\0") if entry.startswith(b"RANK=")]
        found |= {int(rank): int(place.name) for rank in ranks}
    return found


def wait_until(condition: Callable[[], object], what: str, pause: float = 0.01) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise Unexpected(f"{what}: not within {LIMIT} seconds")
        time.sleep(pause)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_once(process: subprocess.Popen, run: Path, since: int, kind: str, step: int, wait: float,
              rng: random.Random) -> list[str]:
    """Kill at `step`, or `wait` seconds after the start; returns a row of the table."""
    def ended() -> bool:
        return process.poll() is not None

    def writing() -> list[Path]:
        return list((run / "checkpoints").glob(".*.tmp"))

    if kind == "a start":
        time.sleep(wait)
    else:
        wait_until(lambda: steps_logged(run, since) >= step or ended(), f"step {step}")
        if kind == "a checkpoint":  # or just after it, where writing was too quick to be seen
            before = list_checkpoints(run)
            wait_until(lambda: writing() or list_checkpoints(run) != before or ended(), "a checkpoint",
                       pause=0.002)
        else:
            time.sleep(wait)
    workers, moment = find_workers(process), time.monotonic()
    if ended():
        raise Unexpected(f"the run ended by itself with status {process.returncode} before it was killed")
    victim = rng.randrange(PROCESSES)
    kill({"one process": [workers.get(victim, process.pid)], "torchrun": [process.pid]}.get(
        kind, [process.pid, *workers.values()]))
    logged = steps_logged(run)
    wait_until(lambda: ended() and not any(map(alive, workers.values())), "the job's end")
    seconds = time.monotonic() - moment
    if seconds > 60:
        raise Unexpected(f"the job ended only {seconds:.0f} seconds after {kind} was killed")
    stands = [path.stem for path in list_checkpoints(run)]
    name = f"{kind} (rank {victim})" if kind == "one process" else kind
    return [name, str(logged), f"{seconds:.1f}", " ".join(stands) or "none", str(len(writing()))]


def stress(folder: Path, kills: int, seed: int, cache: bool, stage: str) -> list[list[str]]:
    """Both runs, with a cache of its own each or none. Raises Unexpected, and AssertionError where they
    differ."""
    # One small process makes a step in milliseconds: it must not have ended before it is killed.
    rng, steps = random.Random(seed), 6 + 3 * kills if stage == "moa" else 60 + 12 * kills
    write_base(folder / "base")
    if stage == "moa":
        write_data(folder / "world")
    begin = time.monotonic()
    options = ["--cache", "cache"] if cache else []
    process = start(folder, "whole", steps, *options, stage=stage)
    wait_until(lambda: steps_logged(folder / "whole" / "run") or process.poll() is not None, "the first step")
    setup = time.monotonic() - begin
    if process.wait(LIMIT + 10 * steps):
        raise Unexpected(f"the undisturbed run failed: see {folder / 'whole' / 'log.txt'}")
    pace = (time.monotonic() - begin - setup) / steps
    run, rows = folder / "killed" / "run", []
    possible = KINDS if stage == "moa" else ALONE
    kinds = [possible[(seed + k) % len(possible)] for k in range(kills)]
    rng.shuffle(kinds)
    last = steps - (3 if stage == "moa" else 50)
    for kind, step in zip(kinds, sorted(rng.randrange(1, last) for _ in kinds), strict=True):
        resume = ["--resume"] if run.exists() else []
        since = (run / "metrics.jsonl").stat().st_ino if (run / "metrics.jsonl").exists() else 0
        process = start(folder, "killed", steps, *options, *resume, stage=stage)
        wait = rng.uniform(0, setup) if kind == "a start" else rng.uniform(0, pace)
        name, *rest = kill_once(process, run, since, kind, step, wait, rng)
        rows.append([str(len(rows) + 1), name, stage, *rest])
    resume = ["--resume"] if run.exists() else []
    if start(folder, "killed", steps, *options, *resume, stage=stage).wait(LIMIT + 10 * steps):
        raise Unexpected(f"the last start failed: see {folder / 'killed' / 'log.txt'}")
    assert_same_run(run, folder / "whole" / "run")
    assert len(list_checkpoints(run)) == KEEP, f"{KEEP} checkpoints have to stay"
    assert not list(run.rglob(".*.tmp")), "temporary files are left"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="default 10")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds (default 0)")
    parser.add_argument("--stage", default="moa", choices=[*STEPS, "all"], help="default moa")
    parser.add_argument("--cache", action="store_true", help="train from a cache, which is killed too (moa)")
    parser.add_argument("--output", type=Path, help="keep both runs and their logs in this new folder")
    args = parser.parse_args()
    stages = list(STEPS) if args.stage == "all" else [args.stage]
    shares = [args.kills // len(stages) + (k < args.kills % len(stages)) for k in range(len(stages))]
    head = ["kill", "what", "stage", "after step", "ended in, s", "checkpoints", "torn files"]
    widths = [4, 20, 10, 10, 11, 13, 10]
    print("  ".join(cell.ljust(width) for cell, width in zip(head, widths, strict=True)).rstrip())
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for stage, kills in zip(stages, shares, strict=True):
                folder = (args.output or Path(temporary)).resolve() / (stage if len(stages) > 1 else "")
                folder.mkdir(parents=True, exist_ok=True)
                for row in stress(folder, kills, args.seed, args.cache and stage == "moa", stage):
                    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
                    print("  ".join(cells).rstrip(), flush=True)
        except (Unexpected, subprocess.TimeoutExpired) as error:
            print("error:", error, file=sys.stderr)
            sys.exit(2)
        except AssertionError as error:
            print(f"different from the undisturbed run: {error or 'see --output'}", file=sys.stderr)
            sys.exit(1)
    print(f"{args.kills} kills: weights, averages, optimizer states and logs are equal bit for bit")


if __name__ == "__main__":
    main()
