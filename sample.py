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
import warnings
from pathlib import Path

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
BATCH = 8  # pictures drawn at once
# Words that a subject may stand for when it is given without WORD=.
PEOPLE = ("man", "woman", "boy", "girl", "person", "kid", "child", "baby", "guy", "lady", "gentleman",
          "father", "mother", "dad", "mom", "son", "daughter", "grandfather", "grandmother", "friend")


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
    add("--steps", type=int, help="sampling steps (default: 20)")
    add("--guidance-scale", type=float, help="classifier-free guidance; 1 is none (default: the weights')")
    add("--negative-prompt", default="", help="what to lead away from")
    add("--sampler", choices=["unipc", "ddim"], default="unipc", help="default unipc")
    add("--width", type=int, help="pixels (default: the weights')")
    add("--height", type=int, help="pixels (default: the weights')")
    add("--prior-only", action="store_true", help="draw with the base model, whatever the subjects")
    add("--save-routing", type=Path, metavar="FILE",
        help="also save what the routers gave to the personalized experts, per layer and step (.png)")
    add("--weights", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the small world")
    add("--moa", type=Path, metavar="FILE", help="default: moa.safetensors in the weights folder")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto)")
    add("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="default fp32")
    args = parser.parse_args(argv)
    for name, low, high in (("num", 1, 10_000), ("steps", 1, 1000), ("width", 8, 8192), ("height", 8, 8192)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} must be in {low}..{high}, not {value}")
    for name in ("width", "height"):
        if (getattr(args, name) or 8) % 8:
            parser.error(f"--{name} must be a multiple of 8, not {getattr(args, name)}")
    if args.seed is not None and not 0 <= args.seed < 2 ** 63 - args.num:
        parser.error(f"--seed must be in 0..2^63, not {args.seed}")
    if not args.prompt.strip():
        parser.error("--prompt is empty")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
    from models import WeightsError
    try:
        run(args)
    except (ValueError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> None:
    """Load, encode, sample, decode, save."""
    import torch
    from tqdm import tqdm

    from pictures import read_picture, to_images
    from pipeline import Pipeline, Subject, pick_device

    outputs = plan_outputs(args)
    places = bind_subjects(args.prompt, args.subject)
    photos = [read_picture(file) for _, _, file in places]
    moa = args.moa or (args.weights / "moa.safetensors")
    if places and not args.prior_only and not moa.is_file():
        raise ValueError(f"{moa} not found: --subject needs trained MoA weights (--moa FILE)")
    pipeline = Pipeline.load(args.weights, moa if moa.is_file() else None,
                             pick_device(args.device),
                             {"fp32": torch.float32, "fp16": torch.float16,
                              "bf16": torch.bfloat16}[args.dtype])
    subjects = []
    for (word, nth, file), photo in zip(places, photos, strict=True):
        positions = pipeline.models.tokenize.word_positions(args.prompt, word)
        if nth >= len(positions):
            raise ValueError(f"the word {word!r} for {file} lies beyond the 77 tokens of the prompt")
        subjects.append(Subject(positions[nth], pipeline.encode_subjects(photo[None])[0]))
        warn_if_foreign(pipeline, subjects[-1].feature, file)
    defaults = {"steps": 20, "guidance_scale": 5.0, **pipeline.models.config.get("sampling", {})}
    steps = args.steps or defaults["steps"]
    scale = defaults["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    size = pipeline.models.config["image_size"]
    size = (args.height or size, args.width or size)
    seed = random.randrange(2 ** 32) if args.seed is None else args.seed
    print(f"seed {seed}")
    recorder = RoutingRecorder(pipeline) if args.save_routing else None
    images = []
    with tqdm(total=steps * -(-args.num // BATCH), unit="step", desc="sampling") as bar:
        for first in range(0, args.num, BATCH):
            seeds = range(seed + first, seed + min(first + BATCH, args.num))
            images += to_images(pipeline.generate(
                [args.prompt] * len(seeds), seeds, [subjects] * len(seeds), args.negative_prompt, size,
                steps, scale, args.sampler, args.prior_only,
                progress=recorder.step(bar) if recorder else lambda *_: bar.update()))
    settings = {
        "prompt": args.prompt, "negative_prompt": args.negative_prompt, "steps": steps,
        "sampler": args.sampler, "guidance_scale": scale, "width": size[1], "height": size[0],
        "weights": args.weights.resolve().name, "moa": moa.name if moa.is_file() else None,
        "prior_only": args.prior_only, "dtype": args.dtype,
        "subjects": [f"{word}={Path(file).name}" for word, _, file in places]}
    save_all(images, outputs, settings, seed)
    if recorder:
        recorder.save(args.save_routing, images[0])
        outputs.append(args.save_routing)
    print("\n".join(str(path) for path in outputs))


def plan_outputs(args: argparse.Namespace) -> list[Path]:
    """The files to write: --output, or numbered files and a sheet in it. Tries the folder at once, so
    that nobody waits for a picture that cannot be saved."""
    for path in (args.output, args.save_routing):
        if path is not None and path.suffix and path.suffix.lower() != ".png":
            raise ValueError(f"{path}: pictures are saved as .png")
    if args.save_routing is not None and args.save_routing.suffix.lower() != ".png":
        raise ValueError(f"--save-routing {args.save_routing}: give a .png file")
    many = args.num > 1 or not args.output.suffix
    folder = args.output.with_suffix("") if many else args.output.parent
    for place in {folder, args.save_routing.parent if args.save_routing else folder}:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / ".moa-write-test"
        probe.touch()
        probe.unlink()
    if not many:
        if args.output.is_dir():
            raise ValueError(f"--output {args.output} is a folder")
        return [args.output]
    sheet = [folder / "sheet.png"] if args.num > 1 else []
    return [folder / f"{k:03d}.png" for k in range(args.num)] + sheet


def bind_subjects(prompt: str, arguments: list[str]) -> list[tuple[str, int, str]]:
    """Which word of the prompt each subject stands for: (word, its n-th occurrence, file).

    WORD=FILE takes the next free occurrence of WORD; a bare FILE the next free word for a person.
    """
    def occurrences(words) -> list[tuple[str, int]]:
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)"
        found = [match[0].lower() for match in re.finditer(pattern, prompt, re.IGNORECASE)]
        return [(word, found[:i].count(word)) for i, word in enumerate(found)]

    parsed = []
    for argument in arguments:
        word, equals, file = argument.partition("=")
        named = bool(equals) and not Path(argument).exists()
        parsed.append((word.strip().lower(), file) if named else (None, argument))
    taken, bound = set(), {}
    for i, (word, file) in sorted(enumerate(parsed), key=lambda item: item[1][0] is None):
        if word == "":
            raise ValueError(f"--subject {arguments[i]}: the word before = is empty")
        free = [place for place in occurrences([word] if word else PEOPLE) if place not in taken]
        if not free:
            raise ValueError(no_place(prompt, word, file, occurrences(PEOPLE)))
        taken.add(free[0])
        bound[i] = (*free[0], file)
    return [bound[i] for i in range(len(parsed))]


def no_place(prompt: str, word: str | None, file: str, people: list) -> str:
    """Why a subject has no word, and what to do."""
    if word:
        return f"--subject {word}={file}: the prompt has no (further) word {word!r}: {prompt!r}"
    if people:
        return f"--subject {file}: all words for people in the prompt are taken: {prompt!r}"
    return (f"--subject {file}: the prompt names nobody it could stand for: {prompt!r}. Write one of "
            f"{', '.join(PEOPLE[:6])}, or WORD={file} with a word of the prompt")


def warn_if_foreign(pipeline, feature, file: str) -> None:
    """The shipped cartoon weights say so when a subject looks like nobody of their world."""
    world = pipeline.models.config.get("subjects")
    if world is None:
        return
    import torch
    mean, std = torch.tensor(world["mean"]), torch.tensor(world["std"])
    distance = ((feature.float().cpu() - mean) / std).square().mean()
    if distance > world["limit"]:
        warnings.warn(f"{file} looks like nobody of the small cartoon world that these weights know; "
                      "the picture will not resemble it. For photos use Stable Diffusion 1.5's weights")


class RoutingRecorder:
    """The weight of the personalized expert in every layer at every step, for the first picture."""

    def __init__(self, pipeline):
        from moa import record_routing
        if pipeline.prompt is None:
            raise ValueError("--save-routing needs MoA weights (--moa FILE)")
        self.context = record_routing(pipeline.models.unet)
        self.routing = self.context.__enter__()
        self.steps = []

    def step(self, bar):
        """A progress callback that keeps the maps of the step that just ended."""
        def keep(step, steps, t, x0):
            bar.update()
            # The guided half comes last; its first picture is number -B.
            maps = {key: 1 - r[-len(x0), :, 0].float().cpu() for key, r in self.routing.items()}
            self.steps.append((t, maps, x0.shape[-2:]))
            self.routing.clear()
        return keep

    def save(self, path: Path, picture) -> None:
        """Rows: layers, self- before cross-attention; columns: steps. Black is the prior."""
        self.context.__exit__(None, None, None)
        from pictures import routing_sheet
        routing_sheet(self.steps, picture).save(path)


def save_all(images: list, outputs: list[Path], settings: dict, seed: int) -> None:
    """Write the pictures with their metadata and, for several, a contact sheet."""
    from pictures import contact_sheet, parameters_text, save_png
    for k, image in enumerate(images):
        own = {**settings, "seed": seed + k}
        save_png(image, outputs[k], parameters_text(own), own)
    if len(outputs) > len(images):
        columns = min(len(images), 8)
        save_png(contact_sheet(images, columns), outputs[-1],
                 parameters_text({**settings, "seed": seed}), {**settings, "seed": seed})


if __name__ == "__main__":
    main()
