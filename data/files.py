"""Files as people have them: text in any Unicode encoding, pictures as a viewer shows them."""
import codecs
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

# Formats that Pillow decodes itself; for some others it starts programs.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")  # their colours may come out as others
SRGB = ImageCms.createProfile("sRGB")
# Of a PNG's texts and profile, when unpacked. A workflow alone takes more than Pillow's 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 27
# How a file begins that has a picture's name and is none -> what it is, and the cure.
NO_PICTURE = {b"version https://git-lfs": "a git-LFS pointer: run `git lfs pull`",
              **dict.fromkeys((b"<svg", b"<?xml"), "an SVG drawing: save it as PNG"),
              b"<": "a web page: download the picture again"}


def read_text(path: Path) -> str:
    r"""Text in UTF-8, or in UTF-16 with its byte order mark; lines end in \n. Raises OSError, ValueError."""
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("not a text in UTF-8 (it holds zeros): save it as UTF-8")
    return re.sub("\r\n?", "\n", text)


@contextmanager
def open_picture(path: Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """A picture file in one of these formats. Raises ValueError for what is none or has floating-point
    numbers, and an error for more than Pillow's 89 million pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=formats)
        except UnidentifiedImageError as error:
            raise ValueError(why_no_picture(path, formats)) from error
        with image:
            if image.mode == "F":
                raise ValueError("pictures of floating-point numbers are not supported, save it as PNG")
            yield image


def why_no_picture(path: Path, formats: tuple[str, ...]) -> str:
    """What a file is that Pillow cannot identify, and the cure."""
    with Path(path).open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        return "it is empty: copy or download it again"
    found = next((begin for begin in NO_PICTURE if head.startswith(begin)), None)
    return (f"it is {NO_PICTURE[found]}" if found else
            f"it is none of {', '.join(formats)}, or damaged. Save it as JPEG or PNG")


def as_shown(image: Image.Image) -> Image.Image:
    """Any picture -> RGB: EXIF rotation and colour profile applied, alpha over white."""
    return to_rgb(ImageOps.exif_transpose(image))


def as_labels(image: Image.Image) -> Image.Image:
    """A picture whose colours are labels -> RGB: colours stay as they are, numbers of more than 8 bits become
    a colour each, and what is transparent is black. Raises ValueError where colours may have been changed."""
    if image.format in LOSSY:
        raise ValueError(f"{image.format} may change colours, which are labels here: save it as PNG")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 2 ** 24 - 1)
        rgb = np.stack([values >> 16, values >> 8, values], -1).astype(np.uint8)
    else:
        rgb = np.array(image.convert("RGBA"))[..., :3]
    return Image.fromarray(rgb * opaque(image)[..., None])


def opaque(image: Image.Image) -> np.ndarray:
    """(H, W) bool: which pixels of labels are there, and not transparent."""
    if image.mode.startswith("I"):
        return np.asarray(image) != image.info.get("transparency", -1)
    return np.asarray(image.convert("RGBA").getchannel("A")) > 127


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB of 8 bits: colour profile applied, transparent parts over white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # more than 8 bits: Pillow's own conversion would clip them to 255
        values = np.asarray(image).clip(0, 65535)
        whole = image.mode == "I" and values.max() <= 255  # 32 bits may hold numbers of 8
        image = Image.fromarray((values >> (0 if whole else 8)).astype(np.uint8))
    if image.mode == "La":  # premultiplied, which Pillow brings to nothing else
        image = image.convert("LA")
    colours = to_srgb(image, profile)
    if not image.has_transparency_data:
        return colours
    return Image.composite(colours, Image.new("RGB", image.size, "white"),
                           image.convert("RGBA").getchannel("A"))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours of a picture, without alpha, as RGB in sRGB; a profile that cannot be used is left out, as
    viewers do."""
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB")
    kinds = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}
    colours = image.convert(kinds.get(image.mode, "RGB"))
    with suppress(ImageCms.PyCMSError, OSError):
        found = ImageCms.ImageCmsProfile(BytesIO(profile or b""))
        if "sRGB" not in ImageCms.getProfileDescription(found):
            colours = ImageCms.profileToProfile(colours, found, SRGB, outputMode="RGB")
    return colours.convert("RGB")
