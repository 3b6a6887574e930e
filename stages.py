"""The five stages of `train.py`: what each one trains, on what, with which loss."""
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import toyworld
from data.dataset import MAX_SUBJECTS, Cache, batch_indices, render_cache
from data.fastcomposer import folder_cache
from data.judge import Judge
from distributed import share, world_size
from moa import (ExpertContext, MultimodalPrompt, PromptConfig, add_moa, load_moa, record_routing,
                 record_subject_attention, save_moa)
from moa.loss import masked_loss, mean_routing, object_loss, router_loss
from models import load_models
from models.attention import FeedForward
from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import BOS, EOS, CLIPTextConfig, CLIPTextEncoder, Tokenizer
from models.load import (Models, carry_over, load_part, read_config, save_part, save_tensors, write_json,
                         write_whole)
from models.open_clip_import import open_clip
from models.resnet import ResnetBlock
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig
from pictures import to_picture, to_uint8
from pipeline import Pipeline, Subject, squared_distance
from samplers import add_noise, alpha_bar


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
    accumulate: int = 1  # turns in which a process works on its share of a batch
    checkpointing: bool = False  # compute activations again in the backward pass (moa)
    min_snr: float = 5.0  # gamma of min-SNR weighting (arXiv 2303.09556); 0 is the plain eps loss
    null_probability: float = 0.1
    max_timestep: int = 1000
    lambda_router: float = 0.0
    lambda_object: float = 0.0
    router_layers: tuple[int, ...] = tuple(range(16))  # L in Eq. 10
    object_layers: tuple[int, ...] = tuple(range(16))  # those of Eq. 12


# The small world's recipe: a few hours on four CPU cores. Larger batches and more steps are better
# where there is a GPU.
TOYWORLD = {
    "vae": TrainConfig(steps=6000, batch_size=8, lr=1e-3, ema=0.995, bf16=True),
    "clip": TrainConfig(steps=800, batch_size=128, lr=1e-3, weight_decay=0.1),
    "prior": TrainConfig(steps=4000, batch_size=32, lr=1e-3, ema=0.998),
    "moa": TrainConfig(steps=3250, batch_size=32, lr=1e-3, ema=0.998, max_timestep=800,
                       lambda_router=1e-5, lambda_object=3e-3,
                       # Cells of the 2 x 2 and 4 x 4 layers hold people and background at once.
                       router_layers=(0, 1, 2, 3, 10, 11, 12, 13, 14, 15)),
    "judge": TrainConfig(steps=4500, batch_size=32, lr=2e-3, ema=0.998, bf16=True),
}
# Table 1 of the paper, and FastComposer's values where it is silent.
SD15 = {
    "moa": TrainConfig(
        steps=40_000, batch_size=128, lr=5e-5,  # Table 1; section 4.1 says 1e-5
        warmup=0, decay=0.0, betas=(0.9, 0.999), min_snr=0.0, max_timestep=800, augment=True,
        lambda_router=1e-4, lambda_object=1e-4, checkpointing=True,
        # "excluding the first two and last three"
        router_layers=tuple(range(2, 13)), object_layers=tuple(range(2, 13))),
}
PRESETS = {"toyworld": TOYWORLD, "sd15": SD15}


def make_config(preset: str, stage: str, **changes) -> TrainConfig:
    """The preset of a stage with the values from the command line that are not None."""
    if stage not in PRESETS[preset]:
        raise StageError(f"preset {preset} has no stage {stage}: its base model comes from "
                         "weights/convert_sd15.py, only `moa` is trained")
    return replace(PRESETS[preset][stage], **{k: v for k, v in changes.items() if v is not None})


# Sizes of the small world's models. The UNet has SD1.5's four levels and two layers, so 686 tensors
# and 32 attention layers.
SMALL = {
    "unet": UNetConfig(channels=(32, 64, 96, 96), heads=4, context_dim=128, groups=8),
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


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step, so that a run needs no random state to go on."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_grid(rows: list[np.ndarray], path: Path) -> None:
    """Rows of pictures (N, H, W, 3) uint8 as one PNG."""
    grid = np.concatenate([rearrange(row, "n h w c -> h (n w) c") for row in rows])
    Image.fromarray(grid).save(path)


class Stage:
    """`module` holds what is trained; `loss(step)` is a pure function of it and the step."""

    module: nn.Module
    reads: tuple[str, ...] = ("data",)  # which of --weights, --data and --moa the stage can use
    size = toyworld.SIZE  # of its pictures, in pixels
    shareable = True  # whether the loss is a mean over samples, which several processes can share

    def __init__(self, config: TrainConfig, seed: int, device: torch.device,
                 weights: Path | None, data: Path | None, moa: Path | None = None):
        self.config, self.seed, self.device = config, seed, device
        self.weights, self.data, self.moa = weights, data, moa
        for name in ("weights", "data", "moa"):
            if getattr(self, name) is not None and name not in self.reads:
                raise StageError(f"this stage cannot use --{name}: leave it out")
        parts = world_size() * config.accumulate
        if parts > 1 and not self.shareable:
            raise StageError("the loss of this stage is not a mean over its samples: run it in one process, "
                             "without --accumulate")
        if config.batch_size % parts:
            raise StageError(f"--batch-size {config.batch_size} must be a multiple of {parts}, the processes "
                             "times --accumulate")
        torch.manual_seed(seed)  # initial weights
        self.setup()
        self.module.to(device)

    def setup(self) -> None:
        """Build `module` and the data."""
        raise NotImplementedError

    def training_scenes(self) -> Cache:
        """The scenes of the folder --data, else rendered ones."""
        if self.data is not None:
            return folder_cache(self.data, self.config.samples, self.size, augmented=self.config.augment)
        return render_cache("scenes", self.config.samples)

    def indices(self, step: int, count: int) -> np.ndarray:
        """This process's samples of a step."""
        return share(batch_indices(self.seed, step, self.config.batch_size, count))

    def noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """This process's share, of `shape`, of the noise of a step."""
        whole = torch.randn(self.config.batch_size, *shape[1:], generator=generator)
        return share(whole).to(self.device)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step and its parts by name."""
        raise NotImplementedError

    def sheet(self, path: Path) -> None:
        """A picture of what the stage can do by now."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write the trained weights."""
        raise NotImplementedError


class VAEStage(Stage):
    """Autoencoder: L1, squared error, edges, and a slight pull of the posterior to N(0, 1)."""

    def setup(self) -> None:
        self.module = AutoencoderKL(SMALL["vae"]).to(memory_format=torch.channels_last)
        self.scenes = self.training_scenes()
        self.test = render_cache("scenes", 512, "test")

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        vae, generator = self.module, step_generator(self.seed, step)
        image = to_picture(self.scenes.images[self.indices(step, len(self.scenes))]).to(self.device)
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
        batches = [self.module.decode(self.module.encode(to_picture(batch).to(self.device)))
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
        images = np.array(self.scenes.images[:2048])
        means = torch.cat([self.module.posterior(to_picture(batch).to(self.device))[0]
                           for batch in np.array_split(images, max(1, len(images) // 32))])
        channels = rearrange(means, "b c h w -> c (b h w)")
        self.module.normalize_latents(channels.mean(1), channels.std(1))
        save_part(self.module, folder, "vae")


class CLIPStage(Stage):
    """Text and image encoder, contrastively: half scenes with captions, half portraits with full
    descriptions, the latter in pairs that differ in one attribute. Models of --weights are kept."""

    reads = ("weights",)
    shareable = False  # every picture is compared with all others of the batch

    def setup(self) -> None:
        if self.weights is not None:
            read_config(self.weights)
        if self.config.batch_size < 4 or self.config.samples < 2:
            raise StageError("clip compares pairs: it needs --batch-size 4 and --samples 2 at least")
        text, image = small_text_config(), SMALL["image_encoder"]
        self.module = nn.ModuleDict({
            "text_encoder": CLIPTextEncoder(text), "image_encoder": CLIPImageEncoder(image),
            "text_projection": nn.Linear(text.dim, image.output_dim, bias=False)})
        for embedding in (m for m in self.module["text_encoder"].modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(embedding.weight, std=0.05)
        self.module.register_parameter("log_scale", nn.Parameter(torch.tensor(2.7)))
        self.tokenize = Tokenizer(text)
        count = self.config.samples
        self.portraits = render_cache("portraits", count - count % 2)
        self.scenes = render_cache("scenes", count)
        self.test = render_cache("portraits", 2000, "test")
        self.tokens = {id(cache): tokenize_all(self.tokenize, cache.captions)
                       for cache in (self.portraits, self.scenes, self.test)}

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, F), read at the end-of-text token. Attention is causal, so the padding
        behind it need not be computed."""
        ends = (tokens == EOS).int().argmax(1)
        states = self.module["text_encoder"](tokens[:, :int(ends.max()) + 1])
        return F.normalize(self.module["text_projection"](states[torch.arange(len(ends)), ends]), dim=-1)

    def features(self, images: np.ndarray) -> Tensor:
        encoder = self.module["image_encoder"]
        return encoder(encoder.preprocess(to_picture(images).to(self.device) / 2 + 0.5))

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        half = self.config.batch_size // 2
        pairs = batch_indices(self.seed, step, half // 2, len(self.portraits) // 2)
        indices = (np.concatenate([2 * pairs, 2 * pairs + 1]),
                   batch_indices(self.seed, step, half, len(self.scenes)))
        caches = (self.portraits, self.scenes)
        tokens = torch.cat([self.tokens[id(c)][i] for c, i in zip(caches, indices, strict=True)])
        images = np.concatenate([c.images[i] for c, i in zip(caches, indices, strict=True)])
        text = self.embed_text(tokens.to(self.device))
        image = F.normalize(self.features(images), dim=-1)
        logits = self.module.log_scale.exp().clamp(max=100) * (image @ text.T).float()
        # Pictures that share a caption are all right answers.
        target = (tokens[:, None] == tokens[None]).all(-1).float().to(self.device)
        target = target / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        with torch.no_grad():
            right = (target.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean()
        return loss, {"retrieved": right, "scale": self.module.log_scale.exp()}

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """How much of a person the image features hold: a linear read-out of held-out portraits."""
        train = torch.cat([self.features(self.portraits.images[i:i + 200]) for i in range(0, 4000, 200)
                           if i < len(self.portraits)]).cpu()
        test = torch.cat([self.features(self.test.images[i:i + 200])
                          for i in range(0, len(self.test), 200)]).cpu()
        labels, truth = (torch.as_tensor(c.labels("attributes")[:, 0]) for c in (self.portraits, self.test))
        scores = {}
        for a, (name, classes) in enumerate(toyworld.ATTRIBUTES.items()):
            one_hot = F.one_hot(labels[:len(train), a], len(classes)).float()
            design = F.pad(train.float(), (0, 1), value=1)
            weights = torch.linalg.solve(design.T @ design + 1e-2 * torch.eye(design.shape[1]),
                                         design.T @ one_hot)
            scores[name] = ((F.pad(test.float(), (0, 1), value=1) @ weights).argmax(1)
                            == truth[:, a]).float().mean().item()
        write_json(scores, path.with_suffix(".json"))
        print("\nlinear read-out of held-out portraits: "
              + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))

    def export(self, folder: Path) -> None:
        if self.weights is not None:
            carry_over(self.weights, folder)
        for part in ("text_encoder", "image_encoder"):
            save_part(self.module[part], folder, part)


def tokenize_all(tokenize: Tokenizer, captions: list[str]) -> Tensor:
    """(N,) captions, many of them equal -> (N, 77) int64."""
    unique = sorted(set(captions))
    rows = {caption: i for i, caption in enumerate(unique)}
    return tokenize(unique)[[rows[caption] for caption in captions]]


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


class MoAStage(PriorStage):
    """Personalized experts, routers and multimodal prompt on a frozen base (section 3.3), from the
    base's attention on or from those of the file --moa on."""

    reads = ("weights", "data", "moa")

    def setup(self) -> None:
        if self.weights is None:
            raise StageError("moa needs --weights FOLDER with a complete base model")
        models = load_models(self.weights, self.device)
        if models.image_encoder is None:
            raise StageError(f"{self.weights} has no image encoder")
        self.unet, self.vae, self.text_encoder = models.unet, models.vae, models.text_encoder
        self.image_encoder, self.tokenize = models.image_encoder, models.tokenize
        self.size = models.config.get("image_size", self.size)
        self.unet.to(memory_format=torch.channels_last)
        if self.moa is not None:
            self.prompt = load_moa(self.unet, self.moa)
        else:
            add_moa(self.unet)
            text_dim, image_dim = self.text_encoder.cfg.dim, self.image_encoder.cfg.output_dim
            layers = len(list(self.unet.transformer_blocks()))
            self.prompt = MultimodalPrompt(PromptConfig(text_dim, image_dim, 2 * image_dim, layers))
        if self.config.checkpointing:
            # Not the attention: it is watched by hooks that are gone in the backward pass, and its fused
            # kernel keeps little.
            for module in self.unet.modules():
                if isinstance(module, (ResnetBlock, FeedForward)):
                    module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        self.module = nn.ModuleDict({"unet": self.unet, "prompt": self.prompt})
        self.load_scenes()
        self.features = encode_references(self.scenes, self.image_encoder, self.device).float()
        self.masks = latent_masks(self.scenes, self.latents.shape[-1])
        self.positions, self.present = self.subject_positions(self.scenes)
        if not self.present.any():
            raise StageError(f"{self.data} has no subjects to train on")

    def subject_positions(self, scenes: Cache) -> tuple[Tensor, Tensor]:
        """Token index of each subject's noun (N, P) int64, and whether there is one (N, P) bool.
        A noun behind the last token that fits is not there."""
        positions = torch.zeros(len(scenes), MAX_SUBJECTS, dtype=torch.int64)
        present = torch.zeros(len(scenes), MAX_SUBJECTS, dtype=torch.bool)
        for i, sample in enumerate(scenes.samples):
            for s, end in enumerate(sample["ends"]):
                position = len(self.tokenize.encode(sample["caption"][:end]))
                if position < self.tokenize.length - 1:  # the last is the end of the text
                    positions[i, s], present[i, s] = position, True
        return positions, present

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11. The people's mask is kept on null samples, so that these train too."""
        indices, x, eps, t, tokens, null = self.noised(step)
        masks = self.masks[indices].float().to(self.device)  # (B, P, h, w)
        people = masks.sum(1).clamp(max=1)
        positions, present, features = (
            v[indices].to(self.device) for v in (self.positions, self.present, self.features))
        present = present & ~null[:, None]
        with torch.no_grad():
            text = self.text_encoder(tokens)
        context = ExpertContext(text, self.prompt(text, features, positions, present, t))
        with record_routing(self.unet) as routing, record_subject_attention(self.unet, positions) as maps:
            eps_hat = self.unet(x, t, context).float()
        prior_weights = [r[..., 0].float() for key, r in routing.items()
                         if key.layer in self.config.router_layers]
        attention = [a.float() for layer, a in maps.items() if layer in self.config.object_layers]
        mean_prior = mean_routing(prior_weights, *people.shape[-2:])
        masked = masked_loss(eps_hat, eps, people, snr_weight(t, self.config.min_snr))
        router = router_loss(mean_prior, people)
        balance = object_loss(attention, masks, present)
        loss = masked + self.config.lambda_router * router + self.config.lambda_object * balance
        return loss, {
            "masked": masked, "router": router, "object": balance,
            "prior_weight_people": (mean_prior * people).sum() / people.sum().clamp(min=1),
            "prior_weight_background": (mean_prior * (1 - people)).sum() / (1 - people).sum()}

    def sheet(self, path: Path) -> None:
        """First row the prior alone, then one row per subject: same seeds, another person."""
        models = Models(self.unet, self.vae, self.text_encoder, self.tokenize, self.image_encoder,
                        {"image_size": toyworld.SIZE})
        pipeline = Pipeline(models, self.prompt.eval())
        rng = np.random.default_rng(11)
        identities = [toyworld.sample_identity(rng, "test", noun) for noun in ("woman", "woman", "woman")]
        references = np.stack([toyworld.render_reference(p, i) for i, p in enumerate(identities)])
        features = pipeline.encode_subjects(to_picture(references) / 2 + 0.5)
        prompts = [f"a woman {what}" for what in SWAP_PROMPTS]
        positions = [self.tokenize.word_positions(prompt, "woman")[0] for prompt in prompts]
        rows = []
        for row in range(1 + len(identities)):
            people = [[Subject(p, features[row - 1])] for p in positions] if row else None
            pictures = pipeline.generate(prompts, range(len(prompts)), people, steps=20,
                                         guidance_scale=SHEET_GUIDANCE, prior_only=row == 0)
            left = references[row - 1] if row else np.full_like(references[0], 255)
            rows.append(np.concatenate([left[None], to_uint8(pictures)]))
        self.prompt.train()
        save_grid(rows, path)

    def export(self, folder: Path) -> None:
        carry_over(self.weights, folder)
        save_moa(self.unet, self.prompt, folder / "moa.safetensors", preset=asdict(self.config))
        save_tensors(feature_statistics(self.features[self.present]), folder / "subjects.safetensors")


def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Where the image features (N, F) of the training subjects lie, so that `sample.py` can tell a
    subject of another world: mean (F,), precision (F, F) and the largest usual distance ()."""
    mean = features.mean(0)
    precision = torch.linalg.inv(torch.cov(features.T) + 1e-4 * torch.eye(features.shape[1]))
    distances = squared_distance(features, mean, precision)
    return {"mean": mean, "precision": precision, "limit": 1.25 * distances.quantile(0.999)}


def latent_masks(scenes: Cache, size: int) -> Tensor:
    """(N, P, size, size) float16: the share of each latent cell that a subject covers."""
    parts = []
    for start in range(0, len(scenes), 1000):
        masks = torch.from_numpy(scenes.masks(slice(start, start + 1000)))
        parts.append(F.adaptive_avg_pool2d(masks.float(), size).half())
    return torch.cat(parts)


def update_config(folder: Path, **values) -> None:
    """Add to a folder's config.json."""
    write_json({**read_config(folder), **values}, folder / "config.json")


class JudgeStage(Stage):
    """Reads attributes, activity, place and masks off rendered pictures (`data/judge.py`)."""

    shareable = False  # means over the attributes that are visible, of which samples have unequal numbers

    def setup(self) -> None:
        self.module = Judge().to(memory_format=torch.channels_last)
        self.scenes = self.training_scenes()
        self.test = render_cache("scenes", 2000, "test")
        if not all(sample["labels"] for sample in self.scenes.samples):
            raise StageError(f"{self.data} has no labels for a judge: only the small world writes them")
        self.labels = {id(c): {name: torch.as_tensor(c.labels(name))
                               for name in ("activity", "context", "style", "attributes")}
                       for c in (self.scenes, self.test)}

    def batch(self, cache: Cache, indices: np.ndarray) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pictures (B, 3, S, S), masks (B, P, 32, 32) and labels."""
        masks = F.adaptive_avg_pool2d(torch.from_numpy(cache.masks(indices)).float(), 32)
        labels = {k: v[indices].to(self.device) for k, v in self.labels[id(cache)].items()}
        return to_picture(cache.images[indices]).to(self.device), masks.to(self.device), labels

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, masks, labels = self.batch(self.scenes, self.indices(step, len(self.scenes)))
        generator = step_generator(self.seed, step)
        if torch.rand((), generator=generator) < 0.5:  # generated pictures are a little soft
            factor = 1 + torch.rand((), generator=generator).item()
            small = F.interpolate(image, scale_factor=1 / factor, mode="bilinear", antialias=True)
            image = F.interpolate(small, image.shape[-2:], mode="bilinear")
        image = image + 0.05 * self.noise(image.shape, generator)
        verdict = self.module(image.contiguous(memory_format=torch.channels_last), masks)
        background = (1 - masks.sum(1, keepdim=True)).clamp(min=0)
        parts = {"people": F.cross_entropy(verdict.people, torch.cat([background, masks], 1))}
        for name in ("activity", "context", "style"):
            parts[name] = F.cross_entropy(getattr(verdict, name), labels[name])
        count = (labels["attributes"] >= 0).any(-1).sum(1) - 1
        parts["count"] = F.cross_entropy(verdict.count, count)
        for a, name in enumerate(toyworld.ATTRIBUTES):
            parts[name] = F.cross_entropy(verdict.attributes[name].flatten(0, 1),
                                          labels["attributes"][:, :, a].flatten(), ignore_index=-1)
        return sum(parts.values()), parts

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Accuracies on held-out renders, as JSON."""
        hits: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.test), 100):
            image, masks, labels = self.batch(self.test, np.arange(len(self.test))[start:start + 100])
            verdict = self.module(image)
            for name in ("activity", "context", "style"):
                hits.setdefault(name, []).append(getattr(verdict, name).argmax(1) == labels[name])
            for a, name in enumerate(toyworld.ATTRIBUTES):
                truth = labels["attributes"][:, :, a]
                guess = verdict.attributes[name].argmax(-1)
                hits.setdefault(name, []).append((guess == truth)[truth >= 0])
            found, true = verdict.people.argmax(1) > 0, masks.sum(1) > 0.5
            hits.setdefault("mask_iou", []).append(
                (found & true).sum((1, 2)) / (found | true).sum((1, 2)).clamp(min=1))
        scores = {name: torch.cat(values).float().mean().item() for name, values in hits.items()}
        scores["attributes_mean"] = float(np.mean([scores[name] for name in toyworld.ATTRIBUTES]))
        write_json(scores, path.with_suffix(".json"))
        print("\nheld-out renders: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def export(self, folder: Path) -> None:
        save_tensors(self.module.state_dict(), folder / "judge.safetensors", torch.float16)


# The sample sheets always show the same prompts; guidance as in the shipped config.
SHEET_GUIDANCE = 4.0
SWAP_PROMPTS = ("standing on the beach", "riding a bike in a park", "reading a book in the snow",
                "holding a bouquet of roses in Paris", "sitting on a sofa in a laboratory",
                "drinking boba in a night market", "waving on a mountain", "running in a lavender farm")
SHEET_PROMPTS = [f"a {noun} {what}" for noun in ("woman", "man", "girl") for what in SWAP_PROMPTS] + [
    f"{who} {what}" for who in ("a man and a woman", "a woman and a boy") for what in (
        "standing on the beach", "shaking hands in Paris", "dancing on Mars", "reading a book in the snow",
        "sitting on a sofa in the wild west", "running in a park", "waving in a night market",
        "holding a bouquet of roses in a lavender farm")]
STAGES = {"vae": VAEStage, "clip": CLIPStage, "prior": PriorStage, "moa": MoAStage, "judge": JudgeStage}
