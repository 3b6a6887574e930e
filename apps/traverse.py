"""Walk from the noise of one seed to that of another, with several castings in step.

    python -m apps.traverse --prompt "a woman waving on a mountain" --subjects examples/ada.png \\
        examples/zoe.png --seeds 1 2 --frames 8 --output traverse.png --animation traverse.gif

The noise traversal of the paper's project page: frame i starts from noise on the arc between the two
seeds' noises; first and last frame are the pictures of the seeds themselves. The noise decides the
context, the casting decides the people: all rows change their layout together. First row: the prior
alone. --animation shows the rows beside each other, frame after frame.
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
        help=f"a row each: {SUBJECT}, or several of them joined by +")
    add("--frames", type=int, default=8, metavar="N",
        help="pictures on the way, both ends included (default 8)")
    add("--output", type=Path, default=Path("traverse.png"), metavar="FILE", help="default traverse.png")
    add("--animation", type=Path, metavar="FILE", help="also save the frames as .gif or animated .png")
    command.add_flags(parser, seeds=(1, 2))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    castings = bind_castings(args.prompt, args.subjects)
    names = ["the prior alone", *(" + ".join(place.name for place in places) for places in castings)]
    pipeline, photos, people = command.load_cast(args, castings, [args.output, args.animation])
    from images import casting_sheet, labelled
    from images import save_animation, save_png
    from pipeline import interpolate
    ends = pipeline.noise(args.seeds, (args.height, args.width))
    noises = interpolate(*ends, args.frames, spherical=True)
    rows = command.draw_rows(args, pipeline, [None, *people], noises)
    labels = command.frame_labels(args.frames, *(f"seed {seed}" for seed in args.seeds))
    everybody = [place for places in castings for place in places]
    settings = {"prompt": args.prompt, **command.describe(
        args, everybody, seeds=args.seeds, frames=args.frames,
        castings=[list(map(str, places)) for places in castings])}
    save_png(casting_sheet(args.prompt, list(zip([[], *photos], names, rows, strict=True)), labels),
             args.output, settings)
    print(args.output)
    if args.animation:
        frames = [labelled(list(zip(column, names, strict=True)), len(names))
                  for column in zip(*rows, strict=True)]
        save_animation(frames, args.animation, settings)
        print(args.animation)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first setting that cannot be drawn."""
    command.check(args)
    command.check_picture("--output", args.output)
    if len(args.seeds) != 2:
        raise ValueError(f"--seeds must be two, where to begin and where to end, not {len(args.seeds)}")
    if args.animation:
        from images import ANIMATIONS
        command.check_picture("--animation", args.animation, ANIMATIONS, [args.output])


if __name__ == "__main__":
    main()
