"""The base model of the small world."""
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import toyworld
from data.dataset import CACHE_ROOT
from training.distributed import share
from models.clip_text import Tokenizer
from models.load import Models, carry_over, load_part, save_part
from models.unet import UNet
from images import to_uint8
from pipeline import Pipeline
from samplers import add_noise, alpha_bar
from training.encode import Encoder, encode_all
from training.presets import SMALL, StageError
from training.stage import SHEET_GUIDANCE, SHEET_PROMPTS, Stage, save_grid, step_generator, update_config


def snr_weight(t: Tensor, gamma: float) -> Tensor:
    """min-SNR weight of the eps loss at each timestep (B,): min(SNR, gamma) / SNR; 1 for gamma 0."""
    alpha_bars = torch.tensor(alpha_bar(), dtype=torch.float32, device=t.device)[t]
    snr = alpha_bars / (1 - alpha_bars)
    return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)


class PriorStage(Stage):
    """The base model: noise prediction on the small world's scenes, text encoder and VAE frozen."""

    reads = ("weights", "data", "cache")
    recordable = True

    def setup(self) -> None:
        if self.weights is None:
            raise StageError("the prior needs --weights FOLDER with a VAE, a text and an image encoder")
        vae, text_encoder, image_encoder = (
            load_part(self.weights, part, self.device) for part in ("vae", "text_encoder", "image_encoder"))
        tokenize = Tokenizer(text_encoder.cfg)
        self.encode = Encoder(vae, text_encoder, image_encoder, tokenize, self.device)
        self.unet = self.module = UNet(SMALL["unet"])
        self.start_residuals_at_zero()
        self.module.to(memory_format=torch.channels_last)
        self.samples = self.training_samples()

    def start_residuals_at_zero(self) -> None:
        """Every residual branch and the output start at zero: small nets then learn much faster."""
        for name, module in self.module.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def prepare(self) -> None:
        """Encode all samples once: rendered ones in any case, those of a folder where --cache says."""
        if self.cache is not None and self.data is None:
            raise StageError("--cache goes with --data: rendered scenes are always kept in .cache")
        cache = self.cache
        if self.data is None:
            cache = CACHE_ROOT / f"encoded-{self.samples.key}-{self.encode.key()}"
        with self.encode.precision():
            self.null = self.encode.text_encoder(self.encode.tokenize([""]).to(self.device)).float()
        self.shards = encode_all(self.samples, self.encode, cache) if cache else None

    def encoded(self, step: int) -> dict[str, Tensor]:
        """This process's samples of a step as `Encoder` makes them, float32."""
        if self.shards is None:
            return self.encode(self.batch(step))
        with torch.autocast("cpu", enabled=False):  # which cannot join float16
            rows = self.shards.rows(self.order(step)[:, 0])
        return {k: v.to(self.device, torch.float32 if v.is_floating_point() else None)
                for k, v in rows.items()}

    def noised(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The draws of one step: x_t, eps, t, text and which samples are null (B,)."""
        generator, size = step_generator(self.seed, step), self.config.batch_size
        x0 = batch["latents"]
        eps = self.noise(x0.shape, generator)
        t = share(torch.randint(0, self.config.max_timestep, (size,), generator=generator)).to(self.device)
        null = share(torch.rand(size, generator=generator) < self.config.null_probability).to(self.device)
        text = torch.where(null[:, None, None], self.null, batch["text"])
        x = add_noise(x0, eps, t).contiguous(memory_format=torch.channels_last)
        return x, eps, t, text, null

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_of(self.inputs(step))

    def inputs(self, step: int) -> dict[str, Tensor]:
        """All that the loss of a step is computed from, on the device."""
        x, eps, t, text, _ = self.noised(self.encoded(step), step)
        return {"x": x, "eps": eps, "t": t, "text": text, "weight": snr_weight(t, self.config.min_snr)}

    def loss_of(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts by name. Here the device never waits for the host, so that a CUDA graph
        can hold it (see `training/graph.py`)."""
        eps_hat = self.predict(inputs).float()
        error = (eps_hat - inputs["eps"]).square().mean((1, 2, 3))
        return (inputs["weight"] * error).mean(), {"eps": error.mean()}

    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        """The noise (B, 4, h, w) that the model sees."""
        return self.unet(inputs["x"], inputs["t"], inputs["text"])

    def pipeline(self) -> Pipeline:
        encode = self.encode
        models = Models(self.module, encode.vae, encode.text_encoder, encode.tokenize, None,
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
