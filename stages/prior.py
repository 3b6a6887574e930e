"""The base model of the small world."""
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from data import toyworld
from data.dataset import MAX_SUBJECTS, Cache
from distributed import share
from models.clip_image import CLIPImageEncoder
from models.clip_text import Tokenizer
from models.load import Models, carry_over, load_part, save_part, write_whole
from models.unet import UNet
from models.vae import AutoencoderKL
from pictures import to_picture, to_uint8
from pipeline import Pipeline
from samplers import add_noise, alpha_bar
from stages.presets import SMALL, StageError
from stages.stage import (SHEET_GUIDANCE, SHEET_PROMPTS, Stage, save_grid, step_generator, tokenize_all,
                          update_config)


def snr_weight(t: Tensor, gamma: float) -> Tensor:
    """min-SNR weight of the eps loss at each timestep (B,): min(SNR, gamma) / SNR; 1 for gamma 0."""
    alpha_bars = torch.tensor(alpha_bar(), dtype=torch.float32, device=t.device)[t]
    snr = alpha_bars / (1 - alpha_bars)
    return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)


@torch.no_grad()
def map_images(images: np.ndarray, function, path: Path) -> np.ndarray:
    """`function` of (B, 3, S, S) pictures in [-1, 1], for all pictures, kept on disk as float16."""
    if not path.exists():
        batches = [function(to_picture(images[i:i + 64])).half().cpu().numpy()
                   for i in tqdm(range(0, len(images), 64), path.stem, leave=False)]
        write_whole(path, lambda temporary: save_array(np.concatenate(batches), temporary))
    return np.load(path, mmap_mode="r")


def save_array(array: np.ndarray, path: Path) -> None:
    """`np.save`, which would add .npy to a name without it."""
    with open(path, "wb") as file:
        np.save(file, array)


def encode_latents(cache: Cache, vae: AutoencoderKL, device: torch.device) -> Tensor:
    """(N, 4, h, w) scaled latents of all pictures, computed once per VAE."""
    path = cache.folder / f"latents-{fingerprint(vae)}.npy"
    return torch.from_numpy(np.array(map_images(cache.images, lambda x: vae.encode(x.to(device)), path)))


def encode_references(cache: Cache, encoder: CLIPImageEncoder, device: torch.device) -> Tensor:
    """(N, P, F) image features of all reference pictures."""
    flat = cache.references.reshape(-1, *cache.references.shape[2:])
    path = cache.folder / f"features-{fingerprint(encoder)}.npy"
    features = map_images(flat, lambda x: encoder(encoder.preprocess(x.to(device) / 2 + 0.5)), path)
    return torch.from_numpy(np.array(features)).unflatten(0, (-1, MAX_SUBJECTS))


def fingerprint(module: nn.Module) -> str:
    """A checksum of all weights, for the names of cached results."""
    checksum = 0
    for value in module.state_dict().values():
        checksum = zlib.crc32(value.detach().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


class PriorStage(Stage):
    """The base model: noise prediction on the small world's scenes, text encoder and VAE frozen."""

    reads = ("weights", "data")

    def setup(self) -> None:
        if self.weights is None:
            raise StageError("the prior needs --weights FOLDER with a VAE and a text encoder")
        self.vae = load_part(self.weights, "vae", self.device)
        self.text_encoder = load_part(self.weights, "text_encoder", self.device)
        self.tokenize = Tokenizer(self.text_encoder.cfg)
        self.module = UNet(SMALL["unet"])
        self.start_residuals_at_zero()
        self.module.to(memory_format=torch.channels_last)
        self.load_scenes()

    def start_residuals_at_zero(self) -> None:
        """Every residual branch and the output start at zero: small nets then learn much faster."""
        for name, module in self.module.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def load_scenes(self) -> None:
        self.scenes = self.training_scenes()
        self.latents = encode_latents(self.scenes, self.vae, self.device)
        self.tokens = tokenize_all(self.tokenize, self.scenes.captions)
        self.null = self.tokenize([""])

    def noised(self, step: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The data of one step: indices, x_t, eps, t, tokens and which samples are null (B,)."""
        generator, size = step_generator(self.seed, step), self.config.batch_size
        indices = self.indices(step, len(self.scenes))
        x0 = self.latents[indices].float().to(self.device)
        eps = self.noise(x0.shape, generator)
        t = share(torch.randint(0, self.config.max_timestep, (size,), generator=generator))
        null = share(torch.rand(size, generator=generator) < self.config.null_probability)
        tokens = torch.where(null[:, None], self.null, self.tokens[indices]).to(self.device)
        t, null = t.to(self.device), null.to(self.device)
        x = add_noise(x0, eps, t).contiguous(memory_format=torch.channels_last)
        return indices, x, eps, t, tokens, null

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        _, x, eps, t, tokens, _ = self.noised(step)
        with torch.no_grad():
            context = self.text_encoder(tokens)
        error = (self.module(x, t, context).float() - eps).square().mean((1, 2, 3))
        return (snr_weight(t, self.config.min_snr) * error).mean(), {"eps": error.mean()}

    def pipeline(self) -> Pipeline:
        models = Models(self.module, self.vae, self.text_encoder, self.tokenize, None,
                        {"image_size": toyworld.SIZE})
        return Pipeline(models)

    def sheet(self, path: Path) -> None:
        """Every context with a few activities, fixed seeds."""
        pictures = self.pipeline().generate(
            SHEET_PROMPTS, range(len(SHEET_PROMPTS)), steps=20, guidance_scale=SHEET_GUIDANCE)
        save_grid(list(to_uint8(pictures).reshape(5, 8, toyworld.SIZE, toyworld.SIZE, 3)), path)

    def export(self, folder: Path) -> None:
        carry_over(self.weights, folder)
        save_part(self.module, folder, "unet")
        update_config(folder, image_size=toyworld.SIZE, world="toyworld",
                      sampling={"guidance_scale": SHEET_GUIDANCE, "steps": 20})
