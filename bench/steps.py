"""How many steps of which sampler the small world needs.

    python -m bench.steps --output runs/steps
    python -m bench.steps --output runs/steps --count 64 --steps 10 20 --samplers unipc-2

Draws the evaluation's first cases with each number of steps of each sampler and has the judge read them:
evaluate.py's scores. "Distance" is the mean absolute difference of the pixels, in 0..1, to what UniPC of
order 3 draws from the same noise in `CONVERGED` steps: what discretization changes in a picture. Prints a
table, writes steps.json and, with matplotlib, steps.png. What is done is kept and skipped.
"""
import argparse
import hashlib
import json
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np

import command
from bench.measure import ROOT, positive, table

SAMPLER_NAMES = ["ddim", "unipc-1", "unipc-2", "unipc-3"]
STEPS = [5, 8, 10, 15, 20, 30, 50]
CONVERGED = 100
PANELS = {"identity": "subjects' attributes right", "activity": "activity right",
          "locality": "change outside / inside the people", "distance": f"distance to {CONVERGED} steps"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="for results, pictures and the plot")
    add("--weights", type=Path, default=ROOT / "weights" / "toyworld", metavar="FOLDER",
        help="default: the small world")
    add("--count", type=positive, default=32, metavar="N", help="cases (default 32)")
    add("--steps", type=positive, nargs="+", default=STEPS, metavar="N",
        help="default: " + " ".join(map(str, STEPS)))
    add("--samplers", nargs="+", choices=SAMPLER_NAMES, default=SAMPLER_NAMES, help="default: all")
    add("--device", default="auto", help="cpu, cuda, ... (default auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    import evaluate
    from models.load import write_json
    args.moa = args.judge = args.guidance_scale = args.prior_above = None
    args.output.mkdir(parents=True, exist_ok=True)
    evaluate.fill_in(args)
    for steps, sampler in product(args.steps, args.samplers):
        evaluate.moa_timesteps(steps, args.prior_above, f"--steps {steps} of {sampler} leave",
                               sampler.split("-")[0])
    pipeline, judge, files = evaluate.load(args)
    # Part of the names of what is kept, so that other weights and settings are drawn anew.
    source = evaluate.source(pipeline.device, files)
    drawn_with = [source["sha256"], args.guidance_scale, args.prior_above]
    args.drawn_with = hashlib.sha256(repr(drawn_with).encode()).hexdigest()[:16]
    converged = draw(args, pipeline, judge, "unipc-3", CONVERGED)[1]
    rows = []
    for steps in sorted(args.steps):
        for sampler in args.samplers:
            scores, pictures = draw(args, pipeline, judge, sampler, steps)
            distance = np.abs(pictures.astype(int) - converged).mean() / 255
            rows.append({"steps": steps, "sampler": sampler, **scores, "distance": float(distance)})
    print(table(rows))
    settings = {name: getattr(args, name) for name in ("count", "guidance_scale", "prior_above")}
    write_json({"settings": settings, "run": source, "rows": rows},
               args.output / "steps.json")
    plot(rows, args.output / "steps.png")


def draw(args: argparse.Namespace, pipeline, judge, sampler: str, steps: int) -> tuple[dict, np.ndarray]:
    """Mean scores of the cases drawn so, and their pictures (N, 3, S, S, 3) uint8."""
    import torch

    import evaluate
    from samplers import SAMPLERS, SCHEDULES, sample_unipc
    stem = args.output / f"{sampler}_{steps}_{args.count}_{args.drawn_with}"
    kept = stem.with_suffix(".json"), stem.with_suffix(".npy")
    if all(path.exists() for path in kept):
        return json.loads(kept[0].read_text(encoding="utf-8")), np.load(kept[1])
    orders = {f"unipc-{order}": partial(sample_unipc, order=order) for order in (1, 2, 3)}
    cases = []
    schedules = dict.fromkeys(orders, SCHEDULES["unipc"])
    with patch.dict(SAMPLERS, orders), patch.dict(SCHEDULES, schedules), torch.no_grad():
        for first in range(0, args.count, evaluate.BATCH):
            numbers = range(first, min(first + evaluate.BATCH, args.count))
            cases += evaluate.draw(pipeline, judge, numbers, steps=steps, sampler=sampler,
                                   guidance_scale=args.guidance_scale, prior_above=args.prior_above)[0]
    of_one_picture = {name: evaluate.READ_OFF[name] for name in ("context", "activity", "identity")}
    scores = {name: np.mean([score(case.scene, case.readings[1]) for case in cases])
              for name, score in of_one_picture.items()}
    scores |= {name: np.nanmean([score(case) for case in cases])
               for name, score in (("locality", evaluate.locality), ("router_iou", evaluate.router_iou))}
    scores = {name: float(value) for name, value in scores.items()}
    pictures = np.stack([case.pictures for case in cases])
    np.save(kept[1], pictures)
    kept[0].write_text(json.dumps(scores), encoding="utf-8")
    return scores, pictures


def plot(rows: list[dict], path: Path) -> None:
    """A curve over the steps for each sampler and score; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not drawn: matplotlib is not installed (requirements-dev.txt names it)")
        return
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, (score, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            points = [(row["steps"], row[score]) for row in rows if row["sampler"] == sampler]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=sampler)
        ticks = sorted({row["steps"] for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1 if title.endswith("right") else None)
        axis.set_xlabel("steps", fontsize=9)
        axis.grid(alpha=0.25)
    figure.axes[3].legend(fontsize=9)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
