"""Pictures beside and below each other, with text: strips, grids, contact sheets."""
import math
import re
import unicodedata
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from pictures import to_images

THUMBNAIL = 128
FONT = ImageFont.load_default(13)
LINE = 18  # pixels per line of text


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy, at most `THUMBNAIL` pixels wide and high."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


@cache
def letter(character: str) -> str:
    """The character where Pillow's own font has it, which is little more than ASCII; of other Latin
    letters what they are without their marks; else a question mark."""
    if bytes(FONT.getmask(character)) != bytes(FONT.getmask("\uffff")):
        return character
    latin = re.match(r"LATIN (CAPITAL|SMALL) LETTER (AE|OE|[A-Z])\b", unicodedata.name(character, ""))
    if not latin:
        return "?"
    return latin[2] if latin[1] == "CAPITAL" else latin[2].lower()


def printable(text: str) -> str:
    """Text in characters that the font has; `letter` says what becomes of others."""
    return "".join(map(letter, unicodedata.normalize("NFC", text)))


def write(canvas: ImageDraw.ImageDraw, x: int, y: int, text: str, width: int) -> None:
    """One line of text, cut where it would leave `width`."""
    text = shown = printable(" ".join(text.split()))
    while FONT.getlength(shown) > width and text:
        text = text[:-1]
        shown = text + "…"
    canvas.text((x, y), shown, "black", FONT)


def labelled(tiles: list[tuple[Image.Image, str]], columns: int, gap: int = 8) -> Image.Image:
    """Pictures in rows of `columns` on white, each with a line of text below it."""
    width = max(THUMBNAIL, *(image.width for image, _ in tiles)) + gap
    height = max(image.height for image, _ in tiles) + LINE + gap
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * width + gap, -(-len(tiles) // columns) * height + gap), "white")
    for i, (image, text) in enumerate(tiles):
        x, y = gap + i % columns * width, gap + i // columns * height
        sheet.paste(image, (x, y))
        write(ImageDraw.Draw(sheet), x, y + image.height + 1, text, width - gap)
    return sheet


def captioned(tiles: list[tuple[Image.Image, str]], columns: int = 5) -> Image.Image:
    """Pictures in rows of `columns`, each with the whole of its text below it."""
    tiles = [(stack([image, heading(text, max(THUMBNAIL, image.width), margin=0)]), "")
             for image, text in tiles]
    return labelled(tiles, columns)


def strip(title: str, tiles: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in one row, each with its label, below a title."""
    row = labelled(tiles, len(tiles))
    return stack([heading(title, row.width), row])


def stack(parts: list[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def beside(parts: list[Image.Image]) -> Image.Image:
    """Pictures beside each other on white."""
    sheet = Image.new("RGB", (sum(p.width for p in parts), max(p.height for p in parts)), "white")
    x = 0
    for part in parts:
        sheet.paste(part, (x, 0))
        x += part.width
    return sheet


def heading(text: str, width: int, margin: int = 8) -> Image.Image:
    """Text in as many lines as it needs."""
    lines = []
    for word in printable(text).split():
        if lines and FONT.getlength(f"{lines[-1]} {word}") <= width - 2 * margin:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    image = Image.new("RGB", (width, LINE * len(lines) + 8), "white")
    for i, line in enumerate(lines):
        write(ImageDraw.Draw(image), margin, 8 + LINE * i, line, width - 2 * margin)
    return image


def portrait(photos: list[Tensor], size: tuple[int, int]) -> Image.Image:
    """Photos (3, H, W) in [0, 1] beside each other on white, in a picture of this (width, height)."""
    tile = Image.new("RGB", size, "white")
    for k, photo in enumerate(photos):
        left, right = size[0] * k // len(photos), size[0] * (k + 1) // len(photos)
        small = ImageOps.contain(to_images(photo[None] * 2 - 1)[0], (max(1, right - left), size[1]))
        tile.paste(small, ((left + right - small.width) // 2, (size[1] - small.height) // 2))
    return tile


def casting_sheet(text: str, rows: list[tuple[list[list[Tensor]], str, list[Image.Image]]],
                  columns: list[str]) -> Image.Image:
    """The text, then a row per casting: its photos, a list per person, over its name; its pictures, over
    the names of the columns."""
    tiles = []
    for people, name, pictures in rows:
        photos = [photo for several in people for photo in several]
        tiles += [(portrait(photos, pictures[0].size), name), *zip(pictures, columns, strict=True)]
    body = labelled(tiles, 1 + len(columns))
    return stack([heading(text, body.width), body])


def contact_sheet(prompt: str, people: list[tuple[Image.Image, str]],
                  pictures: list[tuple[Image.Image, str]], columns: int | None = None) -> Image.Image:
    """The prompt, a row of subjects, then all pictures, each with its label, in about a square."""
    rows = labelled(pictures, columns or min(8, max(4, math.ceil(math.sqrt(len(pictures))))))
    parts = [rows] if not people else [labelled(people, len(people)), rows]
    return stack([heading(prompt, max(part.width for part in parts)), *parts])
