"""How alike pictures come out that should be the same: precisions, batches, threads.

    python tests/stress/numerics.py
    python tests/stress/numerics.py --weights weights/sd15 --device cuda

Pictures of the same prompts, seeds and people are drawn in float32 alone with one thread, and then otherwise.
PSNR in dB, of the worst picture; the difference in steps of 255, of the worst pixel.

Exit status: 0 all are as alike as LIMITS say, 1 they are not.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sample import SHIPPED
from images import psnr, to_uint8
from pipeline import Pipeline, pick_device
from subjects import bind_subjects, read_photos

PROMPTS = ("a woman standing on the beach", "a woman riding a bike in a park",
           "a woman reading a book in the snow", "a woman waving on a mountain")
PHOTO = str(ROOT / "examples" / "zoe.png")
SEEDS = (0, 1, 2, 3)
# The least PSNR of each row, in dB: an 8-bit picture rounded once more has about 50.
LIMITS = {"fp16": 30.0, "bf16": 18.0, "batch": 50.0, "place": 50.0, "threads": 50.0}


def draw(args: argparse.Namespace, dtype: torch.dtype, groups: list[list[int]]) -> Tensor:
    """The pictures (4, 3, H, W), in batches of these numbers; numbers beyond 3 stand for fillers."""
    moa = args.weights / "moa.safetensors"
    people = moa.is_file()
    pipeline = Pipeline.load(args.weights, moa if people else None, pick_device(args.device), dtype)
    found = {}
    for group in groups:
        prompts = [PROMPTS[k % 4] for k in group]
        subjects = None
        if people:
            bound = [bind_subjects(prompt, [PHOTO]) for prompt in prompts]
            features = [pipeline.encode_photos(found, read_photos(found)) for found in bound]
            subjects = list(map(pipeline.make_subjects, prompts, bound, features))
        pictures = pipeline.generate(prompts, [SEEDS[k] if k < 4 else 100 + k for k in group], subjects,
                                     steps=args.steps, guidance_scale=4.0, prior_above=800)
        found |= {k: picture for k, picture in zip(group, pictures, strict=True) if k < 4}
    return torch.stack([found[k] for k in range(4)])


def with_threads(args: argparse.Namespace, threads: int) -> Tensor:
    """The same in a process of its own, which counts its threads once."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "pictures.safetensors"
        subprocess.run([sys.executable, __file__, "--weights", args.weights, "--device", args.device,
                        "--steps", str(args.steps), "--write", file], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        return load_file(file)["pictures"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="default: the small world")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    alone = [[0], [1], [2], [3]]
    if args.write:
        return save_file({"pictures": draw(args, torch.float32, alone)}, args.write)
    torch.set_num_threads(1)
    truth = draw(args, torch.float32, alone)
    rows = {"fp16": draw(args, torch.float16, alone), "bf16": draw(args, torch.bfloat16, alone),
            "batch of 4": draw(args, torch.float32, [[0, 1, 2, 3]]),
            "batch of 4 backwards": draw(args, torch.float32, [[3, 2, 1, 0]]),
            "place 7 of 8": draw(args, torch.float32, [[*range(4 + 8 * k, 11 + 8 * k), k] for k in range(4)]),
            **{f"threads {count}": with_threads(args, count) for count in args.threads}}
    print("pictures | PSNR, dB | largest difference of a pixel, of 255 | limit, dB")
    print("---|---|---|---")
    failures = 0
    for name, pictures in rows.items():
        worst = min(psnr(a, b) for a, b in zip(pictures, truth, strict=True))
        difference = abs(to_uint8(pictures).astype(int) - to_uint8(truth).astype(int)).max()
        limit = LIMITS[name.split()[0]]
        failures += not worst >= limit
        text = "exact" if torch.equal(pictures, truth) else f"{worst:.1f}"
        print(f"{name} | {text} | {difference} | {limit:.0f}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
