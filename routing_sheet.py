"""What the routers do while a picture is drawn, as numbers and as a picture (MoA paper, Fig. 6, 19)."""
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from layout import FONT, LINE, beside, captioned, stack, write
from moa.loss import mean_routing
from moa.router import grid

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

        routing: {(l, kind): (B or 2B, N, 2)}; of a guided batch the half with the prompt comes last.
        x0: (B, 4, h, w). attention: {l: (B or 2B, H, N, S)} of the named subjects' tokens, of which the
        mean over heads is kept.
        """
        self.size = x0.shape[-2:]
        if step in self.shown and len(self.columns) < len(self.shown):
            maps = {key: r[-len(x0)][None, :, 1].float().cpu() for key, r in routing.items()}
            for layer, a in (attention or {}).items():
                each = a[-len(x0)].mean(0).float().cpu()  # (N, S)
                maps |= {(layer, name): each[None, :, s] for s, name in enumerate(self.names)}
            self.columns.append((t, maps))

    def draw(self, picture: Image.Image, people: list[tuple[Image.Image, str]]) -> Image.Image:
        """The sheet, with the picture, the mean of all maps and the subjects on its left."""
        means = [(image, f"{title}: {colours}") for title, (image, colours) in
                 [("mean", self.mean(picture.size)),
                  *((f"to {name}", self.mean(picture.size, name)) for name in self.names)]]
        side = captioned([(picture, "the picture"), *means, *people], 1)
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
            return Image.new("RGB", size, NO_MAP), "drawn by the prior alone"
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
                                 (none, LINE, "drawn by the prior alone;   "
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
