"""Pictures in and out, beside and below each other: reading, saving, grids, labels, routing maps."""
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data.files import as_labels, as_shown, open_picture
from moa import grid, record_routing, record_subject_attention
from moa.loss import mean_routing
from models.errors import no_file
from models.load import write_whole
from models.unet import UNet
from samplers import LABELS

FRAME = 125  # ms that a frame of an animation is shown
MIN_SIDE = 16
MAX_ASPECT = 10  # a sliver would be scaled up to gigabytes
# XMP that says what IPTC's vocabulary has for pictures made by a trained model; others look for it.
GENERATED = """<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia\
</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"""


def read_picture(path: str | Path, labels: bool = False) -> Tensor:
    """(3, H, W) in [0, 1] from any picture file, as a viewer shows it: EXIF rotation and colour profile
    applied, alpha over white, palette, CMYK, greyscale and 16 bit brought to RGB; of an animation the first
    frame. labels: its colours are labels, so they stay as they are, and transparent is black.

    Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{no_file(path)}: give a picture file")
    try:
        rgb = decode(path, labels)
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"{path} cannot be used as a picture: {error or type(error).__name__}") from error
    return rearrange(torch.from_numpy(rgb), "h w c -> c h w").float() / 255


def decode(path: Path, labels: bool = False) -> np.ndarray:
    """(H, W, 3) uint8."""
    with open_picture(path) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"it has {width} x {height} pixels, both must be at least {MIN_SIDE}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"its {width} x {height} pixels are too long and thin, crop it")
        return np.array(as_labels(image) if labels else as_shown(image))


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
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=png_info(settings)))


def save_animation(frames: list[Image.Image], path: Path, settings: dict) -> None:
    """Write two frames or more of one size as an endless .gif (256 colours) or animated .png (exact), whole
    or not at all. The settings are kept as `save_png` does, in a .gif as its comment."""
    gif = path.suffix.lower() == ".gif"
    kept = {"comment": json.dumps(settings).encode()} if gif else {"pnginfo": png_info(settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: frames[0].save(
        temporary, format="GIF" if gif else "PNG", save_all=True, append_images=frames[1:], duration=FRAME,
        loop=0, **kept))


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


def is_foreign(path: Path) -> bool:
    """Whether this is a whole picture that `save_png` has not written."""
    try:
        with Image.open(path) as image:
            with suppress(KeyError, ValueError, RecursionError):
                json.loads(image.info["moa"])
                return False  # known by its head: nothing is decoded
            image.load()
            return True
    except (OSError, ValueError, SyntaxError, MemoryError):
        return False


def parameters_text(settings: dict) -> str:
    """The settings in the form that web UIs read back: prompt, negative prompt, one line of pairs."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {"Steps": settings["steps"], "Sampler": LABELS.get(settings["sampler"], settings["sampler"]),
             "CFG scale": settings["guidance_scale"], "Seed": settings["seed"],
             "Size": f"{settings['width']}x{settings['height']}", "Model": quoted(settings["weights"]),
             **({"Clip skip": settings["clip_skip"]} if settings["clip_skip"] > 1 else {}),
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


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (...) in [-1, 1]."""
    return -10 * math.log10(max(((pictures - others) / 2).square().mean().item(), 1e-12))


# --- grids and labels ---

THUMBNAIL = 128
FONT = ImageFont.load_default(13)
LINE = 18  # pixels per line of text


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy, at most `THUMBNAIL` pixels wide and high."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def write(canvas: ImageDraw.ImageDraw, x: int, y: int, text: str, width: int) -> None:
    """One line of text, cut where it would leave `width`."""
    text = shown = " ".join(text.split())
    while FONT.getlength(shown) > width and text:
        text = text[:-1]
        shown = text + "…"
    canvas.text((x, y), shown, "black", FONT)


def labelled(tiles: Sequence[tuple[Image.Image, str]], columns: int, gap: int = 8) -> Image.Image:
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


def captioned(image: Image.Image, text: str) -> tuple[Image.Image, str]:
    """A tile for `labelled`, with the whole of its text below the picture."""
    return stack([image, heading(text, max(THUMBNAIL, image.width), margin=0)]), ""


def page(title: str, *parts: Image.Image) -> Image.Image:
    """Pictures below each other, and over them a title."""
    return stack([heading(title, max(part.width for part in parts)), *parts])


def stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def beside(parts: Sequence[Image.Image]) -> Image.Image:
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
    for word in text.split():
        if lines and FONT.getlength(f"{lines[-1]} {word}") <= width - 2 * margin:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    image = Image.new("RGB", (width, LINE * len(lines) + 8), "white")
    for i, line in enumerate(lines):
        write(ImageDraw.Draw(image), margin, 8 + LINE * i, line, width - 2 * margin)
    return image


def photo_image(photo: Tensor) -> Image.Image:
    """A photo (3, H, W) in [0, 1], or a person alone (4, H, W) over white."""
    there = photo[3].bool() if len(photo) == 4 else torch.tensor(True)
    return to_images(torch.where(there, photo[:3], 1.0)[None] * 2 - 1)[0]


def portrait(photos: Sequence[Tensor], size: tuple[int, int]) -> Image.Image:
    """Photos beside each other on white, in a picture of this (width, height)."""
    tile = Image.new("RGB", size, "white")
    for k, photo in enumerate(photos):
        left, right = size[0] * k // len(photos), size[0] * (k + 1) // len(photos)
        small = ImageOps.contain(photo_image(photo), (max(1, right - left), size[1]))
        tile.paste(small, ((left + right - small.width) // 2, (size[1] - small.height) // 2))
    return tile


# --- routing maps ---

PRIOR, PERSONALIZED = (28, 36, 84), (255, 205, 70)  # the two ends of the routing maps' colours
NO_MAP = (226, 226, 226)


class RoutingSheet:
    """What the routers gave to the personalized experts while one picture was drawn, and where these
    looked at each subject's token.

    One map per transformer block (row, in forward order) and step (column, `COLUMNS` of them at
    most), for self- and for cross-attention and for each of the subjects whose names are given.
    """

    COLUMNS, CELL = 20, 36

    def __init__(self, steps: int, names: Sequence[str] = ()):
        shown = np.linspace(1, steps, min(steps, self.COLUMNS)).round()
        self.shown = {int(step) for step in shown}
        self.names = list(names)
        self.columns: list[tuple[int, dict[tuple[int, str], Tensor]]] = []  # t, {(l, kind): (1, N)}

    def add(self, step: int, t: int, routing: dict, x0: Tensor, attention: dict | None = None) -> None:
        """Keep the maps of the step that just ended; none when the prior drew it alone.

        routing: {(l, kind): (B or 2B, N, E)}; of a guided batch the half with the prompt comes last.
        x0: (B, 4, h, w). attention: {l: (B or 2B, H, N, S)} of the named subjects' tokens, of which the
        mean over heads is kept.
        """
        self.size = x0.shape[-2:]
        if step in self.shown and len(self.columns) < len(self.shown):
            maps = {key: r[-len(x0)][None, :, 1:].sum(-1).float().cpu() for key, r in routing.items()}
            for layer, a in (attention or {}).items():
                each = a[-len(x0)].mean(0).float().cpu()  # (N, S)
                maps |= {(layer, name): each[None, :, s] for s, name in enumerate(self.names)}
            self.columns.append((t, maps))

    @contextmanager
    def recording(self, unet: UNet, positions: Tensor | None = None, first: int = 0) -> Iterator[Callable]:
        """Inside, the UNet's routers are watched. Yields what `Pipeline.generate` is to call after each
        step. positions: (B, S) the named subjects' tokens, B as large as the UNet's batch. first: which
        sample of the batch counts."""
        attention_maps = nullcontext({}) if positions is None else record_subject_attention(unet, positions)
        with record_routing(unet) as routing, attention_maps as attention:
            def watch(step: int, steps: int, t: int, x0: Tensor) -> None:
                self.add(step, t, routing, x0[first:], attention)
                routing.clear()
                attention.clear()
            yield watch

    def draw(self, picture: Image.Image, people: list[tuple[Image.Image, str]]) -> Image.Image:
        """The sheet, with the picture, the mean of all maps and the subjects on its left."""
        means = [(image, f"{title}: {colours}") for title, (image, colours) in
                 [("mean", self.mean(picture.size)),
                  *((f"to {name}", self.mean(picture.size, name)) for name in self.names)]]
        side = labelled([captioned(*tile) for tile in [(picture, "the picture"), *means, *people]], 1)
        panels = [self.panel(kind) for kind in ("self", "cross", *self.names)]
        body = beside([side, stack([beside(panels[k:k + 2]) for k in range(0, len(panels), 2)])])
        return stack([self.legend(body.width), body])

    def mean(self, size: tuple[int, int], name: str | None = None) -> tuple[Image.Image, str]:
        """The mean over layers and steps of what the routers gave (Eq. 10, of the other expert), or of the
        attention to a subject, as large as the picture. Its own smallest and largest values are the ends
        of the colour scale, since they lie close; the text says which."""
        maps = [weights for _, column in self.columns for (_, kind), weights in column.items()
                if (kind == name if name else kind not in self.names)]
        if not maps:
            return Image.new("RGB", size, NO_MAP), "drawn by the base model"
        mean = mean_routing(maps, *self.size)[0]
        low, high = mean.min(), mean.max()
        image = paint((mean - low) / (high - low).clamp(min=1e-6))
        return image.resize(size, Image.Resampling.NEAREST), f"dark {low:.2f}, yellow {high:.2f}"

    def panel(self, kind: str) -> Image.Image:
        """The maps of all layers and steps of self- or cross-attention or, brought to the largest value of
        all subjects' maps, of the attention to a subject."""
        peak = self.peak() if kind in self.names else 1.0
        scale = self.CELL / max(self.size)
        height, width = (max(1, round(scale * side)) for side in self.size)
        row, column, left, top = max(height, LINE) + 2, max(width, 28) + 2, 44, 2 * LINE + 8
        layers = 1 + max((layer for _, maps in self.columns for layer, _ in maps), default=0)
        panel = Image.new("RGB", (left + column * len(self.columns) + 12, top + row * layers + 8), "white")
        canvas = ImageDraw.Draw(panel)
        title = f"attention to {kind}, from 0 to {peak:.2f}" if kind in self.names else f"{kind}-attention"
        write(canvas, left, 8, title, panel.width - left)
        write(canvas, 8, 8 + LINE, "t =", left)
        for layer in range(layers):
            write(canvas, 8, top + row * layer + (height - LINE) // 2, f"l = {layer}", left)
        for i, (t, maps) in enumerate(self.columns):
            write(canvas, left + column * i, 8 + LINE, str(t), column)
            for layer in range(layers):
                tile = self.tile(maps.get((layer, kind)), peak)
                panel.paste(tile.resize((width, height), Image.Resampling.NEAREST),
                            (left + column * i, top + row * layer))
        return panel

    def peak(self) -> float:
        """The largest attention to any subject."""
        return max((float(weights.max()) for _, maps in self.columns
                    for (_, kind), weights in maps.items() if kind in self.names), default=0.0) or 1.0

    def tile(self, weights: Tensor | None, peak: float = 1.0) -> Image.Image:
        """One map (1, N) on its own grid; yellow is `peak`."""
        if weights is None:
            return Image.new("RGB", (1, 1), NO_MAP)
        return paint(self.unfold(weights) / peak)

    def unfold(self, weights: Tensor) -> Tensor:
        """(1, N) -> (h, w)."""
        height, _ = grid(weights.shape[1], self.size[0] / self.size[1])
        return rearrange(weights, "1 (h w) -> h w", h=height)

    def numbers(self) -> dict:
        """Everything that the sheet shows, for JSON: `timesteps` in the order of drawing and, for "self",
        "cross" and each subject's name, `mean` [layer][timestep] and `maps` [layer][timestep], each a
        list of rows on the layer's own grid; None where the prior drew alone."""
        layers = 1 + max((layer for _, maps in self.columns for layer, _ in maps), default=-1)

        def table(value: Callable[[Tensor], object], kind: str) -> list[list]:
            found = [[maps.get((layer, kind)) for _, maps in self.columns] for layer in range(layers)]
            return [[None if weights is None else value(weights) for weights in row] for row in found]

        def mean(weights: Tensor) -> float:
            return round(float(weights.mean()), 6)

        def rows(weights: Tensor) -> list[list[float]]:
            return [[round(value, 4) for value in row] for row in self.unfold(weights).tolist()]

        kinds = ("self", "cross", *self.names)
        return {"timesteps": [t for t, _ in self.columns],
                "mean": {kind: table(mean, kind) for kind in kinds},
                "maps": {kind: table(rows, kind) for kind in kinds}}

    def legend(self, width: int) -> Image.Image:
        """What the colours say."""
        image = Image.new("RGB", (width, LINE + 8), "white")
        canvas, x = ImageDraw.Draw(image), 8
        scale, none = paint(torch.linspace(0, 1, 100)[None]), Image.new("RGB", (1, 1), NO_MAP)
        for tile, size, text in ((scale, 100, "weight of the personalized expert, from 0 to 1"),
                                 (none, LINE, "drawn by the base model;   "
                                              "l: transformer block in forward order, t: timestep")):
            image.paste(tile.resize((size, LINE - 2)), (x, 8))
            write(canvas, x + size + 6, 8, text, width)
            x += size + 30 + round(FONT.getlength(text))
        return image


def paint(weights: Tensor) -> Image.Image:
    """(h, w) in [0, 1] -> from the prior's colour to the personalized expert's."""
    values = weights.clamp(0, 1).numpy()[..., None]
    colours = (1 - values) * np.array(PRIOR) + values * np.array(PERSONALIZED)
    return Image.fromarray(colours.round().astype(np.uint8))
