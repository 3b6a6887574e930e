"""Write captions and masks of people for a folder of pictures, as data.build reads them.

    pip install -r requirements-data.txt
    python -m data.annotate PICTURES
    python -m data.build PICTURES --output DATA

Each picture NAME.jpg (.jpeg, .png, .webp) gets NAME.txt, its caption by BLIP-2, and NAME_mask.png, its people
by Mask2Former, the largest first. These are the models that the paper's data came from. What is there
already is kept, so the command can be stopped and given again, and any line can be corrected by hand.

The mask's first person is taken for the caption's first word for a person. With several people that may be
wrong: look at the contact sheet, and swap the caption's words where it is.

`torchrun` shares the pictures; give the command once more without it for the contact sheet of all.

Exit status: 0 all pictures can be built, 1 some cannot (each is named with the reason; under torchrun 0,
since 1 would stop the other processes), 2 an error.
"""
import argparse
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

# First: it says what is not installed.
from models.errors import Parser, fail, fail_if_memory, no_file

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.build import COLORS, NOUNS, TILE, find_people, find_pictures, read_picture
from data.fastcomposer import MAX_PEOPLE, DataError, naming
from data.files import read_text
from data.masks import beside, mask_of, read_mask
from data.shards import whole
from weights.hub import fetch

CAPTIONER = "Salesforce/blip2-opt-2.7b"
SEGMENTER = "facebook/mask2former-swin-base-coco-instance"
PERSON = "person"  # as the segmenter's labels call people
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # no pickles
GROUND = (124, 116, 104)  # ImageNet's mean, which the segmenter's processor makes 0
SHOWN = 20  # pictures on the contact sheet


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m data.annotate")
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="folder with pictures")
    parser.add_argument("--captioner", default=CAPTIONER, metavar="NAME",
                        help="folder or Hugging Face name of a model for AutoModelForImageTextToText "
                             "(default %(default)s, 15 GB)")
    parser.add_argument("--segmenter", default=SEGMENTER, metavar="NAME",
                        help="folder or Hugging Face name of a model for AutoModelForUniversalSegmentation "
                             "(default %(default)s, 0.4 GB)")
    parser.add_argument("--max-people", type=int, default=MAX_PEOPLE, metavar="N",
                        help="at most so many people of a picture (default %(default)s)")
    parser.add_argument("--min-share", type=float, default=0.01, metavar="SHARE",
                        help="leave out people who cover less of the picture (default %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.8, metavar="SCORE",
                        help="leave out what the segmenter is less sure of (default %(default)s)")
    parser.add_argument("--nouns", nargs="+", default=[], metavar="WORD", help="more words for a person")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="pictures at a time (default %(default)s)")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=own, metavar="NAME", help="default: cuda where there is one")
    parser.add_argument("--sheet", type=Path, metavar="FILE",
                        help="contact sheet to write (default annotations.png beside PICTURES)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if not args.pictures.is_dir():
            raise DataError(f"{args.pictures} is not a folder")
        pictures, broken = find_pictures(args.pictures)
        broken = (broken if rank == 0 else []) + annotate(pictures[rank::world], args)
        if rank == 0:
            sheet = args.sheet or args.pictures.resolve().with_name("annotations.png")
            draw_sheet(pictures).save(sheet)
            print(f"{args.pictures}: {len(pictures)} pictures; look at {sheet}")
    except ImportError as error:
        fail(f"{error.name or 'transformers'} is missing: pip install -r requirements-data.txt")
    except (DataError, OSError, ValueError) as error:
        fail(str(error)[:400])
    except (MemoryError, RuntimeError) as error:
        fail_if_memory(error, "give a smaller --batch-size or another --captioner")
    except KeyboardInterrupt:
        print("stopped: what was written stays; give the command again to go on", file=sys.stderr)
        sys.exit(130)
    for line in broken:
        print(f"cannot be built: {line}")
    sys.exit(1 if broken and world == 1 else 0)


def annotate(pictures: list[Path], args: argparse.Namespace) -> list[str]:
    """Write what is missing; returns a line for each picture that cannot be built.

    Raises ImportError without transformers, OSError where a model cannot be had.
    """
    nouns, broken, good = (*NOUNS, *args.nouns), [], []
    for path in tqdm(pictures, "looking", unit="picture", disable=None, leave=False):
        try:
            with naming(beside(path, ".txt")):
                caption = caption_of(path)
            if caption is None or not mask_of(path).exists():
                with naming(path):
                    read_picture(path)
            good.append(path)
        except DataError as error:
            broken.append(str(error))
    if todo := [path for path in good if caption_of(path) is None]:
        for path, caption in captions(todo, args):
            with whole(path.with_suffix(".txt")) as temporary:
                temporary.write_text(f"{caption}\n", encoding="utf-8")
    words = {path: len(find_people(caption_of(path), nouns)[1]) for path in good}
    broken += [f"{path}: its caption names nobody: {caption_of(path)!r}"
               for path, count in words.items() if not count]
    if todo := [path for path, count in words.items() if count and not mask_of(path).exists()]:
        for path, people in masks(todo, args):
            share = np.array([person.mean() for person in people])
            large = [people[i] for i in np.argsort(-share) if share[i] >= args.min_share]
            if not large:
                broken.append(f"{path}: " + (f"the largest person covers {share.max():.2%} of it"
                                             if len(share) else "nobody was found on it"))
                continue
            mask = np.zeros(large[0].shape, np.uint8)
            for number, person in enumerate(large[:min(args.max_people, words[path])], 1):
                mask[person & (mask == 0)] = number
            with whole(mask_of(path)) as temporary:
                Image.fromarray(mask).save(temporary, "PNG")
    return broken


def caption_of(path: Path) -> str | None:
    """The caption beside a picture; None where there is none yet."""
    file = beside(path, ".txt")
    return " ".join(read_text(file).split()) if file.exists() else None


def captions(todo: list[Path], args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """A line for each picture, by the captioner."""
    from transformers import AutoModelForImageTextToText, AutoProcessor  # an extra: requirements-data.txt
    processor, model = load(AutoProcessor, AutoModelForImageTextToText, args.captioner, args.device)
    for batch in batches(todo, args.batch_size, "captions"):
        pictures = [read_picture(path) for path in batch]
        inputs = processor(images=pictures, return_tensors="pt").to(args.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=30)
        for path, text in zip(batch, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
            yield path, " ".join(text.split())


def masks(todo: list[Path], args: argparse.Namespace) -> Iterator[tuple[Path, list[np.ndarray]]]:
    """The people of each picture, (H, W) bool each, by the segmenter."""
    from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation
    processor, model = load(AutoImageProcessor, AutoModelForUniversalSegmentation, args.segmenter,
                            args.device)
    if PERSON not in model.config.id2label.values():
        raise ValueError(f"{args.segmenter} has no label {PERSON!r}: take one trained on COCO's instances")
    for batch in batches(todo, args.batch_size, "masks"):
        pictures = [read_picture(path) for path in batch]
        # In squares: pictures of other shapes are padded by the processor, which forgets that in the masks.
        squares = [square(picture) for picture in pictures]
        inputs = processor(images=squares, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs.to(args.device, model.dtype))
        found = processor.post_process_instance_segmentation(
            outputs, threshold=args.threshold, target_sizes=[picture.size for picture in squares])
        for path, picture, instances in zip(batch, pictures, found, strict=True):
            ids = [segment["id"] for segment in instances["segments_info"]
                   if model.config.id2label[segment["label_id"]] == PERSON]
            seen = instances["segmentation"][:picture.height, :picture.width]
            yield path, [(seen == i).cpu().numpy() for i in ids]


def square(picture: Image.Image) -> Image.Image:
    """With room to the right or below."""
    canvas = Image.new("RGB", (max(picture.size),) * 2, GROUND)
    canvas.paste(picture)
    return canvas


def load(processor: type, model: type, name: str, device: str) -> tuple:
    """A processor and a model of transformers, safetensors only, in fp16 on a GPU. Raises ValueError."""
    folder = fetch(Path(name), MODEL_FILES)
    if not folder.is_dir():
        raise DataError(f"{no_file(folder)}: give a model's folder, or user/name on the hub")
    with naming(name):
        loaded = model.from_pretrained(folder, dtype=torch.float32 if device == "cpu" else torch.float16,
                                       use_safetensors=True, local_files_only=True)
        return processor.from_pretrained(folder, local_files_only=True), loaded.to(device).eval()


def batches(todo: list[Path], size: int, title: str) -> Iterator[list[Path]]:
    with tqdm(total=len(todo), desc=title, unit="picture", disable=None) as bar:
        for start in range(0, len(todo), size):
            yield todo[start:start + size]
            bar.update(len(todo[start:start + size]))


def draw_sheet(pictures: list[Path]) -> Image.Image:
    """Pictures from all over the folder, their people tinted in the order of the caption's words."""
    shown = [pictures[i] for i in sorted({i * len(pictures) // SHOWN for i in range(SHOWN)})]
    columns, height, font = min(4, len(shown)), TILE + 50, ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * (TILE + 8), -(-len(shown) // columns) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, path in enumerate(shown):
        x, y = place % columns * (TILE + 8), place // columns * height
        try:
            picture, caption = read_picture(path), caption_of(path) or "no caption"
            mask = read_mask(mask_of(path), picture.size) if mask_of(path).exists() else np.zeros(1, int)
        except (OSError, ValueError):  # it has been named, here or by the builder
            continue
        pixels = np.array(picture, np.float32)
        for number in np.unique(mask[mask > 0]):
            pixels[mask == number] = (pixels[mask == number] * 0.55
                                      + np.array(COLORS[(number - 1) % len(COLORS)]) * 0.45)
        tile = Image.fromarray(pixels.astype(np.uint8))
        tile.thumbnail((TILE, TILE))
        sheet.paste(tile, (x, y))
        for i, line in enumerate(textwrap.wrap(f"{path.name}: {caption}", 32)[:3]):
            canvas.text((x + 2, y + TILE + 2 + 14 * i), line, "black", font)
    return sheet


if __name__ == "__main__":
    main()
