"""Train on a dataset of which 5 % is broken, in twenty ways, and on its clean rest, and compare.

    python tests/stress/broken_data.py

`data.build --check` has to name every broken sample, and training has to count them, leave them out, and
make of the others the very numbers that it makes of a dataset without them.

Exit status: 0 everything held, 1 something did not.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
from safetensors.torch import load_file

from tests.stress.kill import write_base
from tests.test_data import BROKEN
from tests.test_train import metrics_of

KINDS = ("no picture", "half a picture", "no picture at all", "a folder", "no map", "empty map", "half a map",
         "map of another shape", "float map", "pickled map", "map of objects", "no record", "invalid json",
         "not utf-8", "no caption", "no segments", "end at zero", "negative bbox", "record outside",
         "a link to itself")
EACH = 20  # samples for one that is broken: 5 %


def run(*words, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def damage(data: Path) -> list[str]:
    """Break every twentieth sample, each in another way; returns their ids."""
    ids = (data / "image_ids_train.txt").read_text().split()
    chosen = ids[7::EACH]
    for kind, image_id in zip(KINDS, chosen, strict=True):
        suffix, spoil = BROKEN[kind]
        spoil(data / image_id[:5] / f"{image_id}{suffix}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each training (default 30)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="broken-") as temporary:
        folder = Path(temporary)
        data, listed = folder / "data", folder / "data" / "image_ids_train.txt"
        write_base(folder / "base")
        made = run("-m", "toyworld", "--output", data, "--count", len(KINDS) * EACH, folder=folder)
        assert made.returncode == 0, made.stderr
        broken = damage(data)
        checked = run("-m", "data.build", "--check", data, folder=folder)
        named = {image_id for image_id in broken if f"{image_id}." in checked.stdout}
        train = [ROOT / "tests" / "test_train.py", "moa", "--weights", folder / "base", "--data", data,
                 "--steps", args.steps, "--batch-size", 4, "--log-every", 1, "--device", "cpu", "--output"]
        first = run(*train, folder / "broken", folder=folder)
        whole = listed.read_text().split()
        listed.write_text("\n".join(image_id for image_id in whole if image_id not in broken))
        second = run(*train, folder / "clean", folder=folder)
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        warned = f"{len(broken)} of {len(whole)} samples are broken and left out" in first.stderr
        logs = [[{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gb")}
                 for line in metrics_of(folder / name)] for name in ("broken", "clean")]
        states = [load_file(folder / name / "moa.safetensors") for name in ("broken", "clean")]
        equal = states[0].keys() == states[1].keys() and all(
            torch.equal(states[0][key], states[1][key]) for key in states[0])
    alike = "yes" if logs[0] == logs[1] else "**no**"
    rows = {"broken samples": f"{len(broken)} of {len(whole)}, of {len(set(KINDS))} kinds",
            "named by data.build --check": f"{len(named)} (exit status {checked.returncode})",
            "counted and left out by train.py": "yes" if warned else "**no**",
            f"numbers of {args.steps} steps equal those on the clean rest": alike,
            "weights equal those on the clean rest, bit for bit": "yes" if equal else "**no**"}
    print("what | found", "---|---", *(f"{name} | {value}" for name, value in rows.items()), sep="\n")
    held = len(named) == len(broken) and checked.returncode == 1 and warned and equal and logs[0] == logs[1]
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
