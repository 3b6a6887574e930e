"""What a training step costs at Stable Diffusion 1.5's size: seconds, pictures/s, peak memory.

    python -m bench.training --output runs/bench
    python -m bench.training --output runs/bench --device cuda --batch-size 8
    python -m bench.training --output runs/bench --rows "with a cache, no checkpointing" FastComposer

Makes base weights with random values and a few rendered pictures in `--output`, once, and then runs the
`sd15` preset's own step in one process per row, so that each has its own peak: with and without --cache,
with and without gradient checkpointing, and with the frozen parts in fp32. The last rows are a step as
FastComposer's (fastcomposer.py), whole, which takes 19 GB at batch 1, and without its optimizer's step and
state: less than it costs. Prints a table, writes training.json. Times are medians without the first step,
which counts operations (on a CPU without those of the fused attention itself, which torch does not count
there); a GPU is waited for.

Memory is what the process or the GPU held at most while stepping, without what loading took.
"""
import argparse
import json
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import toyworld
from bench.fastcomposer import FastComposerStage
from bench.measure import in_child, machine, peak_memory, positive, reset_peak, seconds, table
from data.fastcomposer import Folder
from models.device import pick_device, reuse_memory
from models.errors import Parser
from models.load import PARTS, read_config, save_part, write_json
from toyworld.presets import SMALL
from train import STAGES, make_config

# Row -> (keep encoded samples, changes of the preset); None: FastComposer's step, with its optimizer or not.
ROWS = {
    "the preset": (False, {}),
    "with a cache": (True, {}),
    "no checkpointing": (False, {"checkpointing": False}),
    "with a cache, no checkpointing": (True, {"checkpointing": False}),
    "with a cache, frozen parts in fp32": (True, {"frozen_bf16": False}),
    "with a cache, all in fp32": (True, {"frozen_bf16": False, "bf16": False}),
    "FastComposer": (None, True),
    "FastComposer without its optimizer": (None, False),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder for weights, data and results")
    add("--size", default="sd15", choices=["sd15", "small"],
        help="of the models and pictures (default sd15: 512 pixels)")
    add("--batch-size", type=positive, default=1, metavar="N", help="pictures per step (default 1)")
    add("--steps", type=positive, default=4, metavar="N", help="timed steps of each row (default 4)")
    add("--device", default="auto", help="cpu, cuda, ... (default auto)")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all")
    add("--here", action="store_true", help="the first row only, in this process")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_inputs(args.output, args.size)
    if args.here:
        os.chdir(args.output)  # .cache is made there; this process ends with the row
        print(json.dumps(measure(args)))
        return
    arguments, rows = sys.argv[1:] if argv is None else argv, []
    for row in args.rows:
        print(row, "...", file=sys.stderr)
        rows.append({"step": row, **in_child("bench.training", [*arguments, "--here", "--rows", row])})
    found = machine(pick_device(args.device))
    write_json({"machine": found, "batch_size": args.batch_size, "rows": rows}, args.output / "training.json")
    print(table([{k: v for k, v in row.items() if k != "spread"} for row in rows]))
    print(", ".join(f"{k} {v}" for k, v in found.items()))


def make_inputs(folder: Path, size: str) -> None:
    """Base weights with random values and eight pictures, unless they are there."""
    weights = folder / size
    if not (weights / "done").exists():
        torch.manual_seed(0)
        for part, (cls, config) in PARTS.items():
            save_part(cls(SMALL[part] if size == "small" else config()), weights, part)
        sizes = json.loads((weights / "config.json").read_text())
        write_json({**sizes, "image_size": 512 if size == "sd15" else toyworld.SIZE}, weights / "config.json")
        (weights / "done").touch()
    if not (folder / "data").exists():
        toyworld.main(["--output", str(folder / "data"), "--count", "8"])


def measure(args: argparse.Namespace) -> dict:
    """One row."""
    reuse_memory()
    cached, changes = ROWS[args.rows[0]]
    device = pick_device(args.device)
    common = {"steps": args.steps + 1, "batch_size": args.batch_size, "samples": 8}
    size = read_config(Path(args.size))["image_size"]
    preset, optimized = make_config("sd15", "moa", **common), True
    samples = Folder(Path("data"), 8, size, max_people=preset.max_people, augmented=cached is not True)
    inputs = (0, device, samples, Path(args.size), None)
    if cached is None:
        stage, optimized = FastComposerStage(preset, *inputs), changes
    else:
        config = make_config("sd15", "moa", **common, **changes)
        cache = Path(f"cache-{args.size}-{'bf16' if config.frozen_bf16 else 'fp32'}") if cached else None
        stage = STAGES["moa"](config, *inputs, cache)
    config, losses = stage.config, []
    parameters = [p for p in stage.module.parameters() if p.requires_grad]
    if optimized:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, fused=True)

    def step(index: int, counter=None) -> None:
        with counter or nullcontext():
            with stage.autocast():
                loss, _ = stage.loss(stage.batch(index))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if optimized:
            optimizer.step()
        for p in parameters:
            p.grad = None
        losses.append(loss.item())

    reset_peak(device)
    counter = FlopCounterMode(display=False)
    step(0, counter)
    taken = [seconds(lambda index=index: step(index), device) for index in range(1, args.steps + 1)]
    median = statistics.median(taken)
    return {"seconds": median, "pictures/s": args.batch_size / median,
            "TFLOP per picture": counter.get_total_flops() / args.batch_size / 1e12,
            "memory, GB": peak_memory(device), "loss": statistics.mean(losses),
            "trained, M": sum(p.numel() for p in parameters) / 1e6, "spread": [min(taken), max(taken)]}


if __name__ == "__main__":
    main()
