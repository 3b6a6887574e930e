"""The small world's hyperparameters, and the sizes of its models."""
from dataclasses import replace

import toyworld
from models.clip_image import CLIPImageConfig
from models.clip_text import BOS, EOS, CLIPTextConfig
from models.controlnet import ControlNetConfig
from models.open_clip_import import open_clip
from models.unet import UNetConfig
from models.vae import VAEConfig
from training.presets import TrainConfig

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
