"""What the people of the small world hold and use; drawn with label 0, so it counts as background."""
import math

from toyworld.pen import Color, Pen, Point, shade


def book(pen: Pen, x: float, y: float, width: float, cover: Color) -> None:
    """Open book seen from the front, centered at (x, y)."""
    w, h = width / 2, width * 0.29
    pen.blob([(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)], 1.6, cover)
    for s in (-1, 1):
        pen.polygon([(x, y - h + 2.5), (x + s * (w - 2), y - h - 1.5), (x + s * (w - 2), y - h + 2),
                     (x, y - h + 5)], (255, 253, 240))
        pen.ellipse(x + s * w * 0.5, y + 1, w * 0.24, w * 0.24, shade(cover, 1.55))
    pen.limb([(x, y - h + 2), (x, y + h)], 2.4, shade(cover, 0.72))


def bouquet(pen: Pen, x: float, y: float, r: float, wrap: Color) -> None:
    """Red roses in a paper cone; (x, y) is the middle of the flowers."""
    tip = y + 1.75 * r
    pen.polygon([(x - r, y), (x + r, y), (x + 0.22 * r, tip), (x - 0.22 * r, tip)], wrap)
    pen.polygon([(x + 0.2 * r, y), (x + r, y), (x + 0.22 * r, y + 1.75 * r)], shade(wrap, 0.88))
    for angle in range(20, 380, 45):
        pen.ellipse(x + 0.98 * r * math.cos(math.radians(angle)),
                    y + 0.72 * r * math.sin(math.radians(angle)), 0.36 * r, 0.32 * r, (52, 150, 78))
    for dx, dy in ((-0.62, -0.32), (0, -0.55), (0.62, -0.32), (-0.7, 0.28), (0.7, 0.28), (0, 0.12)):
        cx, cy = x + dx * r, y + dy * r
        pen.ellipse(cx, cy, 0.4 * r, 0.38 * r, (222, 34, 62))
        pen.arc(cx, cy, 0.24 * r, 0.22 * r, 150, 400, 0.12 * r, (255, 120, 138))


def boba(pen: Pen, x: float, y: float, h: float, tea: Color, straw: Color, mouth: Point) -> None:
    """Cup of bubble tea with its bottom center at (x, y) and a straw to `mouth`."""
    w = h * 0.4
    pen.limb([(x, y - h), mouth], 4.2, straw)
    cup = [(x - w, y - h), (x + w, y - h), (x + w * 0.74, y), (x - w * 0.74, y)]
    pen.blob(cup, 1.4, (250, 246, 240))
    pen.polygon([(x - w * 0.95, y - h * 0.84), (x + w * 0.95, y - h * 0.84), (x + w * 0.74, y),
                 (x - w * 0.74, y)], tea)
    for dx, dy in ((-0.45, 0.1), (0, 0.08), (0.45, 0.1), (-0.25, 0.26), (0.25, 0.27), (0.55, 0.3)):
        pen.ellipse(x + dx * w, y - dy * h, w * 0.21, w * 0.21, (52, 30, 34))
    pen.limb([(x - w * 1.1, y - h), (x + w * 1.1, y - h)], 3.2, straw)
    pen.limb([(x - w * 0.6, y - h * 0.74), (x - w * 0.52, y - h * 0.42)], 2.4, (255, 255, 255, 120))


def bike(pen: Pen, color: Color) -> None:
    """Bicycle heading right, wheels on y = 0, in body units."""
    rear, front, crank, seat, bar = (-25, -15), (25, -15), (-2, -14), (-9, -33), (18, -38)
    for x, y in (rear, front):
        pen.ring(x, y, 15, 3.4, (48, 46, 58))
        pen.ring(x, y, 11.6, 1.2, (190, 196, 208))
        pen.ellipse(x, y, 2.8, 2.8, (190, 196, 208))
    for joints in ((crank, rear, seat, crank), (seat, bar, crank), (front, bar)):
        pen.limb(list(joints), 3.4, color)
    pen.limb([bar, (bar[0] - 1, bar[1] - 7), (bar[0] - 5, bar[1] - 9)], 3, (70, 66, 80))
    pen.limb([(seat[0] - 6, seat[1] - 1), (seat[0] + 5, seat[1] - 1)], 4.6, (70, 50, 50))
    pen.ellipse(*crank, 4.6, 4.6, shade(color, 0.7))


def sofa(pen: Pen, x: float, y: float, half: float, seat: float, color: Color) -> None:
    """Back and seat of a sofa standing on y; the arm rests are drawn later, over the people."""
    back = seat + 26
    for s in (-1, 1):
        pen.rect(x + s * (half - 8) - 2, y - 5, x + s * (half - 8) + 2, y + 1, (92, 60, 48))
    pen.blob([(x - half + 6, y - back), (x + half - 6, y - back), (x + half - 6, y - 6),
              (x - half + 6, y - 6)], 5, shade(color, 0.88))
    pen.blob([(x - half + 6, y - seat), (x + half - 6, y - seat), (x + half - 6, y - 7),
              (x - half + 6, y - 7)], 3, color)
    pen.limb([(x - half + 6, y - seat + 7), (x + half - 6, y - seat + 7)], 1.6, shade(color, 0.76))
    pen.limb([(x - half + 10, y - seat - 0.5), (x + half - 10, y - seat - 0.5)], 2.4,
             shade(color, 1.2))


def sofa_arms(pen: Pen, x: float, y: float, half: float, seat: float, color: Color) -> None:
    for s in (-1, 1):
        pen.limb([(x + s * (half - 4.5), y - 7), (x + s * (half - 4.5), y - seat - 9)], 11,
                 shade(color, 0.94))
        pen.ellipse(x + s * (half - 4.5), y - seat - 9, 6.4, 6.4, shade(color, 1.15))


def race_car(pen: Pen, x: float, y: float, color: Color, flip: int) -> None:
    """Low racing car in profile behind the driver, wheels on y."""
    car = pen.at(x, y, 1.0, flip)
    car.rect(-62, -40, -46, -35, shade(color, 0.8))
    car.rect(-56, -36, -51, -20, shade(color, 0.7))
    body = [(-54, -20), (-26, -30), (4, -29), (26, -20), (58, -15), (60, -9), (-54, -9)]
    car.blob(body, 3, color)
    car.blob([(-10, -30), (8, -29), (14, -25), (-12, -25)], 2, (70, 90, 124))
    car.blob([(48, -9), (64, -9), (64, -7), (48, -7)], 2, shade(color, 0.7))
    car.limb([(-50, -14), (54, -14)], 3.4, (255, 255, 255))
    for wx in (-38, 40):
        car.ellipse(wx, -12, 12.5, 12.5, (44, 42, 52))
        car.ellipse(wx, -12, 6, 6, (206, 212, 222))
    for wx in (-22, 22):
        car.ellipse(wx, -20, 6.8, 6.8, (255, 255, 255))


def helmet(pen: Pen, x: float, y: float, color: Color) -> None:
    pen.ellipse(x, y, 12.5, 12, color)
    pen.rect(x - 10, y + 4, x + 10, y + 9, shade(color, 0.85))
    pen.limb([(x - 5, y), (x + 9, y)], 7, (48, 58, 86))
    pen.limb([(x - 3, y - 0.8), (x + 2, y - 0.8)], 2, (150, 200, 240))
    pen.arc(x, y, 11, 10.5, 220, 320, 2.6, (255, 255, 255))
