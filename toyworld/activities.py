"""What the people of the small world do: each painter poses the figures and draws them with their props."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from toyworld import props
from toyworld.pen import Pen, Point
from toyworld.people import Pose, draw_person, outfit_of
from toyworld.places import either_side
from toyworld.scenes import Identity, pick


@dataclass(frozen=True)
class Figure:
    """A placed person; `pen` draws in its body units."""

    person: Identity
    pen: Pen


@dataclass(frozen=True)
class Stage:
    """What an activity draws on: canvas pen (label 0), random layout and figures left to right."""

    pen: Pen
    rng: np.random.Generator
    figures: tuple[Figure, ...]

    @property
    def center(self) -> float:
        return sum(figure.pen.x for figure in self.figures) / len(self.figures)

    @property
    def ground(self) -> float:
        return self.figures[0].pen.y

    def prop(self, figure: Figure) -> Pen:
        """The figure's own frame, drawing background."""
        return replace(figure.pen, label=0)


PROP_COLORS = ((226, 62, 70), (44, 118, 214), (250, 168, 40), (36, 160, 130), (150, 80, 200))


def _shadow(stage: Stage, half: float = 20) -> None:
    for figure in stage.figures:
        stage.prop(figure).ellipse(0, -1, half, 4.2, (30, 16, 60, 62))


def _standing_pose(rng: np.random.Generator) -> Pose:
    jitter = rng.uniform(-1, 1, 5)
    left = (-19 - 2 * jitter[0], -28 + jitter[1])
    right = (19 + 2 * jitter[2], -28 - jitter[1])
    pose = Pose(hands=(left, right), lean=0.8 * jitter[3], gaze=0.6 * jitter[4])
    if rng.random() < 0.3:  # one hand on the hip
        pose = replace(pose, hands=((-12, -27), pose.hands[1]), elbows=((-23, -36), None))
    return pose


def _waving_pose(rng: np.random.Generator, side: int) -> Pose:
    pose = _standing_pose(rng)
    sign = (-1, 1)[side]
    hand, elbow = (sign * (29 + rng.uniform(-2, 2)), -70 + rng.uniform(-3, 3)), (sign * 23, -50)
    hands = (hand, (19, -28)) if side == 0 else ((-19, -28), hand)
    elbows = (elbow, None) if side == 0 else (None, elbow)
    return replace(pose, hands=hands, elbows=elbows)


def _standing(stage: Stage) -> None:
    _shadow(stage)
    for figure in stage.figures:
        pose = _standing_pose(stage.rng)
        draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, ""))


def _waving(stage: Stage) -> None:
    _shadow(stage)
    for i, figure in enumerate(stage.figures):
        side = i if len(stage.figures) == 2 else int(stage.rng.integers(2))
        pose = _waving_pose(stage.rng, side)
        draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, ""))


def _riding(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    pen = replace(figure.pen, flip=either_side(rng))
    color = pick(rng, PROP_COLORS)
    stage.prop(figure).ellipse(0, -1, 42, 4, (30, 16, 60, 62))
    down = int(rng.integers(2))
    pedals = ((1, -22), (-1, -4)) if down else ((2, -4), (6, -20))
    pose = Pose(hands=((16, -46), (13, -47)), elbows=((9, -50), (2, -47)), hip=(-9, -36), lean=6,
                feet=pedals, knees=((8, -32), (7, -22)) if down else ((5, -20), (12, -34)),
                gaze=0.8, toes=1, seated=True)
    draw_person(pen, figure.person, pose, outfit_of(figure.person, ""),
                between_legs=lambda: props.bike(replace(pen, label=0), color))


def _sitting(stage: Stage) -> None:
    color = pick(stage.rng, ((206, 84, 92), (62, 128, 190), (88, 156, 110), (232, 158, 70),
                              (150, 104, 176)))
    seat = 21 * stage.figures[0].pen.scale if len(stage.figures) == 1 else 19
    half = 44 * stage.figures[0].pen.scale if len(stage.figures) == 1 else 60
    box = (stage.center, stage.ground - 1, min(half, 60), seat, color)
    stage.pen.ellipse(stage.center, stage.ground, box[2] + 2, 4.5, (30, 16, 60, 62))
    props.sofa(stage.pen, *box)
    for figure in stage.figures:
        jitter = stage.rng.uniform(-1, 1, 2)
        hip = -(seat + 2) / figure.pen.scale
        pose = Pose(hands=((-11, hip + 1), (11, hip + 1)), hip=(0, hip), lean=jitter[0],
                    elbows=((-17, hip - 11), (17, hip - 11)), gaze=0.6 * jitter[1], seated=True,
                    knees=((-9, hip + 6), (9, hip + 6)), feet=((-9.5, 0), (9.5, 0)))
        draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, ""))
    props.sofa_arms(stage.pen, *box)


def _holding(stage: Stage, draw: Callable[[Pen, float, float, float], None], grip: Point) -> None:
    """People around a prop; draw(pen, x, y, size), `grip` = hand offset in units of the size."""
    _shadow(stage)
    if len(stage.figures) == 1:
        (figure,) = stage.figures
        size, y = 44.0, -36 + stage.rng.uniform(-1, 1)
        x, dy = grip[0] * size, grip[1] * size
        pose = Pose(hands=((-x, y + dy), (x, y + dy)), gaze=stage.rng.uniform(-0.3, 0.3),
                    elbows=((-22, -36), (22, -36)))
        draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, ""),
                    before_arms=lambda: draw(stage.prop(figure), 0, y, size))
        return
    # Two people share one prop between them, below the chin of the shorter one.
    scale = min(figure.pen.scale for figure in stage.figures)
    size = 42.0
    y = stage.ground - 35 * scale
    outfits = [outfit_of(figure.person, "") for figure in stage.figures]
    poses = []
    for i, figure in enumerate(stage.figures):
        sign = (-1, 1)[i]
        target = figure.pen.inverse(stage.center + sign * grip[0] * size * 0.9, y + grip[1] * size)
        rest = (sign * 18, -28)
        poses.append(Pose(hands=(rest, target) if i == 0 else (target, rest), gaze=-sign * 0.7))
        draw_person(figure.pen, figure.person, poses[i], outfits[i])
    draw(stage.pen, stage.center, y, size)
    for i, figure in enumerate(stage.figures):  # the inner hands close around the prop
        hand = poses[i].hands[1 - i]
        figure.pen.ellipse(*hand, 4.5, 4.5, outfits[i].hand)


def _reading(stage: Stage) -> None:
    cover = pick(stage.rng, PROP_COLORS)
    _holding(stage, lambda pen, x, y, size: props.book(pen, x, y, size, cover), (0.48, 0.1))


def _flowers(stage: Stage) -> None:
    wrap = pick(stage.rng, ((250, 238, 214), (196, 226, 250), (252, 208, 222), (236, 214, 250)))

    def draw(pen: Pen, x: float, y: float, size: float) -> None:
        props.bouquet(pen, x, y - 0.1 * size, 0.38 * size, wrap)

    _holding(stage, draw, (0.13, 0.36))


def _drinking(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    pen = replace(figure.pen, flip=either_side(rng))
    tea = pick(rng, ((222, 166, 112), (246, 170, 190), (166, 204, 128), (190, 160, 226)))
    straw = pick(rng, PROP_COLORS)
    _shadow(stage)
    pose = Pose(hands=((-13, -32), (13, -32)), elbows=((-23, -37), (23, -37)), gaze=0.3)
    draw_person(pen, figure.person, pose, outfit_of(figure.person, ""), before_arms=lambda: props.boba(
        replace(pen, label=0), 0, -18, 35, tea, straw, (1, -63)))


def _running(stage: Stage) -> None:
    direction = either_side(stage.rng)
    for figure in stage.figures:
        stage.prop(figure).ellipse(0, 0, 24, 4, (30, 16, 60, 62))
        pen, jitter = replace(figure.pen, flip=direction), stage.rng.uniform(-1, 1, 3)
        pose = Pose(hands=((-19 + jitter[0], -40), (22, -50 + jitter[1])),
                    elbows=((-22, -47), (19, -38)), hip=(-1, -28), lean=5 + jitter[2], gaze=0.8,
                    knees=((-10, -14), (13, -22)), feet=((-25, -9), (17, -3)), toes=1)
        draw_person(pen, figure.person, pose, outfit_of(figure.person, ""))


def _cowboy(stage: Stage) -> None:
    (figure,) = stage.figures
    _shadow(stage)
    pose = replace(_standing_pose(stage.rng), hands=((-14, -25), (14, -25)),
                   elbows=((-24, -36), (24, -36)), feet=((-9, 0), (9, 0)))
    draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, "cowboy"))


def _astronaut(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    _shadow(stage)
    pose = _waving_pose(rng, int(rng.integers(2))) if rng.random() < 0.4 else _standing_pose(rng)
    pose = replace(pose, feet=((-9, 0), (9, 0)))
    draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, "space"))


def _racer(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    color = pick(rng, ((226, 48, 52), (38, 104, 220), (30, 160, 110)))
    flip = either_side(rng)
    stage.pen.ellipse(64, stage.ground - 4, 62, 5, (30, 16, 60, 70))
    props.race_car(stage.pen, 64 + rng.uniform(-3, 3), stage.ground - 4, color, flip)
    _shadow(stage)
    pen = replace(figure.pen, flip=flip)
    pose = Pose(hands=((-18, -28), (20, -20)), elbows=(None, (25, -42)), gaze=-0.2)
    wear = outfit_of(figure.person, "race", color)
    draw_person(pen, figure.person, pose, wear)
    props.helmet(replace(pen, label=0), 21, -27, (255, 206, 62))
    pen.ellipse(25, -16, 4.8, 4.8, wear.hand)


def _shaking(stage: Stage) -> None:
    _shadow(stage)
    y = stage.ground - 33 * sum(figure.pen.scale for figure in stage.figures) / 2
    for i, figure in enumerate(stage.figures):
        sign = (1, -1)[i]
        target = figure.pen.inverse(stage.center - sign * 0.5, y)
        rest = (-sign * 19, -28)
        pose = Pose(hands=(rest, target) if i == 0 else (target, rest), gaze=sign * 0.9,
                    lean=sign * 1.5)
        draw_person(figure.pen, figure.person, pose, outfit_of(figure.person, ""))


def _dancing(stage: Stage) -> None:
    _shadow(stage)
    order = (0, 1) if stage.rng.random() < 0.5 else (1, 0)
    if stage.figures[0].person.hair_style == "ponytail":
        order = (0, 1)  # or the ponytail would cover the other face
    y = stage.ground - 36 * min(figure.pen.scale for figure in stage.figures)
    for i in order:
        figure, sign = stage.figures[i], (1, -1)[i]
        pen = replace(figure.pen, flip=sign)  # posed as the left dancer, mirrored for the right
        joined = pen.inverse(stage.center, y)
        raised = (-27 + stage.rng.uniform(-2, 2), -74 + stage.rng.uniform(-3, 3))
        pose = Pose(hands=(raised, joined), elbows=((-23, -52), None), lean=-1.0, gaze=0.8,
                    knees=((-14, -14), (6, -13)), feet=((-25, -8), (5, 0)))
        draw_person(pen, figure.person, pose, outfit_of(figure.person, ""))


ACTIVITY_PAINTERS: dict[str, Callable[[Stage], None]] = {
    "standing": _standing, "waving": _waving, "riding a bike": _riding,
    "sitting on a sofa": _sitting, "reading a book": _reading,
    "holding a bouquet of roses": _flowers, "drinking boba": _drinking, "running": _running,
    "dressed as a cowboy": _cowboy, "wearing a space suit": _astronaut,
    "dressed as a race car driver": _racer, "shaking hands": _shaking, "dancing": _dancing,
}

# Half the distance between two people, in canvas units.
SPREAD = {"dancing": 19.5, "sitting on a sofa": 22.0, "reading a book": 23.0,
          "holding a bouquet of roses": 23.0}
