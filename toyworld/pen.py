"""Shapes on a picture, in a scaled and mirrored frame, and whose they are."""
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIZE = 128
SUPERSAMPLING = 3

Color = tuple[int, ...]
Point = tuple[float, float]


def shade(color: Color, factor: float) -> Color:
    """Darker (factor < 1) or lighter, towards white (factor > 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in color)
    return tuple(int(c + (255 - c) * (factor - 1)) for c in color)


@dataclass(frozen=True)
class Pen:
    """Draws shapes in a scaled, optionally mirrored frame, on a picture and its owner map.

    The owner map holds, per supersampled pixel, the label of the topmost opaque shape; reduced
    to the output size it gives each person's visible alpha exactly. Translucent colors (RGBA)
    tint the picture and leave the owner map alone.
    """

    image: Image.Image
    draw: ImageDraw.ImageDraw
    owners: ImageDraw.ImageDraw
    zoom: float  # supersampled pixels per canvas unit
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    flip: int = 1
    label: int = 0

    def at(self, x: float, y: float, scale: float = 1.0, flip: int = 1) -> "Pen":
        """A pen whose origin is at (x, y) of this pen's frame."""
        return replace(self, x=self.x + self.flip * self.scale * x, y=self.y + self.scale * y,
                       scale=self.scale * scale, flip=self.flip * flip)

    def inverse(self, x: float, y: float) -> Point:
        """Canvas coordinates to this pen's frame."""
        return self.flip * (x - self.x) / self.scale, (y - self.y) / self.scale

    def _map(self, points: list[Point]) -> list[Point]:
        k, z = self.scale * self.zoom, self.zoom
        return [(self.x * z + self.flip * k * x, self.y * z + k * y) for x, y in points]

    def _each(self, color: Color) -> list[tuple[ImageDraw.ImageDraw, Color | int]]:
        """The surfaces that a shape of this color goes on, each with its fill."""
        if len(color) == 4:
            return [(self.draw, color)]
        return [(self.draw, color), (self.owners, self.label)]

    def _box(self, cx: float, cy: float, rx: float, ry: float) -> list[float]:
        ((x, y),), k = self._map([(cx, cy)]), self.scale * self.zoom
        return [x - rx * k, y - ry * k, x + rx * k, y + ry * k]

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, color: Color) -> None:
        """Filled ellipse with center (cx, cy) and radii rx, ry."""
        for surface, fill in self._each(color):
            surface.ellipse(self._box(cx, cy, rx, ry), fill=fill)

    def ring(self, cx: float, cy: float, r: float, width: float, color: Color) -> None:
        """Circle outline with outer radius r."""
        line = max(1, round(width * self.scale * self.zoom))
        for surface, fill in self._each(color):
            surface.ellipse(self._box(cx, cy, r, r), outline=fill, width=line)

    def chord(self, cx: float, cy: float, rx: float, ry: float, start: float, end: float,
              color: Color) -> None:
        """Ellipse segment between two angles in degrees, clockwise from the right."""
        if self.flip < 0:
            start, end = 180 - end, 180 - start
        for surface, fill in self._each(color):
            surface.chord(self._box(cx, cy, rx, ry), start, end, fill=fill)

    def arc(self, cx: float, cy: float, rx: float, ry: float, start: float, end: float,
            width: float, color: Color) -> None:
        """Thick ellipse arc between two angles in degrees."""
        if self.flip < 0:
            start, end = 180 - end, 180 - start
        line = max(1, round(width * self.scale * self.zoom))
        for surface, fill in self._each(color):
            surface.arc(self._box(cx, cy, rx, ry), start, end, fill=fill, width=line)

    def polygon(self, points: list[Point], color: Color) -> None:
        """Filled polygon."""
        for surface, fill in self._each(color):
            surface.polygon(self._map(points), fill=fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """Filled rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def limb(self, points: list[Point], width: float, color: Color) -> None:
        """Thick polyline with round joints and ends."""
        mapped = self._map(points)
        line = max(1, round(width * self.scale * self.zoom))
        r = line / 2
        for surface, fill in self._each(color):
            surface.line(mapped, fill=fill, width=line)
            for x, y in mapped:
                surface.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    def blob(self, points: list[Point], radius: float, color: Color) -> None:
        """Polygon grown by `radius`, which rounds its corners."""
        self.polygon(points, color)
        self.limb([*points, points[0]], 2 * radius, color)

    def sky(self, *colors: Color) -> None:
        """Fill the whole picture with a vertical gradient."""
        column = Image.new("RGB", (1, len(colors)))
        column.putdata(colors)
        self.image.paste(column.resize(self.image.size, Image.Resampling.BICUBIC))

    def band(self, top: float, upper: Color, lower: Color) -> None:
        """Vertical gradient from y = top to the bottom of the canvas."""
        y, (width, height) = round(top * self.zoom), self.image.size
        column = Image.new("RGB", (1, 2))
        column.putdata([upper, lower])
        self.image.paste(column.resize((width, height - y), Image.Resampling.BICUBIC), (0, y))

    def glow(self, x: float, y: float, r: float, color: Color, strength: int = 26) -> None:
        """Soft light: a few translucent discs."""
        for factor in (1.0, 0.75, 0.5):
            self.ellipse(x, y, r * factor, r * factor, (*color, strength))
