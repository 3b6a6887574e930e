"""What sparse routing leaves out, and how much that changes pictures of the small world.

    python -m bench.sparse --output runs/sparse

Draws evaluate.py's first cases without sparse routing and with each threshold. Prints, and writes to
sparse.json: the share of pixels whose personalized attention is still computed (of each layer and step that
of the batch's busiest sample, which is what it costs), over all layers and over those of the largest maps,
where nearly all of the cost is; and the PSNR to the picture without, mean and lowest. The scores
of a threshold are `python evaluate.py --sparse WEIGHT`'s, its price bench/unet.py's.
"""
import argparse
from pathlib import Path

import numpy as np

import sample
import evaluate
from bench.measure import positive
from models.errors import Parser
from models.load import write_json
from moa import record_routing
from moa.routing import DENSE_FROM
from toyworld.benchmark import case_scenes, references_of, subjects_of

THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder for sparse.json")
    add("--weights", type=Path, default=evaluate.SHIPPED, metavar="FOLDER", help="default: the small world's")
    add("--count", type=positive, default=16, metavar="N", help="cases (default 16)")
    add("--steps", type=positive, default=20, metavar="N", help="sampling steps (default 20)")
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), metavar="WEIGHT",
        help=f"default {' '.join(map(str, THRESHOLDS))}")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    sample.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    args.moa = args.classifier = args.guidance_scale = args.prior_above = None
    evaluate.fill_in(args)
    evaluate.moa_timesteps("unipc", args.steps, args.prior_above)  # refuses what leaves none
    pipeline, _, files = evaluate.load(args)
    scenes = [case_scenes(number)[0] for number in range(args.count)]
    people = [subjects_of(pipeline, scene, references_of(scene, number, 0))
              for number, scene in enumerate(scenes)]
    shares: list[tuple[int, float]] = []  # pixels of a layer's map, share of them that is computed

    def draw(threshold: float):
        def watch(step, steps, t, x0):
            for weights in routing.values():
                above = float((weights[..., 1] > threshold).float().mean(1).max())
                shares.append((weights.shape[1], 1.0 if above > DENSE_FROM else above))
            routing.clear()

        shares.clear()
        with record_routing(pipeline.models.unet) as routing:
            return pipeline.generate([s.caption for s in scenes], [7_000_000 + n for n in range(args.count)],
                                     people, steps=args.steps, guidance_scale=args.guidance_scale,
                                     prior_above=args.prior_above, sparse=threshold, progress=watch)

    dense, rows = draw(0), {}
    for threshold in args.thresholds:
        error = ((draw(threshold) - dense) / 2).square().mean((1, 2, 3))
        psnr = -10 * error.clamp(min=1e-12).log10()
        pixels, found = np.array(shares).T
        largest = pixels == pixels.max()
        rows[str(threshold)] = {
            "share": float(np.average(found, weights=pixels)), "share_largest": float(found[largest].mean()),
            "psnr": float(psnr.mean()), "psnr_lowest": float(psnr.min())}
    settings = {name: getattr(args, name) for name in ("count", "steps", "guidance_scale", "prior_above")}
    write_json({"settings": settings, "run": evaluate.source(pipeline.device, files), "rows": rows},
               args.output / "sparse.json")
    print("| weights up to | pixels computed | of the largest maps | PSNR, dB | lowest |")
    print("|---|---|---|---|---|")
    for threshold, row in rows.items():
        print(f"| {threshold} | {row['share']:.0%} | {row['share_largest']:.0%} | {row['psnr']:.1f} "
              f"| {row['psnr_lowest']:.1f} |")


if __name__ == "__main__":
    main()
