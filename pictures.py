"""Pictures in and out: whatever file a person has -> RGB, and PNGs that say how they were made."""
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from moa.router import grid
from models.load import write_whole

MAX_PIXELS = 100_000_000
MIN_SIDE = 16
# What Pillow's decoders raise on broken files.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error,
          Image.DecompressionBombError)


def read_picture(path: str | Path) -> Tensor:
    """(3, H, W) in [0, 1] from any picture file: EXIF rotation applied, alpha over white, palette,
    CMYK, greyscale and 16 bit brought to RGB; of an animation the first frame.

    Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"it has {width} x {height} pixels, fewer than {MIN_SIDE} on a side")
            rgb = np.asarray(to_rgb(ImageOps.exif_transpose(image)), dtype=np.float32) / 255
    except BROKEN as error:
        raise ValueError(f"{path} cannot be used as a picture: {error}") from error
    return rearrange(torch.from_numpy(rgb), "h w c -> c h w")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, transparent parts over white."""
    if image.mode.startswith("I"):  # 16 bit greyscale: Pillow's own conversion would clip it to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pictures of floating-point numbers are not supported")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> Pillow images. Raises ValueError on NaN: a black picture is no answer."""
    if not torch.isfinite(pictures).all():
        raise ValueError("the picture has values that are not finite; try --dtype fp32")
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p) for p in rearrange(pixels.cpu(), "b c h w -> b h w c").numpy()]


def save_png(image: Image.Image, path: Path, parameters: str, settings: dict) -> None:
    """Write a PNG whose metadata say how it was made: `parameters` as the field's tools read it, and
    `moa`, all settings as JSON. Written under a temporary name, then renamed."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    info.add_text("moa", json.dumps(settings))
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def parameters_text(settings: dict) -> str:
    """The settings in the form that web UIs read back: prompt, negative prompt, one line of pairs."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {"Steps": settings["steps"], "Sampler": settings["sampler"],
             "CFG scale": settings["guidance_scale"], "Seed": settings["seed"],
             "Size": f"{settings['width']}x{settings['height']}", "Model": settings["weights"]}
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in pairs.items())])


def contact_sheet(images: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Equal pictures in rows of `columns` on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def routing_sheet(steps: list[tuple[int, dict, tuple[int, int]]], picture: Image.Image,
                  cell: int = 40, gap: int = 2) -> Image.Image:
    """What the routers gave to the personalized experts, beside the picture.

    Args:
        steps: per sampling step (t, {(layer, kind): (1, N) weights in [0, 1]}, latent size); a step
            that the prior drew alone has no maps and stays black.
        picture: the finished picture.
    Rows are layers in forward order, self-attention left, cross-attention right; columns are steps.
    White is all personalized, black all prior, one scale for all maps.
    """
    rows = 1 + max((layer for _, maps, _ in steps for layer, _ in maps), default=15)
    width, height = cell, round(cell * picture.height / picture.width)
    label, header, half = 34, 14, len(steps) * (width + gap)
    side = picture.width + 3 * gap
    sheet = Image.new("RGB", (side + 2 * (label + half), header + max(rows * (height + gap), picture.height)),
                      (255, 255, 255))
    sheet.paste(picture, (0, header))
    draw = ImageDraw.Draw(sheet)
    for k, kind in enumerate(("self", "cross")):
        left = side + k * (label + half)
        draw.text((left, 1), f"{kind} t", fill="black")
        for column, (t, maps, (h, w)) in enumerate(steps):
            x = left + label + column * (width + gap)
            draw.text((x, 1), str(int(t)), fill="black")
            for row in range(rows):
                weights = maps.get((row, kind))
                tile = Image.new("L", (width, height))
                if weights is not None:
                    rows_of_map = grid(weights.shape[-1], h / w)[0]
                    values = rearrange(weights[0], "(h w) -> h w", h=rows_of_map).clamp(0, 1) * 255
                    tile = Image.fromarray(values.round().numpy().astype(np.uint8)).resize((width, height), 0)
                sheet.paste(tile, (x, header + row * (height + gap)))
        for row in range(rows):
            draw.text((left, header + row * (height + gap) + height // 3), f"l={row}", fill="black")
    return sheet
