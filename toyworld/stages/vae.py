"""The autoencoder of the small world."""
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from images import to_picture, to_uint8
from models.load import save_part
from models.vae import AutoencoderKL
from toyworld.presets import SMALL
from toyworld.rendered import render_cache
from training.distributed import first_rank_first
from training.stage import Stage, save_grid, step_generator


class VAEStage(Stage):
    """Autoencoder: L1, squared error, edges, and a slight pull of the posterior to N(0, 1)."""

    def setup(self) -> None:
        self.module = AutoencoderKL(SMALL["vae"]).to(memory_format=torch.channels_last)
        with first_rank_first():
            self.test = render_cache("scenes", 512, "test")

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        image = to_picture(np.stack([sample.image for sample in self.read(step, turn)]), self.device)
        config = SMALL["vae"]
        cells = image.shape[-1] // config.factor
        noise = self.noise((len(image), config.latent_channels, cells, cells),
                           step_generator(self.seed, step), turn)
        return {"image": image.contiguous(memory_format=torch.channels_last), "noise": noise}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        vae, image = self.module, batch["image"]
        mean, logvar = vae.posterior(image)
        z = mean + (0.5 * logvar).exp() * batch["noise"]
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
        images = np.stack([self.samples.read(i).image for i in range(min(2048, len(self.samples)))])
        means = torch.cat([self.module.posterior(to_picture(batch, self.device))[0]
                           for batch in np.array_split(images, max(1, len(images) // 32))])
        channels = rearrange(means, "b c h w -> c (b h w)")
        self.module.normalize_latents(channels.mean(1), channels.std(1))
        save_part(self.module, folder, "vae")
