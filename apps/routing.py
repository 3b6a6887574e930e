"""Show what the routers do while a picture is drawn: a map for each layer and timestep.

    python -m apps.routing --prompt "a woman and a man shaking hands in Paris" \\
        --subject woman=examples/ada.png --subject man=examples/max.png --output routing.png

The paper's Fig. 6 and 19: the weight of the personalized expert in self- and in cross-attention, all on
one scale of colours. Routers tell people from background, not people from each other; who is who shows
in the further panels, the personalized experts' attention to each subject's token (mean over heads).
The same numbers go into a .json beside the picture: per kind and subject `mean` [layer][timestep] and
the `maps` themselves, null where the prior drew alone.
"""
import argparse
import json
from pathlib import Path

import torch

from apps import load_people
from images import RoutingSheet, portrait, thumbnail
from models.load import write_whole
from sample import (Parser, add_flags, check, check_picture, check_writable, execute, generate_images, save,
                    settings_of)
from subjects import SUBJECT, bind_subjects


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subject", required=True, action="append", metavar=SUBJECT,
        help="photo of a person, bound to the prompt's words for people in order, or to WORD; repeatable")
    add("--output", type=Path, default=Path("routing.png"), metavar="FILE",
        help="default routing.png; the numbers go into a .json of the same name, in place of an older one")
    add_flags(parser, without=["--sparse"])  # the maps are of all pixels
    parser.set_defaults(sparse=0.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    check_picture("--output", args.output)
    numbers = args.output.with_suffix(".json")
    check_writable("--output", numbers)
    subjects = bind_subjects(args.prompt, args.subject)
    pipeline, (photos,), (people,) = load_people(args, [subjects], [args.output, numbers])
    names = [f"{subject.word} {k}" for k, subject in enumerate(subjects, 1)]
    sheet = RoutingSheet(args.steps, names)
    print(f"seed {args.seed}", flush=True)
    batch = 1 if args.guidance_scale == 1 else 2  # with guidance, one without and one with the prompt
    positions = torch.tensor([[one.position for one in people]] * batch, device=pipeline.device)
    with sheet.recording(pipeline.models.unet, positions) as watch:
        image, = generate_images(args, pipeline, [args.prompt], [args.seed], [people], watch)
    image = thumbnail(image)
    portraits = [(portrait(several, image.size), f"{name}: {subject.name}")
                 for several, name, subject in zip(photos, names, subjects, strict=True)]
    settings = settings_of(args, subjects)
    text = json.dumps({"settings": settings, **sheet.numbers()})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(numbers, lambda temporary: temporary.write_text(text + "\n"))
    save(sheet.draw(image, portraits), args.output, settings)
    print(numbers)


if __name__ == "__main__":
    main()
