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

import command
from subjects import SUBJECT, bind_subjects


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--prompt", required=True, help="what to draw")
    add("--subject", required=True, action="append", metavar=SUBJECT,
        help="photo of a person, bound to the prompt's words for people in order, or to WORD; repeatable")
    add("--output", type=Path, default=Path("routing.png"), metavar="FILE",
        help="default routing.png; the numbers go into a .json of the same name, in place of an older one")
    command.add_flags(parser, without=["--sparse"])  # the maps are of all pixels
    parser.set_defaults(sparse=0.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    command.check(args)
    command.check_picture("--output", args.output)
    numbers = args.output.with_suffix(".json")
    command.check_writable("--output", numbers)
    places = bind_subjects(args.prompt, args.subject)
    pipeline, photos, people = command.load_cast(args, [places], [args.output, numbers])
    from models.load import write_whole
    from images import portrait, thumbnail
    from images import save_png
    from images import RoutingSheet
    sheet = RoutingSheet(args.steps, [f"{place.word} {k}" for k, place in enumerate(places, 1)])
    print(f"seed {args.seed}", flush=True)
    image = thumbnail(draw(args, pipeline, people[0], sheet))
    portraits = [(portrait(several, image.size), f"{place.word} {k}: {place.name}")
                 for k, (several, place) in enumerate(zip(photos[0], places, strict=True), 1)]
    settings = {"prompt": args.prompt, **command.describe(args, places)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, **sheet.numbers()})
    write_whole(numbers, lambda temporary: temporary.write_text(text + "\n"))
    save_png(sheet.draw(image, portraits), args.output, settings)
    print(args.output, numbers, sep="\n")


def draw(args: argparse.Namespace, pipeline, people: list, sheet):
    """The picture; `sheet` takes the maps of its steps."""
    import torch

    from moa import record_routing, record_subject_attention
    unet = pipeline.models.unet
    rows = 1 if args.guidance_scale == 1 else 2  # with guidance, one without and one with the prompt
    positions = torch.tensor([[one.position for one in people]] * rows, device=pipeline.device)
    with record_routing(unet) as routing, record_subject_attention(unet, positions) as attention:
        def watch(step, steps, t, x0):
            sheet.add(step, t, routing, x0, attention)
            routing.clear()
            attention.clear()
        image, = command.draw(args, pipeline, [args.prompt], [args.seed], [people], watch)
    return image


if __name__ == "__main__":
    main()
