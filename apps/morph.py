"""Morph one person into another (MoA paper, Section 5.2, Fig. 12).

    python -m apps.morph --prompt "a woman riding a bike" --subjects examples/ada.png examples/zoe.png
    python -m apps.morph --prompt "a man and a woman dancing" --subjects woman=a.png woman=b.png \\
        --animation morph.gif

The image features of the two people are interpolated; prompt and seed stay, and with them the place. The
first and the last frame are what sample.py draws of each person.
"""
import argparse
from pathlib import Path

# A script has only its own folder on the path.
import command
from subjects import SUBJECT, bind_subjects, encode_person, make_subjects, read_photos


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
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
    command.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Encode both people, draw everybody between them, save."""
    command.check(args)
    places = [bind_subjects(args.prompt, [subject])[0] for subject in args.subjects]
    if places[0]._replace(files=places[1].files) != places[1]:
        raise ValueError(f"--subjects {' '.join(args.subjects)}: both must stand for one word, from one "
                         "timestep on")
    from images import portrait, strip
    from images import ANIMATIONS, save_animation
    from pipeline import interpolate
    sheet, files = command.plan_sheet(args.output, args.frames)
    if args.animation:
        command.check_picture("--animation", args.animation, ANIMATIONS, [sheet, *files])
    command.keep_photos(args, places, [sheet, *files, args.animation])

    photos = read_photos(places)
    pipeline = command.load_pipeline(args)
    first, last = (encode_person(pipeline, args.weights, place.files, pictures)
                   for place, pictures in zip(places, photos, strict=True))
    features = interpolate(first, last, args.frames, args.interpolation == "spherical")
    people = [make_subjects(pipeline, args.prompt, places[:1], [feature]) for feature in features]
    print(f"seed {args.seed}", flush=True)
    frames = list(command.draw(args, pipeline, [args.prompt] * args.frames, [args.seed] * args.frames,
                               people))

    settings = {"prompt": args.prompt, **command.describe(args, places, interpolation=args.interpolation)}
    first, last = ((portrait(pictures, frames[0].size), str(place))
                   for pictures, place in zip(photos, places, strict=True))
    tiles = [first, *zip(frames, command.frame_labels(args.frames), strict=True), last]
    command.save_sheet(strip(args.prompt, tiles), sheet, settings, frames, files,
                       [{"amount": amount} for amount in command.amounts(args.frames)])
    if args.animation:
        save_animation(frames, args.animation, settings)
        print(args.animation, flush=True)


if __name__ == "__main__":
    main()
