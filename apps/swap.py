"""Swap the people of a picture and keep the rest: the same seeds with one row of people after the other.

    python -m apps.swap --prompt "a woman riding a bike on the beach" \\
        --subjects examples/ada.png examples/mia.png examples/zoe.png --seeds 0 1 2
    python -m apps.swap --prompt "a woman and a man dancing in Paris" --keep man=examples/max.png \\
        --subjects examples/ada.png examples/mia.png

The paper's Fig. 7 and 9. First row: the base model alone. Each further row is a SUBJECT or, for several
people, SUBJECT+SUBJECT; those of --keep are in all of them. A column is a seed: its steps above
--prior-above are the same for everybody and are computed once.

How far each row is from the base model's pictures is printed, in shares of the range of colours: inside and
outside of where the routers let the personalized experts work (their mean weight over layers, timesteps
and rows lies above the middle of its range in this column).
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from apps import generate_rows, load_people, rows_sheet
from moa import record_routing
from moa.loss import mean_routing
from pipeline import Pipeline, Subject
from sample import Parser, add_flags, check, check_picture, execute, save, settings_of
from subjects import SUBJECT, bind_rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subjects", required=True, nargs="+", action="extend", metavar="ROW",
        help=f"who takes turns, a row each: {SUBJECT}, or several of them joined by +")
    add("--keep", action="append", default=[], metavar=SUBJECT, help="who is in every row; repeatable")
    add("--output", type=Path, default=Path("swap.png"), metavar="FILE", help="default swap.png")
    add_flags(parser, seeds=(0, 1, 2))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    check_picture("--output", args.output)
    subjects = bind_rows(args.prompt, args.subjects, args.keep)
    names = [" + ".join(subject.name for subject in row) for row in subjects]
    pipeline, photos, people = load_people(args, subjects, [args.output])
    rows, maps = swap(args, pipeline, [None, *people])
    if maps is not None:
        print_changes(rows, names, maps)
    sheet = rows_sheet(args.prompt, [[], *photos], ["the base model", *names], rows,
                       [f"seed {seed}" for seed in args.seeds])
    save(sheet, args.output, settings_of(args, sum(subjects, []), seeds=args.seeds,
                                         rows=[list(map(str, row)) for row in subjects]))


def swap(args: argparse.Namespace, pipeline: Pipeline, people: list[list[Subject] | None]
         ) -> tuple[list[list[Image.Image]], Tensor | None]:
    """The pictures, row by row, and for each seed the mean of its rows' routing maps (seeds, h, w); None
    if no step was left to MoA."""
    steps_maps, maps = [], []
    with record_routing(pipeline.models.unet) as routing:
        def watch(step: int, steps: int, t: int, x0: Tensor) -> None:
            if routing:  # of a guided batch the half with the prompt comes last
                weights = [r[len(r) // 2 if args.guidance_scale != 1 else 0:, :, 1] for r in routing.values()]
                steps_maps.append(mean_routing(weights, *x0.shape[-2:]))
                routing.clear()
            if step == steps and steps_maps:
                maps.append(torch.stack(steps_maps).mean(0))
                steps_maps.clear()
        rows = generate_rows(args, pipeline, people, args.seeds, watch)
    if not maps:
        return rows, None
    return rows, torch.cat(maps).unflatten(0, (len(args.seeds), -1)).mean(1).cpu()


def print_changes(rows: list[list[Image.Image]], names: list[str], maps: Tensor) -> None:
    """Mean absolute difference to the base model's pictures (the first row), inside and outside."""
    pictures = np.array([[np.array(image) for image in row] for row in rows], dtype=float) / 255
    large = F.interpolate(maps[:, None], pictures.shape[2:4], mode="bilinear")[:, 0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    inside = (large > (low + high) / 2).numpy()
    for name, row in zip(names, pictures[1:], strict=True):
        change = np.abs(row - pictures[0]).mean(-1)
        print(f"{name}: changed {change[inside].mean():.3f} inside, {change[~inside].mean():.3f} outside")


if __name__ == "__main__":
    main()
