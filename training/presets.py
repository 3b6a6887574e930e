"""Hyperparameters of the stages, and the paper's for Stable Diffusion 1.5."""
from dataclasses import dataclass


class StageError(ValueError):
    """A stage cannot be set up; the message says what is missing."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of one stage; printed at the start and kept in config.json."""

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
    masked_probability: float = 1.0  # that the loss of a sample sees the people alone, else all of it (moa)
    lambda_router: float = 0.0
    lambda_object: float = 0.0
    router_layers: tuple[int, ...] = tuple(range(16))  # L in Eq. 10
    object_layers: tuple[int, ...] = tuple(range(16))  # those of Eq. 12
    lora_layers: tuple[str, ...] = ()  # a layer is changed if its path has one of these names (lora)
    lora_rank: int = 0
    lora_alpha: float = 0.0  # the change is scaled by alpha / rank


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
