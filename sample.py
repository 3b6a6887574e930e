"""Draw pictures from a prompt, with people from photos in them.

    python sample.py --subject examples/ada.png --prompt "a woman riding a bike on the beach"
    python sample.py --subject woman=a.png --subject man=b.png --prompt "a man and a woman dancing" --num 4
    python sample.py --controlnet weights/toyworld --control-image examples/waving.png --prompt "a boy waving"
    python sample.py --from-file prompts.jsonl --output pictures

Without --weights it uses the small cartoon world that ships with the code; for Stable Diffusion 1.5
convert a checkpoint with weights/convert_sd15.py and give its folder.

Each line of --from-file is a prompt, or a JSON object with `prompt` and, if you like, `subjects` (a list
of what --subject takes: paths start at the current folder, not at the file's) and `seed`. The command can
be given again after a stop: pictures that are there are left alone. Under `torchrun` processes share the
lines.
"""
import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import command
from subjects import (SUBJECT, Place, bind_subjects, encode_person, make_subjects,
                      read_photos)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", help="what to draw")
    add("--from-file", type=Path, metavar="FILE", help="one picture for each of its lines, see above")
    add = parser.add_argument
    add("--subject", action="append", default=[], metavar=SUBJECT,
        help="photo of a person, or several of the same one; bound to the prompt's words for people in "
             "order, to WORD, or by N=FILE to the N-th of them; @T: not before the timestep falls below T, "
             "which changes something for T below --prior-above only; repeatable")
    add("--output", type=Path, default=Path("sample.png"), metavar="PATH",
        help="a .png, or a folder (default sample.png; for several pictures a folder of that name)")
    add("--num", type=int, default=1, metavar="N",
        help="how many pictures; picture k has seed SEED + k (default 1)")
    add("--prior-only", action="store_true", help="draw with the base model, whatever the subjects")
    add("--save-routing", type=Path, metavar="FILE",
        help="also save what the routers gave to the personalized experts in the first picture (.png)")
    command.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    command.execute(run_file if args.from_file else run, args)


def run(args: argparse.Namespace) -> None:
    """Check, load, encode, draw, save: pictures of one prompt."""
    check(args)
    files, sheet = plan_files(args)
    places = bind_subjects(args.prompt, args.subject)
    command.keep_photos(args, places, [*files, sheet, args.save_routing])
    from images import RoutingSheet
    photos = read_photos(places)
    pipeline = load(args, people=bool(places))
    subjects = []
    if not args.prior_only:
        features = [encode_person(pipeline, args.weights, place.files, pictures)
                    for place, pictures in zip(places, photos, strict=True)]
        subjects = make_subjects(pipeline, args.prompt, places, features)
    settings = describe(args, args.prompt, places)
    routing = RoutingSheet(args.steps) if args.save_routing else None
    print(f"seed {args.seed}", flush=True)
    save_all(args, draw(args, pipeline, subjects, routing), files, sheet, routing, places, photos, settings)


def load(args: argparse.Namespace, people: bool):
    """The pipeline, with MoA where these flags need it or it is there."""
    moa = True if people or args.save_routing else None
    return command.load_pipeline(args, False if args.prior_only else moa, people and not args.prior_only)


def draw(args: argparse.Namespace, pipeline, subjects: list, sheet) -> Iterator:
    """Yield the pictures; `sheet` takes the routers' maps of the first, unless None."""
    from moa import record_routing
    seeds = range(args.seed, args.seed + args.num)
    with record_routing(pipeline.models.unet) if sheet else nullcontext() as routing:
        def watch(step, steps, t, x0):
            sheet.add(step, t, routing, x0)
            routing.clear()
        yield from command.draw(args, pipeline, [args.prompt] * args.num, seeds, [subjects] * args.num,
                                watch if sheet else None, prior_only=args.prior_only)


def save_all(args: argparse.Namespace, images: Iterator, files: list[Path], sheet: Path | None, routing,
             places: list[Place], photos: list[list], settings: dict) -> None:
    """Save each picture as soon as it is there, then the sheets; print the files."""
    from images import contact_sheet, thumbnail
    from images import to_images
    people = [(thumbnail(to_images(photo[None] * 2 - 1)[0]), f"{place.word}={Path(file).name}")
              for place, several in zip(places, photos, strict=True)
              for file, photo in zip(place.files, several, strict=True)]
    small = []
    for seed, (image, file) in enumerate(zip(images, files, strict=True), args.seed):
        command.save(image, file, {**settings, "seed": seed})
        small.append((thumbnail(image), f"seed {seed}"))
    if sheet:
        command.save(contact_sheet(args.prompt, people, small), sheet, settings)
    if routing:
        command.save(routing.draw(small[0][0], people), args.save_routing, settings)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first setting that cannot be drawn."""
    command.check(args)
    if args.prior_only and args.save_routing:
        raise ValueError("--save-routing has nothing to show with --prior-only: leave one of them out")


def plan_files(args: argparse.Namespace) -> tuple[list[Path], Path | None]:
    """The pictures' files and, for several, their contact sheet's. Tries now whether they can be
    written, so that nobody waits for a picture that cannot be saved."""
    output, sheet = args.output, None
    if output.suffix.lower() not in ("", ".png") and not output.is_dir():
        raise ValueError(f"--output {output}: pictures are saved as .png, give a name that ends so")
    if args.num == 1 and output.suffix and not output.is_dir():
        files = [output]
    else:
        folder = output if output.is_dir() else output.with_suffix("")
        files = [folder / f"{k:03d}.png" for k in range(args.num)]
        sheet = folder / "sheet.png" if args.num > 1 else None
    command.check_writable("--output", files[0])
    if args.save_routing:
        command.check_picture("--save-routing", args.save_routing, others=[*files, sheet or files[0]])
    return files, sheet


def describe(args: argparse.Namespace, prompt: str, places: list[Place]) -> dict:
    """The settings that go into a picture's metadata."""
    return {"prompt": prompt, **command.describe(args, places, prior_only=args.prior_only)}


# --- --from-file ---


@dataclass
class Line:
    """One picture of a file of prompts."""

    name: str  # for messages
    prompt: str
    seed: int
    subject: list[str]
    places: list[Place] = field(default_factory=list)
    people: list = field(default_factory=list)


def run_file(args: argparse.Namespace) -> None:
    """Draw this process's lines of a file of prompts, except those whose pictures are there.

    Everything that is wrong with a line is said before the first picture.
    """
    if args.subject or args.save_routing or args.num != 1:
        raise ValueError("--from-file goes without --subject, --num and --save-routing: its lines say what "
                         "to draw")
    args.seed = args.seed or 0  # not random, so that a second run finds the pictures of the first
    command.check(args)
    folder = args.output.with_suffix("") if args.output.suffix == ".png" else args.output
    command.check_writable("--output", folder / "00000.png")
    lines = read_lines(args.from_file, args.seed)
    pipeline = load(args, people=any(line.subject for line in lines))
    draw_lines(args, pipeline, dict(own_share([(folder / f"{k:05d}.png", line)
                                               for k, line in enumerate(lines)])))


def own_share(items: Sequence) -> Sequence:
    """Of what the processes of `torchrun` share, the part of this one; all of it without `torchrun`."""
    return items[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


def draw_lines(args: argparse.Namespace, pipeline, lines: dict[Path, Line]) -> None:
    """Draw the pictures of these files, except those that are there. Raises ValueError before the first."""
    if not args.prior_only:
        cast(args, pipeline, lines.values())
        places = [place for line in lines.values() for place in line.places]
        command.keep_photos(args, places, list(lines))
    from models.load import remove_leftovers
    from images import read_settings
    for folder in {file.parent for file in lines}:
        remove_leftovers(folder, lines)  # of its own share: other processes may be writing theirs
    settings = {file: line_settings(args, line) for file, line in lines.items()}
    todo = [file for file in lines if read_settings(file) != settings[file]]
    images = command.draw(args, pipeline, [lines[file].prompt for file in todo],
                          [lines[file].seed for file in todo], [lines[file].people for file in todo],
                          prior_only=args.prior_only)
    for file, image in zip(todo, images, strict=True):
        command.save(image, file, settings[file])
    print(f"{len(todo)} drawn, {len(lines) - len(todo)} were there", flush=True)


def line_settings(args: argparse.Namespace, line: Line) -> dict:
    """What the metadata of a line's picture say, once its people have their places."""
    return {**describe(args, line.prompt, line.places), "seed": line.seed}


def read_lines(file: Path, seed: int) -> list[Line]:
    """The pictures that a file asks for; line k has seed `seed` + k unless it names one.

    Raises ValueError with the number of the first line that cannot be read.
    """
    try:
        texts = [(k, text) for k, text in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1)
                 if text.strip()]
    except OSError as error:
        raise ValueError(f"--from-file {file} cannot be read: {error.strerror}. Give a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--from-file {file} is not a text file: {error}") from error
    if not texts:
        raise ValueError(f"--from-file {file} is empty: give it a prompt on each line")
    lines = []
    for number, text in texts:
        name = f"--from-file {file}, line {number}"
        with command.naming(name):
            lines.append(read_line(name, text, seed + len(lines)))
    return lines


def read_line(name: str, text: str, seed: int) -> Line:
    """A prompt, or a JSON object. Raises ValueError."""
    if text.lstrip().startswith(("[", '"')):
        raise ValueError("a line is a prompt or a JSON object")
    if not text.lstrip().startswith("{"):
        return Line(name, text.strip(), seed, [])
    values = json.loads(text)
    command.check_keys("it", values, optional=("subjects", "seed"), prompt=str)
    line = Line(name, values["prompt"], values.get("seed", seed), values.get("subjects", []))
    command.check_prompt("its prompt", line.prompt)
    command.check_seed(line.seed)
    if not isinstance(line.subject, list) or not all(isinstance(s, str) for s in line.subject):
        raise ValueError('subjects must be a list, such as ["woman=ada.png"]')
    return line


def cast(args: argparse.Namespace, pipeline, lines: Iterable[Line]) -> None:
    """Find the people of all lines; each photo is read once. Raises ValueError."""
    known = {}
    for line in lines:
        with command.naming(line.name):
            line.places = bind_subjects(line.prompt, line.subject)
            for place in line.places:
                if tuple(place.files) not in known:
                    photos, = read_photos([place])
                    known[tuple(place.files)] = encode_person(pipeline, args.weights, place.files, photos)
            line.people = make_subjects(pipeline, line.prompt, line.places,
                                        [known[tuple(place.files)] for place in line.places])


if __name__ == "__main__":
    main()
