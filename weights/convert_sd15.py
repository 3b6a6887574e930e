"""Convert Stable Diffusion 1.5, in any of its usual layouts, into a weights folder.

    python weights/convert_sd15.py v1-5-pruned.ckpt --output weights/sd15
    python weights/convert_sd15.py SOURCE --vae better.safetensors --output weights/sd15
    python weights/convert_sd15.py weights/sd15 --image-encoder openai/clip-vit-large-patch14 \\
        --output weights/sd15

SOURCE is one LDM (CompVis) file, a diffusers folder, a Hugging Face repository or an earlier output;
without it give --unet, --vae and --text-encoder. Subjects need an --image-encoder.

Exit codes: 1 cannot read or write, 2 the wrong kind of file, 3 the right kind with wrong or missing
tensors, 4 a pickle that asks for code. No tensor tells SDXL's VAE, v-prediction, or a CLIP ViT-L/14
that is not OpenAI's from what is wanted here: a lone file of these is taken for the right one.
"""
import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own folder there
from models.errors import Parser, one_line
from models.load import PARTS, WeightsError, describe_sizes, whole_folder, write_json
from weights.checkpoints import REQUIRED, Notes, WrongKind, WrongTensors
from weights.names import LABELS
from weights.parts import (DTYPES, FIXED, Part, check_output, check_together, fit, not_taken,
                           open_part, open_source, write_parts)

DEFAULTS = {"image_size": 512, "sampling": {"guidance_scale": 5.0, "steps": 20}}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="checkpoint, folder, repository or earlier output")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the weights folder to write")
    for part in PARTS:
        add(flag(part), metavar="FILE", help=f"take the {LABELS[part]} from here")
    add("--ema", choices=["auto", "on", "off"], default="auto",
        help="the averaged copies of the UNet: where there are any (auto, default), required, never")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the written tensors (default: as they are)")
    args = parser.parse_args(argv)
    if not (args.source or args.unet and args.vae and args.text_encoder):
        parser.error("give SOURCE, or all of --unet, --vae and --text-encoder")
    return args


def flag(part: str) -> str:
    return f"--{part.replace('_', '-')}"


def convert(args: argparse.Namespace) -> None:
    """Write the weights folder, whole or not at all. Raises WeightsError and OSError."""
    notes = Notes()
    parts, base = gather(args, notes)
    check_output(args, parts)
    for name, part in parts.items():
        fit(name, part, notes)
    check_together(parts)
    config = describe(args, parts, base, notes)
    with whole_folder(args.output) as folder:
        write_parts(parts, {name: folder / f"{name}.safetensors" for name in parts}, DTYPES[args.dtype])
        write_json(config, folder / "config.json")
    for name, part in parts.items():
        print(f"{LABELS[name]}: {len(part.tensors)} tensors from {part.path}")
    for line in (f"EMA: {parts['unet'].ema}", *notes.repaired, f"written to {args.output}"):
        print(line)


def gather(args: argparse.Namespace, notes: Notes) -> tuple[dict[str, Part], dict]:
    """The parts to convert, and config.json of the source if that is a weights folder. Raises Refusal."""
    parts = open_source(args.source, args.ema, notes) if args.source else {}
    if parts and "unet" not in parts and not args.unet:
        raise WrongKind(f"{args.source} holds {' and '.join(LABELS[name] for name in parts)} only, no UNet"
                        f"{not_taken(Path(args.source))}{unknown(notes)}: give it as "
                        f"{' and '.join(map(flag, parts))} beside a checkpoint")
    base = next((part.settings for part in parts.values() if part.cfg), {})
    for name in PARTS:
        if source := getattr(args, name):
            parts[name] = open_part(source, name, args.ema if name == "unet" else "off", notes)
    if missing := [name for name in REQUIRED if name not in parts]:
        raise WrongTensors(f"{args.source} has no {' and no '.join(LABELS[name] for name in missing)}"
                           f"{not_taken(Path(args.source))}{unknown(notes)}: add "
                           f"{' and '.join(f'{flag(name)} FILE' for name in missing)}")
    return {name: parts[name] for name in PARTS if name in parts}, base


def unknown(notes: Notes) -> str:
    """The first names of tensors that belong to no part, the most frequent ones, for messages."""
    names = ", ".join(f"{name} ({count})" for name, count in notes.dropped.most_common(3))
    return f"; of no part are its {names}" if names else ""


def describe(args: argparse.Namespace, parts: dict[str, Part], base: dict, notes: Notes) -> dict:
    """config.json: sizes, defaults and where everything came from. What a weights folder says stays."""
    source, old = args.source or args.unet, base.get("conversion", {})
    ema = {"ema": parts["unet"].ema}
    record = {"source": Path(source).resolve().name if Path(source).exists() else source,
              "prediction_type": FIXED["prediction_type"], **ema, **old, **(ema if args.unet else {}),
              "dropped": {**old.get("dropped", {}), **notes.dropped},
              "repaired": [*old.get("repaired", []), *notes.repaired]}
    sizes = {name: describe_sizes(part.cfg) for name, part in parts.items()}
    side = parts["unet"].settings.get("sample_size")  # of latents, in diffusers' folders
    drawn = {"image_size": side * parts["vae"].cfg.factor} if isinstance(side, int) else {}
    return {**DEFAULTS, **drawn, **base, **sizes, "conversion": record}


def run(work: Callable[[], None]) -> None:
    """Do the work of a command; say in one line what is wrong, and leave with its code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    try:
        work()
    except (WeightsError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(getattr(error, "code", 1))
    except KeyboardInterrupt:
        print("stopped: nothing is written", file=sys.stderr)
        sys.exit(130)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run(lambda: convert(args))


if __name__ == "__main__":
    main()
