"""Text and image encoder of the small world."""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import toyworld
from data.sample import batch_indices
from images import to_picture
from models.clip_image import CLIPImageEncoder
from models.clip_text import EOS, CLIPTextEncoder, Tokenizer
from models.load import carry_over, read_config, save_part, write_json
from toyworld.presets import SMALL, small_text_config
from toyworld.rendered import render_cache
from training.presets import StageError
from training.stage import Stage


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
        self.portraits, self.scenes = render_cache("portraits", count - count % 2), self.samples
        self.test = render_cache("portraits", 2000, "test")
        self.tokens = {id(cache): tokenize_all(self.tokenize, cache.captions)
                       for cache in (self.portraits, self.scenes, self.test)}

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, F), read at the end-of-text token. Attention is causal, so the padding
        behind it need not be computed."""
        ends = (tokens == EOS).int().argmax(1)
        states = self.module["text_encoder"](tokens[:, :int(ends.max()) + 1])
        return F.normalize(self.module["text_projection"](states[torch.arange(len(ends)), ends]), dim=-1)

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, F)."""
        encoder = self.module["image_encoder"]
        return encoder(encoder.preprocess(pictures / 2 + 0.5))

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        half = self.config.batch_size // 2
        pairs = batch_indices(self.seed, step, half // 2, len(self.portraits) // 2)
        indices = (np.concatenate([2 * pairs, 2 * pairs + 1]),
                   batch_indices(self.seed, step, half, len(self.scenes)))
        caches = (self.portraits, self.scenes)
        tokens = torch.cat([self.tokens[id(c)][i] for c, i in zip(caches, indices, strict=True)])
        images = np.concatenate([c.images[i] for c, i in zip(caches, indices, strict=True)])
        return {"tokens": tokens.to(self.device), "image": to_picture(images, self.device)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = batch["tokens"]
        text = self.embed_text(tokens)
        image = F.normalize(self.features(batch["image"]), dim=-1)
        logits = self.module.log_scale.exp().clamp(max=100) * (image @ text.T).float()
        # Pictures that share a caption are all right answers.
        target = (tokens[:, None] == tokens[None]).all(-1).float()
        target = target / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        with torch.no_grad():
            right = (target.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean()
        return loss, {"retrieved": right, "scale": self.module.log_scale.exp()}

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """How much of a person the image features hold: a linear read-out of held-out portraits."""
        train, test = (
            torch.cat([self.features(to_picture(cache.images[i:i + 200], self.device))
                       for i in range(0, min(4000, len(cache)), 200)]).cpu()
            for cache in (self.portraits, self.test))
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
