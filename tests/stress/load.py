"""Draw a long file of prompts, kill it in the middle, draw on, and count.

    python tests/stress/load.py
    python tests/stress/load.py --pictures 1000 --kills 3

Every picture has to be there once, with its own settings; those that were there before a kill are not drawn
again; after the last one nothing is left half-written; and memory does not grow with the number of pictures.

Exit status: 0 everything held, 1 something did not.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import toyworld
from images import read_settings


def resident(pid: int) -> float:
    """The memory that a process has now, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, help="default 1000")
    parser.add_argument("--kills", type=int, default=1, help="default 1")
    parser.add_argument("--steps", type=int, default=1, help="sampling steps (default 1)")
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="load-") as temporary:
        folder = Path(temporary)
        lines = [{"prompt": toyworld.sample_scene(seed).caption} for seed in range(args.pictures)]
        for k in range(0, args.pictures, 3):
            lines[k] = {"prompt": "a woman standing on the beach",
                        "subjects": [str(ROOT / "examples" / "zoe.png")]}
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        command = [sys.executable, str(ROOT / "sample.py"), "--from-file", str(folder / "prompts.jsonl"),
                   "--output", str(folder / "pictures"), "--steps", str(args.steps)]
        stops = sorted(rng.randrange(args.pictures // 4, 3 * args.pictures // 4) for _ in range(args.kills))
        memory, stamps, said = [], {}, ""
        for stop in [*stops, None]:
            with open(folder / "log.txt", "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log)
            while process.poll() is None:
                count = len(list((folder / "pictures").glob("[0-9]*.png")))
                if stop is None and count > len(stamps):
                    memory.append((count, resident(process.pid)))
                if stop is not None and count >= stop:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                time.sleep(0.05)
            if stop is not None:
                stamps = {path.name: path.stat().st_mtime_ns
                          for path in (folder / "pictures").glob("[0-9]*.png")}
            said = (folder / "log.txt").read_text().splitlines()[-1]
        files = sorted((folder / "pictures").glob("[0-9]*.png"))
        settings = [read_settings(path) for path in files]
        right = [found is not None and (found["prompt"], found["seed"]) == (line["prompt"], k)
                 for k, (found, line) in enumerate(zip(settings, lines, strict=False))]
        again = [path.name for path in files if stamps.get(path.name, path.stat().st_mtime_ns) !=
                 path.stat().st_mtime_ns]
        names = {path.name for path in (folder / "pictures").iterdir()}
        left = [name for name in names if not (name[:5].isdecimal() or name.startswith("."))]
        torn = [name for name in names if name.startswith(".")]
    third = len(memory) // 3
    early, late = (max(mb for _, mb in part) for part in (memory[:third], memory[-third:]))
    rows = {"pictures asked for": args.pictures, "killed after": ", ".join(map(str, stops)),
            "there, each with its own prompt and seed": sum(right),
            "missing": args.pictures - sum(right), "drawn twice": len(again) + len(left),
            "last line": said, "temporary files of killed processes": len(torn),
            "memory of the last process, first and last third, MB": f"{early:.0f}, {late:.0f}"}
    print("what | found", "---|---", *(f"{name} | {value}" for name, value in rows.items()), sep="\n")
    held = len(right) == sum(right) == args.pictures and not again and not left and late < 1.1 * early
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
