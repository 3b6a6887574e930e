"""Write a weights folder in diffusers' layout, so that others can load it and check this project.

    python weights/export_diffusers.py weights/toyworld --output toyworld-diffusers

    StableDiffusionPipeline.from_pretrained("toyworld-diffusers")   # with diffusers: the base model

Image encoder and MoA have no place in that layout and stay behind. A small world's text encoder knows a
few words: their embeddings go to their places in CLIP's whole table, all other rows are zero. This project
leaves unknown words out of a prompt, diffusers reads them as zeros: compare prompts of known words.

Exit codes: 1 cannot read or write, 2 no weights folder or a bad --output, 3 wrong or missing tensors.
"""
import argparse
import signal
import sys
from pathlib import Path

# A script has only its own folder on the path. Torch is imported after the flags are read.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from weights.convert_sd15 import run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a weights folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    args = parser.parse_args(argv)
    from weights.diffusers_layout import export
    run(lambda: export(args.folder, args.output))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    main()
