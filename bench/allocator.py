"""What it brings that the commands keep freed memory (allocator.py), on a CPU.

    python -m bench.allocator --output runs/bench
    python -m bench.allocator --output runs/bench --jobs unet --pixels 512 --repeats 2

Processes in turns, one that keeps the memory it has freed, as all commands do, and one that gives it back, as
Python does by itself. The jobs:

    unet      a call of our base UNet, random weights
    picture   a picture of the small world with a person, 20 steps
    training  a step of MoA's training in the small world, 36 pictures

Times are medians over --calls calls after one to warm up; memory is the most that a process held while
calling. Both are ratios: kept over given back.
"""
import argparse
import json
import statistics
import sys
from collections.abc import Callable

from bench.measure import (in_child, make_parser, peak_memory, pick, positive, report, reset_peak, seconds,
                           sizes, spread)

JOBS = ["unet", "picture", "training"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3)
    add = parser.add_argument
    add("--jobs", nargs="+", choices=JOBS, default=JOBS, help="default: all")
    add("--pixels", type=positive, default=256, help="of the UNet's picture (default 256)")
    add("--calls", type=positive, default=5, metavar="N", help="in each process (default 5)")
    add("--side", choices=["kept", "given back"], help="the first job only, in this process")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.side:
        print(json.dumps(measure(args)))
        return
    arguments, rows = sys.argv[1:] if argv is None else argv, []
    for job in args.jobs:
        rounds = [[in_child(__file__, [*arguments, "--jobs", job, "--side", side])
                   for side in ("kept", "given back")] for _ in range(args.repeats)]
        rows.append({"job": job, "side": "kept", "against": "given back",
                     "ratio": spread([kept["seconds"] / back["seconds"] for kept, back in rounds]),
                     "memory": spread([kept["gb"] / back["gb"] for kept, back in rounds])})
    report("allocator", rows, args, pick(args)[0])


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds and the peak of memory of a job, in this process."""
    import torch

    device, dtype = pick(args, keep_memory=args.side == "kept")
    call = {"unet": unet, "picture": picture, "training": training}[args.jobs[0]](args, device, dtype)
    with torch.set_grad_enabled(args.jobs[0] == "training"):
        call()
        reset_peak(device)
        taken = [seconds(call, device) for _ in range(args.calls)]
    return {"seconds": statistics.median(taken), "gb": peak_memory(device)}


def unet(args, device, dtype) -> Callable[[], object]:
    """A call of the base model."""
    import torch

    from models.unet import UNet
    torch.manual_seed(0)
    net = UNet(sizes(args.size)["unet"]).to(device, dtype).eval()
    x = torch.randn(1, 4, args.pixels // 8, args.pixels // 8, device=device, dtype=dtype)
    text = torch.randn(1, 77, net.cfg.context_dim, device=device, dtype=dtype)
    return lambda: net(x, torch.tensor([400], device=device), text)


def picture(args, device, dtype) -> Callable[[], object]:
    """From a prompt to pixels."""
    import torch

    from evaluate import SHIPPED
    from pipeline import Pipeline, Subject
    pipeline = Pipeline.load(SHIPPED, SHIPPED / "moa.safetensors", device, dtype)
    prompt = "a woman standing on the beach"
    feature = torch.randn(pipeline.prompt.cfg.image_dim, device=device, dtype=dtype)
    people = [[Subject(pipeline.models.tokenize.word_positions(prompt, "woman")[0], feature)]]
    return lambda: pipeline.generate([prompt], [0], people, steps=20)


def training(args, device, dtype) -> Callable[[], object]:
    """Forward and backward, without the optimizer."""
    from itertools import count

    from evaluate import SHIPPED
    from training import STAGES, make_config
    stage = STAGES["moa"](make_config("toyworld", "moa", batch_size=36, samples=72), 0, device, SHIPPED, None)
    stage.prepare()
    steps = count()

    def step() -> None:
        with stage.autocast():
            loss, _ = stage.loss(next(steps))
        loss.backward()
        stage.module.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
