"""Hyperparameters of the stages and sizes of the small world's models."""
from dataclasses import dataclass, replace
from pathlib import Path

import toyworld
from models.clip_image import CLIPImageConfig
from models.clip_text import BOS, EOS, CLIPTextConfig
from models.controlnet import ControlNetConfig
from models.load import build_config, read_config
from models.open_clip_import import open_clip
from models.unet import UNetConfig
from models.vae import VAEConfig


class StageError(Exception):
    """A stage cannot be set up; the message says what is missing."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of one stage; printed at the start and kept in the run's config.json."""

    steps: int
    batch_size: int
    lr: float
    samples: int = 32_000  # rendered scenes
    augment: bool = False  # the pictures and references of a folder
    warmup: int = 100
    decay: float = 0.5  # the learning rate falls linearly to zero over this last part of the run
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    bf16: bool = False  # on a CPU; on CUDA always
    frozen_bf16: bool = False  # parts that are not trained are kept in bf16; wants bf16 (moa)
    accumulate: int = 1  # turns in which a process works on its share of a batch
    checkpointing: bool = False  # compute activations again in the backward pass (moa)
    max_people: int = 2  # of one picture
    subject_probability: float = 1.0  # that a person's reference is shown (moa)
    image_layers: int = 0  # last layers of the image encoder that are trained too (moa)
    min_snr: float = 5.0  # gamma of min-SNR weighting (arXiv 2303.09556); 0 is the plain eps loss
    null_probability: float = 0.1
    max_timestep: int = 1000
    masked_probability: float = 1.0  # that only the people of a sample count, else all of it (moa)
    lambda_router: float = 0.0
    lambda_object: float = 0.0
    router_layers: tuple[int, ...] = tuple(range(16))  # L in Eq. 10
    object_layers: tuple[int, ...] = tuple(range(16))  # those of Eq. 12
    lora_layers: tuple[str, ...] = ()  # names that the path of a changed layer has one of (lora)
    lora_rank: int = 0
    lora_alpha: float = 0.0  # the change is scaled by alpha / rank


# The small world's recipe: a few hours on four CPU cores. Larger batches and more steps are better
# where there is a GPU.
TOYWORLD = {
    "vae": TrainConfig(steps=6000, batch_size=8, lr=1e-3, ema=0.995, bf16=True),
    "clip": TrainConfig(steps=800, batch_size=128, lr=1e-3, weight_decay=0.1),
    "prior": TrainConfig(steps=4000, batch_size=32, lr=1e-3, ema=0.998),
    "moa": TrainConfig(steps=3250, batch_size=32, lr=1e-3, ema=0.998, max_timestep=800,
                       lambda_router=3e-5, lambda_object=3e-3, masked_probability=0.5,
                       # Cells of the 2 x 2 and 4 x 4 layers hold people and background at once.
                       router_layers=(0, 1, 2, 3, 10, 11, 12, 13, 14, 15)),
    # Half of the prompts empty, as in the paper, so that the skeleton has to tell what is to be seen.
    "controlnet": TrainConfig(steps=3000, batch_size=36, lr=1e-3, ema=0.995, null_probability=0.5),
    "classifier": TrainConfig(steps=4500, batch_size=32, lr=2e-3, ema=0.998, bf16=True),
    # Attention only, so that --lora-scope attn is all of it; ("attentions",) is all of a transformer block.
    "lora": TrainConfig(steps=260, batch_size=16, lr=3e-3, samples=2000, ema=0.99,
                        lora_layers=("attn1", "attn2"), lora_rank=8, lora_alpha=8.0),
}
# The paper's Table 1 and section 4.1; where it is silent FastComposer's released code and script, whose
# data and losses it takes over.
SD15 = {
    "moa": TrainConfig(
        steps=40_000, batch_size=128,  # section 4.1: 32 on each of 4 GPUs
        lr=5e-5,  # Table 1; section 4.1 says 1e-5
        warmup=0, decay=0.0,  # section 4.1: constant
        augment=True, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0, ema=0.0, min_snr=0.0,  # FastComposer
        null_probability=0.1,  # Table 1
        subject_probability=0.9, max_people=4,  # FastComposer
        max_timestep=800,  # Table 1
        masked_probability=1.0,  # Table 1; FastComposer's is 0.5
        lambda_router=1e-4, lambda_object=1e-4,  # Table 1
        # Section 3.3: without "first two and last three attention layers", FastComposer's 11 blocks
        router_layers=tuple(range(2, 13)), object_layers=tuple(range(2, 13)),
        # FastComposer trains the last 2; the paper does not say. Frozen, features can be cached.
        image_layers=0,
        bf16=True, frozen_bf16=True,  # section 4.1; FastComposer
        checkpointing=True),  # for memory alone: gradients are the same
    # The example command of diffusers' examples/text_to_image (train_text_to_image_lora.py).
    "lora": TrainConfig(
        steps=15_000, batch_size=4, accumulate=4, lr=1e-4, warmup=0,
        decay=1.0,  # there along a cosine
        augment=True,  # mirrored pictures
        betas=(0.9, 0.999), weight_decay=0.01, clip=1.0, ema=0.0, min_snr=0.0, null_probability=0.0,
        lora_layers=("attn1", "attn2"), lora_rank=4, lora_alpha=4.0,  # queries, keys, values, output
        bf16=True, checkpointing=True),
}
PRESETS = {"toyworld": TOYWORLD, "sd15": SD15}


def make_config(preset: str, stage: str, **changes) -> TrainConfig:
    """The preset of a stage with the values from the command line that are not None."""
    if stage not in PRESETS[preset]:
        raise StageError(f"preset {preset} has no stage {stage}: its base model comes from "
                         "weights/convert_sd15.py, only `moa` and `lora` are trained")
    return replace(PRESETS[preset][stage], **{k: v for k, v in changes.items() if v is not None})


def check_preset(preset: str, weights: Path | None) -> None:
    """Raise StageError for Stable Diffusion's weights and the small world's hyperparameters."""
    if preset == "toyworld" and weights is not None:
        config = read_config(weights)
        if "unet" in config and build_config(config, "unet") == UNetConfig():
            raise StageError(f"{weights} is of Stable Diffusion 1.5's size: give --preset sd15 "
                             "(toyworld is the default)")


# Sizes of the small world's models. The UNet has SD1.5's four levels and two layers, so 686 tensors
# and 32 attention layers.
SIZES = {"channels": (32, 64, 96, 96), "heads": 4, "context_dim": 128, "groups": 8}
SMALL = {
    "unet": UNetConfig(**SIZES),
    "controlnet": ControlNetConfig(**SIZES, hint_channels=(8, 16, 32, 64)),
    "vae": VAEConfig(channels=(16, 32, 64, 96), layers=1, groups=8),
    "text_encoder": CLIPTextConfig(dim=128, layers=3, heads=4),
    "image_encoder": CLIPImageConfig(image_size=64, patch_size=8, dim=128, layers=4, heads=4, output_dim=128),
}


def small_text_config() -> CLIPTextConfig:
    """The small text encoder, with embeddings for the words of the small world only."""
    encode = open_clip().tokenizer.SimpleTokenizer().encode
    words = tuple(toyworld.vocabulary())
    kept = {token for word in words for token in encode(word)} | {BOS, EOS}
    return replace(SMALL["text_encoder"], kept_tokens=tuple(sorted(kept)), words=words)
