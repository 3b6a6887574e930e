"""Take the room away from every command that writes, and see what is left.

    python tests/stress/disk.py

Each command runs on a disk that is full (a small tmpfs, which needs root on Linux), under a limit of the
size of files as a quota sets it (RLIMIT_FSIZE), and into a folder that is read-only. It has to end with an
error of one line that names a path below its output, and with the files that were there before unchanged.

Exit status: 0 everything held, 1 something did not.
"""
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tests.conftest import save_world
from tests.layouts import ldm, put
from tests.stress.fuzz import plain_states
from tests.stress.kill import write_base, write_data

# What is written -> the command, of which {out} is the output, the bytes that a full disk has room for, and
# the length that files may have.
COMMANDS = {
    "train, checkpoint": ("tests/test_train.py moa --weights {base} --data {data} --steps 2 --batch-size 4 "
                          "--output {out}/run --device cpu", 600_000, 200_000),
    "train, resumed": ("tests/test_train.py moa --weights {base} --data {data} --steps 6 --batch-size 4 "
                       "--checkpoint-every 2 --output {out}/run --device cpu --resume", 300_000, 200_000),
    "train, cache": ("tests/test_train.py moa --weights {base} --data {data} --steps 2 --batch-size 4 "
                     "--output {other}/run --cache {out}/cache --device cpu", 30_000, 20_000),
    "convert": ("weights/convert_sd15.py {model} --output {out}/weights", 300_000, 200_000),
    "sample": ("sample.py --weights {world} --prompt 'a man' --num 3 --output {out}/pictures", 12_000, 3_000),
    "sample, a file of prompts": ("sample.py --weights {world} --from-file {prompts} --output {out}/pictures",
                                  12_000, 3_000),
    "evaluate": ("evaluate.py --count 2 --steps 3 --output {out}/evaluation", 40_000, 20_000),
    "data.build": ("-m data.build {pictures} --output {out}/data", 20_000, 3_000),
}


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes in `folder`, which keeps what was there."""
    held = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    size += sum(len(content) + 4096 for content in held.values())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        for name, content in held.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody, not even root, writes into `folder`."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def run(command: str, places: dict, most: int | None = None) -> subprocess.CompletedProcess:
    """The command, in a process whose files may have `most` bytes."""
    words = [word.format(**places) for word in shlex.split(command)]
    words[0] = str(ROOT / words[0]) if words[0].endswith(".py") else words[0]
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))) if most else None
    return subprocess.run([sys.executable, *words], cwd=places["other"], capture_output=True, text=True,
                          preexec_fn=limit, timeout=600, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def judge(done: subprocess.CompletedProcess, out: Path, before: dict, after: dict) -> str:
    """What is wrong, or nothing."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    wrong = []
    if "Traceback" in done.stderr or len(errors) != 1:
        wrong.append(f"{len(errors)} messages, {done.stderr.strip().splitlines()[-1:]}")
    if done.returncode not in (1, 2):
        wrong.append(f"status {done.returncode}")
    if errors and str(out) not in errors[0]:
        wrong.append(f"no path in {errors[0]}")
    kept = {"config.json", "metrics.jsonl"}  # of a run, which a resumed one writes anew
    if lost := [name for name in before if Path(name).name not in kept and after.get(name) != before[name]]:
        wrong.append(f"changed: {', '.join(lost[:3])}")
    if left := [name for name in after if Path(name).name.startswith(".") and name not in before]:
        wrong.append(f"left behind: {', '.join(left[:3])}")
    return "; ".join(wrong)


def main() -> None:
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        places = {"base": folder / "base", "data": folder / "world", "other": folder / "other",
                  "world": save_world(folder / "tiny"), "prompts": folder / "prompts.txt",
                  "model": put(ldm(plain_states()), folder / "model.safetensors"), "pictures": folder / "in"}
        places["other"].mkdir()
        places["prompts"].write_text("a man\na woman\na girl\n")
        write_base(places["base"])
        write_data(places["data"])
        write_pictures(places["pictures"])
        print("written | disk | status | message", "---|---|---|---", sep="\n")
        for number, (name, (command, room, most)) in enumerate(COMMANDS.items()):
            for kind in ("full", "quota", "read-only"):
                out = places["out"] = folder / f"out {number} {kind}"
                out.mkdir()
                if "--resume" in command:
                    first = run(command.replace("--resume", "").replace("--steps 6", "--steps 4"), places)
                    assert first.returncode == 0, first.stderr
                    command = command.replace("--steps 6", "--steps 4")
                before = snapshot(out)
                if kind == "quota":
                    done, after = run(command, places, most), snapshot(out)
                else:
                    with small_disk(out, room) if kind == "full" else read_only(out):
                        done, after = run(command, places), snapshot(out)
                wrong = judge(done, out, before, after)
                failures += bool(wrong)
                said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
                text = (said or done.stderr.splitlines()[-1:] or [""])[0].replace(str(folder), "")
                print(f"{name} | {kind} | {done.returncode} | {'**' + wrong + '** ' if wrong else ''}{text}",
                      flush=True)
    print(f"{3 * len(COMMANDS)} runs, {failures} failures")
    sys.exit(1 if failures else 0)


def write_pictures(folder: Path) -> None:
    """A few pictures with captions and masks, as `data.build` takes them."""
    from tests.test_build import write_scene
    folder.mkdir()
    for seed in range(4):
        write_scene(folder, seed)


if __name__ == "__main__":
    main()
