"""Draw pictures from a prompt, with people from photos in them.

    python sample.py --subject examples/ada.png --prompt "a woman riding a bike on the beach"
    python sample.py --subject woman=a.png --subject man=b.png --prompt "a man and a woman dancing" --num 4

Without --weights it uses the small cartoon world that ships with the code. A line of --from-file is a
prompt, or a JSON object with `prompt` and perhaps `subjects`, a list of what --subject takes, and `seed`.
Given again, it skips existing pictures and redraws those of changed lines. `torchrun` splits the lines.
A photo is for the prompt's next person; woman=a.png is for that word, 2=a.png for the prompt's second person.
a.png,b.png are two photos of one person. crowd.png#2 is the second person of the photo's mask.
"""
import argparse
import importlib
import json
import math
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

# First: it says what is not installed, and how torch's threads wait.
from models.errors import Parser, fail, fail_if_memory, no_file, one_line

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from data.files import read_text
from images import (RoutingSheet, check_finite, is_foreign, labelled, page, photo_image, read_picture,
                    read_settings, save_png, thumbnail, to_images)
from models.controlnet import Control
from models.device import pick_device, reuse_memory
from models.load import remove_leftovers
from pipeline import Pipeline, Subject
from samplers import SAMPLERS
from subjects import BoundSubject, bind_subjects, file_of, read_photos
from weights.checkpoints import Refusal
from weights.controlnet import load_controlnet
from weights.hub import find_moa, find_weights
from weights.lora import LoRASetting

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
BATCH = 8  # pictures drawn at once, fewer where they are large
BATCH_PIXELS = 8 * 512 * 512
MANY_PIXELS = 4  # times those of the weights' own pictures: behind it there is a warning
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a flag, or config.json in its place, may say; numbers that may have a fraction are floats here.
LIMITS = {"num": (1, 1000), "seed": (0, 2 ** 63 - 1), "steps": (1, 999), "guidance_scale": (0.0, 100.0),
          "width": (8, 2048), "height": (8, 2048), "clip_skip": (1, 12), "prior_above": (0, 1000),
          "strength": (0.0, 10.0), "sparse": (0.0, 1.0), "frames": (2, 200)}
# Flags of each ControlNet -> their default, and what they may say.
CONTROL_LIMITS = {"scale": (1.0, 0.0, 10.0), "start": (0.0, 0.0, 1.0), "end": (1.0, 0.0, 1.0)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", metavar="TEXT", help="what to draw")
    add("--from-file", type=Path, metavar="FILE", help="one picture for each of its lines")
    add = parser.add_argument
    add("--subject", action="append", default=[], metavar="[WORD=]FILE",
        help="a person's photo, see above; repeatable")
    add("--subject-mask", action="append", default=[], type=Path, metavar="FILE",
        help="cuts the person out (default: NAME_mask.png beside it); one for each photo")
    add("--output", type=Path, default=Path("sample.png"), metavar="PATH",
        help="a .png, or a folder for several pictures (default sample.png)")
    add("--num", type=int, default=1, metavar="N", help="how many; picture k has seed SEED + k (default 1)")
    add("--prior-only", action="store_true", help="draw with the base model, without the subjects")
    add("--save-routing", type=Path, metavar="FILE", help="also draw what the routers did, as .png")
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    execute(run_file if args.from_file else run, args)


def run(args: argparse.Namespace) -> None:
    """Check, load, encode, draw, save: pictures of one prompt."""
    check(args)
    if args.prior_only and args.save_routing:
        raise ValueError("--save-routing has nothing to show with --prior-only: leave one of them out")
    files, sheet = plan_files(args)
    subjects = bind_subjects(args.prompt, args.subject)
    keep_inputs(args, subjects, [*files, sheet, args.save_routing], args.subject_mask)
    photos = read_photos(subjects, args.subject_mask)
    pipeline = load(args, people=bool(subjects))
    people = [] if args.prior_only else pipeline.make_subjects(
        args.prompt, subjects, pipeline.encode_photos(subjects, photos))
    print(f"seed {args.seed}", flush=True)

    settings = settings_of(args, subjects, prior_only=args.prior_only)
    routing = RoutingSheet(args.steps)
    tiles = []
    with routing.recording(pipeline.models.unet) if args.save_routing else nullcontext() as watch:
        seeds = range(args.seed, args.seed + args.num)
        drawn = generate_images(args, pipeline, [args.prompt] * args.num, seeds, [people] * args.num, watch,
                                prior_only=args.prior_only)
        for image, seed, file in zip(drawn, seeds, files, strict=True):
            save(image, file, {**settings, "seed": seed})
            tiles.append((thumbnail(image), f"seed {seed}"))

    portraits = [(thumbnail(photo_image(photo)), f"{subject.word}={Path(file).name}")
                 for subject, several in zip(subjects, photos, strict=True)
                 for file, photo in zip(subject.files, several, strict=True)]
    if sheet:
        rows = [labelled(portraits, len(portraits))] if portraits else []
        columns = min(8, max(4, math.ceil(math.sqrt(len(tiles)))))
        save(page(args.prompt, *rows, labelled(tiles, columns)), sheet, settings)
    if args.save_routing:
        save(routing.draw(tiles[0][0], portraits), args.save_routing, settings)


def load(args: argparse.Namespace, people: bool) -> Pipeline:
    """The pipeline, with MoA where these flags need it or it is there."""
    moa = True if people or args.save_routing else None
    return load_pipeline(args, False if args.prior_only else moa, people and not args.prior_only)


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
        if there := next((file for file in (*files, sheet) if file and file.exists()), None):
            raise ValueError(f"--output {folder} holds {there.name} of an earlier run: give another folder")
    check_writable("--output", files[0])
    if args.save_routing:
        check_picture("--save-routing", args.save_routing, others=[*files, sheet or files[0]])
    return files, sheet


# --- --from-file ---


@dataclass
class Line:
    """One picture of a file of prompts."""

    name: str  # for messages
    prompt: str
    seed: int
    subject: list[str]  # as the flag takes them
    subjects: list[BoundSubject] = field(default_factory=list)
    people: list[Subject] = field(default_factory=list)


def run_file(args: argparse.Namespace) -> None:
    """Draw this process's lines of a file of prompts, except those whose pictures are there.

    Everything that is wrong with a line is said before the first picture.
    """
    if args.subject or args.subject_mask or args.save_routing or args.num != 1:
        raise ValueError("--from-file goes without --subject, --subject-mask, --num and --save-routing: its "
                         "lines say what to draw")
    args.seed = args.seed or 0  # not random, so that a second run finds the pictures of the first
    check(args)
    folder = args.output.with_suffix("") if args.output.suffix == ".png" else args.output
    check_writable("--output", folder / "00000.png")
    lines = read_lines(args.from_file, args.seed)
    pipeline = load(args, people=any(line.subject for line in lines))
    draw_lines(args, pipeline, dict(own_share([(folder / f"{k:05d}.png", line)
                                               for k, line in enumerate(lines)])))


def own_share(items: Sequence) -> Sequence:
    """Of what the processes of `torchrun` share, the part of this one; all of it without `torchrun`."""
    return items[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


def draw_lines(args: argparse.Namespace, pipeline: Pipeline, lines: dict[Path, Line]) -> None:
    """Draw the pictures of these files, except those that are there. Raises ValueError before the first."""
    for line in lines.values():
        with naming(line.name):
            pipeline.check_prompt(line.prompt)
    if not args.prior_only:
        find_people(pipeline, lines.values())
        keep_inputs(args, [subject for line in lines.values() for subject in line.subjects], list(lines))
    for folder in {file.parent for file in lines}:
        remove_leftovers(folder, lines)  # of its own share: other processes may be writing theirs
    settings = {file: line_settings(args, line) for file, line in lines.items()}
    todo = [file for file in lines if read_settings(file) != settings[file]]
    drawn = generate_images(args, pipeline, [lines[file].prompt for file in todo],
                            [lines[file].seed for file in todo], [lines[file].people for file in todo],
                            prior_only=args.prior_only)
    for file, image in zip(todo, drawn, strict=True):
        save(image, file, settings[file])
    print(f"{len(todo)} drawn, {len(lines) - len(todo)} were there", flush=True)


def line_settings(args: argparse.Namespace, line: Line) -> dict:
    """What the metadata of a line's picture say, once its subjects are bound."""
    return settings_of(args, line.subjects, prompt=line.prompt, seed=line.seed, prior_only=args.prior_only)


def read_lines(file: Path, seed: int) -> list[Line]:
    """The pictures that a file asks for; line k has seed `seed` + k unless it names one.

    Raises ValueError with the number of the first line that cannot be read.
    """
    lines = []
    with naming(f"--from-file {file}"):
        texts = read_text(file).split("\n")
    for number, text in enumerate(texts, 1):
        if text.strip():
            name = f"--from-file {file}, line {number}"
            with naming(name):
                lines.append(read_line(name, text.strip(), seed + len(lines)))
    if not lines:
        raise ValueError(f"--from-file {file} is empty: give it a prompt on each line")
    return lines


def read_line(name: str, text: str, seed: int) -> Line:
    """A prompt, or a JSON object. Raises ValueError."""
    if not text.startswith(("{", "[")):
        return Line(name, text, seed, [])
    values = json.loads(text)
    check_keys(values, {"prompt": str}, {"subjects": list, "seed": int})
    return Line(name, values["prompt"], values.get("seed", seed), values.get("subjects", []))


def find_people(pipeline: Pipeline, lines: Iterable[Line]) -> None:
    """Find the people of all lines; each photo is read once. Raises ValueError."""
    known: dict[tuple[str, ...], Tensor] = {}
    for line in lines:
        with naming(line.name):
            line.subjects = bind_subjects(line.prompt, line.subject)
            for subject in line.subjects:
                if (files := tuple(subject.files)) not in known:
                    known[files], = pipeline.encode_photos([subject], read_photos([subject]))
            line.people = pipeline.make_subjects(line.prompt, line.subjects,
                                                 [known[tuple(subject.files)] for subject in line.subjects])


# --- the flags that the apps share ---


def add_flags(parser: argparse.ArgumentParser, seeds: Sequence[int] = (), without: Sequence[str] = (),
              **defaults: float) -> None:
    """What every command that draws pictures understands. seeds: the default of --seeds, which then
    takes the place of --seed. without: flags of "drawing" that mean nothing to a command, or that it
    describes itself. defaults: of --seed, --steps and --guidance-scale, if it has its own."""
    said = {"seed": "random, printed", "steps": "the weights', or 20", "guidance_scale": "the weights', or 5",
            **defaults}
    group = parser.add_argument_group("drawing")

    def add(flag: str, **options) -> None:
        if flag not in without:
            group.add_argument(flag, **options)

    if seeds:
        add("--seeds", type=int, nargs="+", default=list(seeds), metavar="SEED",
            help=f"of the noises (default {' '.join(map(str, seeds))})")
    else:
        add("--seed", type=int, default=defaults.get("seed"), help=f"of the noise (default: {said['seed']})")
    add("--steps", type=int, default=defaults.get("steps"), metavar="N",
        help=f"sampling steps (default: {said['steps']})")
    add("--guidance-scale", type=float, default=defaults.get("guidance_scale"), metavar="SCALE",
        help=f"classifier-free guidance; 1 is none (default: {said['guidance_scale']})")
    add("--negative-prompt", default="", metavar="TEXT", help="what the picture shall not show")
    add("--clip-skip", type=int, default=1, metavar="N",
        help="the text encoder's N-th layer from the end, as web UIs count (default 1)")
    add("--sampler", choices=list(SAMPLERS), default="unipc", help="default unipc")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the weights')")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the weights')")
    add("--prior-above", type=int, metavar="T",
        help="the base model alone at timesteps from T on (default: the weights', or 800)")
    add("--strength", type=float, default=1.0, metavar="FACTOR",
        help="scales the subjects' router weight; 0 is the base model (default 1)")
    add("--sparse", type=float, default=0.0, metavar="WEIGHT",
        help="faster: pixels routed below this, such as 0.1, get the prior only (default 0)")
    add("--reuse", action="store_true",
        help="faster: compute the subjects' self-attention in every second step only")
    add = parser.add_argument_group("models").add_argument
    add("--weights", type=Path, default=SHIPPED, metavar="FOLDER",
        help="a folder, or user/name[@revision] on the hub (default: the small world)")
    add("--moa", type=Path, metavar="FILE",
        help="a file, or a name on the hub (default: moa.safetensors of --weights)")
    add("--any-subject", action="store_true",
        help="also draw people who look like nobody in the training data")
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]",
        help="a style, and how much of it (default 1); repeatable")
    add("--lora-scope", choices=["attn", "all"],
        help="only the prior's attention (default, the paper's), or all layers")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    add("--dtype", choices=list(DTYPES), default="fp32", help="default fp32")
    add("--checker", metavar="MODULE:FUNCTION",
        help="a safety checker: Pillow image -> the one to save, or ValueError")
    add = parser.add_argument_group("control; repeatable, numbers once or for each ControlNet").add_argument
    add("--controlnet", action="append", default=[], metavar="FILE",
        help="a file or folder of a ControlNet")
    add("--control-image", action="append", default=[], metavar="FILE",
        help="the picture that it follows, such as a skeleton; it is resized")
    add("--control-scale", action="append", type=float, metavar="S",
        help="how strongly (default 1)")
    add("--control-start", action="append", type=float, metavar="F",
        help="from which share of the steps on (default 0)")
    add("--control-end", action="append", type=float, metavar="F", help="up to which share (default 1)")


def execute(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a command. What the user can mend becomes one line on stderr and exit status 2."""
    reuse_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = WarningPrinter()
            run(args)
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        fail_if_memory(error, "make --width and --height smaller, draw fewer pictures at once, or take "
                              "--dtype fp16")
    except KeyboardInterrupt:
        print("stopped: what was saved is kept, nothing else was written", file=sys.stderr)
        sys.exit(130)


class WarningPrinter:
    """Prints each warning once, as one line that does not break the progress bar."""

    def __init__(self):
        self.said = set()

    def __call__(self, message: Warning | str, *rest, **more) -> None:
        if str(message) not in self.said:
            self.said.add(str(message))
            tqdm.write("warning: " + one_line(message), file=sys.stderr)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What is wrong inside, say with a line of a file, is said with where it is."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first setting that cannot be drawn."""
    for name in LIMITS:
        if getattr(args, name, None) is not None:
            check_limits("--" + name.replace("_", "-"), name, getattr(args, name))
    if args.lora_scope and not args.lora:
        raise ValueError("--lora-scope means nothing without --lora")
    for seed in getattr(args, "seeds", ()):
        check_limits("--seeds", "seed", seed)
    if "seeds" in args:
        args.seed = args.seeds[0]
    for name in ("prompt", "source_prompt"):
        prompt = getattr(args, name, None)
        if prompt is not None and not prompt.strip():
            raise ValueError(f"--{name.replace('_', '-')} is empty: say what to draw")
    check_controls(args)


def check_limits(flag: str, name: str, value: object) -> None:
    """Raise ValueError unless a setting lies in its `LIMITS`; config.json may hold anything."""
    low, high = LIMITS[name]
    if not isinstance(value, (int, type(low))) or not low <= value <= high:
        raise ValueError(f"{flag} must be in {int(low)}..{int(high)}, not {value}")
    if name in ("width", "height") and value % 8:
        raise ValueError(f"{flag} must be a multiple of 8, not {value}: {value // 8 * 8} or "
                         f"{value // 8 * 8 + 8}")


def check_keys(values: object, needed: dict[str, type], optional: dict[str, type] | None = None) -> None:
    """Raise ValueError unless `values`, out of a JSON file, is an object with these keys, each of its
    kind."""
    kinds = {**needed, **(optional or {})}
    if not isinstance(values, dict) or not needed.keys() <= values.keys() <= kinds.keys():
        also = f" and, if you like, {', '.join(optional)}" if optional else ""
        raise ValueError(f"an object with {', '.join(needed)}{also} is needed, not {str(values)[:99]}")
    for key, value in values.items():
        if not isinstance(value, kinds[key]) or key in needed and not value:
            raise ValueError(f"{key!r} must be a {kinds[key].__name__} that is not empty, not {value!r}")
    if "prompt" in needed and not values["prompt"].strip():
        raise ValueError("its prompt is empty: say what to draw")
    if "seed" in values:
        check_limits("seed", "seed", values["seed"])


def check_words(pipeline: Pipeline, texts: Sequence[str]) -> None:
    """Raise ValueError if the weights do not know a word of the texts."""
    if complaint := pipeline.models.tokenize.complaint(" ".join(texts)):
        raise ValueError(complaint)


def check_picture(flag: str, path: Path, endings: Iterable[str] = (".png",), others: Sequence[Path] = ()
                  ) -> None:
    """Raise ValueError unless `path` has one of these endings, is none of the other outputs and can be
    created or replaced."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{flag} {path} must be a file whose name ends in {' or '.join(endings)}")
    if path.resolve() in [other.resolve() for other in others]:
        raise ValueError(f"{flag} {path} is --output's file: give another name")
    check_writable(flag, path)


def check_writable(flag: str, path: Path) -> None:
    """Raise ValueError unless `path` can be created or replaced. Leaves nothing behind."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder, give another name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written, {folder}: {error.strerror}. "
                         "Give another place") from error


def keep_inputs(args: argparse.Namespace, subjects: Sequence[BoundSubject], outputs: Sequence[Path | None],
                others: Sequence[Path] = ()) -> None:
    """Raise ValueError if an output would replace a picture that is read, or that no command of ours drew."""
    read = [*(file_of(file) for subject in subjects for file in subject.files), *args.control_image, *others]
    taken = {Path(file).resolve() for file in read}
    for output in outputs:
        if output and output.resolve() in taken:
            raise ValueError(f"{output} is a subject's photo or another file that is read, and would be "
                             "replaced: give another --output")
        if output and output.suffix.lower() == ".png" and is_foreign(output):
            raise ValueError(f"{output} is a picture that was not drawn by these commands, and would be "
                             "replaced: give another --output")


def save(image: Image.Image, path: Path, settings: dict) -> None:
    """Save a picture with its settings and print its name."""
    save_png(image, path, settings)
    print(path, flush=True)


def settings_of(args: argparse.Namespace, subjects: Sequence[BoundSubject], **more: object) -> dict:
    """The settings that go into a picture's metadata: names of files, never where they lie."""
    kept = ("negative_prompt", "seed", "steps", "sampler", "guidance_scale", "clip_skip", "width", "height",
            "prior_above", "strength", "sparse", "reuse", "dtype")
    return {"prompt": getattr(args, "prompt", None), **{name: getattr(args, name) for name in kept},
            "weights": args.weights.resolve().name, "moa": args.moa.name if args.moa else None,
            "loras": [str(lora) for lora in args.lora],
            "lora_scope": (args.lora_scope or "attn") if args.lora else None,
            "subjects": [str(subject) for subject in subjects], "controls": control_settings(args), **more}


# --- loading ---


def load_pipeline(args: argparse.Namespace, moa: bool | None = True, people: bool = True) -> Pipeline:
    """The models, with seed and sizes that the flags leave open filled in from them.

    moa: True where it is needed, None to take it if it is there. people: whether there are photos.
    `args.moa` becomes the file that was loaded, or None, `args.lora` a list of `LoRASetting`,
    `args.controls` what else steers the pictures. Raises ValueError.
    """
    args.checker = find_checker(args.checker)
    args.weights = find_weights(args.weights)
    args.moa = find_moa(args.moa) if args.moa else None
    args.lora = [split_lora(argument) for argument in args.lora]
    file = args.moa or args.weights / "moa.safetensors"
    if args.moa and not file.is_file():
        raise ValueError(f"--moa {no_file(file)}: give one that train.py moa has written")
    args.moa = file if moa is not False and file.is_file() else None
    pipeline = Pipeline.load(args.weights, args.moa, pick_device(args.device), DTYPES[args.dtype])
    if moa and args.moa is None:
        raise ValueError(f"--weights {args.weights} has no moa.safetensors, which subjects and routing maps "
                         "need: give --moa FILE. For photos no trained one exists yet, docs/photos.md says "
                         "what training it needs")
    if people and args.moa and pipeline.models.image_encoder is None:
        raise ValueError(f"--weights {args.weights} has no image_encoder.safetensors, which subjects need")
    if args.any_subject:
        pipeline.trained_on = None
    pipeline.set_loras(args.lora, args.lora_scope or "attn")
    fill_in(args, pipeline.models.config)
    if args.negative_prompt and args.guidance_scale == 1:
        warnings.warn("--negative-prompt has no effect with --guidance-scale 1", stacklevel=2)
    args.controls = load_controls(args, pipeline)
    return pipeline


def fill_in(args: argparse.Namespace, config: dict) -> None:
    """Take what the flags leave open from config.json, and a random seed."""
    size = config.get("image_size")
    found = {"width": size, "height": size, **config.get("sampling", {})}
    defaults = {"steps": 20, "guidance_scale": 5.0, "width": 512, "height": 512, "prior_above": 800,
                "seed": random.randrange(2 ** 32)}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default if found.get(name) is None else found[name])
    check(args)
    side = size or defaults["width"]
    if args.width * args.height > MANY_PIXELS * side ** 2:
        warnings.warn(f"pictures of {args.width} x {args.height} pixels are far larger than the {side} x "
                      f"{side} that these weights are made for: they take long and show things several times",
                      stacklevel=2)


def find_checker(name: str | None) -> Callable[[Image.Image], Image.Image]:
    """What --checker names, from a module in this directory or installed; without, what changes nothing.
    Raises ValueError."""
    if name is None:
        return lambda image: image
    module, _, function = name.partition(":")
    sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--checker {name}: {error}; give MODULE:FUNCTION") from error


def split_lora(argument: str) -> LoRASetting:
    """FILE[:SCALE] -> LoRASetting. Raises ValueError."""
    found = re.fullmatch(r"(.+):(-?[\d.]+(?:e-?\d+)?)", argument)
    file, scale = (found[1], float(found[2])) if found and not Path(argument).exists() else (argument, 1.0)
    if not Path(file).is_file():
        raise ValueError(f"--lora {argument}: {no_file(file)}; give FILE[:SCALE], the scale as a number")
    if not -100 <= scale <= 100:
        raise ValueError(f"--lora {argument}: a scale must be in -100..100")
    return LoRASetting(Path(file), scale)


def check_controls(args: argparse.Namespace) -> None:
    """Raise ValueError for the first control flag that cannot be used."""
    count, images = len(args.controlnet), len(args.control_image)
    if count != images:
        raise ValueError(f"{count} --controlnet with {images} --control-image: give one image for each")
    for name, (_, low, high) in CONTROL_LIMITS.items():
        values = getattr(args, f"control_{name}") or []
        if values and len(values) not in (1, count):
            raise ValueError(f"{len(values)} --control-{name} for {count} --controlnet: give one for all, or "
                             "one for each")
        for value in values:
            if not low <= value <= high:
                raise ValueError(f"--control-{name} must be in {low:.0f}..{high:.0f}, not {value}")
    for setting in control_settings(args):
        if not setting["start"] < setting["end"]:
            raise ValueError(f"--control-start {setting['start']} must be smaller than --control-end "
                             f"{setting['end']}")


def control_settings(args: argparse.Namespace) -> list[dict]:
    """Each control's settings: names of files, never where they lie."""
    found = [{"controlnet": Path(net).resolve().name, "image": Path(image).name}
             for net, image in zip(args.controlnet, args.control_image, strict=True)]
    for name, (default, _, _) in CONTROL_LIMITS.items():
        values = getattr(args, f"control_{name}") or [default]
        for i, setting in enumerate(found):
            setting[name] = values[0 if len(values) == 1 else i]
    return found


def load_controls(args: argparse.Namespace, pipeline: Pipeline) -> list[Control]:
    """The `Control`s that the flags ask for; each ControlNet is read once. Raises ValueError."""
    hints = [read_picture(file)[None] for file in args.control_image]
    nets = {}
    for source in dict.fromkeys(args.controlnet):
        try:
            nets[source] = load_controlnet(source).to(pipeline.device, pipeline.dtype)
            pipeline.check_controlnet(nets[source])
        except (Refusal, SafetensorError, ValueError) as error:
            raise ValueError(f"--controlnet {source}: {error}") from error
    controls = []
    for source, hint, setting in zip(args.controlnet, hints, control_settings(args), strict=True):
        control = Control(nets[source], hint, setting["scale"], setting["start"], setting["end"])
        if control.scale and not any(control.acts(step, args.steps) for step in range(args.steps)):
            warnings.warn(f"--control-start {control.start} and --control-end {control.end} leave none of "
                          f"the {args.steps} steps between them: {setting['image']} has no effect",
                          stacklevel=2)
        height, width = hint.shape[-2:]
        if abs(width * args.height / (height * args.width) - 1) > 0.02:
            warnings.warn(f"--control-image {setting['image']} has {width} x {height} pixels and is "
                          f"stretched to {args.width} x {args.height}", stacklevel=2)
        controls.append(control)
    return controls


# --- drawing ---


def sampling_options(args: argparse.Namespace) -> dict:
    """What the flags mean for `Pipeline.sample`."""
    return {name: getattr(args, name) for name in ("steps", "guidance_scale", "sampler", "prior_above",
                                                   "strength", "sparse", "reuse", "controls")}


def generate_images(args: argparse.Namespace, pipeline: Pipeline, prompts: Sequence[str] | Tensor,
                    seeds: Sequence[int | Tensor], subjects: Sequence[Sequence[Subject] | None],
                    watch: Callable[[int, int, int, Tensor], object] | None = None, group: int = 1,
                    **more: object) -> Iterator[Image.Image]:
    """Yield an image per prompt, drawn in batches, with a progress bar.

    prompts, seeds, subjects: as `Pipeline.generate` takes them.
    watch: called after each step of each batch, like `progress` of `Pipeline.generate`. group: so many
    neighbours stay in one batch, where it has room for them. more: for `Pipeline.generate`, besides what
    the flags say.
    """
    size = min(BATCH, max(1, BATCH_PIXELS // (args.width * args.height)))
    size -= size % group if group < size else 0
    starts = range(0, len(prompts), size)
    for prompt in () if isinstance(prompts, Tensor) else dict.fromkeys(prompts):
        pipeline.check_prompt(prompt)
    with tqdm(total=args.steps * len(starts), desc="sampling", unit="step", disable=None) as bar:
        for start in starts:
            def progress(step: int, steps: int, t: int, x0: Tensor) -> None:
                check_finite(x0, f"the UNet's latents of step {step} of {steps}")
                bar.update()
                if watch:
                    watch(step, steps, t, x0)
            batch = slice(start, start + size)
            pictures = pipeline.generate(
                prompts[batch], seeds[batch], subjects[batch], args.negative_prompt,
                (args.height, args.width), args.clip_skip, progress=progress,
                **{**sampling_options(args), **more})
            yield from map(args.checker, to_images(pictures, "what the VAE makes of finite latents"))


if __name__ == "__main__":
    main()
