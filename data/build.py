"""Make a training dataset from pictures, captions and masks, or check one.

    python -m data.build FOLDER --output DATA
    python -m data.build --check DATA [--sheet PNG]

FOLDER holds for each picture NAME.jpg (.jpeg, .png, .webp), in any subfolder:

    NAME.txt          its caption, one line, as in: a woman and a man riding bikes
    NAME_mask.png     who is where, of the picture's size, greyscale or palette. A pixel's value is the
                      number of the person: 0 nobody, 1 the caption's first word for a person (woman),
                      2 the second (man) and so on. White (255) alone counts as 1.
    NAME_people.txt   optional, who they are: a line for person 1, one for person 2 and so on. People of
                      one name lend each other their reference pictures.

With --without-people pictures and captions are enough, as for a style (train.py lora).

Each person needs a word of their own: "two women" becomes "a woman and a woman", while people without
a number ("women", "a crowd") cannot be trained on.

DATA gets FastComposer's layout (docs/train.md) and contact_sheet.png, whole or not at all. All that is
wrong with any picture is listed, and nothing is written then, unless --skip-broken leaves these out.

Exit status: 0 all samples are good, 1 some are broken, 2 an error (one line on stderr).
"""
import argparse
import json
import re
import secrets
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# First: it says what is not installed.
from models.errors import Parser, one_line

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.files import as_shown, open_picture, read_text
from data.fastcomposer import (
    MAX_PEOPLE,
    PERSON,
    DataError,
    find_places,
    naming,
    open_sample,
    people_of,
    read_ids,
    read_record,
    read_sample,
    repeated_ids,
    square,
)
from data.masks import beside, mask_of, read_mask
from data.processes import in_processes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
BY_SYSTEMS = ("thumbs.db", "desktop.ini")  # what Windows puts into folders; others hide theirs by a dot
NOUNS = ("man", "woman", "boy", "girl", "person", "kid", "child", "baby", "toddler", "teenager", "adult",
         "guy", "lady", "gentleman", "father", "mother", "dad", "mom", "son", "daughter", "brother",
         "sister", "husband", "wife", "bride", "groom", "grandfather", "grandmother", "grandpa", "grandma",
         "friend")
PLURALS = {"man": "men", "woman": "women", "person": "people", "child": "children", "baby": "babies",
           "lady": "ladies", "gentleman": "gentlemen", "wife": "wives"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
SHEET, TILE = 20, 192  # samples on the contact sheet, and the pixels of each
COLORS = ((255, 190, 0), (0, 190, 255), (255, 80, 160), (90, 220, 90))  # of the people on it


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m data.build")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER",
                        help="folder with pictures, captions and masks")
    parser.add_argument("--output", type=Path, metavar="DATA", help="folder to write: a new dataset")
    parser.add_argument("--check", type=Path, metavar="DATA",
                        help="folder of a dataset to check in place of building one; nothing is written")
    parser.add_argument("--sheet", type=Path, metavar="FILE",
                        help="with --check: contact sheet to write (.png)")
    parser.add_argument("--nouns", nargs="+", default=[], metavar="WORD",
                        help=f"more words for a person, besides {', '.join(NOUNS)}")
    parser.add_argument("--skip-broken", action="store_true",
                        help="leave out pictures with something wrong, in place of writing nothing")
    parser.add_argument("--without-people", action="store_true",
                        help="take pictures with captions about anything, and read no masks")
    args = parser.parse_args(arguments)
    if args.check and (args.folder or args.output or args.nouns or args.without_people or args.skip_broken):
        parser.error("--check takes a dataset and nothing to build")
    if not args.check and (args.sheet or not (args.folder and args.output)):
        parser.error("give FOLDER and --output DATA, or --check DATA")
    for noun in args.nouns:
        if not re.fullmatch(r"[\w-]+", noun):
            parser.error(f"--nouns: {noun!r} is not a word")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        lines, broken = check(args.check, args.sheet) if args.check else build(args)
        print("\n".join(lines))
    except (DataError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: nothing is written", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if broken else 0)


# Building ----------------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Write the dataset. Returns a report and what was broken and left out. Raises DataError."""
    folder, output = args.folder, args.output
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one, an archive unpacked")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"{output} exists already: give another --output")
    if output.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{output} is inside of {folder}: give another --output")
    pictures, broken = find_pictures(folder)
    temporary = output.absolute().with_name(f".{output.name}.{secrets.token_hex(6)}")
    temporary.mkdir(parents=True)
    try:
        nouns = None if args.without_people else (*NOUNS, *args.nouns)
        job = partial(convert, output=temporary, nouns=nouns)
        results = list(in_processes(job, list(enumerate(pictures)), "writing"))
        broken += [fault for result in results if isinstance(result, list) for fault in result]
        ids = [result for result in results if isinstance(result, str)]
        if broken and not args.skip_broken:
            told = (f"nothing is written: {len(ids)} of {len(pictures)} pictures are good. Mend the others "
                    "and give the command again, or leave them out with --skip-broken")
            return [*listed(broken), told], broken
        if not ids:
            raise DataError(f"none of the {len(pictures)} pictures of {folder} can be used: {broken[0]}")
        for split, members in (("", ids), ("_train", ids), ("_test", [])):
            text = "".join(f"{image_id}\n" for image_id in members)
            (temporary / f"image_ids{split}.txt").write_text(text, encoding="utf-8")
        lines, broken = check(temporary, temporary / "contact_sheet.png", args.nouns, broken)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written = f"{output}: written, {len(ids)} of {len(pictures)} pictures; look at its contact_sheet.png"
    return [*lines, written], broken


def find_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, sorted, and a line for every file that is of no use.
    Raises DataError without a picture."""
    files = sorted(path for path in folder.rglob("*")
                   if (path.is_symlink() or not path.is_dir()) and path.name.lower() not in BY_SYSTEMS
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    pictures = [path for path in files
                if path.suffix.lower() in SUFFIXES and not path.name.lower().endswith("_mask.png")
                and path.is_file()]
    if not pictures:
        raise DataError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    names = Counter(path.with_suffix("") for path in pictures)
    broken = [f"{path}: {n} pictures have this name" for path, n in names.items() if n > 1]
    for path in files:
        owner = re.fullmatch(r"(.+?)(_mask\.png|_people\.txt|\.txt)", path.name, re.IGNORECASE)
        if not path.is_file():
            broken.append(f"{path}: not read, it is a link or a device, no file: copy here what it leads to")
        elif owner and not {path.with_name(owner[1]), path.with_suffix("")} & names.keys():
            broken.append(f"{path}: there is no picture for it")
        elif not owner and path.suffix.lower() not in SUFFIXES:
            broken.append(f"{path}: not read, pictures are {', '.join(SUFFIXES)}")
    return [path for path in pictures if names[path.with_suffix("")] == 1], broken


def convert(job: tuple[int, Path], output: Path, nouns: tuple[str, ...] | None) -> str | list[str]:
    """Write the three files of a picture; returns its id, or all that is wrong with it. Without `nouns` there
    are no people on it."""
    (index, path), faults = job, []
    picture = attempt(faults, path, read_picture)
    caption, words = attempt(faults, beside(path, ".txt"), read_caption, nouns) or ("", [])
    size, people = picture.size if picture else None, len(words) or 255
    instances = names = None
    if nouns is not None:
        instances = attempt(faults, mask_of(path), read_people, size, people, caption)
        names = attempt(faults, beside(path, "_people.txt"), read_names, people)
    if faults:
        return faults
    if instances is None:
        instances, names = np.zeros((picture.height, picture.width), np.uint8), {}
    image_id = f"{index:09d}"
    segments = []
    for number in np.unique(instances[instances > 0]).tolist():
        ys, xs = np.nonzero(instances == number)
        word = words[number - 1]
        segments.append({
            "id": number, "word": word[0], "start": word.start(), "end": word.end(), "coco_label": PERSON,
            "bbox": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1],
            **({"identity": names[number]} if number in names else {})})
    record = {"image_id": image_id, "caption": caption, "segments": segments, "source": path.name}
    stem = output / image_id[:5] / image_id
    try:
        stem.parent.mkdir(exist_ok=True)
        picture.save(stem.with_suffix(".jpg"), quality=95, subsampling=0)
        np.save(stem.with_suffix(".npy"), instances)
        stem.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    except OSError as error:  # numpy's names no file
        raise OSError(f"{stem} cannot be written ({error.strerror or error}): "
                      f"{shutil.disk_usage(output).free / 1e6:.1f} MB are free there") from error
    return image_id


def attempt(faults: list[str], path: Path, read: Callable, *arguments):
    """What `read` makes of a file; None, and a line in `faults`, where something is wrong with it."""
    try:
        with naming(path):
            return read(path, *arguments)
    except DataError as error:
        faults.append(str(error))


def read_caption(path: Path, nouns: tuple[str, ...] | None) -> tuple[str, list[re.Match]]:
    """The caption and its words for people, each of whom has one."""
    if not path.exists():
        raise ValueError("not there: write a caption into it, one line")
    lines = read_text(path).strip().split("\n")
    if len(lines) != 1 or not lines[0]:
        raise ValueError(f"a caption is one line, not {len(lines) if lines[0] else 0}")
    caption = " ".join(lines[0].split())
    if nouns is None:
        return caption, []
    caption, words = find_people(caption, nouns)
    if not words:
        raise ValueError(f"no word for a person in {caption!r}: write one ({', '.join(nouns[:4])}, ...), or "
                         "give --nouns with the word that stands for the person there; people in the plural "
                         "need their number, as in 'two women'")
    return caption, words


def read_picture(path: Path) -> Image.Image:
    """RGB as a viewer shows it. Raises ValueError and OSError."""
    with open_picture(path) as image:
        return as_shown(image)


def read_people(path: Path, size: tuple[int, int] | None, people: int, caption: str) -> np.ndarray:
    """(H, W) uint8 person numbers from 1 to `people`, 0 where nobody is."""
    if not path.exists():
        raise ValueError("not there: paint the people into it, let python -m data.annotate make it, or give "
                         "--without-people")
    mask = read_mask(path, size)
    numbers = np.unique(mask[mask > 0]).tolist()
    if numbers[-1] > people:
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        raise ValueError(f"persons {shown} on the mask, words for a person in {caption!r}: {people}")
    return mask.astype(np.uint8)


def read_names(path: Path, people: int) -> dict[int, str]:
    """Person number -> name, of those that have one."""
    if not path.exists():
        return {}
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if len(lines) > people:
        raise ValueError(f"names: {len(lines)}, words for a person in the caption: {people}")
    return {number: name for number, name in enumerate(lines, 1) if name}


def plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


def find_people(caption: str, nouns: tuple[str, ...]) -> tuple[str, list[re.Match]]:
    """The caption with "two women" as "a woman and a woman", and its words for single people."""
    singular = {plural(noun): noun for noun in nouns}
    counted = rf"\b({'|'.join(NUMBERS)}) ((?!and |or |of )\w*[^\Ws] )?({alternatives(singular)})"
    caption = re.sub(counted, lambda match: one_by_one(match, singular), caption, flags=re.IGNORECASE)
    return caption, list(re.finditer(alternatives(nouns), caption, re.IGNORECASE))


def alternatives(words) -> str:
    """A pattern for whole words; "man" is in neither "woman" nor "man-made"."""
    return rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?![\w-])"


def one_by_one(match: re.Match, singular: dict[str, str]) -> str:
    """"two young women" -> "a young woman and a young woman"."""
    number, adjective, people = match.groups(default="")
    person = adjective + singular[people.lower()]
    article = "an" if person[0].lower() in "aeiou" else "a"
    return " and ".join([f"{article} {person}"] * NUMBERS[number.lower()])


# Checking ----------------------------------------------------------------------------------------


@dataclass
class Facts:
    """What the report tells of a good sample."""

    size: tuple[int, int]
    words: list[str]  # the segments' in lower case
    ends: list[int]
    identities: list
    named: int  # words for people in the caption
    hidden: int  # people outside of the square that training sees


def inspect_sample(image_id: str, folder: Path, nouns: tuple[str, ...]) -> Facts | DataError:
    """The facts of a sample, or what is wrong with it."""
    try:
        opened = open_sample(folder, image_id)
    except DataError as error:
        return error
    caption, segments = opened.record["caption"], opened.record["segments"]
    words = [re.search(r"([\w-]*)\W*$", caption[:segment["end"]])[1] for segment in segments]
    seen = [square(Image.fromarray(mask), 64, Image.Resampling.NEAREST).getbbox() for mask in opened.masks]
    return Facts(opened.picture.size, [word.lower() for word in words], [s["end"] for s in segments],
                 [s["identity"] for s in segments if s.get("identity", "") != ""],
                 len(find_people(caption, nouns)[1]), seen.count(None))


def check(folder: Path, sheet: Path | None, nouns=(), broken=()) -> tuple[list[str], list[str]]:
    """Read a whole dataset and write its contact sheet. Returns a report and what is broken, after what
    was already known to be. Raises DataError without a list of ids."""
    lists = {"train": read_ids(folder, "train")}
    with suppress(DataError):  # a dataset may do without
        lists["test"] = read_ids(folder, "test")
    ids = [image_id for members in lists.values() for image_id in members]
    unique = list(dict.fromkeys(ids))
    nouns = (*NOUNS, *nouns)
    results = list(in_processes(partial(inspect_sample, folder=folder, nouns=nouns), unique, "checking"))
    good = {i: facts for i, facts in zip(unique, results, strict=True) if isinstance(facts, Facts)}
    broken = [*broken, *repeated_ids(ids), *(str(error) for error in results if isinstance(error, DataError))]
    counts = ", ".join(f"{name} {len(members)}" for name, members in lists.items())
    lines = [f"samples   {counts}; {len(good)} good, {len(broken)} broken"]
    if good:
        lines += report(list(good.values()), nouns) + report_files(folder, unique)
    if good and sheet:
        draw_sheet(folder, list(good)).save(sheet, format="PNG")
    return [*lines, *listed(broken)], broken


def listed(broken: list[str]) -> list[str]:
    return [f"broken    {one_line(line)}" for line in broken]


def report(facts: list[Facts], nouns: tuple[str, ...]) -> list[str]:
    """What good samples hold, and what is odd about them."""
    sizes = sorted((min(f.size), f.size) for f in facts)
    words = Counter(one_line(word) for f in facts for word in f.words)
    people = Counter(len(f.words) for f in facts)
    pictures = Counter(identity for f in facts for identity in set(f.identities))
    small, large = (f"{w} x {h}" for _, (w, h) in (sizes[0], sizes[-1]))
    strange = [word for word in words if word not in nouns]
    odd = {
        f"words that no person is known by ({', '.join(strange[:8])})": len(strange),
        "samples whose caption has more words for people than there are segments":
            sum(f.named > len(f.words) for f in facts),
        "samples in which people share a word": sum(len(set(f.ends)) < len(f.ends) for f in facts),
        f"samples with more than {MAX_PEOPLE} people (the largest are trained on)":
            sum(len(f.words) > MAX_PEOPLE for f in facts),
        "people outside of the middle square that is trained on": sum(f.hidden for f in facts),
        "pictures smaller than Stable Diffusion's 512 pixels": sum(min(f.size) < 512 for f in facts),
    }
    return [f"pictures  {small} to {large}",
            f"people    {', '.join(f'{n} in {people[n]}' for n in sorted(people))}",
            f"words     {', '.join(f'{word} {n}' for word, n in words.most_common(12))}",
            *([f"names     {len(pictures)}, in several pictures {sum(n > 1 for n in pictures.values())}"]
              if pictures else []),
            *(f"note      {what}: {n}" for what, n in odd.items() if n)]


def report_files(folder: Path, ids: list[str]) -> list[str]:
    """Whether the lists of ids fit each other and the files."""
    odd = {"pictures in no list": len({path.stem for path in folder.glob("[0-9]*/*.jpg")} - set(ids))}
    with suppress(DataError):
        odd["ids in only one of image_ids.txt and the splits"] = len(set(read_ids(folder, "")) ^ set(ids))
    return [f"note      {what}: {n}" for what, n in odd.items() if n]


def draw_sheet(folder: Path, ids: list[str]) -> Image.Image:
    """Samples from all over a dataset as training sees them: people tinted, their words in brackets,
    and beside the picture their references, framed in the tint."""
    places = find_places({image_id: people_of(read_record(folder, image_id)) for image_id in ids})
    ids = [ids[i] for i in sorted({i * len(ids) // SHEET for i in range(SHEET)})]
    width, height, columns, font = TILE * 3 // 2 + 8, TILE + 36, 4, ImageFont.load_default(11)
    sheet = Image.new("RGB", (columns * width, -(-len(ids) // columns) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, image_id in enumerate(ids):
        sample = read_sample(folder, image_id, TILE, places=places)
        x, y = place % columns * width, place // columns * height
        picture, caption = sample.image, sample.caption
        for s in reversed(range(len(sample.ends))):
            tint = picture * 0.55 + np.array(COLORS[s]) * 0.45
            picture = np.where(sample.masks[s][..., None], tint, picture)
            side = TILE // max(2, len(sample.ends))
            reference = Image.fromarray(sample.references[s]).resize((side - 6,) * 2)
            sheet.paste(ImageOps.expand(reference, 3, COLORS[s]), (x + TILE, y + s * side))
        for end in sorted(set(sample.ends), reverse=True):
            word = re.search(r"\S*\s*$", caption[:end])
            caption = f"{caption[:word.start()]}[{word[0]}]{caption[end:]}"
        sheet.paste(Image.fromarray(np.uint8(picture)), (x, y))
        for i, line in enumerate(textwrap.wrap(f"{image_id}: {caption}", 50)[:2]):
            canvas.text((x + 2, y + TILE + 2 + 14 * i), line, "black", font)
    return sheet


if __name__ == "__main__":
    main()
