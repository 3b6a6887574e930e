"""Convert a ControlNet of Stable Diffusion 1.5, in any of its usual layouts, into a folder for --controlnet.

    python weights/convert_controlnet.py control_v11p_sd15_openpose.pth --output weights/openpose
    python sample.py --weights weights/sd15 --controlnet weights/openpose --control-image pose.png ...

SOURCE is a file of lllyasviel's (v1.1, or v1.0 with the whole model), a file without prefixes, a file or
folder of diffusers, a Hugging Face repository, or an earlier output. --controlnet reads all of these, too;
a converted folder loads faster and is checked once.

Exit codes are those of weights/convert_sd15.py.
"""
import argparse
import signal
import sys
from pathlib import Path

# A script has only its own folder on the path. Torch is imported after the flags are read.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from weights.convert_sd15 import run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="file, folder or repository of a ControlNet, or an earlier output")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    add("--dtype", choices=["keep", "fp16", "fp32"], default="keep",
        help="of the written tensors (default: as they are)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from weights.controlnet import convert
    run(lambda: convert(args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    main()
