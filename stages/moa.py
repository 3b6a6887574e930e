"""Personalized experts, routers and multimodal prompt on a frozen base."""
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distributed
from data import toyworld
from data.dataset import MAX_SUBJECTS, Cache
from moa import (ExpertContext, MultimodalPrompt, PromptConfig, add_moa, load_moa, moa_config,
                 record_routing, record_subject_attention, save_moa)
from moa.loss import masked_loss, mean_routing, object_loss, router_loss, subject_attention
from models import load_models
from models.attention import FeedForward
from models.load import Models, carry_over, save_tensors, write_whole
from models.resnet import ResnetBlock
from pictures import RoutingSheet, to_picture, to_uint8
from pipeline import Pipeline, Subject, squared_distance
from stages.presets import StageError
from stages.prior import PriorStage, encode_references, snr_weight
from stages.stage import SHEET_GUIDANCE, SWAP_PROMPTS, save_grid


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
        self.watched = ({key: r.detach() for key, r in routing.items()},
                        {layer: a.detach() for layer, a in maps.items()}, masks, present)
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

    @torch.no_grad()
    def health(self) -> dict[str, float | list[float]]:
        """Of the step's last turn, per transformer block in forward order: the prior's weight on the
        people and on the background, mean of self- and cross-attention, and the attention to a
        subject's token inside its mask. Of the whole step: the norms of the parts' gradients."""
        routing, maps, masks, present = self.watched
        people = masks.sum(1).clamp(max=1)
        prior = torch.stack([mean_routing([routing[layer, kind][..., 0] for kind in ("self", "cross")],
                                          *people.shape[-2:]) for layer in sorted(maps)])  # (L, B, h, w)
        attention = torch.stack([(subject_attention(maps[layer].float(), masks)[0].mean(1) * present).sum()
                                 for layer in sorted(maps)])
        # Ratios of sums over all processes do not depend on the number of processes.
        mean = distributed.mean({
            "people": (prior * people).sum((1, 2, 3)), "people_cells": people.sum(),
            "background": (prior * (1 - people)).sum((1, 2, 3)), "background_cells": (1 - people).sum(),
            "attention": attention, "subjects": present.sum()})

        def ratio(name: str, count: str) -> list[float]:  # 0 where there is nobody
            return [value / (mean[count] or 1) for value in mean[name]]

        values = {"prior_weight_people_by_layer": ratio("people", "people_cells"),
                  "prior_weight_background_by_layer": ratio("background", "background_cells"),
                  "subject_attention_by_layer": ratio("attention", "subjects")}
        trained = [(name, p.grad) for name, p in self.module.named_parameters() if p.requires_grad]
        for part, mark in (("experts", ".personalized."), ("routers", ".router."), ("prompt", "prompt.")):
            gradients = [gradient for name, gradient in trained if mark in name]
            values[f"gradient_norm_{part}"] = float(torch.nn.utils.get_total_norm(gradients))
        return values

    def moa_config(self) -> dict:
        return moa_config(self.unet, self.prompt, preset=asdict(self.config))

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
        self.routing_sheet(pipeline, prompts[0], Subject(positions[0], features[0]), references[0],
                           path.with_name(f"{path.stem}_routing.png"))
        self.prompt.train()
        save_grid(rows, path)

    def routing_sheet(self, pipeline: Pipeline, prompt: str, subject: Subject, reference: np.ndarray,
                      path: Path) -> None:
        """What the routers give to the personalized experts in the first picture of the second row."""
        sheet = RoutingSheet(20)
        with record_routing(self.unet) as routing:
            def progress(step: int, steps: int, t: int, x0: Tensor) -> None:
                sheet.add(step, t, routing, x0)
                routing.clear()
            picture = pipeline.generate([prompt], [0], [[subject]], steps=20, guidance_scale=SHEET_GUIDANCE,
                                        progress=progress)
        image = sheet.draw(Image.fromarray(to_uint8(picture)[0]),
                           [(Image.fromarray(reference), "the subject")])
        write_whole(path, lambda temporary: image.save(temporary, format="PNG"))

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
