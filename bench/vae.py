"""What the VAE costs: ours against diffusers' `AutoencoderKL` with the same random weights.

    python -m bench.vae --output runs/bench
    python -m bench.vae --output runs/bench --device cuda --pixels 512 --batches 1 8 --channels-last
"""
import argparse

from bench.measure import compare, make_parser, pick, positive, report, sizes, twin


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--pixels", nargs="+", type=positive, default=[256], help="of the picture's side (default 256)")
    add("--batches", nargs="+", type=positive, default=[1], metavar="N", help="pictures at once (default 1)")
    add("--channels-last", action="store_true", help="both sides in that layout too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = pick(args)
    import torch

    from models.vae import LATENT_SCALE
    from tests.parity_full import pair, random
    cfg = sizes(args.size)["vae"]
    ours, theirs = (vae.to(device, dtype) for vae in pair("vae", cfg))
    models, layouts = {"": (ours, theirs)}, {"": torch.contiguous_format}
    if args.channels_last:
        layouts[", channels_last"] = torch.channels_last
        models[", channels_last"] = tuple(twin(vae).to(memory_format=torch.channels_last)
                                          for vae in (ours, theirs))
    rows = []
    for pixels in args.pixels:
        for batch in args.batches:
            image = random(batch, 3, pixels, pixels).tanh().to(device, dtype)
            side = pixels // cfg.factor
            latents = random(batch, cfg.latent_channels, side, side).to(device, dtype)
            encode, decode = {}, {}
            for layout, (our, their) in models.items():
                x, z = (value.contiguous(memory_format=layouts[layout]) for value in (image, latents))
                encode[f"ours{layout}"] = lambda our=our, x=x: our.encode(x)
                encode[f"diffusers{layout}"] = lambda their=their, x=x: their.encode(x).latent_dist.mean
                decode[f"ours{layout}"] = lambda our=our, z=z: our.decode(z)
                decode[f"diffusers{layout}"] = lambda their=their, z=z: their.decode(z / LATENT_SCALE).sample
            for question, sides in (("encode", encode), ("decode", decode)):
                pairs = [(name, "diffusers") for name in sides if name != "diffusers"]
                rows += compare(sides, pairs, args.repeats, device, question=question, pixels=pixels,
                                batch=batch)
    report("vae", rows, args, device)


if __name__ == "__main__":
    main()
