"""Does a pose ControlNet of the small world pose people?

    python -m bench.poses --controlnet runs/controlnet

Held-out scenes are drawn from the same noise without a skeleton, with their own, and with the one of another
scene, which their prompt contradicts. The people that the judge sees in a picture are compared with the
rendered people of the scene that the skeleton is of: IoU of the masks, the share of joints that lie on
people, and of wrists alone, which stick out. Prints a table; its first row is the judge on the renders
themselves, the most that can be reached.
"""
import argparse

import numpy as np

import command
import toyworld
from toyworld.skeleton import JOINTS, draw_skeletons, scene_joints
from evaluate import SHIPPED, iou, load_judge, read

BATCH = 16
WRISTS = [i for i, name in enumerate(JOINTS) if name.endswith("wrist")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--controlnet", required=True, metavar="FILE", help="file or folder")
    add("--count", type=int, default=64, metavar="N", help="scenes (default 64)")
    add("--first", type=int, default=1000, metavar="SEED",
        help="seed of the first held-out scene (default 1000)")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps (default 20)")
    return parser.parse_args(argv)


def score(found: np.ndarray, masks: np.ndarray, joints: list[np.ndarray]) -> list[float]:
    """Mean IoU, joints and wrists on people."""
    overlap = [iou(a, b) for a, b in zip(found, masks, strict=True)]
    on = [mask[y, x] for mask, several in zip(found, joints, strict=True)
          for x, y in several.round().astype(int).clip(0, toyworld.SIZE - 1).transpose(0, 2, 1)]
    on = np.stack(on)  # (people, 18)
    return [float(np.mean(overlap)), float(on.mean()), float(on[:, WRISTS].mean())]


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    import torch

    from images import to_picture
    from pipeline import Control, Pipeline
    from weights.checkpoints import Refusal
    from weights.controlnet import load_controlnet
    try:
        net = load_controlnet(args.controlnet)
    except Refusal as error:
        raise ValueError(f"--controlnet: {error}") from error
    pipeline = Pipeline.load(SHIPPED)
    judge = load_judge(SHIPPED / "judge.safetensors")
    scenes = [toyworld.sample_scene(args.first + i, "test") for i in range(args.count)]
    images, masks = zip(*(toyworld.render_scene(scene) for scene in scenes), strict=True)
    masks = np.stack([several.any(0) for several in masks])
    joints = [scene_joints(scene) for scene in scenes]
    hints = to_picture(np.stack([draw_skeletons(several) for several in joints])) / 2 + 0.5
    order = list(range(args.count))
    shifted = order[1:] + order[:1]  # to each scene the next one's skeleton

    def people(pictures: torch.Tensor) -> np.ndarray:
        """(B, 3, S, S) in [-1, 1] -> where the judge sees people, (B, S, S) bool."""
        return np.stack([reading.people for reading in read(judge, pictures)])

    def draw(prompts: list[str], skeletons: list[int] | None) -> np.ndarray:
        parts = []
        for start in range(0, args.count, BATCH):
            batch = order[start:start + BATCH]
            controls = [Control(net, hints[[skeletons[i] for i in batch]])] if skeletons else []
            parts.append(pipeline.generate([prompts[i] for i in batch], batch, steps=args.steps,
                                           guidance_scale=4.0, controls=controls))
        return people(torch.cat(parts))

    def row(name: str, found: np.ndarray, truth: list[int]) -> None:
        values = score(found, masks[truth], [joints[i] for i in truth])
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |", flush=True)

    print(f"{args.count} scenes\n| | people IoU | joints on people | wrists on people |\n|---|---|---|---|")
    row("render", people(to_picture(np.stack(images))), order)
    for name, prompts in (("caption", [scene.caption for scene in scenes]), ("no prompt", [""] * args.count)):
        plain = draw(prompts, None)
        row(f"{name}, no ControlNet", plain, order)
        row(f"{name}, its skeleton", draw(prompts, order), order)
        row(f"{name}, no ControlNet, against another scene", plain, shifted)
        row(f"{name}, another scene's skeleton", draw(prompts, shifted), shifted)


if __name__ == "__main__":
    main()
