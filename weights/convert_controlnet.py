"""Convert a ControlNet of Stable Diffusion 1.5, in any of its usual layouts, into a folder for --controlnet.

    python weights/convert_controlnet.py control_v11p_sd15_openpose.pth --output weights/openpose
    python sample.py --weights weights/sd15 --controlnet weights/openpose --control-image pose.png ...

SOURCE is a file of lllyasviel's (v1.1, or v1.0 with the whole model), a file without prefixes, a file or
folder of diffusers, a Hugging Face repository, or an earlier output. --controlnet reads all of these, too;
a converted folder loads faster and is checked once.

Exit codes are those of weights/convert_sd15.py.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own folder there
from models.errors import Parser
from models.load import describe_sizes, whole_folder, write_json
from weights.checkpoints import Notes
from weights.controlnet import PART, open_controlnet
from weights.convert_sd15 import run
from weights.parts import DTYPES, check_output, fit, write_parts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="file, folder or repository of a ControlNet, or an earlier output")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the written tensors (default: as they are)")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Write the folder, whole or not at all. Raises WeightsError and OSError."""
    notes = Notes()
    part = open_controlnet(args.source, notes)
    own = part.cfg is not None  # an earlier output
    check_output(args, [PART])
    fit(PART, part, notes)
    record = part.settings.get("conversion") if own else {
        "source": part.path.resolve().name, "dropped": dict(notes.dropped), "repaired": notes.repaired}
    with whole_folder(args.output) as folder:
        write_parts({PART: part}, {PART: folder / f"{PART}.safetensors"}, DTYPES[args.dtype])
        write_json({PART: describe_sizes(part.cfg), "conversion": record}, folder / "config.json")
    pooled = ", whose residuals are pooled" if part.cfg.global_pool else ""
    print(f"ControlNet{pooled}: {len(part.tensors)} tensors from {part.path}")
    for line in (*notes.repaired, f"written to {args.output}"):
        print(line)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run(lambda: convert(args))


if __name__ == "__main__":
    main()
