"""Walk from the noise of one seed to that of another, with several rows of people in step.

    python -m apps.traverse --prompt "a woman waving on a mountain" --subjects examples/ada.png \\
        examples/zoe.png --seeds 1 2 --frames 8 --output traverse.png --animation traverse.gif

The noise traversal of the paper's project page: frame i starts from noise on the arc between the two
seeds' noises; first and last frame are the pictures of the seeds themselves. The noise decides the
context, the subjects decide the people: all rows change their layout together. First row: the prior
alone. --animation shows the rows beside each other, frame after frame.
"""
import argparse
from pathlib import Path

from apps import ANIMATIONS, frame_labels, generate_rows, load_people, rows_sheet
from images import labelled, save_animation
from pipeline import interpolate
from sample import Parser, add_flags, check, check_picture, execute, save, settings_of
from subjects import SUBJECT, bind_rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subjects", required=True, nargs="+", action="extend", metavar="ROW",
        help=f"a row each: {SUBJECT}, or several of them joined by +")
    add("--frames", type=int, default=8, metavar="N",
        help="pictures on the way, both ends included (default 8)")
    add("--output", type=Path, default=Path("traverse.png"), metavar="FILE", help="default traverse.png")
    add("--animation", type=Path, metavar="FILE", help="also save the frames as .gif or animated .png")
    add_flags(parser, seeds=(1, 2))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    if len(args.seeds) != 2:
        raise ValueError(f"--seeds must be two, where to begin and where to end, not {len(args.seeds)}")
    check_picture("--output", args.output)
    if args.animation:
        check_picture("--animation", args.animation, ANIMATIONS, [args.output])
    subjects = bind_rows(args.prompt, args.subjects)
    names = ["the base model", *(" + ".join(subject.name for subject in row) for row in subjects)]
    pipeline, photos, people = load_people(args, subjects, [args.output, args.animation])
    ends = pipeline.noise(args.seeds, (args.height, args.width))
    rows = generate_rows(args, pipeline, [None, *people], interpolate(*ends, args.frames, spherical=True))
    labels = frame_labels(args.frames, *(f"seed {seed}" for seed in args.seeds))
    settings = settings_of(args, sum(subjects, []), seeds=args.seeds, frames=args.frames,
                           rows=[list(map(str, row)) for row in subjects])
    save(rows_sheet(args.prompt, [[], *photos], names, rows, labels), args.output, settings)
    if args.animation:
        frames = [labelled(list(zip(column, names, strict=True)), len(names))
                  for column in zip(*rows, strict=True)]
        save_animation(frames, args.animation, settings)
        print(args.animation)


if __name__ == "__main__":
    main()
