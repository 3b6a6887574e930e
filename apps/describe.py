"""Print the model as a tree, or the shapes through one of its transformer blocks.

    python -m apps.describe
    python -m apps.describe --weights weights/sd15 --moa runs/sd15/moa.safetensors
    python -m apps.describe --preset sd15              # Stable Diffusion 1.5's sizes; no weights are needed
    python -m apps.describe --explain 10 --prompt "a woman waving in Paris" --subject examples/zoe.png

--explain sends a prompt with a subject through the model, up to the two MoA layers of transformer block
LAYER, and names the paper's equation beside each value. docs/method.md tells the same in words.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Linear

from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from models.load import Models
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig
from moa import MixtureOfAttention, MultimodalPrompt, PromptConfig, add_moa, record_routing
from pipeline import Pipeline
from sample import SHIPPED, Parser, execute
from models.errors import no_file
from subjects import SUBJECT, BoundSubject, bind_subjects, read_photos

EXAMPLE = SHIPPED.parents[1] / "examples" / "zoe.png"
T = 500  # the timestep of --explain; MoA draws at those below 800


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m apps.describe"
    models = parser.add_mutually_exclusive_group().add_argument
    models("--weights", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the small world")
    models("--preset", choices=["sd15"], help="sizes as in train.py, without any weights")
    add = parser.add_argument
    add("--moa", type=Path, metavar="FILE", help="default: moa.safetensors in the weights folder")
    add("--untrained", action="store_true",
        help="MoA as `add_moa` makes it, in place of a file's: what an edit of it changes shows here")
    add("--explain", type=int, metavar="LAYER",
        help="transformer block l in forward order, from 0; SD1.5 and the small world have 16")
    add("--prompt", default="a woman standing on the beach", help="of --explain (default %(default)r)")
    add("--subject", action="append", default=[], metavar=SUBJECT,
        help="of --explain, as in sample.py; repeatable (default examples/zoe.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.moa and (args.preset or args.untrained):
        raise ValueError("--preset and --untrained take no MoA file: leave out --moa")
    if args.explain is None:
        lines = tree(load(args))
    else:
        subjects = bind_subjects(args.prompt, args.subject or [str(EXAMPLE)])
        photos = read_photos(subjects)
        lines = explain(load(args), args.explain, args.prompt, subjects, photos)
    print(*lines, sep="\n")


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline, with MoA as training starts it where there is no MoA file, or it is not wanted. Raises
    ValueError."""
    if args.preset:
        return sd15()
    file = args.moa or args.weights / "moa.safetensors"
    if args.moa and not file.is_file():
        raise ValueError(f"--moa {no_file(file)}: give one that train.py moa has written")
    pipeline = Pipeline.load(args.weights, file if file.is_file() and not args.untrained else None)
    if pipeline.models.image_encoder is None:
        raise ValueError(f"--weights {args.weights} has no image_encoder.safetensors, which subjects need")
    return pipeline if pipeline.prompt else start(pipeline.models)


def sd15() -> Pipeline:
    """Stable Diffusion 1.5 with MoA, without memory: all tensors are on the meta device."""
    with torch.device("meta"):
        unet, vae, text, image = (module.requires_grad_(False).eval() for module in (
            UNet(UNetConfig()), AutoencoderKL(VAEConfig()), CLIPTextEncoder(CLIPTextConfig()),
            CLIPImageEncoder(CLIPImageConfig())))
        return start(Models(unet, vae, text, Tokenizer(text.cfg), image, {"image_size": 512}))


def start(models: Models) -> Pipeline:
    """MoA as training starts it."""
    add_moa(models.unet)
    text, image = models.text_encoder.cfg.dim, models.image_encoder.cfg.output_dim
    layers = len(list(models.unet.transformer_blocks()))
    return Pipeline(models, MultimodalPrompt(PromptConfig(text, image, 2 * image, layers)).eval())


# --- the tree ---


def count(*modules) -> tuple[int, int]:
    """Parameters that are frozen, and that are trained."""
    sizes = [(p.requires_grad, p.numel()) for module in modules for p in module.parameters()]
    return sum(n for trained, n in sizes if not trained), sum(n for trained, n in sizes if trained)


def readable(number: int) -> str:
    """Three digits: 66, 4.13 k, 0.93 M; nothing for 0."""
    value, unit = (number / 1e6, " M") if number >= 100_000 else (number / 1e3, " k")
    if number < 1000:
        return str(number or "")
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"


def row(name: str, what: str, *modules) -> str:
    frozen, trained = count(*modules)
    routers = sum(count(module.router)[1] for part in modules for module in part.modules()
                  if isinstance(module, MixtureOfAttention))
    sizes = "".join(f"{readable(n):>10}" for n in (frozen, trained - routers, routers))
    return f"{name:31}{what:43}{sizes}".rstrip()


def tree(pipeline: Pipeline) -> Iterator[str]:
    """Every part of the model with its size."""
    models, prompt, unet = pipeline.models, pipeline.prompt, pipeline.models.unet
    text, image, vae = models.text_encoder, models.image_encoder, models.vae
    size, layer = latent_size(pipeline), 0
    yield f"{'':74}{'frozen':>10}{'trained':>10}{'routers':>10}"
    yield row("text_encoder", f"77 tokens -> (77, {text.cfg.dim})", text)
    yield row("image_encoder", f"-> ({image.cfg.output_dim},)", image)
    yield row("vae", f"{square(size * vae.cfg.factor)} <-> (4, {size}, {size})", vae)
    yield row("prompt", f"f ({prompt.cfg.image_dim},), token ({prompt.cfg.text_dim},), t, l -> token", prompt)
    yield row("unet", f"(4, {size}, {size}), t, tokens -> (4, {size}, {size})", unet)
    yield row("├─ time_embedding, conv_in", "", unet.time_embedding, unet.conv_in)
    for name, stage, level in stages(unet):
        side = -(-size // 2 ** level)  # odd sizes are rounded up
        yield row(f"├─ {name}", f"width {unet.cfg.channels[level]}, {square(side)} = {side * side} pixels, "
                                f"{len(stage.resnets)} resnets", stage)
        for attention in stage.attentions:
            block = attention.transformer_blocks[0]
            yield row(f"│  ├─ transformer block l = {layer}", "", attention)
            yield row("│  │  ├─ attn1, self", experts(block.attn1), block.attn1)
            yield row("│  │  └─ attn2, cross", experts(block.attn2), block.attn2)
            layer += 1
    yield row("└─ conv_norm_out, conv_out", "", unet.conv_norm_out, unet.conv_out)
    everything = text, image, vae, prompt, unet
    yield row("in all", f"{2 * layer} MoA layers in {layer} transformer blocks", *everything)
    trained = count(*everything)[1]
    yield f"A MoA file holds the {trained:,} trained parameters: {2 * trained / 1e6:.1f} MB in fp16."


def square(side: int) -> str:
    return f"{side} x {side}"


def latent_size(pipeline: Pipeline) -> int:
    """Height and width of the latents of a picture of the usual size."""
    return (pipeline.models.config.get("image_size") or 512) // pipeline.models.vae.cfg.factor


def stages(unet: UNet) -> Iterator[tuple[str, object, int]]:
    """(name, module, level) of the blocks in forward order; level 0 is the finest."""
    last = len(unet.down_blocks) - 1
    yield from ((f"down_blocks.{i}", block, i) for i, block in enumerate(unet.down_blocks))
    yield "mid_block", unet.mid_block, last
    yield from ((f"up_blocks.{i}", block, last - i) for i, block in enumerate(unet.up_blocks))


def experts(mixture: MixtureOfAttention) -> str:
    """The widths of an expert, and of the router's linear layers."""
    prior, linear = mixture.prior, [m for m in mixture.router.modules() if isinstance(m, Linear)]
    widths = " -> ".join(map(str, [prior.to_q.in_features, *(layer.out_features for layer in linear)]))
    return (f"q {prior.to_q.in_features}, k and v {prior.to_k.in_features}, {prior.heads} heads; "
            f"router {widths}")


# --- --explain ---


def explain(pipeline: Pipeline, layer: int, prompt: str, subjects: list[BoundSubject],
            photos: list[list[Tensor]]) -> Iterator[str]:
    """What goes into the two MoA layers of a transformer block, and what comes out."""
    unet, block = pipeline.models.unet, pick_block(pipeline.models.unet, layer)
    side = latent_size(pipeline) * pipeline.models.vae.cfg.factor
    features = pipeline.encode_photos(subjects, photos)
    people = pipeline.make_subjects(prompt, subjects, features)
    with torch.no_grad(), record_routing(unet) as routing:
        text = pipeline.encode_text([prompt])
        seen = watch({"m": pipeline.prompt.norm_m, "pe": pipeline.prompt.norm_pe, "mlp": pipeline.prompt.mlp,
                      "self": block.attn1, "cross": block.attn2})
        t = text.new_tensor([T], dtype=torch.int64)
        context = pipeline.context_at(text, [people])(t)
        unet(pipeline.noise([0], (side, side)), t, context)
    yield f'prompt   "{prompt}", t = {T}, {square(side)} pixels, seed 0'
    yield from (f"subject  {subject} in token {one.position} of 77"
                for subject, one in zip(subjects, people, strict=True))
    yield "\nmultimodal prompt, for all transformer blocks at once"
    yield line("T, text states", text.shape, "", "CLIPTextEncoder")
    yield line("f, an image feature per subject", (1, len(people), len(features[0])), "sec. 3.2.1",
               "CLIPImageEncoder")
    yield line("m = [f, its token of T]", seen["m"][0].shape, "Fig. 5", "MultimodalPrompt")
    yield line("PE(t, l)", seen["pe"][0].shape, "Eq. 8", "PositionalEncoding")
    yield line("LN(m) + LN(PE(t, l))", seen["mlp"][0].shape, "Eq. 8", "MultimodalPrompt")
    yield line("its token of T + MLP(...)", seen["mlp"][1].shape, "sec. 3.2.1")
    yield line("T_pers: T with these tokens", context.personalized.shape, "", "ExpertContext")
    names = {module: name for name, module in unet.named_modules()}
    for kind, mixture in (("self", block.attn1), ("cross", block.attn2)):
        yield f"\nblock l = {layer}, {kind}-attention: {names[mixture]}"
        yield from explain_layer(mixture, *seen[kind], None if kind == "self" else text)
        yield from routed(routing[layer, kind])


def pick_block(unet: UNet, layer: int):
    """A transformer block. Raises ValueError."""
    blocks = list(unet.transformer_blocks())
    if not 0 <= layer < len(blocks):
        raise ValueError(f"--explain must be in 0..{len(blocks) - 1}, the transformer blocks of this UNet, "
                         f"not {layer}")
    return blocks[layer]


def explain_layer(mixture: MixtureOfAttention, z: Tensor, out: Tensor, text: Tensor | None) -> Iterator[str]:
    """From the hidden state z (B, N, D) to out (B, N, D); text: (B, M, C), None in self-attention."""
    heads, width = mixture.prior.heads, z.shape[-1] // mixture.prior.heads
    keys = z if text is None else text
    yield line("Z, a token per pixel", z.shape, "", "MixtureOfAttention")
    yield line("C, prior: T; personalized: T_pers[l]" if text is not None else "C = Z for all experts",
               keys.shape, "sec. 3.2.1")
    yield line(f"Q = Z W_q, {heads} heads, per expert", (1, heads, z.shape[1], width), "Eq. 2, 3",
               "CrossAttention")
    yield line("K = C W_k, V = C W_v, per expert", (1, heads, keys.shape[1], width), "Eq. 2, 3")
    yield line("A = Softmax(Q K^T / sqrt(d))", (1, heads, z.shape[1], keys.shape[1]), "Eq. 1",
               "fused, never stored")
    yield line("Attention: A V, heads joined, W_out", z.shape, "Eq. 1")
    yield line("R = Softmax(f(Z))", (*z.shape[:2], len(mixture.names)), "Eq. 5, 7",
               type(mixture.router).__name__)
    mix = " + ".join(f"R_{e} * {name}" for e, name in enumerate(mixture.names))
    yield line(f"Z' = {mix}", out.shape, "Eq. 4, 6", "MixtureOfAttention")


def line(what: str, shape, equation: str, where: str = "") -> str:
    return f"  {what:39}{str(tuple(shape)):19}{equation:12}{where}".rstrip()


def routed(r: Tensor) -> Iterator[str]:
    """What a router gave, (B, N, E); nothing without weights."""
    if r.device.type != "meta":
        personalized = r[..., 1]
        yield (f"  R_1 is {personalized.mean():.2f} on average, from {personalized.min():.2f} to "
               f"{personalized.max():.2f}; x is noise")


def watch(modules: dict) -> dict:
    """Filled with the first input and the output of these modules whenever they are called."""
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output)))
    return seen


if __name__ == "__main__":
    main()
