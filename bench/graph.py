"""What `train.py --graph` saves: a step of the small world's MoA, by Python and as a CUDA graph.

    python -m bench.graph --output runs/bench
    python -m bench.graph --output runs/bench --batch-sizes 36 256 --samples 1024

With gradient clipping, the optimizer and the moving average, bf16, on a GPU. Prints the seconds of both for
each batch size and their ratio, in rounds of one step each, and writes graph.json.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.errors import Parser, fail
from bench.measure import ROOT, compare, pick, positive, report
from data.sample import ENCODED
from toyworld.rendered import render_cache
from train import STAGES, make_config
from training import RecordedStep, Stage


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the JSON goes")
    add("--batch-sizes", type=positive, nargs="+", default=[36, 128, 256, 512], metavar="N",
        help="pictures in a step (default 36 128 256 512)")
    add("--samples", type=positive, default=32_000, metavar="N", help="scenes to read from (default 32000)")
    add("--repeats", type=positive, default=30, metavar="N", help="rounds after the warm-up (default 30)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device, args.dtype = "auto", "bf16"
    device, _ = pick(args)
    if device.type != "cuda":
        fail(f"a CUDA graph is for a CUDA GPU, this is {device}")
    report("graph", measure(args, device), args, device)


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Both sides for each batch size."""
    rows = []
    for size in args.batch_sizes:
        config = make_config("toyworld", "moa", batch_size=size, samples=args.samples)
        scenes = render_cache("scenes", config.samples)
        stage = STAGES["moa"](config, 0, device, scenes, ROOT / "weights" / "toyworld", cache=ENCODED)
        sides = {"eager": steps(stage, partial(backward, stage)), "graph": steps(stage, RecordedStep(stage))}
        rows += compare(sides, [("eager", "eager"), ("graph", "eager")], args.repeats, device, pictures=size)
    return rows


def backward(stage: Stage, batch: dict[str, Tensor]) -> None:
    """Loss and gradients, without a graph."""
    with stage.autocast():
        loss, _ = stage.loss(batch)
    loss.backward()


def steps(stage: Stage, backward: Callable) -> Callable[[], None]:
    """A function that makes the next step each time it is called."""
    parameters = [p for p in stage.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    averages, done = [p.detach().clone() for p in parameters], 0

    @torch.enable_grad()
    def step() -> None:
        nonlocal done
        with stage.autocast():
            batch = stage.batch(done)
        backward(batch)
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, stage.config.clip)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - stage.config.ema)
        done += 1

    return step


if __name__ == "__main__":
    main()
