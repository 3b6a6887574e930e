"""Skeletons of the small world's people, drawn as OpenPose draws them: what a pose ControlNet sees.

    python -m toyworld.skeleton --output pose.png --seed 3 --activity dancing
"""
import argparse
import colorsys
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import toyworld
from models.errors import Parser
from toyworld import TRAITS, Identity, Scene, activities
from toyworld.pen import Pen, Point
from toyworld.people import Outfit, Pose

# OpenPose's 18 joints; left and right are the person's own.
JOINTS = ("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow",
          "left wrist", "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
          "right eye", "left eye", "right ear", "left ear")
# Its 17 limbs, as pairs of joints, in the order of their colours.
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
         (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))
COLORS = [tuple(round(255 * value) for value in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18)]
LIMB_SHADE = 0.6  # limbs are darker than joints
WIDTH, RADIUS = 1 / 48, 1 / 56  # of limbs and joints, in picture sides
SUPERSAMPLING = 3


def scene_joints(scene: Scene) -> np.ndarray:
    """(P, 18, 2) x and y of the joints of a scene's people, from left to right, in canvas units (0..128).

    Joints are given also where something hides them.
    """
    found: dict[int, np.ndarray] = {}

    def watch(pen: Pen, person: Identity, pose: Pose, wear: Outfit, **props) -> None:
        found[pen.label] = person_joints(pen, person, pose)

    # All activities draw people through this name. The layout does not depend on the picture's size.
    draw_person, activities.draw_person = activities.draw_person, watch
    try:
        toyworld.render_scene(scene, size=8)
    finally:
        activities.draw_person = draw_person
    return np.stack([found[label] for label in sorted(found)])


def person_joints(pen: Pen, person: Identity, pose: Pose) -> np.ndarray:
    """(18, 2) joints of one person, where `draw_person` has them."""
    traits = TRAITS[person.noun]
    half, apart, (hx, hy) = traits.shoulders * person.width, 5.5 * person.width, pose.hip
    sx, sy = hx + pose.lean, hy - 26
    sides = [_limbs(pose, i, (sx + s * (half - 1), sy + 4.5), (hx + s * apart, hy + 2))
             for i, s in ((0, -1), (1, 1))]
    # People face the viewer: their right is on the viewer's left, unless the pen mirrors them.
    right, left = (0, 1) if pen.flip > 0 else (1, 0)
    body = [pen.at(*point) for point in ((sx, sy), *sides[right][:3], *sides[left][:3], *sides[right][3:],
                                         *sides[left][3:])]
    head = pen.at(sx + pose.lean * 0.35, sy - 3.5 - 17.5 * traits.head, traits.head)
    turn = 3.2 * pose.gaze
    signs = [(-1, 1)[right], (-1, 1)[left]]
    face = [head.at(turn, 5.5)] + [head.at(turn + 7.3 * s, 2.3) for s in signs] + [
        head.at(18.5 * s, 3) for s in signs]
    return np.array([(p.x, p.y) for p in (face[0], *body, *face[1:])])


def _limbs(pose: Pose, side: int, shoulder: Point, hip: Point) -> list[Point]:
    """Shoulder, elbow, wrist, hip, knee and ankle of one side."""
    hand, foot = pose.hands[side], pose.feet[side]
    ankle = (foot[0], foot[1] - 4)
    elbow = pose.elbows[side] or ((shoulder[0] + hand[0]) / 2 + (-2.5, 2.5)[side],
                                  (shoulder[1] + hand[1]) / 2 + 1.5)
    knee = pose.knees[side] if pose.knees else ((hip[0] + foot[0]) / 2, (hip[1] + foot[1]) / 2)
    return [shoulder, elbow, hand, hip, knee, ankle]


def draw_skeletons(joints: np.ndarray, size: int = toyworld.SIZE) -> np.ndarray:
    """(P, 18, 2) joints in canvas units -> picture (S, S, 3) uint8, coloured limbs on black."""
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side))
    draw, line, r = ImageDraw.Draw(image), round(side * WIDTH), side * RADIUS
    for person in joints * (side / toyworld.SIZE):
        points = [tuple(point) for point in person]
        for (a, b), color in zip(LIMBS, COLORS[:len(LIMBS)], strict=True):
            draw.line([points[a], points[b]], tuple(round(LIMB_SHADE * c) for c in color), line)
        for (x, y), color in zip(points, COLORS, strict=True):
            draw.ellipse([x - r, y - r, x + r, y + r], color)
    return np.array(image.reduce(SUPERSAMPLING))


def pose_scene(seed: int, activity: str | None = None) -> Scene:
    """The first held-out scene from `seed` on, if wanted of one activity."""
    scene = toyworld.sample_scene(seed, "test")
    while activity not in (None, scene.activity):
        seed += 1
        scene = toyworld.sample_scene(seed, "test")
    return scene


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("Draw the skeletons of a scene's people.", prog="skeleton")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="a .png")
    add("--seed", type=int, default=0, help="of the scene; with --activity the first from here (default 0)")
    add("--activity", choices=toyworld.ACTIVITIES, metavar="ACTIVITY",
        help=f"one of: {', '.join(toyworld.ACTIVITIES)} (default: any)")
    add("--size", type=int, default=toyworld.SIZE, metavar="PIXELS", help="pixels of a side (default 128)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2 ** 32:
        parser.error(f"--seed must be in 0..{2 ** 32 - 1}, not {args.seed}")
    if not 16 <= args.size <= 4096:
        parser.error(f"--size must be in 16..4096, not {args.size}")
    if args.output.suffix.lower() != ".png":
        parser.error(f"--output {args.output}: pictures are saved as .png, give a name that ends so")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    scene = pose_scene(args.seed, args.activity)
    image = Image.fromarray(draw_skeletons(scene_joints(scene), args.size))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        image.save(args.output)
    except OSError as error:
        print(f"error: {args.output} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output}: {scene.caption}")


if __name__ == "__main__":
    main()
