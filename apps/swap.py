"""Swap the people of a picture and keep the rest: the same seeds with one casting after the other.

    python -m apps.swap --prompt "a woman riding a bike on the beach" \\
        --subjects examples/ada.png examples/mia.png examples/zoe.png --seeds 0 1 2
    python -m apps.swap --prompt "a woman and a man dancing in Paris" --keep man=examples/max.png \\
        --subjects examples/ada.png examples/mia.png

The paper's Fig. 7 and 9. First row: the prior alone. Each further row is a casting, SUBJECT or, for
several people, SUBJECT+SUBJECT; those of --keep are in all of them. A column is a seed: its steps above
--prior-above are the same for everybody and are computed once.

How far each casting is from the prior's pictures is printed, in shares of the range of colours: inside
and outside of where the routers let the personalized experts work (their mean weight over layers,
timesteps and castings lies above the middle of its range in this column).
"""
import argparse
from pathlib import Path

import command
from subjects import SUBJECT, bind_castings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subjects", required=True, nargs="+", action="extend", metavar="CASTING",
        help=f"who takes turns, a row each: {SUBJECT}, or several of them joined by +")
    add("--keep", action="append", default=[], metavar=SUBJECT, help="who is in every row; repeatable")
    add("--output", type=Path, default=Path("swap.png"), metavar="FILE", help="default swap.png")
    command.add_flags(parser, seeds=(0, 1, 2))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    command.check(args)
    command.check_picture("--output", args.output)
    castings = bind_castings(args.prompt, args.subjects, args.keep)
    names = [" + ".join(place.name for place in places) for places in castings]
    pipeline, photos, people = command.load_cast(args, castings, [args.output])
    from images import casting_sheet
    from images import save_png
    rows, maps = draw(args, pipeline, [None, *people])
    if maps is not None:
        print_changes(rows, names, maps)
    labelled = list(zip([[], *photos], ["the prior alone", *names], rows, strict=True))
    sheet = casting_sheet(args.prompt, labelled, [f"seed {seed}" for seed in args.seeds])
    everybody = [place for places in castings for place in places]
    save_png(sheet, args.output, {"prompt": args.prompt, **command.describe(
        args, everybody, seeds=args.seeds, castings=[list(map(str, places)) for places in castings])})
    print(args.output)


def draw(args: argparse.Namespace, pipeline, castings: list):
    """The pictures, a row per casting, and for each seed the mean of its castings' routing maps
    (seeds, h, w); None if no step was left to MoA."""
    import torch

    from moa import record_routing
    from moa.loss import mean_routing
    steps_maps, maps = [], []
    with record_routing(pipeline.models.unet) as routing:
        def watch(step, steps, t, x0):
            if routing:  # of a guided batch the half with the prompt comes last
                weights = [r[len(r) // 2 if args.guidance_scale != 1 else 0:, :, 1] for r in routing.values()]
                steps_maps.append(mean_routing(weights, *x0.shape[-2:]))
                routing.clear()
            if step == steps and steps_maps:
                maps.append(torch.stack(steps_maps).mean(0))
                steps_maps.clear()
        rows = command.draw_rows(args, pipeline, castings, args.seeds, watch)
    if not maps:
        return rows, None
    return rows, torch.cat(maps).unflatten(0, (len(args.seeds), -1)).mean(1).cpu()


def print_changes(rows: list[list], names: list[str], maps) -> None:
    """Mean absolute difference to the prior's pictures (the first row), inside and outside."""
    import numpy as np
    import torch.nn.functional as F
    pictures = np.array([[np.array(image) for image in row] for row in rows], dtype=float) / 255
    large = F.interpolate(maps[:, None], pictures.shape[2:4], mode="bilinear")[:, 0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    inside = (large > (low + high) / 2).numpy()
    for name, row in zip(names, pictures[1:], strict=True):
        change = np.abs(row - pictures[0]).mean(-1)
        print(f"{name}: changed {change[inside].mean():.3f} inside, {change[~inside].mean():.3f} outside")


if __name__ == "__main__":
    main()
