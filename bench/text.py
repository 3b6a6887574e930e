"""What the text encoder costs: ours against transformers' `CLIPTextModel` with the same random weights.

    python -m bench.text --output runs/bench
    python -m bench.text --output runs/bench --device cuda --batches 1 2 8
"""
import argparse

from bench.measure import compare, make_parser, pick, positive, report, sizes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=15)
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 2], metavar="N",
                        help="prompts at once (default 1 2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = pick(args)
    import torch

    from tests.parity_full import pair
    cfg = sizes(args.size)["text_encoder"]
    ours, theirs = (encoder.to(device, dtype) for encoder in pair("text_encoder", cfg))
    rows = []
    for batch in args.batches:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(1, cfg.vocabulary - 2, (batch, cfg.length), generator=generator).to(device)
        sides = {"ours": lambda tokens=tokens: ours(tokens),
                 "transformers": lambda tokens=tokens: theirs(tokens).last_hidden_state}
        rows += compare(sides, [("ours", "transformers")], args.repeats, device, batch=batch)
    report("text", rows, args, device)


if __name__ == "__main__":
    main()
