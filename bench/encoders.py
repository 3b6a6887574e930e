"""What the small world's encoders know: of people from their photo, and of activities from the prompt.

    python -m bench.encoders --output runs/encoders

Prints two tables and writes encoders.json. The first says how often a read-out of the image features has
each attribute right: one linear layer, and a network of two hidden layers. Both are trained on the
references of the scenes that MoA's training draws and tested on those of evaluate.py's cases, so what they
reach MoA could know of a subject. The second has the distances between the text encoder's states of prompts
that differ in the activity: prompts that lie close together the UNet can hardly tell apart.
"""
import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import command
import evaluate
from bench.measure import positive, table
import toyworld
from toyworld.rendered import render_cache

READ_OUTS = {"linear": (0, 10), "two hidden layers": (512, 20)}  # width, epochs
ACTIVITIES = ("standing", "waving", "running", "dancing", "reading a book", "riding a bike")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="for encoders.json")
    add("--weights", type=Path, default=evaluate.SHIPPED, metavar="FOLDER", help="default: the small world's")
    add("--scenes", type=positive, default=32_000, metavar="N",
        help="scenes of training, rendered once as train.py does (default 32000, all of them)")
    add("--cases", type=positive, default=512, metavar="N",
        help="evaluation cases whose people are tested (default 512)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto)")
    parser.set_defaults(moa=None, judge=None, guidance_scale=None, prior_above=None)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    import torch

    from models.load import write_json
    args.output.mkdir(parents=True, exist_ok=True)
    evaluate.fill_in(args)
    pipeline, _, files = evaluate.load(args)
    cache = render_cache("scenes", args.scenes)
    scenes = map(toyworld.sample_scene, range(args.scenes))
    train = features(pipeline, ((scene, photos[:len(scene.subjects)]) for scene, photos in
                                zip(scenes, cache.references, strict=True)))
    test = features(pipeline, ((scene, evaluate.references_of(scene, number, k))
                               for number in range(args.cases)
                               for k, scene in enumerate(evaluate.cast(number))))
    read = {name: read_out(train, test, *setting) for name, setting in READ_OUTS.items()}
    with torch.no_grad():
        text = pipeline.encode_text([f"a man {activity} in the park" for activity in ACTIVITIES])
    distances = torch.cdist(*2 * [text.float().flatten(1)]).tolist()
    write_json({"run": evaluate.source(pipeline.device, files), "people": [len(train[1]), len(test[1])],
                "read_outs": read, "activities": ACTIVITIES, "distances": distances},
               args.output / "encoders.json")
    print(table([{"right": name, "mean": float(np.mean(list(shares.values()))), **shares}
                 for name, shares in read.items()]), end="\n\n")
    print(table([{"apart": activity, **dict(zip(ACTIVITIES, row, strict=True))}
                 for activity, row in zip(ACTIVITIES, distances, strict=True)]))


def features(pipeline, scenes) -> tuple:
    """(P, F) image features of the people of (scene, their photos), and (P, A) their attributes' indices."""
    import torch

    from images import to_picture
    found, labels = [], []
    while part := list(islice(scenes, 64)):
        photos = torch.cat([to_picture(photos) for _, photos in part])
        with torch.no_grad():
            found.append(pipeline.encode_subjects(photos / 2 + 0.5).float())
        labels += [list(toyworld.attribute_labels(subject.identity).values())
                   for scene, _ in part for subject in scene.subjects]
    return torch.cat(found), torch.tensor(labels, device=found[0].device)


def read_out(train: tuple, test: tuple, width: int, epochs: int) -> dict[str, float]:
    """Attribute -> share of the tested people of whom a read-out, trained on the others, has it right.

    AdamW at 1e-3, falling to 0, batches of 256; the features are brought to mean 0 and variance 1.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn
    torch.manual_seed(0)
    (x, y), (shown, truth) = train, test
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, shown = (x - mean) / deviation, (shown - mean) / deviation
    sizes = [len(values) for values in toyworld.ATTRIBUTES.values()]
    net = nn.Linear(x.shape[1], sum(sizes)) if not width else nn.Sequential(
        nn.Linear(x.shape[1], width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, sum(sizes)))
    net = net.to(x.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    steps = 1 + epochs * len(x) // 256
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,), device=x.device)
        logits = net(x[rows]).split(sizes, 1)
        loss = sum(F.cross_entropy(part, y[rows, k]) for k, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guesses = [part.argmax(1) for part in net.eval()(shown).split(sizes, 1)]
    return {name: float((guess == truth[:, k]).float().mean())
            for k, (name, guess) in enumerate(zip(toyworld.ATTRIBUTES, guesses, strict=True))}


if __name__ == "__main__":
    main()
