"""The command line that sample.py and the apps share: flags, checks, loading, drawing, settings."""
import argparse
import hashlib
import importlib
import json
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import controls
from allocator import reuse_memory
from errors import one_line
from subjects import Place, cast, read_photos

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
NEAR_FLAG = 0.7  # of difflib's similarity, from which on a flag is suggested for another
BATCH = 8  # pictures drawn at once, fewer where they are large
BATCH_PIXELS = 8 * 512 * 512
MANY_PIXELS = 4  # times those of the weights' own pictures: behind it there is a warning
# What a flag, or config.json in its place, may say; numbers that may have a fraction are floats here.
LIMITS = {"num": (1, 1000), "seed": (0, 2 ** 63 - 1), "steps": (1, 999), "guidance_scale": (0.0, 100.0),
          "width": (8, 2048), "height": (8, 2048), "clip_skip": (1, 12), "prior_above": (0, 1000),
          "strength": (0.0, 10.0), "sparse": (0.0, 1.0), "frames": (2, 200)}


class Parser(argparse.ArgumentParser):
    """A command's flags. None may be shortened: `--subject` is not `--subjects`, `--seed` not `--seeds`; of
    one that is unknown a near one is said."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        known = self._option_string_actions
        flags = [word.split("=")[0] for word in self.given if word.startswith("--")]
        near = {flag: get_close_matches(flag, known, 1, NEAR_FLAG) for flag in flags if flag not in known}
        hints = [f"{flag}: did you mean {found[0]}?" for flag, found in near.items() if found]
        super().error(message + (f" ({', '.join(hints)})" if hints else ""))


class Once(argparse.Action):
    """A flag that refuses to be given again, where the second would silently take the first one's place
    though one may well want both."""

    def __call__(self, parser, args, values, flag=None) -> None:
        if getattr(args, self.dest) is not self.default:
            parser.error(f"{flag} can be given only once")
        setattr(args, self.dest, values)


def add_flags(parser: argparse.ArgumentParser, seeds: Sequence[int] = (), without: Sequence[str] = (),
              **defaults) -> None:
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
        add("--seeds", type=int, nargs="+", action=Once, default=list(seeds), metavar="SEED",
            help=f"of the noises (default {' '.join(map(str, seeds))})")
    else:
        add("--seed", type=int, default=defaults.get("seed"), help=f"of the noise (default: {said['seed']})")
    add("--steps", type=int, default=defaults.get("steps"), metavar="N",
        help=f"sampling steps (default: {said['steps']})")
    add("--guidance-scale", type=float, default=defaults.get("guidance_scale"), metavar="SCALE",
        help=f"classifier-free guidance; 1 is none (default: {said['guidance_scale']})")
    add("--negative-prompt", default="", metavar="TEXT", help="what to lead away from")
    add("--clip-skip", type=int, default=1, metavar="N",
        help="take the text encoder's N-th layer from the end, as web UIs count: 1 is the last (default), "
             "which diffusers calls 0")
    add("--sampler", choices=["unipc", "ddim"], default="unipc", help="default unipc")
    add("--width", type=int, metavar="PIXELS", help="pixels, a multiple of 8 (default: the weights')")
    add("--height", type=int, metavar="PIXELS", help="pixels, a multiple of 8 (default: the weights')")
    add("--prior-above", type=int, metavar="T",
        help="the base model draws alone at timesteps from T on (default: the weights', or 800)")
    add("--strength", type=float, default=1.0, metavar="FACTOR",
        help="times the weight that the routers give to the subjects: 0 is the base model (default 1)")
    add("--sparse", type=float, default=0.0, metavar="WEIGHT",
        help="faster: pixels to which the routers give no more than this are left to the prior, such as 0.1 "
             "(default 0, none)")
    add = parser.add_argument_group("models").add_argument
    add("--weights", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the small world")
    add("--moa", type=Path, metavar="FILE", help="default: moa.safetensors in the weights folder")
    add("--vae", metavar="FILE", help="decode with this VAE: a file or folder that convert_sd15.py reads")
    add("--lora", action="append", default=[], metavar="FILE[:SCALE[:TEXT_SCALE]]",
        help="a style: a LoRA's .safetensors, and how much of it (default 1); repeatable, in any order")
    add("--lora-scope", choices=["attn", "all"],
        help="attn (default, the paper's): only the prior's attention, and the text encoder where TEXT_SCALE "
             "is given. all: all layers of the file; TEXT_SCALE is SCALE where it is not given")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    add("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="default fp32")
    add("--checker", metavar="MODULE:FUNCTION",
        help="a safety checker: a Python function that is given every picture drawn, a Pillow image, and "
             "returns the one to save, or raises ValueError to end without it (default: none)")
    controls.add_flags(parser)


def execute(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a command. What the user can mend becomes one line on stderr and exit status 2."""
    # Torch's threads would spin while they wait for each other: on a busy machine that made a picture of the
    # small world take four times as long. Before torch is imported, which reads it once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    reuse_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = WarningPrinter()
            run(args)
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):  # on a CPU, torch has no error class for it
            raise
        fail("not enough memory: make --width and --height smaller, draw fewer pictures at once, or take "
             "--dtype fp16")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: Exception | str) -> None:
    """Say in one line what is wrong, and leave."""
    print("error:", one_line(error), file=sys.stderr)
    sys.exit(2)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What is wrong inside, say with a line of a file, is said with where it is."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


class WarningPrinter:
    """Prints each warning once, as one line that does not break the progress bar."""

    def __init__(self):
        self.said = set()

    def __call__(self, message, *rest, **more) -> None:
        from tqdm import tqdm
        if str(message) not in self.said:
            self.said.add(str(message))
            tqdm.write("warning: " + one_line(message), file=sys.stderr)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first setting that cannot be drawn."""
    for name, (low, high) in LIMITS.items():
        value, flag = getattr(args, name, None), "--" + name.replace("_", "-")
        if value is None:
            continue
        right = isinstance(value, (int, type(low)))
        if not right or not low <= value <= high:
            raise ValueError(f"{flag} must be in {int(low)}..{int(high)}, not {value}")
        if name in ("width", "height") and value % 8:
            raise ValueError(f"{flag} must be a multiple of 8, not {value}: {value // 8 * 8} or "
                             f"{value // 8 * 8 + 8}")
    controls.check(args)
    if args.lora_scope and not args.lora:
        raise ValueError("--lora-scope means nothing without --lora")
    if "seeds" in args:
        check_seeds(args)
    for name in ("prompt", "source_prompt"):
        prompt = getattr(args, name, None)
        if prompt is not None:
            check_prompt("--" + name.replace("_", "-"), prompt)


def check_seeds(args: argparse.Namespace) -> None:
    """Raise ValueError unless --seeds are different seeds. The first becomes `args.seed`."""
    low, high = LIMITS["seed"]
    for k, seed in enumerate(args.seeds):
        if not low <= seed <= high:
            raise ValueError(f"--seeds must be in {low}..{high}, not {seed}")
        if seed in args.seeds[:k]:
            raise ValueError(f"--seeds has {seed} twice: give each seed once")
    args.seed = args.seeds[0]


def check_seed(seed) -> None:
    """Raise ValueError unless it is a seed: those in files may be anything."""
    low, high = LIMITS["seed"]
    if type(seed) is not int or not low <= seed <= high:
        raise ValueError(f"seed must be a whole number in {low}..{high}, not {seed!r}")


def check_keys(where, values, optional: Sequence[str] = (), **kinds: type) -> None:
    """Raise ValueError unless `values`, out of a JSON file, is an object with these keys, each filled with
    its kind, and besides them with `optional` ones alone."""
    names = {dict: "an object", list: "a list", str: "a text"}
    for key, kind in kinds.items():
        found = values.get(key) if isinstance(values, dict) else None
        if not isinstance(found, kind) or not found:
            raise ValueError(f"{where} needs {key!r}: {names[kind]} that is not empty")
    known = [*kinds, *optional]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}: it takes {', '.join(known)}")


def read_json(path: Path, **kinds: type):
    """A JSON file; where `kinds` are given, it has exactly the keys of `check_keys`. Raises ValueError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if kinds:
        check_keys(path, values, **kinds)
    return values


def check_words(pipeline, texts: Sequence[str]) -> None:
    """Raise ValueError if the weights do not know a word of the texts."""
    if complaint := pipeline.models.tokenize.complaint(" ".join(texts)):
        raise ValueError(complaint)


def check_prompt(flag: str, prompt: str) -> None:
    """Raise ValueError if there is nothing to draw."""
    if not prompt.strip():
        raise ValueError(f"{flag} is empty: say what to draw")


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


def keep_photos(args: argparse.Namespace, places: Sequence[Place], outputs: Sequence[Path | None],
                others: Sequence[Path] = ()) -> None:
    """Raise ValueError if an output would replace what is read: a subject's photo, another picture or a
    config.json."""
    configs = [Path(folder) / "config.json" for folder in (args.weights, *args.controlnet)]
    read = [*(file for place in places for file in place.files), *args.control_image, *configs, *others]
    taken = {Path(file).resolve() for file in read}
    for output in outputs:
        if output and output.resolve() in taken:
            raise ValueError(f"{output} is a subject's photo or another file that is read, and would be "
                             "replaced: give another --output")


def plan_sheet(output: Path, count: int) -> tuple[Path, list[Path]]:
    """The file of a sheet and, where --output is a folder, those of its `count` pictures. Raises ValueError
    where they cannot be written."""
    if output.suffix.lower() not in ("", ".png") and not output.is_dir():
        raise ValueError(f"--output {output}: pictures are saved as .png, give a name that ends so, or a "
                         "folder")
    folder = output.is_dir() or not output.suffix
    sheet = output / "sheet.png" if folder else output
    check_writable("--output", sheet)
    return sheet, [output / f"{k:03d}.png" for k in range(count)] if folder else []


def save(image, path: Path, settings: dict) -> None:
    """Save a picture with its settings and print its name."""
    from images import save_png
    save_png(image, path, settings)
    print(path, flush=True)


def save_sheet(sheet, path: Path, settings: dict, images: Sequence, files: Sequence[Path],
               own: Sequence[dict]) -> None:
    """Save a sheet and, where `plan_sheet` gave files for them, its pictures, each with its own settings
    besides those of all."""
    if files:
        for image, file, more in zip(images, files, own, strict=True):
            save(image, file, {**settings, **more})
    save(sheet, path, settings)


def load_pipeline(args: argparse.Namespace, moa: bool | None = True, people: bool = True):
    """The models, with seed and sizes that the flags leave open filled in from them.

    moa: True where it is needed, None to take it if it is there. people: whether there are photos.
    `args.moa` becomes the file that was loaded, or None, `args.lora` a list of `LoRASetting`,
    `args.controls` what else steers the pictures. Raises ValueError.
    """
    import torch

    from pipeline import Pipeline, pick_device
    args.checker = find_checker(args.checker)
    hints = controls.read_hints(args)
    args.lora = [split_lora(argument) for argument in args.lora]
    file = args.moa or args.weights / "moa.safetensors"
    device = pick_device(args.device)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    if args.moa and not file.is_file():
        raise ValueError(f"--moa {file} is not a file: give one that train.py moa has written")
    args.moa = file if moa is not False and file.is_file() else None
    pipeline = Pipeline.load(args.weights, args.moa, device, dtype)
    if moa and args.moa is None:
        raise ValueError(f"--weights {args.weights} has no moa.safetensors, which subjects and routing maps "
                         "need: give --moa FILE")
    if people and args.moa and pipeline.models.image_encoder is None:
        raise ValueError(f"--weights {args.weights} has no image_encoder.safetensors, which subjects need")
    if args.vae is not None:
        replace_vae(pipeline, args.vae)
    pipeline.set_loras(args.lora, args.lora_scope or "attn")
    fill_in(args, pipeline.models.config)
    if args.negative_prompt and args.guidance_scale == 1:
        warnings.warn("--negative-prompt has no effect with --guidance-scale 1", stacklevel=2)
    args.controls = controls.load_controls(args, hints, pipeline)
    return pipeline


def find_checker(name: str | None) -> Callable:
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


def split_lora(argument: str):
    """FILE[:SCALE[:TEXT_SCALE]] -> LoRASetting. A FILE that has a colon itself is told by existing, or by
    what is not a number behind the colon. Raises ValueError."""
    from weights.lora import LoRASetting
    file, scales = argument, []
    while len(scales) < 2 and not Path(file).exists() and (found := re.fullmatch(r"(.+):([^:]*)", file)):
        try:
            scales = [float(found[2]), *scales]
        except ValueError:
            break
        file = found[1]
    if not all(-100 <= scale <= 100 for scale in scales):
        raise ValueError(f"--lora {argument}: a scale must be in -100..100")
    if not Path(file).is_file():
        raise ValueError(f"--lora {argument}: {file} is not a file; give FILE[:SCALE[:TEXT_SCALE]], the "
                         "scales in numbers")
    return LoRASetting(Path(file), *scales)


def replace_vae(pipeline, source: str) -> None:
    """Decode with another VAE. Raises ValueError if it cannot be read, or speaks of other latents."""
    from safetensors import SafetensorError

    from models import WeightsError
    from weights.checkpoints import Refusal
    from weights.parts import load_vae
    try:
        vae = load_vae(source).to(pipeline.device)
    except (Refusal, WeightsError, SafetensorError) as error:
        raise ValueError(f"--vae: {error}") from error
    found, wanted = ((cfg.latent_channels, cfg.factor) for cfg in (vae.cfg, pipeline.models.vae.cfg))
    if found != wanted:
        raise ValueError(f"--vae {source} is made for other weights: its latents have {found[0]} channels, "
                         f"cells of {found[1]} pixels, here they have {wanted[0]} and {wanted[1]}")
    pipeline.models.vae = vae


def fill_in(args: argparse.Namespace, config: dict) -> None:
    """Take what the flags leave open from config.json, and a random seed."""
    sampling, size = config.get("sampling"), config.get("image_size")
    found = {"width": size, "height": size, **(sampling if isinstance(sampling, dict) else {})}
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


def amounts(count: int) -> list[float]:
    """How far each of `count` frames is on the way from the first to the last, from 0 to 1."""
    return [round(k / (count - 1), 3) for k in range(count)]


def frame_labels(count: int, first: str = "0.00", last: str = "1.00") -> list[str]:
    """`amounts` to be shown, the first and the last by other names if given."""
    return [first, *(f"{amount:.2f}" for amount in amounts(count)[1:-1]), last]


def load_cast(args: argparse.Namespace, castings: Sequence[Sequence[Place]], outputs: Sequence[Path | None]):
    """The pipeline; for each casting of `args.prompt` its photos, a list (3, H, W) per person; and its
    people for `Pipeline.generate`. Raises ValueError, before loading if an output would replace a photo."""
    places = [place for casting in castings for place in casting]
    keep_photos(args, places, outputs)
    photos = [read_photos(casting) for casting in castings]
    pipeline = load_pipeline(args, True if places else None, people=bool(places))
    return pipeline, photos, cast(pipeline, args.weights, args.prompt, castings, photos)


def drawing(args: argparse.Namespace) -> dict:
    """What the flags mean for `Pipeline.sample`."""
    return {"steps": args.steps, "guidance_scale": args.guidance_scale, "sampler": args.sampler,
            "prior_above": args.prior_above, "strength": args.strength, "sparse": args.sparse,
            "controls": args.controls}


def draw(args: argparse.Namespace, pipeline, prompts, seeds: Sequence,
         subjects: Sequence[Sequence | None], watch: Callable | None = None, group: int = 1,
         **more) -> Iterator:
    """Yield a Pillow image per prompt, drawn in batches, with a progress bar.

    prompts: a list, or text states as `Pipeline.generate` takes them.
    watch: called after each step of each batch, like `progress` of `Pipeline.generate`. group: so many
    neighbours stay in one batch, where it has room for them. more: for `Pipeline.generate`, besides what
    the flags say.
    """
    from tqdm import tqdm

    from images import check_finite, to_images
    size = min(BATCH, max(1, BATCH_PIXELS // (args.width * args.height)))
    size -= size % group if group < size else 0
    starts = range(0, len(prompts), size)
    with tqdm(total=args.steps * len(starts), desc="sampling", unit="step", disable=None) as bar:
        for start in starts:
            def progress(step, steps, t, x0):
                check_finite(x0, f"the UNet's latents of step {step} of {steps}")
                bar.update()
                if watch:
                    watch(step, steps, t, x0)
            batch = slice(start, start + size)
            pictures = pipeline.generate(
                prompts[batch], seeds[batch], subjects[batch], args.negative_prompt,
                (args.height, args.width), args.clip_skip, progress=progress, **{**drawing(args), **more})
            yield from map(args.checker, to_images(pictures, "what the VAE makes of finite latents"))


def draw_rows(args: argparse.Namespace, pipeline, castings: Sequence[Sequence | None], seeds: Sequence,
              watch: Callable | None = None) -> list[list]:
    """A row of pictures of `args.prompt` per casting (None: the prior alone), one picture per seed.

    The castings of a seed share a batch, so that the steps which the prior draws are computed once for
    all of them. Who is cast twice is drawn once: with several threads the samples of a batch come out
    alike up to rounding only. seeds, watch: as in `draw`.
    """
    from pipeline import fingerprints
    keys = [people if people is None else
            tuple((one.position, one.start, *fingerprints(one.feature[None])) for one in people)
            for people in castings]
    distinct = dict(zip(keys, castings, strict=True))
    pairs = [(seed, people) for seed in seeds for people in distinct.values()]
    images = list(draw(args, pipeline, [args.prompt] * len(pairs), [seed for seed, _ in pairs],
                       [people for _, people in pairs], watch, group=len(distinct)))
    rows = {key: images[k::len(distinct)] for k, key in enumerate(distinct)}
    return [rows[key] for key in keys]


def describe(args: argparse.Namespace, places: Sequence[Place], **more) -> dict:
    """The settings that go into a picture's metadata: names of files, never where they lie, and `files`,
    which tells whether they hold the same."""
    kept = ("negative_prompt", "seed", "steps", "sampler", "guidance_scale", "clip_skip", "width", "height",
            "prior_above", "strength", "sparse", "dtype")
    return {**{name: getattr(args, name) for name in kept},
            "weights": args.weights.resolve().name, "moa": args.moa.name if args.moa else None,
            "vae": Path(args.vae).resolve().name if args.vae else None,
            "loras": [str(lora) for lora in args.lora],
            "lora_scope": (args.lora_scope or "attn") if args.lora else None,
            "subjects": [str(place) for place in places], "controls": controls.describe(args),
            "files": contents([*(args.weights / f"{part}.safetensors" for part in (
                "unet", "vae", "text_encoder", "image_encoder")), args.moa, args.vae,
                *(lora.file for lora in args.lora), *args.controlnet, *args.control_image,
                *(file for place in places for file in place.files)]), **more}


def contents(paths: Sequence[str | Path | None]) -> str:
    """Twelve digits that change with what these files and folders hold, whatever their names."""
    whole = hashlib.sha256()
    for path in map(Path, filter(None, paths)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found = file.stat()
                whole.update(ends(file, found.st_size, found.st_mtime_ns))
    return whole.hexdigest()[:12]


@cache
def ends(file: Path, size: int, changed: int) -> bytes:
    """A checksum of a file's size and of its first and last megabyte: weights have gigabytes, and others
    differ there as they do everywhere."""
    with open(file, "rb") as opened:
        first = opened.read(1 << 20)
        opened.seek(max(len(first), size - (1 << 20)))
        return hashlib.sha256(b"%d " % size + first + opened.read()).digest()
