"""What a training step costs at Stable Diffusion 1.5's size: seconds, pictures/s, peak memory.

    python bench/training.py --output runs/bench
    python bench/training.py --output runs/bench --device cuda --batch-size 8

Makes base weights with random values and a few rendered pictures in `--output`, once, and then runs the
`sd15` preset's own step in one process per row, so that each has its own peak: with and without --cache,
with and without gradient checkpointing, and with the frozen parts in fp32. Prints a table, writes
training.json. Times are medians without the first step, which counts operations (on a CPU without those
of the fused attention itself, which torch does not count there); a GPU is waited for.

Memory is what the process or the GPU held at most while stepping, without what loading took.
"""
import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Row -> (keep encoded samples, changes of the preset).
ROWS = {
    "the preset": (False, {}),
    "with a cache": (True, {}),
    "no checkpointing": (False, {"checkpointing": False}),
    "with a cache, no checkpointing": (True, {"checkpointing": False}),
    "with a cache, frozen parts in fp32": (True, {"frozen_bf16": False}),
    "with a cache, all in fp32": (True, {"frozen_bf16": False, "bf16": False}),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for weights, data and results")
    parser.add_argument("--size", default="sd15", choices=["sd15", "toyworld"],
                        help="of the models and pictures (default sd15: 512 pixels)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures per step (default 1)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each row (default 4)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default auto)")
    parser.add_argument("--row", choices=ROWS, metavar="ROW", help="one row only, in this process")
    args = parser.parse_args()
    for name in ("batch_size", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    return args


def main() -> None:
    args = parse_args()
    make_inputs(args.output, args.size)
    if args.row:
        print(json.dumps(measure(args)))
        return
    results = {}
    for row in ROWS:
        print(row, "...", file=sys.stderr)
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row], check=True,
                              stdout=subprocess.PIPE, text=True)
        results[row] = json.loads(done.stdout.splitlines()[-1])
    (args.output / "training.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print("| step | seconds | pictures/s | TFLOP per picture | peak memory, GB | loss |")
    print("|---|---|---|---|---|---|")
    for row, r in results.items():
        print(f"| {row} | {r['seconds']:.2f} | {r['pictures_per_second']:.3g} | "
              f"{r['tflop_per_picture']:.3g} | {r['memory_gb']:.2f} "
              f"| {r['loss']:.3f} |")
    print(r["machine"])


def make_inputs(folder: Path, size: str) -> None:
    """Base weights with random values and eight pictures, unless they are there."""
    import torch

    from data import toyworld
    from models.load import PARTS, save_part, write_json
    from stages import SMALL
    weights = folder / size
    if not (weights / "done").exists():
        torch.manual_seed(0)
        for part, (cls, config) in PARTS.items():
            save_part(cls(SMALL[part] if size == "toyworld" else config()), weights, part)
        sizes = json.loads((weights / "config.json").read_text())
        write_json({**sizes, "image_size": 512 if size == "sd15" else toyworld.SIZE}, weights / "config.json")
        (weights / "done").touch()
    if not (folder / "data").exists():
        toyworld.main(["--output", str(folder / "data"), "--count", "8"])


def measure(args: argparse.Namespace) -> dict:
    """One row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline import pick_device
    from stages import STAGES, make_config
    cached, changes = ROWS[args.row]
    os.chdir(args.output)  # .cache is made there
    device = pick_device(args.device)
    config = make_config("sd15", "moa", steps=args.steps + 1, batch_size=args.batch_size, samples=8,
                         **changes)
    cache = Path(f"cache-{args.size}-{'bf16' if config.frozen_bf16 else 'fp32'}") if cached else None
    stage = STAGES["moa"](config, 0, device, Path(args.size), Path("data"), None, cache)
    stage.prepare()
    parameters = [p for p in stage.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, fused=True)
    reset_peak(device)
    seconds, losses = [], []
    for step in range(args.steps + 1):
        started = time.perf_counter()
        with FlopCounterMode(display=False) if step == 0 else nullcontext() as counter:
            with stage.autocast():
                loss, _ = stage.loss(step)
            loss.backward()
        if step == 0:
            operations = counter.get_total_flops() / args.batch_size
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{torch.get_num_threads()} CPU threads")
    return {"seconds": median, "spread": [min(seconds[1:]), max(seconds[1:])], "steps": args.steps,
            "pictures_per_second": args.batch_size / median,
            "tflop_per_picture": operations / 1e12, "memory_gb": peak_memory(device),
            "loss": statistics.mean(losses), "trained": sum(p.numel() for p in parameters),
            "batch_size": args.batch_size, "machine": f"{name}, torch {torch.__version__}"}


def reset_peak(device) -> None:
    """Forget what loading took."""
    import torch
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # give back what loading has freed
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew


def peak_memory(device) -> float:
    """GB since `reset_peak`."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


if __name__ == "__main__":
    main()
