"""Every model against its public counterpart, with random values in every tensor.

`python tests/parity_full.py` compares at SD1.5's sizes (8 GB of memory, minutes); test_models.py
uses the same functions at small sizes. Both sides share their weights, so one copy is in memory.
"""
import gc
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import conftest  # noqa: F401  mends torchvision

from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import BOS, EOS, CLIPTextConfig, CLIPTextEncoder
from models.unet import UNet, UNetConfig
from models.vae import LATENT_SCALE, AutoencoderKL, VAEConfig

LIMIT = 2e-5  # of relative errors
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
              "image_encoder": 303_966_208}


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter: zeros and ones would hide wrong wiring."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.normal_(generator=generator)
        if p.dim() > 1 and "embedding" not in name:
            p /= p[0].numel() ** 0.5
        elif p.dim() > 1:
            p *= 0.5
        else:
            p *= 0.2
            p += float(name.endswith("weight"))  # of norms
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert theirs.isfinite().all() and theirs.std() > 1e-3
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def adopt(cls: type[nn.Module], cfg, state: dict[str, Tensor]) -> nn.Module:
    """Our model with the other's tensors, loaded directly and strictly."""
    with torch.device("meta"):
        module = cls(cfg)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def unet_pair(cfg: UNetConfig):
    from diffusers import UNet2DConditionModel
    depth = len(cfg.channels) - 1
    theirs = UNet2DConditionModel(
        in_channels=cfg.latent_channels, out_channels=cfg.latent_channels,
        block_out_channels=cfg.channels, layers_per_block=cfg.layers,
        down_block_types=("CrossAttnDownBlock2D",) * depth + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * depth,
        attention_head_dim=cfg.heads, cross_attention_dim=cfg.context_dim, norm_num_groups=cfg.groups)
    theirs = randomize(theirs).eval()
    return adopt(UNet, cfg, theirs.state_dict()), theirs


def vae_pair(cfg: VAEConfig):
    from diffusers import AutoencoderKL as Theirs
    levels = len(cfg.channels)
    theirs = Theirs(latent_channels=cfg.latent_channels, block_out_channels=cfg.channels,
                    layers_per_block=cfg.layers, norm_num_groups=cfg.groups,
                    down_block_types=("DownEncoderBlock2D",) * levels,
                    up_block_types=("UpDecoderBlock2D",) * levels)
    theirs = randomize(theirs).eval()
    return adopt(AutoencoderKL, cfg, theirs.state_dict()), theirs


def text_pair(cfg: CLIPTextConfig):
    from transformers import CLIPTextConfig as TheirConfig
    from transformers import CLIPTextModel
    theirs = CLIPTextModel(TheirConfig(
        hidden_size=cfg.dim, intermediate_size=4 * cfg.dim, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, max_position_embeddings=cfg.length, vocab_size=cfg.vocabulary,
        hidden_act="quick_gelu"))
    theirs = randomize(theirs).eval()
    state = {f"text_model.{k.removeprefix('text_model.')}": v
             for k, v in theirs.state_dict().items() if not k.endswith("position_ids")}
    return adopt(CLIPTextEncoder, cfg, state), theirs


def image_pair(cfg: CLIPImageConfig):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=cfg.dim, intermediate_size=4 * cfg.dim, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, image_size=cfg.image_size, patch_size=cfg.patch_size,
        projection_dim=cfg.output_dim, hidden_act="quick_gelu"))
    theirs = randomize(theirs).eval()
    return adopt(CLIPImageEncoder, cfg, open_clip_names(theirs.state_dict(), cfg.layers)), theirs


def open_clip_names(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """transformers' names of the vision transformer -> open_clip's."""
    state = {k.removeprefix("vision_model."): v for k, v in state.items() if not k.endswith("position_ids")}
    ours = {"class_embedding": state["embeddings.class_embedding"],
            "conv1.weight": state["embeddings.patch_embedding.weight"],
            "positional_embedding": state["embeddings.position_embedding.weight"],
            "proj": state["visual_projection.weight"].T}
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(layers):
        block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        names |= {f"{block}.ln_1": f"{layer}.layer_norm1", f"{block}.ln_2": f"{layer}.layer_norm2",
                  f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
                  f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
        for kind in ("weight", "bias"):
            ours[f"{block}.attn.in_proj_{kind}"] = torch.cat(
                [state[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
    ours |= {f"{mine}.{kind}": state[f"{theirs}.{kind}"]
             for mine, theirs in names.items() for kind in ("weight", "bias")}
    return {f"visual.{k}": v for k, v in ours.items()}


@torch.no_grad()
def unet_error(ours: UNet, theirs, height: int, width: int, batch: int = 2, tokens: int = 77) -> float:
    x = random(batch, ours.cfg.latent_channels, height, width)
    t = torch.tensor([7, 981])[:batch]
    context = random(batch, tokens, ours.cfg.context_dim, seed=2)
    return relative_error(ours(x, t, context), theirs(x, t, context).sample)


@torch.no_grad()
def vae_errors(ours: AutoencoderKL, theirs, height: int, width: int) -> dict[str, float]:
    image = random(2, 3, height, width).tanh()
    posterior = theirs.encode(image).latent_dist
    mean, logvar = ours.posterior(image)
    latents = posterior.mean * LATENT_SCALE
    return {"encode": relative_error(ours.encode(image), latents),
            "mean": relative_error(mean, posterior.mean),
            "logvar": relative_error(logvar, posterior.logvar),
            "decode": relative_error(ours.decode(latents), theirs.decode(latents / 0.18215).sample)}


@torch.no_grad()
def text_errors(ours: CLIPTextEncoder, theirs) -> dict[str, float]:
    """Of three prompts with 5, 0 and 75 tokens, the rest padding; then without the last layer."""
    cfg = ours.cfg
    tokens = torch.full((3, cfg.length), EOS)
    tokens[:, 0] = BOS
    tokens[0, 1:6] = torch.tensor([320, 786, 537, 320, 2308])
    tokens[2, 1:-1] = torch.randint(0, BOS, (cfg.length - 2,), generator=torch.Generator().manual_seed(3))
    out = theirs(tokens, output_hidden_states=True)
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    return {"last": relative_error(ours(tokens), out.last_hidden_state),
            "skip 1": relative_error(ours(tokens, skip=1), norm(out.hidden_states[-2]))}


@torch.no_grad()
def image_error(ours: CLIPImageEncoder, theirs) -> float:
    pixels = random(2, 3, ours.cfg.image_size, ours.cfg.image_size)
    return relative_error(ours(pixels), theirs(pixels).image_embeds)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compare_full(part: str) -> dict[str, float]:
    if part == "unet":
        ours, theirs = unet_pair(UNetConfig())
        errors = {"16x16": unet_error(ours, theirs, 16, 16), "10x14": unet_error(ours, theirs, 10, 14, 1)}
    elif part == "vae":
        ours, theirs = vae_pair(VAEConfig())
        errors = vae_errors(ours, theirs, 96, 128)
    elif part == "text_encoder":
        ours, theirs = text_pair(CLIPTextConfig())
        errors = text_errors(ours, theirs)
    else:
        ours, theirs = image_pair(CLIPImageConfig())
        errors = {"features": image_error(ours, theirs)}
    assert count(ours) == PARAMETERS[part], f"{part} has {count(ours):,} parameters"
    return errors


if __name__ == "__main__":
    print(f"{'part':14} {'parameters':>12}  {'compared':9} {'rel. error':>10} {'seconds':>8} {'peak GB':>8}")
    for part in ("vae", "text_encoder", "image_encoder", "unet"):  # the largest last: peaks only grow
        start = time.time()
        errors = compare_full(part)
        seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        for name, error in errors.items():
            print(f"{part:14} {PARAMETERS[part]:12,}  {name:9} {error:10.1e} {seconds:8.1f} {peak:8.1f}",
                  flush=True)
            assert error < 2e-5, f"{part} {name}: relative error {error}"
        gc.collect()
