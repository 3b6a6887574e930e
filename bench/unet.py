"""What a UNet call costs: ours against diffusers, with MoA against without.

    python -m bench.unet --output runs/bench
    python -m bench.unet --output runs/bench --questions moa --pixels 256 512 --thresholds 0.1
    python -m bench.unet --output runs/bench --device cuda --dtype bf16 --batches 1 2 8

Weights and inputs are random, never zero. The questions:

    base      ours against diffusers' `UNet2DConditionModel` with the same weights, as they are, and with each
              of the `--variants` against diffusers as it is and with the same: channels_last, compiled
              (torch.compile) and reduce-overhead (its mode, with CUDA graphs)
    moa       dense MoA, and sparse MoA at each of the `--thresholds`, against our base. Routers are
              forced to a map: half of the weight to the personalized expert on a square of `--share` of the
              picture, none elsewhere
    subjects  two to four subjects in one context against one, their tokens made anew as in each step
    layers    MoA in the first 4, 8 and all 16 transformer blocks against our base
"""
import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.measure import compare, make_parser, pick, positive, report, sizes, twin
from moa import (ExpertContext, MultimodalPrompt, PromptConfig, add_moa, force_routing, moa_layers,
                 sparse_routing)
from tests.parity_full import pair, random

QUESTIONS = ["base", "moa", "subjects", "layers"]
BLOCKS = (4, 8, 16)
VARIANTS = {"channels_last": lambda unet: twin(unet).to(memory_format=torch.channels_last),
            "compiled": lambda unet: torch.compile(twin(unet)),
            "reduce-overhead": lambda unet: torch.compile(twin(unet), mode="reduce-overhead")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="default: all")
    add("--pixels", nargs="+", type=positive, default=[256], help="of the picture's side (default 256)")
    add("--batches", nargs="+", type=positive, default=[1], metavar="N", help="pictures at once (default 1)")
    add("--variants", nargs="*", choices=VARIANTS, default=[], help="of the base (default: none)")
    add("--thresholds", nargs="*", type=float, default=[], metavar="T", help="of sparse MoA (default: none)")
    add("--share", type=float, default=0.3, help="of the picture that is people (default 0.3)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = pick(args)
    cfg = sizes(args.size)["unet"]
    ours, theirs = (unet.to(device, dtype) for unet in pair("unet", cfg))
    rows = []
    for question in args.questions:
        sides_of = {"base": base, "moa": moa, "subjects": subjects, "layers": layers}[question]
        for sides, pairs, labels in sides_of(args, ours, theirs, device, dtype):
            rows += compare(sides, pairs, args.repeats, device, question=question, **labels)
    report("unet", rows, args, device)


def inputs(args: argparse.Namespace, cfg, device, dtype) -> Iterator[tuple[tuple, dict]]:
    """x, t, context of each picture size and batch, and what to call them."""
    for pixels in args.pixels:
        for batch in args.batches:
            x, text = random(batch, cfg.latent_channels, pixels // 8, pixels // 8), random(batch, 77,
                                                                                           cfg.context_dim)
            t = random(batch, seed=2).sigmoid().mul(799).long()  # where MoA draws
            yield (x.to(device, dtype), t.to(device), text.to(device, dtype)), {"pixels": pixels,
                                                                               "batch": batch}


def against_all(sides: dict, reference: str) -> list[tuple[str, str]]:
    return [(name, reference) for name in sides if name != reference]


def base(args, ours, theirs, device, dtype) -> Iterator[tuple]:
    """Ours and diffusers', plain and in each variant."""
    models = {"diffusers": theirs, "ours": ours}
    for variant in args.variants:
        models |= {f"{name}, {variant}": VARIANTS[variant](models[name]) for name in ("diffusers", "ours")}
    same = [(f"ours, {variant}", f"diffusers, {variant}") for variant in args.variants]
    for x, labels in inputs(args, ours.cfg, device, dtype):
        sides = {name: lambda unet=unet, x=x: unet(*x) for name, unet in models.items()}
        yield sides, [*against_all(sides, "diffusers"), *same], labels


def with_moa(ours: nn.Module) -> tuple[nn.Module, MultimodalPrompt]:
    """Our UNet with personalized experts and routers that are random, and a random prompt module."""
    unet = add_moa(twin(ours))
    with torch.no_grad():
        for _, _, layer in moa_layers(unet):
            layer.router.f.weight.normal_(std=0.1)
            for p in layer.personalized.parameters():
                p += 0.1 * p.std() * torch.randn_like(p)
    dim = ours.cfg.context_dim
    prompt = MultimodalPrompt(PromptConfig(dim, dim, 2 * dim, len(list(unet.transformer_blocks()))))
    torch.nn.init.normal_(prompt.mlp[-1].weight, std=0.1)
    parameter = next(ours.parameters())
    return unet.eval(), prompt.eval().to(parameter.device, parameter.dtype)


def context_of(prompt: MultimodalPrompt, text: Tensor, t: Tensor, people: int = 1) -> ExpertContext:
    """The tokens of a prompt (B, M, C) with so many people."""
    features = torch.randn(len(text), people, prompt.cfg.image_dim, dtype=text.dtype, device=text.device)
    positions = torch.arange(2, 2 + people, device=text.device).expand(len(text), -1)
    present = torch.ones_like(positions, dtype=torch.bool)
    return ExpertContext(text, prompt(text, features, positions, present, t))


def square(share: float, side: int = 64) -> Tensor:
    """(side, side) map of the prior's weight: a half on a square of this share, else 1."""
    weights, length = torch.ones(side, side), round(side * share ** 0.5)
    start = (side - length) // 2
    weights[start:start + length, start:start + length] = 0.5
    return weights


def moa(args, ours, theirs, device, dtype) -> Iterator[tuple]:
    """Our base, dense MoA and sparse MoA."""
    unet, prompt = with_moa(ours)
    people = square(args.share)
    for (x, t, text), labels in inputs(args, ours.cfg, device, dtype):
        context = context_of(prompt, text, t)

        def sparse(threshold, x=x, t=t, context=context):
            with force_routing(unet, people), sparse_routing(unet, threshold):
                return unet(x, t, context)

        sides = {"our base": lambda x=x, t=t, text=text: ours(x, t, text),
                 "dense MoA": lambda x=x, t=t, context=context: unet(x, t, context)}
        sides |= {f"sparse MoA, {args.share:.0%} above {threshold}":
                  partial(sparse, threshold) for threshold in args.thresholds}
        yield sides, against_all(sides, "our base"), labels


def subjects(args, ours, theirs, device, dtype) -> Iterator[tuple]:
    """One to four subjects in one context."""
    unet, prompt = with_moa(ours)
    for (x, t, text), labels in inputs(args, ours.cfg, device, dtype):
        sides = {f"{count} in one context": lambda count=count, x=x, t=t, text=text:
                 unet(x, t, context_of(prompt, text, t, count)) for count in range(1, 5)}
        yield sides, against_all(sides, "1 in one context"), labels


def layers(args, ours, theirs, device, dtype) -> Iterator[tuple]:
    """MoA in the first transformer blocks only: in the others the prior is alone."""
    unet, prompt = with_moa(ours)
    partly = {}
    for count in BLOCKS:
        partly[count] = twin(unet)
        for index, _, layer in moa_layers(partly[count]):
            layer.prior_only = index >= count
    for (x, t, text), labels in inputs(args, ours.cfg, device, dtype):
        context = context_of(prompt, text, t)
        sides = {"our base": lambda x=x, t=t, text=text: ours(x, t, text)}
        sides |= {f"MoA in {count} blocks": lambda some=some, x=x, t=t, context=context:
                  some(x, t, context) for count, some in partly.items()}
        yield sides, against_all(sides, "our base"), labels


if __name__ == "__main__":
    main()
