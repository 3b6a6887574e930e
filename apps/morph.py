"""Morph one person into another (MoA paper, Section 5.2, Fig. 12).

    python -m apps.morph --prompt "a woman riding a bike" --subjects examples/ada.png examples/zoe.png
    python -m apps.morph --prompt "a man and a woman dancing" --subjects woman=a.png woman=b.png \\
        --animation morph.gif

The image features of the two people are interpolated; prompt and seed stay, and with them the place. The
first and the last frame are what sample.py draws of each person.
"""
import argparse
from pathlib import Path

from apps import ANIMATIONS, amounts, frame_labels, plan_sheet, save_sheet, strip
from images import portrait, save_animation
from pipeline import interpolate
from sample import (Parser, add_flags, check, check_picture, execute, generate_images, keep_inputs,
                    load_pipeline, settings_of)
from subjects import SUBJECT, bind_subjects, read_photos


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subjects", nargs=2, required=True, metavar=SUBJECT,
        help="photos of the first and of the last person; both stand for the prompt's first word for people, "
             "or for WORD")
    add("--frames", type=int, default=8, metavar="N", help="how many people, with both ends (default 8)")
    add("--interpolation", choices=["linear", "spherical"], default="linear",
        help="of the image features: along a line (default) or along an arc")
    add("--output", type=Path, default=Path("morph.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and each frame (default morph.png)")
    add("--animation", type=Path, metavar="FILE", help="also save the frames as an animated .gif or .png")
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Encode both people, draw everybody between them, save."""
    check(args)
    subjects = [bind_subjects(args.prompt, [subject])[0] for subject in args.subjects]
    if subjects[0].end != subjects[1].end:
        raise ValueError(f"--subjects {' '.join(args.subjects)}: both must stand for one word")
    sheet, files = plan_sheet(args.output, args.frames)
    if args.animation:
        check_picture("--animation", args.animation, ANIMATIONS, [sheet, *files])
    keep_inputs(args, subjects, [sheet, *files, args.animation])

    photos = read_photos(subjects)
    pipeline = load_pipeline(args)
    features = interpolate(*pipeline.encode_photos(subjects, photos), args.frames,
                           args.interpolation == "spherical")
    people = [pipeline.make_subjects(args.prompt, subjects[:1], [feature]) for feature in features]
    print(f"seed {args.seed}", flush=True)
    frames = list(generate_images(args, pipeline, [args.prompt] * args.frames, [args.seed] * args.frames,
                                  people))

    settings = settings_of(args, subjects, interpolation=args.interpolation)
    first, last = ((portrait(pictures, frames[0].size), str(subject))
                   for pictures, subject in zip(photos, subjects, strict=True))
    tiles = [first, *zip(frames, frame_labels(args.frames), strict=True), last]
    save_sheet(strip(args.prompt, tiles), sheet, settings, frames, files,
               [{"amount": amount} for amount in amounts(args.frames)])
    if args.animation:
        save_animation(frames, args.animation, settings)
        print(args.animation, flush=True)


if __name__ == "__main__":
    main()
