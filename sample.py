"""Draw pictures from a prompt, with people from photos in them.

    python sample.py --subject examples/ada.png --prompt "a woman riding a bike on the beach"
    python sample.py --subject woman=a.png --subject man=b.png --prompt "a man and a woman dancing" --num 4

Without --weights it uses the small cartoon world that ships with the code; for Stable Diffusion 1.5
convert a checkpoint with weights/convert_sd15.py and give its folder.
"""
import argparse
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
BATCH = 8  # pictures drawn at once, fewer where they are large
BATCH_PIXELS = 8 * 512 * 512
# Words that a subject may stand for when it is given without WORD=.
PEOPLE = ("man", "woman", "boy", "girl", "person", "kid", "child", "baby", "guy", "lady", "gentleman",
          "father", "mother", "dad", "mom", "son", "daughter", "grandfather", "grandmother", "friend")
# What a flag, or config.json in its place, may say.
LIMITS = {"num": (1, 1000), "seed": (0, 2 ** 63 - 1), "steps": (1, 999), "guidance_scale": (0, 100),
          "width": (8, 2048), "height": (8, 2048), "clip_skip": (1, 12)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subject", action="append", default=[], metavar="[WORD=]FILE",
        help="photo of a person; bound to the prompt's words for people in order, or to WORD; repeatable")
    add("--output", type=Path, default=Path("sample.png"), metavar="PATH",
        help="a .png, or a folder (default sample.png; with --num above 1 a folder of that name)")
    add("--num", type=int, default=1, help="how many pictures; picture k has seed SEED + k (default 1)")
    add("--seed", type=int, help="of the noise (default: random, printed)")
    add("--steps", type=int, help="sampling steps (default: the weights', or 20)")
    add("--guidance-scale", type=float,
        help="classifier-free guidance; 1 is none (default: the weights', or 5)")
    add("--negative-prompt", default="", help="what to lead away from")
    add("--clip-skip", type=int, default=1, metavar="N",
        help="take the text encoder's N-th layer from the end, as web UIs count: 1 is the last (default), "
             "which diffusers calls 0")
    add("--sampler", choices=["unipc", "ddim"], default="unipc", help="default unipc")
    add("--width", type=int, help="pixels, a multiple of 8 (default: the weights')")
    add("--height", type=int, help="pixels, a multiple of 8 (default: the weights')")
    add("--prior-only", action="store_true", help="draw with the base model, whatever the subjects")
    add("--save-routing", type=Path, metavar="FILE",
        help="also save what the routers gave to the personalized experts in the first picture (.png)")
    add("--weights", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the small world")
    add("--moa", type=Path, metavar="FILE", help="default: moa.safetensors in the weights folder")
    add("--vae", metavar="FILE", help="decode with this VAE: a file or folder that convert_sd15.py reads")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    add("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="default fp32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = WarningPrinter()
            run(args)
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):  # on a CPU, torch has no error class for it
            raise
        fail("not enough memory: make --width and --height smaller, or take --dtype fp16")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: Exception | str) -> None:
    """Say in one line what is wrong, and leave."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


class WarningPrinter:
    """Prints each warning once, as one line that does not break the progress bar."""

    def __init__(self):
        self.said = set()

    def __call__(self, message, *rest, **more) -> None:
        from tqdm import tqdm
        if str(message) not in self.said:
            self.said.add(str(message))
            tqdm.write("warning: " + " ".join(str(message).split()), file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Check, load, encode, draw, save."""
    check(args)
    files, sheet = plan_files(args)
    places = bind_subjects(args.prompt, args.subject)
    keep_photos(places, [*files, sheet, args.save_routing])
    from pictures import RoutingSheet, read_picture
    photos = [read_picture(place.file) for place in places]
    pipeline, moa = load_pipeline(args)
    fill_in(args, pipeline.models.config)
    subjects = [make_subject(pipeline, args.prompt, place, photo)
                for place, photo in zip(places, photos, strict=True) if not args.prior_only]
    for subject, place in zip(subjects, places, strict=False):
        warn_if_foreign(args.weights, pipeline.models.config, subject.feature, place.file)
    settings = describe(args, places, moa)
    routing = RoutingSheet(args.steps) if args.save_routing else None
    print(f"seed {args.seed}", flush=True)
    save_all(args, draw(args, pipeline, subjects, routing), files, sheet, routing, photos, settings)


def save_all(args, images: Iterator, files: list[Path], sheet: Path | None, routing, photos: list,
             settings: dict) -> None:
    """Save each picture as soon as it is there, then the sheets; print the files."""
    from pictures import contact_sheet, save_png, thumbnail, to_images

    def save(image, path: Path, seed: int = args.seed) -> None:
        save_png(image, path, {**settings, "seed": seed})
        print(path, flush=True)

    people = [(thumbnail(to_images(photo[None] * 2 - 1)[0]), name)
              for photo, name in zip(photos, settings["subjects"], strict=True)]
    small = []
    for seed, (image, file) in enumerate(zip(images, files, strict=True), args.seed):
        save(image, file, seed)
        small.append((thumbnail(image), f"seed {seed}"))
    if sheet:
        save(contact_sheet(args.prompt, people, small), sheet)
    if routing:
        save(routing.draw(small[0][0], people), args.save_routing)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first setting that cannot be drawn."""
    for name, (low, high) in LIMITS.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is None:
            continue
        right = isinstance(value, (int, float) if name == "guidance_scale" else int)
        if not right or not low <= value <= high:
            raise ValueError(f"{flag} must be in {low}..{high}, not {value}")
        if name in ("width", "height") and value % 8:
            raise ValueError(f"{flag} must be a multiple of 8, not {value}: {value // 8 * 8} or "
                             f"{value // 8 * 8 + 8}")
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: say what to draw")
    if args.prior_only and args.save_routing:
        raise ValueError("--save-routing has nothing to show with --prior-only: leave one of them out")


def plan_files(args: argparse.Namespace) -> tuple[list[Path], Path | None]:
    """The pictures' files and, for several, their contact sheet's. Tries now whether they can be
    written, so that nobody waits for a picture that cannot be saved."""
    output, sheet = args.output, None
    for flag, path in (("--output", output), ("--save-routing", args.save_routing)):
        if path and path.suffix.lower() not in ("", ".png") and not path.is_dir():
            raise ValueError(f"{flag} {path}: pictures are saved as .png, give a name that ends so")
    if args.num == 1 and output.suffix and not output.is_dir():
        files = [output]
    else:
        folder = output if output.is_dir() else output.with_suffix("")
        files = [folder / f"{k:03d}.png" for k in range(args.num)]
        sheet = folder / "sheet.png" if args.num > 1 else None
    check_writable("--output", files[0])
    if args.save_routing:
        if not args.save_routing.suffix:
            raise ValueError(f"--save-routing {args.save_routing} must be a file whose name ends in .png")
        if args.save_routing.resolve() in [path.resolve() for path in (*files, sheet or files[0])]:
            raise ValueError(f"--save-routing {args.save_routing} is --output's file: give another name")
        check_writable("--save-routing", args.save_routing)
    return files, sheet


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


class Place(NamedTuple):
    """Where a subject stands in the prompt."""

    word: str
    end: int  # index of the character behind the word
    file: str


def bind_subjects(prompt: str, arguments: list[str]) -> list[Place]:
    """Which word of the prompt each subject stands for.

    WORD=FILE takes the next free occurrence of WORD; a bare FILE the next free word for a person.
    Raises ValueError when there is none.
    """
    parsed = [split_subject(argument) for argument in arguments]
    bound: dict[int, Place] = {}
    for i, (word, file) in sorted(enumerate(parsed), key=lambda item: item[1][0] is None):
        taken = {place.end for place in bound.values()}
        free = [match for match in find_words(prompt, [word] if word else PEOPLE) if match.end() not in taken]
        if not free:
            raise ValueError(no_place(prompt, word, file))
        bound[i] = Place(free[0][0].lower(), free[0].end(), file)
    return [bound[i] for i in range(len(parsed))]


def split_subject(argument: str) -> tuple[str | None, str]:
    """[WORD=]FILE -> word or None, file. A path that has an = itself is told by its / or by existing."""
    word, equals, file = argument.partition("=")
    if not equals or "/" in word or Path(argument).exists():
        return None, argument
    if not word.strip():
        raise ValueError(f"--subject {argument}: the word before = is empty")
    return word.strip().lower(), file


def find_words(prompt: str, words) -> list[re.Match]:
    """The whole words of a prompt that are among `words`, in order."""
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)"
    return list(re.finditer(pattern, prompt, re.IGNORECASE))


def no_place(prompt: str, word: str | None, file: str) -> str:
    """Why a subject has no word, and what to do."""
    if word and find_words(prompt, [word]):
        return f"--subject {word}={file}: every {word!r} in the prompt has a subject already: {prompt!r}"
    if word:
        return f"--subject {word}={file}: there is no {word!r} in the prompt: {prompt!r}"
    if find_words(prompt, PEOPLE):
        return (f"--subject {file}: more subjects than words for people in the prompt: {prompt!r}. "
                f"Add a word, or say WORD={file}")
    return (f"--subject {file}: nobody in the prompt to stand for: {prompt!r}. Write one of "
            f"{', '.join(PEOPLE[:6])}, ..., or say WORD={file} with a word of the prompt")


def keep_photos(places: list[Place], outputs: list[Path | None]) -> None:
    """Raise ValueError if an output would replace a subject's photo."""
    photos = {Path(place.file).resolve() for place in places}
    for output in outputs:
        if output and output.resolve() in photos:
            raise ValueError(f"{output} is a subject's photo and would be replaced: give another --output")


def load_pipeline(args: argparse.Namespace):
    """The models, and the MoA file that they were given or None. Raises ValueError."""
    import torch

    from models import WeightsError
    from pipeline import Pipeline, pick_device
    moa = args.moa or args.weights / "moa.safetensors"
    device = pick_device(args.device)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    if args.moa and not moa.is_file():
        raise ValueError(f"--moa {moa} is not a file: give one that train.py moa has written")
    if args.prior_only or not moa.is_file():
        moa = None
    try:
        pipeline = Pipeline.load(args.weights, moa, device, dtype)
    except WeightsError as error:
        raise ValueError(error) from error
    if not args.prior_only and moa is None and (args.subject or args.save_routing):
        raise ValueError(f"--weights {args.weights} has no moa.safetensors, which --subject and "
                         "--save-routing need: give --moa FILE, or --prior-only to draw without subjects")
    if moa and args.subject and pipeline.models.image_encoder is None:
        raise ValueError(f"--weights {args.weights} has no image_encoder.safetensors, which --subject needs")
    if args.vae is not None:
        replace_vae(pipeline, args.vae)
    return pipeline, moa


def replace_vae(pipeline, source: str) -> None:
    """Decode with another VAE. Raises ValueError if it cannot be read, or speaks of other latents."""
    from models import WeightsError
    from weights.convert_sd15 import Refusal, SafetensorError, load_vae
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
    defaults = {"steps": 20, "guidance_scale": 5.0, "width": 512, "height": 512,
                "seed": random.randrange(2 ** 32)}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default if found.get(name) is None else found[name])
    check(args)


def make_subject(pipeline, prompt: str, place: Place, photo):
    """Encode a photo and find the token that it is fused into. Raises ValueError if it has none."""
    from pipeline import Subject
    word, end, file = place
    tokenize = pipeline.models.tokenize
    if tokenize.unknown_words(word):
        known = [person for person in PEOPLE if not tokenize.unknown_words(person)]
        raise ValueError(f"--subject {file}: these weights do not know the word {word!r}; the people they "
                         f"know: {', '.join(known)}")
    before = tokenize.encode(prompt[:end])
    if len(before) > tokenize.length - 2 or before[-1:] != tokenize.encode(word)[-1:]:
        raise ValueError(f"--subject {file}: its word {word!r} lies beyond the {tokenize.length} tokens of "
                         "the prompt: make the prompt shorter")
    return Subject(len(before), pipeline.encode_subjects(photo[None])[0])


def warn_if_foreign(weights: Path, config: dict, feature, file: str) -> None:
    """Say so when a subject's image feature lies far from those that the weights were trained on.

    A weights folder may tell where these lie, in `subjects.safetensors`. Raises ValueError if it cannot
    be used.
    """
    from models import WeightsError
    from models.load import read_tensors
    from pipeline import squared_distance
    path = weights / "subjects.safetensors"
    if not path.exists():
        return
    try:
        world = read_tensors(path)
        distance = squared_distance(feature[None].cpu(), world["mean"], world["precision"])
        foreign = bool(distance > world["limit"])
    except (WeightsError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit these weights: {error}") from error
    if foreign:
        advice = ("; they know a small cartoon world only, for photos use Stable Diffusion 1.5's"
                  if config.get("world") == "toyworld" else "")
        warnings.warn(f"{file} looks like nobody that these weights were trained on, the picture will "
                      f"hardly resemble it{advice}", stacklevel=2)


def draw(args: argparse.Namespace, pipeline, subjects: list, sheet) -> Iterator:
    """Yield the pictures, drawn in batches; `sheet` takes the routers' maps of the first, unless None."""
    from tqdm import tqdm

    from moa import record_routing
    from pictures import to_images
    size = min(BATCH, max(1, BATCH_PIXELS // (args.width * args.height)))
    seeds = range(args.seed, args.seed + args.num)
    batches = [seeds[k:k + size] for k in range(0, args.num, size)]
    with (record_routing(pipeline.models.unet) if sheet else nullcontext({}) as routing,
          tqdm(total=args.steps * len(batches), desc="sampling", unit="step", disable=None) as bar):
        for batch in batches:
            def progress(step, steps, t, x0, first=batch is batches[0]):
                bar.update()
                if sheet and first:
                    sheet.add(step, t, routing, x0)
                routing.clear()
            yield from to_images(pipeline.generate(
                [args.prompt] * len(batch), batch, [subjects] * len(batch),
                args.negative_prompt, (args.height, args.width), args.steps, args.guidance_scale,
                args.sampler, clip_skip=args.clip_skip, progress=progress))


def describe(args: argparse.Namespace, places: list[Place], moa: Path | None) -> dict:
    """The settings that go into the pictures' metadata: names of files, never where they lie."""
    kept = ("prompt", "negative_prompt", "steps", "sampler", "guidance_scale", "clip_skip", "width",
            "height", "prior_only", "dtype")
    return {**{name: getattr(args, name) for name in kept},
            "weights": args.weights.resolve().name, "moa": moa.name if moa else None,
            "vae": Path(args.vae).resolve().name if args.vae else None,
            "subjects": [f"{place.word}={Path(place.file).name}" for place in places]}


if __name__ == "__main__":
    main()
