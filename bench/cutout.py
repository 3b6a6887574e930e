"""What a subject's photo has to be: a portrait, a busy scene, or the person cut out of it.

    python bench/cutout.py --count 128

The small world's benchmark (evaluate.py), with other photos of the same subjects: portraits as in training;
whole scenes in which the subject stands beside somebody else; and the subject cut out of these scenes by
their mask, on grey like the small world's portraits, as sample.py does it there, or on noise, as it does
with weights that were trained on photos.
Prints identity, identity mix-up and background change, each with its 95 % interval.
"""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import toyworld
from subjects import cut_person, on_grey, on_noise
from toyworld.benchmark import BATCH, case_scores, draw_cases, interval, references_of

SCORES = ("identity", "mixup", "locality")


def scene_with(person: toyworld.Identity, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, S, 3) uint8 and (S, S) bool: a person beside another in some place, and where they are."""
    rng = np.random.default_rng([seed, 25])
    other = toyworld.sample_identity(rng, "test", str(rng.choice(toyworld.NOUNS)))
    people = [person, other][::rng.choice([-1, 1])]
    scene = toyworld.compose_scene(seed, people, str(rng.choice(["standing", "waving"])),
                                   str(rng.choice(toyworld.CONTEXTS)))
    picture, masks = toyworld.render_scene(scene)
    return picture, masks[people.index(person)]


def photos_by(take: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    """For `draw_cases`: what `take` makes of a scene (S, S, 3) and of the subject's mask (S, S)."""
    def photos(scene: toyworld.Scene, number: int, which: int) -> list[np.ndarray]:
        return [take(*scene_with(subject.identity, 100 * number + 10 * which + k))
                for k, subject in enumerate(scene.subjects)]
    return photos


def cut(stand: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """For `photos_by`: the person alone, as `stand` shows them."""
    def take(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
        person = stand(cut_person(rearrange(torch.from_numpy(picture), "h w c -> c h w") / 255,
                                  torch.from_numpy(mask)))
        return rearrange((person * 255).round().byte(), "c h w -> h w c").numpy()
    return take


PHOTOS = {"portrait": references_of, "busy scene": photos_by(lambda picture, mask: picture),
          "cut out, on grey": photos_by(cut(on_grey)), "cut out, on noise": photos_by(cut(on_noise))}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128, metavar="N", help="cases (default 128)")
    args = parser.parse_args()
    options = evaluate.parse_args(["--count", str(args.count)])
    evaluate.fill_in(options)
    pipeline, classifier, _ = evaluate.load(options)
    print("| photo | identity | identity mix-up | background change |\n|---|---|---|---|")
    for name, photos in PHOTOS.items():
        cases = []
        for first in tqdm(range(0, args.count, BATCH), name, leave=False):
            numbers = range(first, min(first + BATCH, args.count))
            cases += draw_cases(pipeline, classifier, numbers, photos=photos, steps=options.steps,
                                guidance_scale=options.guidance_scale, prior_above=options.prior_above)[0]
        values = case_scores(cases)
        print(f"| {name} |", " | ".join(evaluate.cell(interval(values[score])) for score in SCORES), "|",
              flush=True)


if __name__ == "__main__":
    main()
