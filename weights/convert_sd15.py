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

# A script has only its own folder on the path. Torch is imported after the flags are read.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.errors import one_line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="checkpoint, folder, repository or earlier output")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the weights folder to write")
    for part in ("UNet", "VAE", "text encoder", "image encoder"):
        add(f"--{part.lower().replace(' ', '-')}", metavar="FILE", help=f"take the {part} from here")
    add("--ema", choices=["auto", "on", "off"], default="auto",
        help="the averaged copies of the UNet: where there are any (auto, default), required, never")
    add("--dtype", choices=["keep", "fp16", "fp32"], default="keep",
        help="of the written tensors (default: as they are)")
    args = parser.parse_args(argv)
    if not (args.source or args.unet and args.vae and args.text_encoder):
        parser.error("give SOURCE, or all of --unet, --vae and --text-encoder")
    return args


def run(work: Callable[[], None]) -> None:
    """Do the work of a command; say in one line what is wrong, and leave with its code."""
    from safetensors import SafetensorError

    from models import WeightsError
    from weights.checkpoints import Refusal
    try:
        work()
    except (Refusal, WeightsError, OSError, MemoryError, SafetensorError) as error:
        print("error:", one_line(error) or type(error).__name__, file=sys.stderr)
        sys.exit(error.code if isinstance(error, Refusal) else 3 if isinstance(error, WeightsError) else 1)
    except RuntimeError as error:
        if "allocate" not in str(error):  # torch has no error class for it on a CPU
            raise
        print("error: not enough memory", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from weights.conversion import convert
    run(lambda: convert(args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    main()
