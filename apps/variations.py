"""Draw one prompt with many seeds, each picture beside the base model's of the same seed.

    python -m apps.variations --prompt "a man riding a bike in a park" --subject examples/max.png --num 16

The paper's Fig. 3 and 20: with a subject, pictures should differ from each other as much as the base model's
do. Picture k has seed SEED + k. Printed, with and without the subject, in shares of the range of colours:

    pixels   mean absolute difference of all pixels, over all pairs of seeds
    layout   the same of the pictures brought down to 8 x 8 cells, where only their composition is left
    moved    mean absolute difference of the 8 x 8 cells to the prior's picture of the same seed
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from apps import generate_rows, load_people
from images import labelled, page, pairwise_distance, portrait
from sample import Parser, add_flags, check, check_picture, execute, save, settings_of
from subjects import SUBJECT, bind_subjects

CELLS = 8
PAIRS = 4  # of pictures, in a row of the sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subject", action="append", default=[], metavar=SUBJECT,
        help="photo of a person; repeatable; without any, the base model's pictures alone are shown")
    add("--num", type=int, default=16, metavar="N", help="how many seeds (default 16)")
    add("--output", type=Path, default=Path("variations.png"), metavar="FILE", help="default variations.png")
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    check_picture("--output", args.output)
    if args.num < 2:
        raise ValueError(f"--num must be at least 2, not {args.num}: one picture differs from nothing")
    subjects = bind_subjects(args.prompt, args.subject)
    pipeline, (photos,), people = load_people(args, [subjects], [args.output])
    seeds = range(args.seed, args.seed + args.num)
    print(f"seed {args.seed}", flush=True)
    rows = generate_rows(args, pipeline, [None, *people] if subjects else [None], seeds)
    print_diversity(rows)
    names = [Path(subject.files[0]).stem for subject in subjects]
    pairs = zip(*rows, strict=True)
    tiles = [(image, f"seed {seed}, {name}") for seed, pair in zip(seeds, pairs, strict=True)
             for image, name in zip(pair, ["base model", " + ".join(names)], strict=False)]
    portraits = [(portrait(several, rows[0][0].size), str(subject))
                 for several, subject in zip(photos, subjects, strict=True)]
    top = [labelled(portraits, len(portraits))] if portraits else []
    sheet = page(args.prompt, *top, labelled(tiles, PAIRS * len(rows)))
    save(sheet, args.output, settings_of(args, subjects, num=args.num))


def print_diversity(rows: list[list[Image.Image]]) -> None:
    """One line per score: with the subject, the base model's, and how they relate."""
    pictures = [torch.from_numpy(np.stack(row)).permute(0, 3, 1, 2).float() / 255 for row in rows]
    cells = [F.adaptive_avg_pool2d(each, CELLS) for each in pictures]
    for name, (prior, *found) in (("pixels", map(pairwise_distance, pictures)),
                                  ("layout", map(pairwise_distance, cells))):
        print(f"{name}: base model {prior:.3f}", *(f"with the subject {x:.3f} ({x / prior:.2f} of it)"
                                                    for x in found), sep=", ")
    if len(rows) > 1:
        print(f"moved: {(cells[1] - cells[0]).abs().mean():.3f}")


if __name__ == "__main__":
    main()
