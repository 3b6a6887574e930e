"""The places of the small world: each painter fills the whole canvas."""
import math
from collections.abc import Callable

import numpy as np

from toyworld.pen import Color, Pen, shade
from toyworld.scenes import pick


def either_side(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _cloud(pen: Pen, x: float, y: float, r: float, white: Color = (255, 255, 255)) -> None:
    pen.limb([(x - 1.6 * r, y), (x + 1.6 * r, y)], r, white)
    pen.ellipse(x - 0.6 * r, y - 0.4 * r, r * 0.8, r * 0.8, white)
    pen.ellipse(x + 0.5 * r, y - 0.3 * r, r * 0.65, r * 0.6, white)


def _pine(pen: Pen, x: float, y: float, h: float, color: Color, snow: bool = False) -> None:
    pen.rect(x - 0.05 * h, y - 0.2 * h, x + 0.05 * h, y, (104, 72, 56))
    for level, half in ((0.15, 0.3), (0.4, 0.24), (0.65, 0.17)):
        top = y - h * (level + 0.38)
        pen.polygon([(x - half * h, y - level * h), (x, top), (x + half * h, y - level * h)], color)
        pen.polygon([(x + 0.06 * h, y - level * h), (x, top), (x + half * h, y - level * h)],
                    shade(color, 0.85))
        if snow:
            pen.polygon([(x - half * h * 0.5, y - h * (level + 0.19)), (x, top),
                         (x + half * h * 0.5, y - h * (level + 0.19))], (246, 250, 255))


def _tree(pen: Pen, x: float, y: float, h: float, color: Color) -> None:
    pen.limb([(x, y), (x, y - 0.55 * h)], 0.1 * h, (126, 84, 58))
    pen.ellipse(x, y - 0.68 * h, 0.34 * h, 0.34 * h, color)
    pen.ellipse(x - 0.2 * h, y - 0.55 * h, 0.22 * h, 0.2 * h, color)
    pen.ellipse(x + 0.22 * h, y - 0.56 * h, 0.22 * h, 0.2 * h, shade(color, 0.92))
    pen.ellipse(x - 0.1 * h, y - 0.8 * h, 0.15 * h, 0.13 * h, shade(color, 1.18))


def _beach(pen: Pen, rng: np.random.Generator) -> None:
    sea, side = rng.uniform(54, 64), either_side(rng)
    pen.sky((96, 190, 246), (178, 226, 252), (236, 248, 250))
    pen.glow(64 - 40 * side, 20, 20, (255, 246, 190), 60)
    pen.ellipse(64 - 40 * side, 20, 9, 9, (255, 226, 104))
    _cloud(pen, 64 + 20 * side, rng.uniform(14, 26), 6)
    _cloud(pen, 64 - 10 * side, rng.uniform(34, 44), 4)
    pen.band(sea, (24, 132, 200), (72, 208, 214))
    for _ in range(5):
        x, y = rng.uniform(0, 128), rng.uniform(sea + 4, sea + 18)
        pen.limb([(x - 7, y), (x + 7, y)], 1.4, (140, 226, 236))
    pen.ellipse(64, 150, 130, 66, (248, 250, 246))
    pen.ellipse(64, 154, 130, 67, (246, 218, 160))
    pen.ellipse(64, 166, 130, 66, (250, 226, 172))
    x = 64 + side * rng.uniform(46, 56)
    trunk = [(x, 102), (x - 2 * side, 76), (x - 5 * side, 52), (x - 10 * side, 30)]
    pen.limb(trunk, 5.5, (158, 108, 66))
    for angle in (200, 160, 235, 305, 340, 20):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        cx, cy = trunk[-1]
        pen.limb([(cx, cy), (cx + 13 * dx, cy + 9 * dy), (cx + 22 * dx, cy + 14 * dy + 7)], 4.6,
                 (42, 158, 92) if angle % 2 else (30, 136, 84))
    umbrella = 64 - side * rng.uniform(44, 54)
    pen.limb([(umbrella, 108), (umbrella, 74)], 2, (250, 250, 250))
    for half, color in ((20, (240, 82, 84)), (12, (255, 250, 244)), (5, (240, 82, 84))):
        pen.chord(umbrella, 80, half, 16, 180, 360, color)


def _paris(pen: Pen, rng: np.random.Generator) -> None:
    x, ground = 64 + either_side(rng) * rng.uniform(39, 48), rng.uniform(88, 94)
    pen.sky((142, 178, 236), (246, 200, 214), (255, 226, 196))
    _cloud(pen, rng.uniform(14, 40), 18, 5, (255, 240, 240))
    _cloud(pen, rng.uniform(84, 114), 30, 5, (255, 240, 240))
    for left in range(-6, 128, 19):
        top = ground - rng.uniform(16, 27)
        wall = pick(rng, ((244, 226, 204), (236, 212, 190), (250, 234, 214)))
        pen.rect(left, top, left + 18.4, ground, wall)
        pen.polygon([(left - 0.5, top), (left + 2.5, top - 6), (left + 16, top - 6),
                     (left + 19, top)], (112, 124, 152))
        for wx in (left + 4, left + 11):
            for wy in (top + 4, top + 13):
                pen.rect(wx, wy, wx + 3.4, wy + 5, (150, 168, 196))
    iron, dark = (132, 92, 78), (108, 72, 64)
    for s in (-1, 1):
        pen.polygon([(x + s * 25, ground), (x + s * 14, ground), (x + s * 7, 62), (x + s * 1, 28),
                     (x, 28), (x, 6), (x + s * 1.6, 6), (x + s * 4.5, 34), (x + s * 13, 66)], iron)
    pen.polygon([(x - 5, 34), (x + 5, 34), (x + 12, 64), (x - 12, 64)], iron)
    pen.polygon([(x - 1.8, 42), (x + 1.8, 42), (x + 4.5, 58), (x - 4.5, 58)], (250, 214, 206))
    pen.rect(x - 15, 61, x + 15, 66, dark)
    pen.rect(x - 7, 35, x + 7, 39, dark)
    pen.arc(x, ground, 16, 22, 180, 360, 3, dark)
    pen.limb([(x, 2), (x, 10)], 1.6, iron)
    for tx in np.arange(4, 128, 13):
        pen.ellipse(tx, ground - 2, 7.5, 6, (96, 162, 96))
        pen.ellipse(tx - 2, ground - 4, 4, 3, (122, 184, 112))
    pen.band(ground, (226, 212, 202), (198, 184, 182))
    pen.polygon([(50, ground), (78, ground), (118, 128), (10, 128)], (238, 226, 214))


def _mountain(pen: Pen, rng: np.random.Generator) -> None:
    pen.sky((92, 164, 236), (170, 212, 248), (226, 240, 250))
    _cloud(pen, rng.uniform(10, 118), 14, 5)
    peaks = [(rng.uniform(-4, 10), 38, 48, (150, 170, 208)),
             (rng.uniform(118, 132), 34, 48, (150, 170, 208)),
             (64 + either_side(rng) * rng.uniform(20, 36), 10, 62, (108, 128, 176))]
    for x, top, half, color in peaks:
        base, d = 94, half / 82 * (94 - top) / 60 * 22
        pen.polygon([(x - half, base), (x, top), (x + half, base)], color)
        pen.polygon([(x + 5, base), (x, top), (x + half, base)], shade(color, 0.84))
        pen.polygon([(x - d, top + 26), (x, top), (x + d, top + 26), (x + 0.45 * d, top + 20),
                     (x + 0.1 * d, top + 28), (x - 0.4 * d, top + 20)], (252, 252, 255))
    _cloud(pen, rng.uniform(10, 118), 54, 6, (240, 246, 252))
    pen.band(90, (118, 190, 92), (70, 150, 76))
    pen.ellipse(24, 104, 66, 20, (126, 196, 96))
    pen.ellipse(116, 106, 60, 20, (104, 180, 88))
    for x in (5, 18, 110, 123):
        _pine(pen, x + rng.uniform(-3, 3), rng.uniform(92, 100), rng.uniform(26, 38), (36, 108, 88))
    pen.ellipse(rng.uniform(8, 24), 122, 9, 5, (148, 150, 162))
    pen.ellipse(rng.uniform(104, 120), 120, 8, 5, (164, 166, 176))


def _park(pen: Pen, rng: np.random.Generator) -> None:
    side = either_side(rng)
    pen.sky((122, 200, 250), (196, 232, 252), (240, 248, 236))
    _cloud(pen, rng.uniform(20, 60), 16, 5)
    _cloud(pen, rng.uniform(76, 116), 26, 4)
    for x in range(-4, 140, 16):
        pen.ellipse(x, 78, 13, 12, (132, 200, 130))
    pen.band(80, (146, 214, 98), (92, 180, 80))
    pen.polygon([(64 - side * 4, 80), (64 + side * 6, 80), (64 + side * 40, 128),
                 (64 - side * 34, 128)], (240, 220, 176))
    for x, h in ((rng.uniform(6, 18), 70), (rng.uniform(108, 122), 76)):
        _tree(pen, x, rng.uniform(92, 98), h, pick(rng, ((58, 158, 84), (74, 172, 82))))
    x = 64 + side * 44
    pen.rect(x - 16, 86, x + 16, 90, (186, 116, 66))
    pen.rect(x - 16, 92, x + 16, 96, (186, 116, 66))
    pen.rect(x - 17, 98, x + 17, 102, (164, 96, 54))
    for s in (-13, 13):
        pen.rect(x + s - 1.5, 86, x + s + 1.5, 110, (84, 78, 88))
    for _ in range(9):
        fx, fy = 64 - side * rng.uniform(28, 62), rng.uniform(104, 126)
        petals = pick(rng, ((255, 240, 120), (255, 138, 160), (255, 255, 255)))
        pen.ellipse(fx, fy, 2.4, 2.4, petals)
        pen.ellipse(fx, fy, 0.9, 0.9, (240, 160, 60))


def _lavender(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(66, 74), either_side(rng)
    pen.sky((250, 176, 170), (255, 210, 164), (255, 238, 196))
    sun = 64 + side * rng.uniform(26, 44)
    pen.glow(sun, horizon - 16, 24, (255, 244, 196), 60)
    pen.ellipse(sun, horizon - 16, 11, 11, (255, 236, 150))
    pen.ellipse(24, horizon + 6, 60, 18, (176, 150, 198))
    pen.ellipse(108, horizon + 8, 56, 18, (152, 130, 186))
    pen.band(horizon, (126, 178, 98), (84, 140, 78))
    vanish = 64 + rng.uniform(-16, 16)

    def at(y: float, end: float) -> float:
        """x at height y of the row line that reaches x = end at the bottom of the canvas."""
        return vanish + (end - vanish) * (y - horizon + 5) / (133 - horizon)

    for i, end in enumerate(range(-176, 310, 27)):
        color = (150, 88, 206) if i % 2 else (132, 70, 190)
        pen.polygon([(at(horizon, end), horizon), (at(horizon, end + 19), horizon),
                     (at(128, end + 19), 128), (at(128, end), 128)], color)
        for y in (horizon + 3, horizon + 9, horizon + 18, horizon + 30, horizon + 45):
            r = 9.5 * (y - horizon + 5) / (133 - horizon)
            pen.ellipse(at(y, end + 7), y, r, r * 0.8, shade(color, 1.22))
    x = 64 - side * rng.uniform(38, 50)
    pen.rect(x - 10, horizon - 10, x + 10, horizon + 3, (252, 232, 206))
    pen.polygon([(x - 13, horizon - 10), (x, horizon - 20), (x + 13, horizon - 10)], (206, 98, 76))
    pen.rect(x - 2.5, horizon - 5, x + 2.5, horizon + 3, (150, 98, 84))


def _flask(pen: Pen, x: float, y: float, h: float, color: Color, round_body: bool) -> None:
    glass = (226, 242, 250)
    pen.rect(x - 0.11 * h, y - h, x + 0.11 * h, y - 0.3 * h, glass)
    if round_body:
        pen.ellipse(x, y - 0.34 * h, 0.36 * h, 0.34 * h, glass)
        pen.chord(x, y - 0.34 * h, 0.36 * h, 0.34 * h, -15, 195, color)
    else:
        pen.polygon([(x - 0.11 * h, y - 0.7 * h), (x + 0.11 * h, y - 0.7 * h), (x + 0.38 * h, y),
                     (x - 0.38 * h, y)], glass)
        pen.polygon([(x - 0.22 * h, y - 0.42 * h), (x + 0.22 * h, y - 0.42 * h), (x + 0.38 * h, y),
                     (x - 0.38 * h, y)], color)
    pen.limb([(x - 0.15 * h, y - h), (x + 0.15 * h, y - h)], 0.09 * h, (186, 210, 226))


def _laboratory(pen: Pen, rng: np.random.Generator) -> None:
    liquids = ((255, 92, 122), (72, 206, 132), (255, 186, 52), (82, 142, 252), (186, 96, 236))
    pen.sky((206, 234, 240), (224, 244, 244), (236, 248, 246))
    for x in range(0, 128, 32):
        pen.rect(x, 0, x + 0.8, 84, (194, 224, 232))
    for shelf in (26, 56):
        pen.rect(0, shelf, 128, shelf + 4, (150, 178, 196))
        pen.rect(0, shelf + 4, 128, shelf + 6, (186, 212, 222))
        for x in range(10, 128, 21):
            _flask(pen, x + rng.uniform(-3, 3), shelf, rng.uniform(16, 21), pick(rng, liquids),
                   rng.random() < 0.5)
    pen.band(98, (178, 196, 214), (148, 168, 192))
    for x in range(-40, 180, 26):
        pen.polygon([(64 + (x - 64) * 0.7, 98), (64 + (x - 64) * 0.7 + 1, 98), (x + 1.5, 128),
                     (x, 128)], (196, 212, 226))
    pen.rect(0, 80, 128, 86, (250, 252, 252))
    pen.rect(0, 86, 128, 104, (112, 160, 184))
    for x in (22, 64, 106):
        pen.rect(x - 17, 89, x + 17, 101, (132, 178, 200))
    side = either_side(rng)
    _flask(pen, 64 - side * 52, 80, 22, pick(rng, liquids), True)
    x = 64 + side * 50
    pen.limb([(x - 8, 79), (x + 8, 79)], 4, (70, 84, 112))
    pen.arc(x, 69, 9, 10, -90, 90, 4, (70, 84, 112))
    pen.limb([(x - 5, 56), (x - 1, 68)], 5, (54, 66, 94))


def _rocket(pen: Pen, x: float, y: float, h: float) -> None:
    red = (232, 72, 72)
    pen.polygon([(x - 0.36 * h, y), (x - 0.16 * h, y - 0.4 * h), (x + 0.16 * h, y - 0.4 * h),
                 (x + 0.36 * h, y), (x, y - 0.14 * h)], red)
    pen.ellipse(x, y - 0.5 * h, 0.2 * h, 0.48 * h, (246, 248, 252))
    pen.chord(x, y - 0.5 * h, 0.2 * h, 0.48 * h, 226, 314, red)
    pen.rect(x - 0.12 * h, y - 0.16 * h, x + 0.12 * h, y - 0.06 * h, (120, 128, 148))
    pen.ellipse(x, y - 0.54 * h, 0.11 * h, 0.11 * h, (92, 104, 140))
    pen.ellipse(x, y - 0.54 * h, 0.075 * h, 0.075 * h, (120, 214, 250))


def _mars(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(76, 86), either_side(rng)
    pen.sky((46, 26, 66), (150, 62, 78), (244, 138, 86))
    for _ in range(16):
        r = rng.uniform(0.7, 1.3)
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 50), r, r, (255, 240, 214))
    planet = 64 - side * rng.uniform(34, 50)
    pen.ellipse(planet, 20, 11, 11, (246, 206, 150))
    pen.ellipse(planet - 3, 17, 7, 7, (255, 224, 178))
    pen.limb([(planet - 17, 24), (planet + 17, 16)], 2.6, (222, 160, 130))
    pen.polygon([(-5, horizon + 4), (12, horizon - 16), (26, horizon - 15), (46, horizon + 4)],
                (172, 70, 56))
    pen.polygon([(80, horizon + 4), (100, horizon - 13), (116, horizon - 20), (140, horizon + 4)],
                (160, 62, 54))
    pen.band(horizon, (226, 102, 58), (168, 58, 42))
    _rocket(pen, 64 + side * rng.uniform(42, 50), horizon + 12, rng.uniform(62, 74))
    for _ in range(5):
        x, y, r = rng.uniform(4, 124), rng.uniform(horizon + 10, 126), rng.uniform(6, 11)
        pen.ellipse(x, y, r, r * 0.38, (150, 52, 40))
        pen.ellipse(x, y + 0.9, r * 0.86, r * 0.26, (188, 72, 48))


def _night_market(pen: Pen, rng: np.random.Generator) -> None:
    pen.sky((22, 20, 62), (52, 34, 98), (108, 54, 112))
    for _ in range(10):
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 30), 0.8, 0.8, (255, 246, 214))
    pen.band(96, (84, 58, 96), (54, 38, 74))
    for left in (-12, 32, 76, 120):
        left += rng.uniform(-3, 3)
        color = pick(rng, ((232, 66, 72), (40, 170, 160), (246, 150, 44), (66, 116, 224)))
        pen.rect(left, 52, left + 40, 88, (255, 196, 96))
        pen.rect(left + 2, 54, left + 38, 70, (255, 222, 142))
        for x in range(4):
            fruit = pick(rng, ((228, 80, 60), (104, 180, 80), (250, 238, 214), (236, 130, 48)))
            pen.ellipse(left + 6 + 9.5 * x, 77, 4.6, 4.6, fruit)
        pen.rect(left - 1, 80, left + 41, 104, (120, 66, 62))
        pen.rect(left - 1, 80, left + 41, 84, (160, 92, 74))
        for i in range(5):
            stripe = color if i % 2 == 0 else (255, 246, 232)
            x = left - 3 + 9.2 * i
            pen.rect(x, 42, x + 9.2, 54, stripe)
            pen.ellipse(x + 4.6, 54, 4.6, 4, stripe)
    for row, sag in ((10, 7), (24, 6)):
        xs = np.arange(-6, 140, 4.0)
        line = [(float(x), row + sag * math.sin(math.pi * ((x + row) % 64) / 64)) for x in xs]
        pen.limb(line, 0.8, (64, 40, 60))
        for x in np.arange(rng.uniform(4, 16), 128, 21):
            y = row + sag * math.sin(math.pi * ((x + row) % 64) / 64) + 7
            pen.glow(x, y, 12, (255, 160, 70), 34)
            pen.ellipse(x, y, 6.2, 6.6, (246, 78, 52))
            pen.ellipse(x, y, 3, 6.4, (255, 132, 70))
            pen.rect(x - 2.6, y - 7.4, x + 2.6, y - 5.6, (255, 210, 96))
            pen.rect(x - 2.6, y + 5.6, x + 2.6, y + 7.4, (255, 210, 96))
    pen.ellipse(64, 122, 70, 16, (255, 170, 90, 30))


def _snow(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(76, 86), either_side(rng)
    pen.sky((150, 190, 232), (198, 222, 246), (232, 242, 252))
    pen.polygon([(-20, 92), (26, 46), (70, 92)], (186, 206, 236))
    pen.polygon([(54, 92), (100, 40), (150, 92)], (174, 198, 232))
    for x in np.arange(2, 130, 17):
        _pine(pen, x + rng.uniform(-3, 3), horizon + 6, rng.uniform(28, 44), (52, 122, 116), True)
    pen.band(horizon + 4, (240, 246, 254), (206, 222, 244))
    pen.ellipse(20, horizon + 14, 66, 12, (246, 250, 255))
    pen.ellipse(116, horizon + 15, 62, 12, (234, 242, 252))
    x, y = 64 + side * rng.uniform(46, 52), 112
    pen.ellipse(x, y + 1, 15, 4, (150, 174, 214, 120))
    for cy, r in ((y - 9, 12), (y - 26, 9)):
        pen.ellipse(x + 0.8, cy + 0.8, r, r, (196, 212, 238))
        pen.ellipse(x - 0.6, cy - 0.6, r - 0.8, r - 0.8, (255, 255, 255))
    pen.limb([(x - 7, y - 19), (x + 7, y - 19)], 4, (226, 62, 66))
    pen.polygon([(x, y - 28), (x - side * 9, y - 25.5), (x, y - 24)], (250, 140, 40))
    for s in (-3, 3):
        pen.ellipse(x + s, y - 30, 1.4, 1.4, (40, 40, 54))
    pen.rect(x - 6, y - 46, x + 6, y - 35, (60, 58, 84))
    pen.rect(x - 9, y - 36, x + 9, y - 33.5, (60, 58, 84))
    for _ in range(34):
        r = rng.uniform(0.9, 1.9)
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 104), r, r, (255, 255, 255))


def _wild_west(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(84, 90), either_side(rng)
    pen.sky((92, 188, 214), (250, 222, 160), (255, 200, 120))
    sun = 64 + side * rng.uniform(10, 30)
    pen.glow(sun, 28, 22, (255, 246, 200), 50)
    pen.ellipse(sun, 28, 10, 10, (255, 240, 170))
    for offset, top, half in ((14, 60, 15), (-16, 66, 12), (62, 62, 15)):
        x = 64 + side * offset
        pen.polygon([(x - half - 7, horizon), (x - half, top), (x + half, top),
                     (x + half + 7, horizon)], (214, 106, 66))
        pen.rect(x - half, top, x + half, top + 4, (232, 132, 84))
    pen.band(horizon, (240, 184, 108), (214, 142, 76))
    x = 64 - side * rng.uniform(32, 37)
    pen.rect(x - 26, 34, x + 26, horizon + 10, (164, 98, 60))
    for y in range(40, int(horizon) + 8, 8):
        pen.rect(x - 26, y, x + 26, y + 1.2, (142, 80, 50))
    pen.rect(x - 29, 24, x + 29, 40, (120, 66, 44))
    pen.rect(x - 26, 27, x + 26, 37, (252, 228, 170))
    # Block letters from a 3x5 grid: a font would depend on the installed Pillow features.
    rows = {"S": (7, 4, 7, 1, 7), "A": (7, 5, 7, 5, 5), "L": (4, 4, 4, 4, 7), "O": (7, 5, 5, 5, 7),
            "N": (5, 7, 7, 7, 5)}
    for i, letter in enumerate("SALOON"):
        for row, bits in enumerate(rows[letter]):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    left, top = x - 23.5 + 8 * i + 2.1 * column, 28 + 1.6 * row
                    pen.rect(left, top, left + 2.2, top + 1.7, (142, 46, 34))
    pen.rect(x - 29, 56, x + 29, 60, (190, 122, 76))
    for s in (-25, 25):
        pen.rect(x + s - 1.5, 60, x + s + 1.5, horizon + 10, (110, 62, 42))
    pen.rect(x - 9, 68, x + 9, horizon + 10, (70, 40, 36))
    for s in (-1, 1):
        pen.rect(x + s * 0.6, 73, x + s * 8.5, horizon + 3, (222, 160, 96))
    x, green = 64 + side * rng.uniform(46, 54), (58, 150, 92)
    pen.limb([(x, 112), (x, 62)], 11, green)
    pen.limb([(x, 94), (x - 13, 92), (x - 13, 78)], 7, green)
    pen.limb([(x, 86), (x + 13, 84), (x + 13, 70)], 7, shade(green, 0.9))
    pen.limb([(x - 2, 108), (x - 2, 64)], 1.6, shade(green, 1.25))


CONTEXT_PAINTERS: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "on the beach": _beach, "in Paris": _paris, "on a mountain": _mountain, "in a park": _park,
    "in a lavender farm": _lavender, "in a laboratory": _laboratory, "on Mars": _mars,
    "in a night market": _night_market, "in the snow": _snow, "in the wild west": _wild_west,
}
