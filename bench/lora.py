"""What a style LoRA does to people and background in each scope, in the small world.

    python -m bench.lora --output runs/crayons
    python -m bench.lora --output runs/crayons --lora runs/lora/lora.safetensors --count 64

Draws the evaluation's cases six times: by the prior alone and with subjects, each without the LoRA and in
both scopes. Writes sheet.png (from the top: the subject, then these six) and lora.json, and prints a
table. The judge, which knows plain pictures and three other styles, reads activity, place and the
subjects' attributes. "Colours" is the overlap of the colour histograms, 1 for equal ones, with rendered
scenes that went through the style's filter and the VAE: on the people and on the background. The last
row is such scenes themselves, others than these: what could be reached.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import command

WEIGHTS = ROOT / "weights" / "toyworld"
# Row -> (with subjects, scope of the LoRA).
ROWS = {"the prior": (False, None), "the prior, scope attn": (False, "attn"),
        "the prior, scope all": (False, "all"), "subjects": (True, None),
        "subjects, scope attn": (True, "attn"), "subjects, scope all": (True, "all")}
BATCH, SHOWN, BINS = 16, 8, 6


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="for the results")
    add("--lora", type=Path, default=WEIGHTS / "crayons.safetensors", metavar="FILE",
        help="default: the shipped one")
    add("--weights", type=Path, default=WEIGHTS, metavar="FOLDER", help="default: the small world")
    add("--count", type=int, default=64, metavar="N", help="cases (default 64)")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps (default 20)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    import torch

    import evaluate
    import toyworld
    from models.load import write_json
    from weights.lora import LoRASetting
    from images import to_uint8
    from training.stage import save_grid
    args.output.mkdir(parents=True, exist_ok=True)
    args.moa = args.judge = args.guidance_scale = args.prior_above = None
    evaluate.fill_in(args)
    pipeline, judge, _ = evaluate.load(args)
    scenes = [evaluate.cast(number)[0] for number in range(2 * args.count)]
    photos = [evaluate.references_of(scene, number, 0) for number, scene in enumerate(scenes[:args.count])]
    people = [evaluate.subjects_of(pipeline, scene, photo)
              for scene, photo in zip(scenes[:args.count], photos, strict=True)]
    drawn = {}
    for row, (with_subjects, scope) in ROWS.items():
        pipeline.set_loras([LoRASetting(args.lora)] if scope else [], scope or "attn")
        batches = []
        for start in range(0, args.count, BATCH):
            numbers = range(start, min(start + BATCH, args.count))
            batches.append(pipeline.generate(
                [scenes[n].caption for n in numbers], [7_000_000 + n for n in numbers],
                [people[n] for n in numbers] if with_subjects else None, steps=args.steps,
                guidance_scale=args.guidance_scale, prior_above=args.prior_above,
                prior_only=not with_subjects))
        drawn[row] = torch.cat(batches)
    target = render(pipeline, scenes[:args.count])
    drawn["filtered scenes"] = render(pipeline, scenes[args.count:])
    results, wanted = {}, histograms(target, evaluate.read(judge, target))
    for row, pictures in drawn.items():
        cases = scenes[args.count:] if row == "filtered scenes" else scenes[:args.count]
        readings = evaluate.read(judge, pictures)
        functions = {"activity": evaluate.activity_right, "place": evaluate.context_right,
                     "attributes": evaluate.identity}
        scores = {name: float(np.mean([function(scene, reading)
                                       for scene, reading in zip(cases, readings, strict=True)]))
                  for name, function in functions.items()}
        found = histograms(pictures, readings)
        results[row] = scores | {f"colours, {where}": float(np.minimum(a, b).sum())
                                 for where, a, b in zip(("people", "background"), found, wanted, strict=True)}
    single = [n for n in range(args.count) if len(photos[n]) == 1][:SHOWN]
    size = toyworld.SIZE
    top = np.stack([photos[n][0][:size, :size] for n in single])
    save_grid([top, *(to_uint8(drawn[row][single]) for row in ROWS)], args.output / "sheet.png")
    write_json(results, args.output / "lora.json")
    columns = list(results["the prior"])
    print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for row, scores in results.items():
        print(f"| {row} | " + " | ".join(f"{scores[name]:.3f}" for name in columns) + " |")


def render(pipeline, scenes: list):
    """(B, 3, S, S): scenes as the renderer draws them, filtered, encoded and decoded."""
    import torch

    import toyworld
    from toyworld.crayon import crayon
    from images import to_picture
    images = to_picture(np.stack([crayon(toyworld.render_scene(scene)[0]) for scene in scenes]))
    with torch.no_grad():
        return torch.cat([pipeline.decode(pipeline.models.vae.encode(part.to(pipeline.device)))
                          for part in images.split(BATCH)])


def histograms(pictures, readings: list) -> list[np.ndarray]:
    """Of the colours on the people and on the background that the judge sees, each of sum 1."""
    from images import to_uint8
    bins = to_uint8(pictures).astype(int) * BINS // 256
    index = (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]
    masks = np.stack([reading.people for reading in readings])
    counts = [np.bincount(index[where], minlength=BINS ** 3) for where in (masks, ~masks)]
    return [count / max(count.sum(), 1) for count in counts]


if __name__ == "__main__":
    main()
