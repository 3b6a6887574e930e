"""What a whole picture costs, from the prompt to the pixels: 20 UniPC steps with guidance.

    python -m bench.sampling --output runs/bench
    python -m bench.sampling --output runs/bench --pixels 512 --steps 2 --memory
    python -m bench.sampling --output runs/bench --device cuda --dtype bf16 --pixels 512

Our pipeline against diffusers' `StableDiffusionPipeline` with the same random weights; ours with MoA and one
person, the prior alone from t = 800 on; and the MoA that one would write in diffusers: attention processors
that run the attention twice, with its own weights and with others, and mix by a linear router, in all
layers and steps. With `--thresholds` also ours with sparse routing, routers forced to a square of `--share`
of the picture. `--memory` gives the peak of each side in a process of its own in place of times; two steps
are enough for it, one by the prior and one by MoA.
"""
import argparse
import json
import sys
from copy import deepcopy
from functools import partial

from tests.parity_full import pair  # first: it mends torchvision, which diffusers imports

import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from bench.measure import (compare, in_child, make_parser, peak_memory, pick, positive, report, reset_peak,
                           sizes, twin)
from bench.unet import square, with_moa
from models import Models
from models.clip_text import Tokenizer
from moa import force_routing, sparse_routing
from pipeline import Pipeline, Subject

REUSED = "ours with MoA, self-attention reused"
SIDES = {"ours": ["diffusers"], "ours with MoA": ["ours", "diffusers with MoA"], REUSED: ["ours"],
         "diffusers": [], "diffusers with MoA": ["diffusers"]}
PROMPT, SCALE = "a man riding a bike", 5.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3)
    add = parser.add_argument
    add("--pixels", type=positive, default=256, help="of the picture's side (default 256)")
    add("--steps", type=positive, default=20, metavar="N", help="of the sampler (default 20)")
    add("--thresholds", nargs="*", type=float, default=[], metavar="T", help="of sparse MoA (default: none)")
    add("--share", type=float, default=0.3, help="of the picture that is people (default 0.3)")
    add("--memory", action="store_true", help="peak memory in place of times")
    add("--side", metavar="NAME", help="the memory of one side, in this process")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, _ = pick(args)
    against = {**SIDES, **{sparse_name(threshold): ["ours"] for threshold in args.thresholds}}
    if args.side:
        print(json.dumps(memory(args, device)))
        return
    if args.memory:
        arguments = sys.argv[1:] if argv is None else argv
        peaks = {side: in_child("bench.sampling", [*arguments, "--side", side])["gb"] for side in against}
        rows = [{"pixels": args.pixels, "side": side, "gb": gb, "of ours": gb / peaks["ours"]}
                for side, gb in peaks.items()]
        report("sampling_memory", rows, args, device)
        return
    sides = make_sides(args, list(against))
    pairs = [(side, other) for side, others in against.items() for other in others]
    warm_up = {name: partial(draw, 1) for name, draw in sides.items()}
    rows = compare({name: partial(draw, args.steps) for name, draw in sides.items()}, pairs, args.repeats,
                   device, warm_up, pixels=args.pixels)
    report("sampling", rows, args, device)


def sparse_name(threshold: float) -> str:
    return f"ours with sparse MoA above {threshold}"


def memory(args: argparse.Namespace, device) -> dict[str, float]:
    """Peak of one side while it draws."""
    draw, = make_sides(args, [args.side]).values()
    reset_peak(device)
    draw(args.steps)
    return {"gb": peak_memory(device)}


def make_sides(args: argparse.Namespace, names: list[str]) -> dict:
    """Side -> what draws a picture in so many steps, all with the same weights in the same memory."""
    device, dtype = pick(args)
    parts = {part: [model.to(device, dtype) for model in pair(part, cfg)]
             for part, cfg in sizes(args.size).items() if part != "image_encoder"}
    makers = {"ours": ours, "ours with MoA": ours_with_moa, REUSED: partial(ours_with_moa, reuse=True),
              "diffusers": theirs, "diffusers with MoA": theirs_with_moa}
    sides = {}
    for name in names:
        if name in makers:
            sides[name] = makers[name](args, parts, device, dtype)
        else:
            sides[name] = ours_with_moa(args, parts, device, dtype, float(name.split()[-1]))
    return sides


def our_pipeline(args, parts: dict, unet, prompt=None) -> Pipeline:
    text_encoder = parts["text_encoder"][0]
    tokenize = Tokenizer(text_encoder.cfg)
    return Pipeline(Models(unet, parts["vae"][0], text_encoder, tokenize, None, {"image_size": args.pixels}),
                    prompt)


def ours(args, parts: dict, device, dtype):
    pipeline = our_pipeline(args, parts, parts["unet"][0])
    return lambda steps: pipeline.generate([PROMPT], [0], steps=steps, guidance_scale=SCALE)


def ours_with_moa(args, parts: dict, device, dtype, threshold: float | None = None, reuse: bool = False):
    unet, prompt = with_moa(parts["unet"][0])
    pipeline = our_pipeline(args, parts, unet, prompt)
    feature = torch.randn(prompt.cfg.image_dim, device=device, dtype=dtype)
    people = [[Subject(pipeline.models.tokenize.word_positions(PROMPT, "man")[0], feature)]]

    def draw(steps):
        return pipeline.generate([PROMPT], [0], people, steps=steps, guidance_scale=SCALE, reuse=reuse)

    def draw_sparsely(steps):
        with force_routing(unet, square(args.share)), sparse_routing(unet, threshold):
            return draw(steps)

    return draw if threshold is None else draw_sparsely


def theirs(args, parts: dict, device, dtype, unet=None, context=None):
    """diffusers' own pipeline, given the tokens; `context` is what the naive experts attend to."""
    vae, text_encoder = parts["vae"][1], parts["text_encoder"][1]
    scheduler = UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        steps_offset=1)
    pipe = StableDiffusionPipeline(vae, text_encoder, None, unet or parts["unet"][1], scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    tokens = Tokenizer(parts["text_encoder"][0].cfg)(["", PROMPT]).to(device)

    def draw(steps):
        null, text = text_encoder(tokens).last_hidden_state.split(1)
        return pipe(prompt_embeds=text, negative_prompt_embeds=null, height=args.pixels, width=args.pixels,
                    num_inference_steps=steps, guidance_scale=SCALE, output_type="pt",
                    generator=torch.Generator().manual_seed(0), cross_attention_kwargs=context).images

    return torch.no_grad()(draw)


def theirs_with_moa(args, parts: dict, device, dtype):
    class TwoExperts(torch.nn.Module):
        """A processor: the attention as it is and a copy of it, mixed by a linear router."""

        def __init__(self, attention):
            super().__init__()
            self.one = AttnProcessor2_0()
            self.personalized = deepcopy(attention)
            self.router = torch.nn.Linear(attention.to_q.in_features, 2, device=device, dtype=dtype)

        # Not `forward`: diffusers passes on the arguments that it finds in the signature of `__call__`.
        def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None,
                     personalized=None):
            r = self.router(hidden_states).softmax(-1)
            context = None if encoder_hidden_states is None else personalized
            return (r[..., :1] * self.one(attention, hidden_states, encoder_hidden_states, attention_mask)
                    + r[..., 1:] * self.one(self.personalized, hidden_states, context, attention_mask))

    unet = twin(parts["unet"][1])
    for attention in [module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))]:
        attention.set_processor(TwoExperts(attention))
    cfg = parts["unet"][0].cfg
    context = torch.randn(2, 77, cfg.context_dim, device=device, dtype=dtype)
    return theirs(args, parts, device, dtype, unet, {"personalized": context})


if __name__ == "__main__":
    main()
