"""Every application once at SD1.5's full size, with random weights: nothing depends on small sizes.

    python tests/apps_full.py                     # 256 pixels, 2 steps, 9 GB of memory, 6 GB of disk
    python tests/apps_full.py --side 512

Writes random models, a MoA file, a ControlNet and a LoRA, runs each application with them, looks at what it
saved, and prints what it took. --small takes small sizes instead.
"""
import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import torch
from PIL import Image, ImageStat
from safetensors.torch import save_file

from models.load import ALL_PARTS, load_part, read_config, save_part, write_json
from parity_full import (FULL, FULL_CONTROLNET, SMALL, SMALL_CONTROLNET, measure, random, randomize, report,
                         write_moa)

MAN, PAIR = "a man riding a bike", "a man and a woman shaking hands"
EXAMPLES = ROOT / "examples"


def write_weights(folder: Path, sizes: dict, side: int) -> None:
    """A weights folder with all there may be in one, random in every value, in half precision."""
    for part, cfg in sizes.items():
        save_part(randomize(ALL_PARTS[part][0](cfg)), folder, part, torch.float16)
    write_json({**read_config(folder), "image_size": side}, folder / "config.json")
    with torch.no_grad():
        write_moa(folder, sizes, folder / "moa.safetensors")
    unet, lora = load_part(folder, "unet"), {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_v")):
            key, (rows, columns) = "lora_unet_" + name.replace(".", "_"), module.weight.shape
            lora |= {f"{key}.lora_down.weight": 0.1 * random(4, columns),
                     f"{key}.lora_up.weight": 0.1 * random(rows, 4), f"{key}.alpha": torch.tensor(4.0)}
    save_file(lora, folder / "style.safetensors")


def commands(weights: Path) -> dict[str, list]:
    """Name -> script and its flags, but for those that all have."""
    ada, max_, zoe = (EXAMPLES / f"{name}.png" for name in ("ada", "max", "zoe"))
    one, two = ["--prompt", MAN], ["--prompt", PAIR]
    pair = ["--subject", f"man={max_}", "--subject", f"woman={ada}"]
    return {
        "sample": ["sample.py", *two, *pair, "--seed", 1],
        "swap": ["apps/swap.py", *one, "--subjects", max_, zoe, "--seeds", 1],
        "swap one of two": ["apps/swap.py", *two, "--subjects", ada, zoe, "--keep", f"man={max_}",
                            "--seeds", 1],
        "routing": ["apps/routing.py", *two, *pair, "--seed", 1],
        "ControlNet": ["sample.py", *one, "--subject", max_, "--seed", 1, "--controlnet", weights,
                       "--control-image", EXAMPLES / "waving.png"],
        "morph": ["apps/morph.py", *one, "--subjects", max_, zoe, "--frames", 2, "--seed", 1],
        "edit": ["apps/edit.py", "--image", EXAMPLES / "couple.png", "--mask", EXAMPLES / "couple_mask.png",
                 "--source-prompt", "a person and a person", "--keep", 1, "--subject", f"2={zoe}"],
        "style": ["sample.py", *one, "--subject", max_, "--seed", 1, "--lora",
                  f"{weights / 'style.safetensors'}:0.8"],
        "time lapse": ["apps/timelapse.py", "--prompt", "a kid in Paris", "--subject", max_, "--words", "kid",
                       "person", "--frames", 2, "--seed", 1],
        "story": ["apps/story.py", EXAMPLES / "story.json", "--seed", 1],
        "variations": ["apps/variations.py", *one, "--subject", max_, "--num", 2, "--seed", 1],
        "traverse": ["apps/traverse.py", *one, "--subjects", max_, "--frames", 2, "--seeds", 1, 2]}


def prove(sizes: dict, folder: Path, side: int) -> None:
    """Raises CalledProcessError if a command fails, AssertionError if a picture is flat."""
    write_weights(folder, sizes, side)
    print("| command | file, GB | memory, GB | seconds | relative error |\n|---|---|---|---|---|")
    for name, (script, *flags) in commands(folder).items():
        picture = folder / "pictures" / f"{name}.png"
        seconds, peak = measure(script, *flags, "--weights", folder, "--steps", 2, "--width", side,
                                "--height", side, "--output", picture)
        with Image.open(picture) as image:
            assert min(image.size) >= side and min(ImageStat.Stat(image.convert("RGB")).stddev) > 1, name
        report(name, seconds, peak)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes instead of SD1.5's")
    parser.add_argument("--side", type=int, default=256, help="pixels of the pictures (default 256)")
    args = parser.parse_args()
    sizes = SMALL | {"controlnet": SMALL_CONTROLNET} if args.small else FULL | {"controlnet": FULL_CONTROLNET}
    with tempfile.TemporaryDirectory() as temporary:
        prove(sizes, Path(temporary), args.side)
