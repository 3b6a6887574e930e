"""What the encoding of (t, l) does in trained weights (Eq. 8, the paper's Fig. 16).

    python bench/encoding.py --weights weights/toyworld --count 64

Prints which share of a subject token's variance comes from the person, the timestep, the layer and from their
interactions, over people of one noun, timesteps below 800 and all layers; then the benchmark's identity
(evaluate.py) as trained and where the token is made for another timestep or layer than the UNet is at.
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import toyworld
from images import to_picture
from moa import MultimodalPrompt
from pipeline import Pipeline
from toyworld.benchmark import BATCH, case_scores, draw_cases, interval

PEOPLE, TIMESTEPS = 32, range(0, 800, 50)
AXES = ("layer", "timestep", "person")
ELSEWHERE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "as trained": lambda t, layers: (t, layers),
    "always t = 400": lambda t, layers: (torch.full_like(t, 400), layers),
    "400 timesteps away": lambda t, layers: ((t + 400) % 800, layers),
    "8 layers away": lambda t, layers: (t, (layers + 8) % 16)}


def tokens(pipeline: Pipeline) -> Tensor:
    """(L, T, P, C): what the token of "woman" becomes for each layer, timestep and person."""
    rng, prompt = np.random.default_rng(0), "a woman standing on the beach"
    women = [toyworld.sample_identity(rng, "test", "woman") for _ in range(PEOPLE)]
    photos = np.stack([toyworld.render_reference(woman, number) for number, woman in enumerate(women)])
    features = pipeline.encode_subjects(to_picture(photos) / 2 + 0.5)
    text = pipeline.encode_text([prompt]).expand(PEOPLE, -1, -1)
    positions = torch.full((PEOPLE, 1), len(pipeline.models.tokenize.encode("a woman")))
    made = [pipeline.prompt(text, features[:, None], positions, positions > 0, torch.full((PEOPLE,), t))
            for t in TIMESTEPS]
    return torch.stack(made, dim=1)[:, :, :, positions[0, 0]]


def shares(values: Tensor) -> dict[str, float]:
    """Of values (L, T, P, C): the share of their variance of each axis and of each interaction of axes."""
    centred, parts = values - values.mean((0, 1, 2)), {}
    for order in (1, 2, 3):
        for axes in combinations(range(3), order):
            others = [axis for axis in range(3) if axis not in axes]
            part = centred.mean(others, keepdim=True) if others else centred
            part = part - sum(parts[inner] for inner in parts if set(inner) < set(axes))
            parts[axes] = part
    total = centred.square().mean((0, 1, 2)).sum()
    return {" x ".join(AXES[axis] for axis in axes): float(part.square().mean((0, 1, 2)).sum() / total)
            for axes, part in parts.items()}


@contextmanager
def elsewhere(prompt: MultimodalPrompt, move: Callable) -> Iterator[None]:
    """Inside, tokens are made for the timesteps and layers that `move` makes of the true ones."""
    handle = prompt.encoding.register_forward_pre_hook(lambda module, inputs: move(*inputs))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=str(evaluate.SHIPPED), metavar="FOLDER")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="cases (default 64)")
    args = parser.parse_args()
    options = evaluate.parse_args(["--weights", args.weights])
    evaluate.fill_in(options)
    pipeline, classifier, _ = evaluate.load(options)
    print("| share of a subject token's variance | |\n|---|---|")
    for name, share in shares(tokens(pipeline)).items():
        print(f"| {name} | {share:.3f} |")
    print("\n| the token is made for | identity |\n|---|---|")
    for name, move in ELSEWHERE.items():
        cases = []
        for first in tqdm(range(0, args.count, BATCH), name, leave=False):
            numbers = range(first, min(first + BATCH, args.count))
            with elsewhere(pipeline.prompt, move):
                cases += draw_cases(pipeline, classifier, numbers, steps=options.steps,
                                    guidance_scale=options.guidance_scale, prior_above=options.prior_above)[0]
        print(f"| {name} | {evaluate.cell(interval(case_scores(cases)['identity']))} |", flush=True)


if __name__ == "__main__":
    main()
