"""The people of the small world, drawn in hundredths of their height, feet at y = 0, head at negative y."""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from toyworld.pen import Color, Pen, Point, shade
from toyworld.scenes import BOTTOM, HAIR, SHIRT, SKIN, TRAITS, Identity

INK = (44, 34, 46)


@dataclass(frozen=True)
class Pose:
    """Joint positions in body units; index 0 is on the left of the person's own frame."""

    hands: tuple[Point, Point] = ((-18, -29), (18, -29))
    feet: tuple[Point, Point] = ((-7, 0), (7, 0))
    knees: tuple[Point, Point] | None = None
    elbows: tuple[Point | None, Point | None] = (None, None)
    hip: Point = (0, -26)
    lean: float = 0.0  # shoulders relative to the hip, to the right
    gaze: float = 0.0  # -1 (left) to 1 (right)
    toes: float = 0.0  # shoes point to the left (-1), the viewer (0) or the right (1)
    seated: bool = False


@dataclass(frozen=True)
class Outfit:
    """Colors and widths of the clothes as drawn."""

    shirt: Color
    sleeve: Color
    forearm: Color
    hand: Color
    thigh: Color
    shin: Color
    shoe: Color
    arm: float = 8.0
    leg: float = 9.5
    bulk: float = 0.0
    pattern: str = "plain"
    skirt: bool = False
    costume: str = ""


def outfit_of(person: Identity, costume: str, suit: Color = (236, 240, 246)) -> Outfit:
    """The person's own clothes, or a cowboy, space or race costume."""
    skin, shirt = SKIN[person.skin], SHIRT[person.shirt_color]
    bottom = BOTTOM[person.bottom_color]
    if costume in ("space", "race"):
        sleeve, bulk = shade(suit, 0.9), 2.0 if costume == "space" else 0.0
        glove = (74, 104, 176) if costume == "space" else (50, 48, 60)
        return Outfit(suit, sleeve, sleeve, glove, suit, suit, glove, 8.5 + 1.5 * bulk,
                      9.5 + 1.5 * bulk, bulk, costume=costume)
    skirt = person.bottom == "skirt"
    shoe = (128, 70, 38) if costume == "cowboy" else (66, 56, 70)
    return Outfit(shirt, shade(shirt, 0.88), skin, skin, bottom, skin if skirt else bottom, shoe,
                  pattern=person.pattern, skirt=skirt, costume=costume)


def _leg(pen: Pen, wear: Outfit, pose: Pose, side: int, joint: Point, dim: float = 1.0) -> None:
    """One leg: thigh, shin and shoe; `dim` darkens a far leg."""
    foot = pose.feet[side]
    knee = pose.knees[side] if pose.knees else ((joint[0] + foot[0]) / 2, (joint[1] + foot[1]) / 2)
    ankle = (foot[0], foot[1] - 4)
    pen.limb([knee, ankle], wear.leg * 0.92, shade(wear.shin, dim * 0.97))
    thigh = wear.leg + 2 if wear.skirt and pose.seated else wear.leg
    bare = wear.skirt and not pose.seated
    pen.limb([joint, knee], thigh, shade(wear.shin if bare else wear.thigh, dim))
    shoe = shade(wear.shoe, dim)
    toe = pose.toes * 3.5 if pose.toes else (-1.2, 1.2)[side]
    if wear.costume in ("cowboy", "space"):
        pen.limb([(foot[0], foot[1] - 10), ankle], wear.leg + 1.6, shoe)
    pen.blob([(foot[0] - 3 + toe, foot[1] - 3), (foot[0] + 3 + toe, foot[1] - 3),
              (foot[0] + 3 + toe, foot[1] - 2.4), (foot[0] - 3 + toe, foot[1] - 2.4)], 2.6, shoe)


def _arm(pen: Pen, wear: Outfit, pose: Pose, side: int, shoulder: Point, dim: float = 1.0) -> None:
    """One arm; the elbow bends outwards and down unless the pose says where it is."""
    hand = pose.hands[side]
    middle = ((shoulder[0] + hand[0]) / 2, (shoulder[1] + hand[1]) / 2)
    elbow = pose.elbows[side] or (middle[0] + (-2.5, 2.5)[side], middle[1] + 1.5)
    pen.limb([elbow, hand], wear.arm * 0.8, shade(wear.forearm, dim))
    pen.limb([shoulder, elbow], wear.arm, shade(wear.sleeve, dim))
    if wear.costume == "space":
        pen.ellipse(*elbow, wear.arm * 0.5, wear.arm * 0.5, (250, 140, 52))
    pen.ellipse(*hand, wear.arm * 0.56, wear.arm * 0.56, shade(wear.hand, dim))


def _pattern(pen: Pen, wear: Outfit, corners: tuple[Point, Point, Point, Point]) -> None:
    """Bold stripes or dots inside the torso (corners: shoulders left, right, hips right, left)."""
    light = sum(wear.shirt) > 560
    color = (40, 58, 120) if light else (255, 252, 244)
    (x0, y0), (x1, _), (x2, y2), (x3, _) = corners

    def edge(t: float, u: float) -> Point:
        left, right = x0 + (x3 - x0) * t, x1 + (x2 - x1) * t
        return left + (right - left) * u, y0 + (y2 - y0) * t

    if wear.pattern == "stripes":
        for t in (0.1, 0.44, 0.78):
            low = t + 0.17
            pen.polygon([edge(t, -0.06), edge(t, 1.06), edge(low, 1.06), edge(low, -0.06)], color)
    elif wear.pattern == "dots":
        for t, us in ((0.26, (0.1, 0.5, 0.9)), (0.56, (0.3, 0.7)), (0.86, (0.1, 0.5, 0.9))):
            for u in us:
                pen.ellipse(*edge(t, u), 2.8, 2.8, color)


def _torso(pen: Pen, wear: Outfit, pose: Pose, half: float, width: float) -> None:
    """Shirt with its pattern, shading and the top of the trousers or the skirt."""
    hx, hy = pose.hip
    sx, sy = hx + pose.lean, hy - 26
    waist = (half - 1.5) * 0.5 + 5 * width + wear.bulk
    half = half - 2 + wear.bulk
    corners = ((sx - half, sy + 2), (sx + half, sy + 2), (hx + waist, hy), (hx - waist, hy))
    pen.blob([(hx - waist + 2, hy + 1), (hx + waist - 2, hy + 1), (hx + waist - 2, hy + 3),
              (hx - waist + 2, hy + 3)], 3.5, wear.thigh)
    pen.blob(list(corners), 2.6, wear.shirt)
    _pattern(pen, wear, corners)
    pen.polygon([(sx + half - 3, sy), (sx + half + 2.4, sy), (hx + waist + 2.4, hy + 2),
                 (hx + waist - 3, hy + 2)], (30, 10, 60, 26))
    if wear.skirt and not pose.seated:
        flare = waist + 6
        pen.blob([(hx - waist + 1, hy), (hx + waist - 1, hy), (hx + flare, hy + 14),
                  (hx - flare, hy + 14)], 2, wear.thigh)
        for u in (-0.45, 0.1, 0.6):
            pen.polygon([(hx + u * waist, hy + 2), (hx + u * flare - 1.6, hy + 15.5),
                         (hx + u * flare + 1.6, hy + 15.5)], shade(wear.thigh, 0.86))


def _cowboy_vest(pen: Pen, pose: Pose, half: float, width: float) -> None:
    hx, hy = pose.hip
    sx, sy, leather = hx + pose.lean, hy - 26, (128, 74, 42)
    for s in (-1, 1):
        pen.blob([(sx + s * (half - 1.5), sy + 1.5), (sx + s * (half - 5), sy + 1.5),
                  (hx + s * 4, hy - 11), (hx + s * 5, hy + 1),
                  (hx + s * (half * 0.5 + 4.5 * width), hy + 1)], 1.6, leather)
    pen.ellipse(sx - half + 4.5, sy + 11, 2.8, 2.8, (255, 214, 72))
    pen.rect(hx - half, hy + 1, hx + half, hy + 4.5, (74, 44, 34))
    pen.ellipse(hx, hy + 2.7, 3.2, 2.8, (255, 210, 80))


def _suit_details(pen: Pen, wear: Outfit, pose: Pose, half: float) -> None:
    hx, hy = pose.hip
    sx, sy = hx + pose.lean, hy - 26
    if wear.costume == "space":
        pen.limb([(sx - half + 1, sy), (sx + half - 1, sy)], 6.5, (168, 182, 208))
        pen.blob([(hx - 7, hy - 16), (hx + 7, hy - 16), (hx + 7, hy - 7), (hx - 7, hy - 7)], 1.5,
                 (92, 112, 150))
        for x, color in ((-5, (246, 76, 70)), (0, (255, 206, 64)), (5, (76, 206, 130))):
            pen.ellipse(hx + x, hy - 11.5, 2.3, 2.3, color)
        pen.limb([(hx - half, hy + 1), (hx + half, hy + 1)], 4, (250, 140, 52))
        return
    pen.limb([(sx - 6, sy), (sx + 6, sy)], 4, (44, 42, 54))
    pen.polygon([(sx - 4.5, sy + 1), (sx + 4.5, sy + 1), (hx + 4.5, hy + 4), (hx - 4.5, hy + 4)],
                (255, 255, 255))
    # A two-column checkered band is the racing sign that survives at low resolution.
    for row in range(6):
        x = hx - 4.5 + 4.5 * (row % 2) + pose.lean * (5 - row) / 6
        pen.rect(x, hy - 22 + 4.4 * row, x + 4.5, hy - 17.6 + 4.4 * row, (36, 34, 44))
    pen.limb([(hx - half, hy + 2), (hx + half, hy + 2)], 3.6, (44, 42, 54))


# Hair, in the head frame: face center at the origin, face radii 18.5 x 17.5.


def _hair_back(pen: Pen, style: str, color: Color) -> None:
    """The part of the hair that lies behind the body and the face."""
    dark = shade(color, 0.88)
    if style == "long":
        pen.blob([(-15, -10), (15, -10), (18, 28), (-18, 28)], 6.5, dark)
    elif style == "curly":
        for angle in range(0, 360, 30):
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            pen.ellipse(20 * x, -5 + 17 * y, 9.5, 9.5, dark)
        pen.ellipse(0, -5, 22, 20, dark)
    elif style == "ponytail":
        pen.limb([(14, -15), (25, -14), (31, -4), (32, 10)], 13, dark)
        pen.limb([(31, 4), (30, 18)], 9, dark)
        pen.limb([(29, 14), (27, 24)], 5, dark)
        pen.ellipse(19, -15, 4.5, 4.5, (255, 214, 92))
    elif style == "bun":
        pen.ellipse(0, -25, 11, 9.5, dark)
        pen.arc(0, -25, 7, 6, 190, 300, 1.8, shade(color, 1.25))
    pen.ellipse(0, -2, 20.5, 19 if style != "short" else 17.5, dark)


def _cap(pen: Pen, color: Color, angle: float = 200) -> None:
    """Hair on top of the head down to the hairline, with a highlight."""
    pen.chord(0, -1.5, 20.5, 20, angle, 540 - angle, color)


def _hair_front(pen: Pen, style: str, color: Color) -> None:
    """Hairline and fringe over the face."""
    if style == "spiky":
        spikes = [(-21, 2), (-29, -8), (-20, -11), (-27, -24), (-14, -20), (-13, -34), (-2, -22),
                  (5, -37), (10, -22), (22, -31), (19, -15), (30, -16), (21, 2), (18, -7)]
        fringe = [(11, -9), (7, -4), (2, -10), (-4, -4), (-9, -10), (-14, -4), (-18, -7)]
        pen.polygon([*spikes, *fringe], color)
    elif style == "curly":
        for x, y in ((-18, -6), (-12, -12), (-4, -14), (4, -14), (12, -12), (18, -6)):
            pen.ellipse(x, y, 7, 6.5, color)
        _cap(pen, color, 215)
    elif style == "bun":
        _cap(pen, color, 205)
        pen.polygon([(-19.5, -10), (-19.5, 0), (-15, -9)], color)
        pen.polygon([(19.5, -10), (19.5, 0), (15, -9)], color)
    elif style == "long":
        _cap(pen, color, 207)
        for s in (-1, 1):
            pen.blob([(s * 2, -12), (s * 15, -10), (s * 18.5, 20), (s * 19, -10)], 1.6, color)
            pen.limb([(s * 19, -4), (s * 20.5, 26)], 6, color)
    else:  # short and ponytail: a fringe swept to one side
        _cap(pen, color, 203)
        pen.blob([(-18.5, -9), (-17.5, -1), (-14, -7), (-3, -6), (9, -10), (12, -13)], 1.4, color)
        pen.polygon([(19.6, -10), (19.3, 0), (13, -11)], color)
    pen.arc(0, 0, 15.5, 16, 215, 275, 2.6, shade(color, 1.35))


def _hat(pen: Pen) -> None:
    """Cowboy hat in the head frame."""
    felt, dark = (170, 108, 60), (112, 66, 40)
    pen.blob([(-12, -14), (12, -14), (10, -29), (3, -26), (-3, -26), (-10, -29)], 3, felt)
    pen.limb([(-13, -14), (13, -14)], 5, (196, 48, 48))
    pen.blob([(-29, -15), (-18, -10.5), (18, -10.5), (29, -15), (18, -9), (-18, -9)], 2.4, dark)


def _face(pen: Pen, person: Identity, gaze: float) -> None:
    """Ears, face, beard, eyes, brows, mouth and glasses."""
    skin, hair = SKIN[person.skin], HAIR[person.hair_color]
    lashes = TRAITS[person.noun].lashes
    for s in (-1, 1):
        pen.ellipse(s * 18.5, 3, 3.6, 4.2, shade(skin, 0.9))
    pen.ellipse(0, 0, 18.5, 17.5, skin)
    pen = pen.at(3.2 * gaze, 0)
    if person.beard == "yes":
        chin = pen.at(-3.2 * gaze, 0)
        chin.chord(0, 1.5, 18.6, 19.5, 20, 160, hair)
        pen.ellipse(0, 8.6, 8.6, 3.2, hair)
    for s in (-1, 1):
        pen.ellipse(s * 11.5, 8, 3.9, 2.7, (250, 90, 96, 88))
        if person.glasses == "yes":
            pen.ellipse(s * 8.2, 2.2, 7, 7, (255, 255, 255, 96))
        pen.ellipse(s * 7.3 + 0.5 * gaze, 2.3, 3.3, 4.1, (255, 252, 248))
        pen.ellipse(s * 7.3 + gaze, 2.4, 2.7, 3.5, INK)
        pen.ellipse(s * 7.3 + gaze - 0.8, 1.1, 1.0, 1.2, (255, 255, 255))
        if lashes:
            pen.arc(s * 7.3, 2.6, 4, 5, *((190, 300) if s < 0 else (240, 350)), 1.5, INK)
            pen.limb([(s * 10.6, 1.2), (s * 12.2, 0.2)], 1.3, INK)
        brow = shade(hair, 0.7)
        pen.limb([(s * 4.8, -5.4), (s * 7.6, -6.2), (s * 10.2, -5)], 1.2 if lashes else 2, brow)
    mouth = (214, 60, 84) if lashes else (176, 62, 62)
    pen.chord(0, 9, 4.6, 4.6, 0, 180, mouth)
    pen.chord(0, 9, 3.2, 1.6, 0, 180, (255, 255, 255))
    if person.glasses == "yes":
        for s in (-1, 1):
            pen.ring(s * 8.2, 2.2, 7.8, 2.3, (28, 28, 40))
            pen.limb([(s * 15.5, 1.4), (s * 18 - 3.2 * gaze, 0.5)], 2.2, (28, 28, 40))
        pen.limb([(-1.4, 1.4), (1.4, 1.4)], 2.2, (28, 28, 40))


def draw_person(
    pen: Pen, person: Identity, pose: Pose, wear: Outfit,
    between_legs: Callable[[], None] | None = None,
    before_arms: Callable[[], None] | None = None,
) -> None:
    """Draw a person back to front; the callbacks draw props that its limbs reach around."""
    traits = TRAITS[person.noun]
    half = traits.shoulders * person.width
    (hx, hy), hair = pose.hip, HAIR[person.hair_color]
    sx, sy = hx + pose.lean, hy - 26
    head = pen.at(sx + pose.lean * 0.35, sy - 3.5 - 17.5 * traits.head, traits.head)
    if wear.costume == "space":
        pen.blob([(sx - half, sy - 3), (sx + half, sy - 3), (hx + half, hy - 5),
                  (hx - half, hy - 5)], 5.5, (112, 124, 156))
    # A ponytail trails behind in profile and is otherwise on the viewer's right.
    hair_pen = head.at(0, 0, 1, -1) if pose.toes else replace(head, flip=1)
    style = person.hair_style
    if wear.costume == "cowboy" and style not in ("long", "ponytail"):
        style = "short"  # the hat presses everything else flat
    _hair_back(hair_pen, style, hair)
    apart = 5.5 * person.width
    _leg(pen, wear, pose, 0, (hx - apart, hy + 2), 0.84 if between_legs else 1.0)
    if between_legs:
        between_legs()
        _arm(pen, wear, pose, 0, (sx - half + 4, sy + 4), 0.88)
    _leg(pen, wear, pose, 1, (hx + apart, hy + 2))
    pen.limb([(sx, sy), (sx + pose.lean * 0.2, sy - 4)], 8, shade(SKIN[person.skin], 0.85))
    _torso(pen, wear, pose, half, person.width)
    if wear.costume == "cowboy":
        _cowboy_vest(pen, pose, half, person.width)
        pen.polygon([(sx - 9, sy - 2), (sx + 9, sy - 2), (sx, sy + 8)], (214, 52, 52))
    elif wear.costume:
        _suit_details(pen, wear, pose, half)
    pen.ellipse(sx + pose.lean * 0.2, sy, half * 0.7, 3, (90, 10, 40, 44))
    _face(head, person, pose.gaze)
    _hair_front(hair_pen, style, hair)
    if wear.costume == "cowboy":
        _hat(head)
    if before_arms:
        before_arms()
    for side, s in ((0, -1), (1, 1)):
        if not (between_legs and side == 0):
            _arm(pen, wear, pose, side, (sx + s * (half - 1), sy + 4.5))
