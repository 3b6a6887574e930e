"""The autoencoder of the small world."""
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.load import save_part
from models.vae import AutoencoderKL
from images import to_picture, to_uint8
from training.presets import SMALL
from training.stage import Stage, save_grid, step_generator


class VAEStage(Stage):
    """Autoencoder: L1, squared error, edges, and a slight pull of the posterior to N(0, 1)."""

    def setup(self) -> None:
        self.module = AutoencoderKL(SMALL["vae"]).to(memory_format=torch.channels_last)
        self.samples = self.training_samples()
        self.test = self.rendered("scenes", 512, "test")

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        vae, generator = self.module, step_generator(self.seed, step)
        image = to_picture(np.stack([sample.image for sample in self.batch(step)]), self.device)
        image = image.contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.posterior(image)
        z = mean + (0.5 * logvar).exp() * self.noise(mean.shape, generator)
        decoded = vae.decoder(vae.post_quant_conv(z)).float()
        l1 = (decoded - image).abs().mean()
        mse = (decoded - image).square().mean()
        edges = sum((decoded.diff(dim=d) - image.diff(dim=d)).abs().mean() for d in (2, 3))
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return l1 + 0.5 * mse + 0.5 * edges + 1e-4 * kl, {"l1": l1, "mse": mse, "edges": edges, "kl": kl}

    @torch.no_grad()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 -> its reconstruction."""
        batches = [self.module.decode(self.module.encode(to_picture(batch, self.device)))
                   for batch in np.array_split(images, max(1, len(images) // 32))]
        return to_uint8(torch.cat(batches))

    def sheet(self, path: Path) -> None:
        images = np.array(self.test.images[:64])
        decoded = self.reconstruct(images)
        error = np.square(images.astype(np.float32) - decoded).mean(axis=(1, 2, 3))
        print(f"\nPSNR {np.mean(10 * np.log10(255 ** 2 / error)):.2f} dB on 64 held-out scenes")
        save_grid([row for k in (0, 10) for row in (images[k:k + 10], decoded[k:k + 10])], path)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Latents get mean 0 and spread 1 per channel, so that SD's scale factor fits them."""
        images = np.stack([sample.image for sample in self.first_samples(2048)])
        means = torch.cat([self.module.posterior(to_picture(batch, self.device))[0]
                           for batch in np.array_split(images, max(1, len(images) // 32))])
        channels = rearrange(means, "b c h w -> c (b h w)")
        self.module.normalize_latents(channels.mean(1), channels.std(1))
        save_part(self.module, folder, "vae")
