"""Let a person grow older or younger (MoA paper, Appendix E.2, Fig. 22).

    python -m apps.timelapse --subject examples/ada.png --words kid person \\
        --prompt "a kid standing on the beach"

The states of the prompt with the one word and with the other are interpolated. The prior reads them, and
the person is fused into the word's token among them, so that both experts follow. The first and the last
frame are what sample.py draws with either word.
"""
import argparse
from pathlib import Path

from apps import amounts, frame_labels, plan_sheet, save_sheet, strip
from images import portrait
from pipeline import Pipeline, interpolate
from sample import (Parser, add_flags, check, check_words, execute, generate_images, keep_inputs,
                    load_pipeline, settings_of)
from subjects import BoundSubject, bind_subjects, find_words, read_photos


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--subject", required=True, metavar="FILE[,FILE...]",
        help="photo of a person, or several of the same one")
    add("--prompt", required=True, help="what to draw; it names the person by one of the words")
    add("--words", nargs=2, required=True, metavar="WORD", help="for the first and for the last frame")
    add("--frames", type=int, default=6, metavar="N", help="how many pictures, with both ends (default 6)")
    add("--output", type=Path, default=Path("timelapse.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and each frame (default timelapse.png)")
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Encode the person and both prompts, draw what lies between these, save."""
    check(args)
    prompts, subject = name_by(args.words, args.prompt, args.subject)
    sheet, files = plan_sheet(args.output, args.frames)
    keep_inputs(args, [subject], [sheet, *files])

    photos = read_photos([subject])
    pipeline = load_pipeline(args)
    check_tokens(pipeline, args.words)
    person = pipeline.make_subjects(prompts[0], [subject], pipeline.encode_photos([subject], photos))
    text = interpolate(*pipeline.encode_text(prompts, args.clip_skip), args.frames)
    print(f"seed {args.seed}", flush=True)
    frames = list(generate_images(args, pipeline, text, [args.seed] * args.frames, [person] * args.frames))

    settings = settings_of(args, [subject], prompt=prompts[0], words=args.words)
    labels = frame_labels(args.frames, *args.words)
    photo = portrait(photos[0], frames[0].size), subject.name
    tiles = [photo, *zip(frames, labels, strict=True)]
    save_sheet(strip(args.prompt, tiles), sheet, settings, frames, files,
               [{"amount": amount} for amount in amounts(args.frames)])


def name_by(words: list[str], prompt: str, subject: str) -> tuple[list[str], BoundSubject]:
    """The prompt with each of the words at the subject's place, and the subject of the first. Raises
    ValueError."""
    said = next((word for word in words if find_words(prompt, [word])), None)
    if said is None:
        raise ValueError(f"--words {' '.join(words)}: neither is in the prompt: {prompt!r}")
    bound, = bind_subjects(prompt, [f"{said}={subject}"])
    before, after = prompt[:bound.end - len(bound.word)], prompt[bound.end:]
    bound = bound._replace(word=words[0], end=len(before + words[0]))
    return [before + word + after for word in words], bound


def check_tokens(pipeline: Pipeline, words: list[str]) -> None:
    """Raise ValueError unless each word is one token: only then the person's token is the same in both
    prompts."""
    check_words(pipeline, words)
    for word in words:
        if (tokens := len(pipeline.models.tokenize.encode(word))) != 1:
            raise ValueError(f"--words: {word!r} is {tokens} tokens of the text encoder, take words of one")


if __name__ == "__main__":
    main()
