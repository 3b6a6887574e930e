"""Let a person grow older or younger (MoA paper, Appendix E.2, Fig. 22).

    python -m apps.timelapse --subject examples/ada.png --words kid person \\
        --prompt "a kid standing on the beach"

The states of the prompt with the one word and with the other are interpolated. The prior reads them, and
the person is fused into the word's token among them, so that both experts follow. The first and the last
frame are what sample.py draws with either word.
"""
import argparse
from pathlib import Path

# A script has only its own folder on the path.
import command
from subjects import Place, bind_subjects, encode_person, find_words, make_subjects, read_photos


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--subject", required=True, action=command.Once, metavar="FILE[,FILE...][@T]",
        help="photo of a person, or several of the same one; @T: not before the timestep falls below T")
    add("--prompt", required=True, help="what to draw; it names the person by one of the words")
    add("--words", nargs=2, required=True, metavar="WORD", help="for the first and for the last frame")
    add("--frames", type=int, default=6, metavar="N", help="how many pictures, with both ends (default 6)")
    add("--output", type=Path, default=Path("timelapse.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and each frame (default timelapse.png)")
    command.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Encode the person and both prompts, draw what lies between these, save."""
    command.check(args)
    prompts, places = name_by(args.words, args.prompt, args.subject)
    sheet, files = command.plan_sheet(args.output, args.frames)
    command.keep_photos(args, places[:1], [sheet, *files])

    from images import portrait, strip
    from pipeline import interpolate
    photos, = read_photos(places[:1])
    pipeline = command.load_pipeline(args)
    check_tokens(pipeline, args.words)
    feature = encode_person(pipeline, args.weights, places[0].files, photos)
    person, _ = (make_subjects(pipeline, prompt, [place], [feature])
                 for prompt, place in zip(prompts, places, strict=True))
    text = interpolate(*pipeline.encode_text(prompts, args.clip_skip), args.frames)
    print(f"seed {args.seed}", flush=True)
    frames = list(command.draw(args, pipeline, text, [args.seed] * args.frames, [person] * args.frames))

    settings = {"prompt": prompts[0], **command.describe(args, places[:1], words=args.words)}
    labels = command.frame_labels(args.frames, *args.words)
    photo = portrait(photos, frames[0].size), ",".join(Path(file).name for file in places[0].files)
    command.save_sheet(strip(args.prompt, [photo, *zip(frames, labels, strict=True)]), sheet, settings,
                       frames, files, [{"amount": amount} for amount in command.amounts(args.frames)])


def name_by(words: list[str], prompt: str, subject: str) -> tuple[list[str], list[Place]]:
    """The prompt with each of the words at the subject's place, and these places. Raises ValueError."""
    said = next((word for word in words if find_words(prompt, [word])), None)
    if said is None:
        raise ValueError(f"--words {' '.join(words)}: neither is in the prompt: {prompt!r}")
    place, = bind_subjects(prompt, [f"{said}={subject}"])
    before, after = prompt[:place.end - len(place.word)], prompt[place.end:]
    return ([before + word + after for word in words],
            [place._replace(word=word, end=len(before + word)) for word in words])


def check_tokens(pipeline, words: list[str]) -> None:
    """Raise ValueError unless each word is one token: only then have both prompts the same places."""
    command.check_words(pipeline, words)
    for word in words:
        if (tokens := len(pipeline.models.tokenize.encode(word))) != 1:
            raise ValueError(f"--words: {word!r} is {tokens} tokens of the text encoder, take words of one")


if __name__ == "__main__":
    main()
