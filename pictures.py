"""Pictures in and out: whatever file a person has -> RGB, and PNGs that say how they were made."""
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from models.load import write_whole

# Formats that Pillow decodes itself; for some others it starts programs.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
ANIMATIONS = {".gif": "GIF", ".png": "PNG"}
MIN_SIDE = 16
MAX_ASPECT = 10  # a sliver would be scaled up to gigabytes
MOST_COLOURS = 20  # of a mask; one with soft edges has hundreds
# XMP that says what IPTC's vocabulary has for pictures made by a trained model; others look for it.
GENERATED = """<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia\
</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"""
CUT_GROUND, CUT_SIDE = 0.85, 1.1  # around a person cut from a picture: grey, and the square's side


def read_picture(path: str | Path) -> Tensor:
    """(3, H, W) in [0, 1] from any picture file: EXIF rotation applied, alpha over white, palette,
    CMYK, greyscale and 16 bit brought to RGB; of an animation the first frame.

    Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        start = "" if path.is_absolute() else " (paths start at the current folder)"
        raise ValueError(f"{path} does not exist{start}: give a picture file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a picture file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a picture file")
    try:
        rgb = decode(path)
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"{path} cannot be used as a picture: {error or type(error).__name__}") from error
    return rearrange(torch.from_numpy(rgb), "h w c -> c h w").float() / 255


def decode(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"it has {width} x {height} pixels, both must be at least {MIN_SIDE}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"its {width} x {height} pixels are too long and thin, crop it")
            return np.array(to_rgb(ImageOps.exif_transpose(image)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, transparent parts over white."""
    if image.mode.startswith("I"):  # 16 bit greyscale: Pillow's own conversion would clip it to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pictures of floating-point numbers are not supported, save it as PNG")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError on NaN or infinity: a black picture is no answer. what: for the message."""
    if not torch.isfinite(values).all():
        raise ValueError(f"{what} came out as NaN: try --dtype fp32 or a lower --guidance-scale; if that "
                         "does not help, the weights are broken")


def to_images(pictures: Tensor, what: str = "the picture") -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> Pillow images. Raises ValueError as `check_finite` does."""
    check_finite(pictures, what)
    return [Image.fromarray(pixels) for pixels in to_uint8(pictures)]


def to_picture(images: np.ndarray | Tensor, device: torch.device | None = None) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], on a device, which gets the bytes alone."""
    pixels = torch.as_tensor(np.array(images)).to(device)
    return rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels.cpu(), "b c h w -> b h w c").numpy()


def pairwise_distance(pictures: Tensor) -> float:
    """Mean absolute difference of the pixels of (B, 3, H, W), over all pairs of pictures."""
    return float(torch.pdist(pictures.flatten(1).float(), p=1).mean() / pictures[0].numel())


def save_png(image: Image.Image, path: Path, settings: dict) -> None:
    """Write a PNG, whole or not at all, whose metadata say how it was made: `parameters` as the
    field's tools read it, and `moa`, all settings as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = png_info(settings)
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def save_animation(frames: list[Image.Image], path: Path, settings: dict, fps: float = 8) -> None:
    """Write frames of one size as a .gif (256 colours, times in 1/100 s) or an animated .png (exact),
    endless, whole or not at all. The settings are kept as `save_png` does, in a .gif as its comment.

    fps: frames per second, in 1..50. Equal frames after each other become one that stays longer.
    Raises ValueError for another ending, for fps out of range, and unless there are two frames.
    """
    if path.suffix.lower() not in ANIMATIONS:
        raise ValueError(f"{path}: an animation is saved as {' or '.join(ANIMATIONS)}, not as "
                         f"{path.suffix or 'a file without an ending'}")
    if not 1 <= fps <= 50:
        raise ValueError(f"an animation has 1..50 frames per second, not {fps}")
    if len(frames) < 2:
        raise ValueError(f"{path}: an animation needs 2 frames or more, not {len(frames)}")
    kept = ({"comment": json.dumps(settings).encode()} if path.suffix.lower() == ".gif"
            else {"pnginfo": png_info(settings)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: frames[0].save(
        temporary, format=ANIMATIONS[path.suffix.lower()], save_all=True, append_images=frames[1:],
        duration=1000 / fps, loop=0, **kept))


def png_info(settings: dict) -> PngInfo:
    """The settings as a PNG keeps them, and that a model made it."""
    info = PngInfo()
    info.add_text("parameters", parameters_text(settings))
    info.add_text("moa", json.dumps(settings))
    info.add_itxt("XML:com.adobe.xmp", GENERATED)
    return info


def read_settings(path: Path) -> dict | None:
    """What `save_png` kept in a picture; None if it is not there, or no such picture."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return json.loads(image.text["moa"])
    except (OSError, KeyError, ValueError, SyntaxError, RecursionError, MemoryError):  # a chunk claims any
        return None


def parameters_text(settings: dict) -> str:
    """The settings in the form that web UIs read back: prompt, negative prompt, one line of pairs."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {"Steps": settings["steps"], "Sampler": {"unipc": "UniPC", "ddim": "DDIM"}[settings["sampler"]],
             "CFG scale": settings["guidance_scale"], "Seed": settings["seed"],
             "Size": f"{settings['width']}x{settings['height']}", "Model": quoted(settings["weights"]),
             **({"Clip skip": settings["clip_skip"]} if settings["clip_skip"] > 1 else {}),
             **({"VAE": quoted(settings["vae"])} if settings["vae"] else {}),
             **({"LoRA": quoted(", ".join(settings["loras"]))} if settings["loras"] else {}),
             **{f"ControlNet {i}": quoted(
                 f"Model: {control['controlnet']}, Weight: {control['scale']}, Guidance Start: "
                 f"{control['start']}, Guidance End: {control['end']}")
                for i, control in enumerate(settings["controls"])}}
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in pairs.items())])


def quoted(value: str) -> str:
    """As web UIs write a value that their own separators occur in."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in [0, 1], scaled so that it covers `size` (height, width) and cut to it around its middle
    -> (1, 3, height, width) in [-1, 1]."""
    image = to_images(picture[None] * 2 - 1)[0]
    return to_picture(np.array(ImageOps.fit(image, size[::-1]))[None])


def read_masks(path: Path, picture: Tensor) -> list[Tensor]:
    """The people of a picture (3, H, W), each (H, W) bool, from a picture of the same size in which each has
    a colour of their own and the rest is black. Raises ValueError."""
    red, green, blue = (read_picture(path) * 255).round().long()
    if red.shape != picture.shape[1:]:
        sizes = [f"{width} x {height}" for height, width in (red.shape, picture.shape[1:])]
        raise ValueError(f"{path} has {sizes[0]} pixels, the picture {sizes[1]}: they must be alike")
    colours = (red << 16) + (green << 8) + blue
    people = [colours == colour for colour in colours.unique() if colour]
    if not 1 <= len(people) <= MOST_COLOURS:
        raise ValueError(f"{path} has {len(people)} colours besides black: give each person one, in a file "
                         "without blur and losses such as a PNG")
    return people


def box_mask(box: str, picture: Tensor) -> Tensor:
    """(H, W) bool, true in "x0,y0,x1,y1" of a picture (3, H, W), behind its corners x1, y1 no more.

    Raises ValueError.
    """
    height, width = picture.shape[1:]
    numbers = re.fullmatch(r"(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})", box)
    if not numbers:
        raise ValueError(f"--box {box}: give four whole numbers x0,y0,x1,y1")
    x0, y0, x1, y1 = map(int, numbers.groups())
    if not (x0 < x1 <= width and y0 < y1 <= height):
        raise ValueError(f"--box {box} must be an area inside the picture's {width} x {height} pixels")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def cut_person(picture: Tensor, mask: Tensor) -> Tensor:
    """A person of a picture as a photo of their own: on light grey, whole, in the middle of a square.

    picture: (3, H, W) in [0, 1]. mask: (H, W) bool, not empty. Returns (3, S, S) in [0, 1].
    """
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    person = torch.where(mask, picture, CUT_GROUND)[box]
    side = math.ceil(max(person.shape[1:]) * CUT_SIDE)
    square = torch.full((3, side, side), CUT_GROUND)
    top, left = ((side - length) // 2 for length in person.shape[1:])
    square[:, top:top + person.shape[1], left:left + person.shape[2]] = person
    return square


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (...) in [-1, 1]."""
    return -10 * math.log10(max(((pictures - others) / 2).square().mean().item(), 1e-12))


