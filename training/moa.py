"""Personalized experts, routers and multimodal prompt on a frozen base."""
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from data.fastcomposer import Folder
from moa import (ExpertContext, MultimodalPrompt, PromptConfig, add_moa, load_moa, moa_config, record_routing,
                 record_subject_attention, save_moa)
from moa.loss import mean_routing, moa_loss, people_of, subject_attention
from models import load_models
from models.load import carry_over, load_part, save_part, save_tensors
from pipeline import Pipeline, squared_distance
from training import distributed
from training.diffusion import noised
from training.encode import CHUNK, Encoded, Encoder
from training.presets import StageError
from training.sheets import routing_sheet, swap_sheet
from training.stage import Stage, checkpoint_blocks, step_generator

STATISTICS = 8192  # samples whose subjects' features are summed up for `sample.py`
ENOUGH = 10  # times a feature's width: of fewer subjects the covariance is too rough to refuse anybody by
SHRINKAGE = 0.3  # of their covariance towards a multiple of the identity


class MoAStage(Stage):
    """Personalized experts, routers and multimodal prompt on a frozen base (section 3.3), from the
    base's attention on or from those of the file --moa on."""

    reads = ("weights", "data", "cache", "moa")
    needs_weights = True
    recordable = True

    def setup(self) -> None:
        models = self.models = load_models(self.weights, self.device)
        if models.image_encoder is None:
            raise StageError(f"{self.weights} has no image encoder")
        self.unet = models.unet.to(memory_format=torch.channels_last)
        if self.moa is not None:
            self.prompt = load_moa(self.unet, self.moa)
        else:
            add_moa(self.unet)
            text_dim, image_dim = models.text_encoder.cfg.dim, models.image_encoder.cfg.output_dim
            layers = len(list(self.unet.transformer_blocks()))
            self.prompt = MultimodalPrompt(PromptConfig(text_dim, image_dim, 2 * image_dim, layers))
        self.module = nn.ModuleDict({"unet": self.unet, "prompt": self.prompt})
        if self.config.image_layers:
            self.train_image_encoder()
        if self.config.frozen_bf16:
            for module in (self.module, models.vae, models.text_encoder, models.image_encoder):
                for parameter in module.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.bfloat16()
        if self.config.checkpointing:
            checkpoint_blocks(self.unet)
        if isinstance(self.samples, Folder) and not self.samples.people:
            raise StageError(f"{self.samples.folder} has no subjects to train on")
        self.module.train()
        self.encode = Encoder(models.vae, models.text_encoder, models.image_encoder, models.tokenize,
                              self.device, self.config.frozen_bf16)
        self.encoded = Encoded(self, self.encode, self.cache)

    def train_image_encoder(self) -> None:
        """Train the last layers of the image encoder as well; its features cannot be cached then."""
        if self.cache is not None:
            raise StageError("image_layers needs --data, and no --cache: features of an encoder that is "
                             "trained change with every step")
        encoder = self.models.image_encoder
        encoder.visual.transformer.resblocks[-self.config.image_layers:].requires_grad_(True)
        self.module["image_encoder"] = encoder

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        encoded = self.encoded(step, turn)
        batch, null = noised(self, encoded, self.encoded.null, step, turn)
        present = encoded["present"] & ~null[:, None]
        # From generators of their own: the noise's draws stay what they are. Whose reference is shown.
        if self.config.subject_probability < 1:
            drawn = torch.rand(self.config.batch_size, present.shape[1],
                               generator=step_generator(self.seed + 1, step))
            present &= (self.share(drawn, turn) < self.config.subject_probability).to(self.device)
        # Where the masked loss counts: the people, or for some samples the whole picture.
        region = people_of(encoded["masks"])
        if self.config.masked_probability < 1:
            drawn = torch.rand(self.config.batch_size, generator=step_generator(self.seed + 2, step))
            whole = self.share(drawn, turn) >= self.config.masked_probability
            region = region.masked_fill(whole[:, None, None].to(self.device), 1.0)
        return {**batch, **{name: encoded[name] for name in ("features", "positions", "masks")},
                "present": present, "region": region}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11. A sample without its subjects keeps their masks, for the masked and the router loss."""
        t, text, masks, positions, present = (
            batch[name] for name in ("t", "text", "masks", "positions", "present"))
        people = people_of(masks)
        # Unbound, since indexing would make a gradient of full size for each layer.
        context = ExpertContext(text, self.prompt(text, batch["features"], positions, present, t).unbind())
        with record_routing(self.unet) as routing, record_subject_attention(
                self.unet, positions, self.config.object_layers) as maps:
            eps_hat = self.unet(batch["x"], t, context).float()
        self.watched = ({key: r.detach() for key, r in routing.items()},
                        {layer: a.detach() for layer, a in maps.items()}, masks, present)
        routing_map = mean_routing([r[..., 0] for key, r in routing.items()
                                    if key.layer in self.config.router_layers], *people.shape[-2:])
        attention = [a.float() for layer, a in maps.items() if layer in self.config.object_layers]
        loss, terms = moa_loss(eps_hat, batch["eps"], routing_map, attention, masks, present,
                               batch["region"], batch["weight"], self.config.lambda_router,
                               self.config.lambda_object)
        background = 1 - people
        return loss, {
            **terms,
            "prior_weight_people": (routing_map * people).sum() / people.sum().clamp(min=1),
            "prior_weight_background": (routing_map * background).sum() / background.sum().clamp(min=1)}

    def moa_config(self) -> dict:
        return moa_config(self.unet, self.prompt, **self.settings())

    def settings(self) -> dict:
        """What a MoA file says about its training. `references`: on what people stood that were cut out."""
        return {"preset": asdict(self.config),
                "references": "noise" if isinstance(self.samples, Folder) else "grey"}

    def sheet(self, path: Path) -> None:
        """First row the prior alone, then one row per subject: same seeds, another person. Beside it, as
        `..._routing.png`, what the routers do in the first picture of the second row."""
        known = (person for person in self.samples.held_out()
                 if not self.models.tokenize.unknown_words(person[0]))
        people = list(islice(known, 3))
        if not people:
            print(f"warning: no {path.name}: nobody is to be seen in the first samples", file=sys.stderr)
            return
        self.module.eval()
        pipeline = Pipeline(self.models, self.prompt)
        with self.encode.precision():
            swap_sheet(pipeline, people, path)
            routing_sheet(pipeline, people[0], path.with_name(f"{path.stem}_routing.png"))
        self.module.train()

    def export(self, folder: Path) -> None:
        carry_over(self.weights, folder)
        if self.config.image_layers:  # the others as they were, not in bf16
            encoder = load_part(self.weights, "image_encoder")
            trained = self.models.image_encoder.named_parameters()
            encoder.load_state_dict({name: p for name, p in trained if p.requires_grad}, strict=False)
            save_part(encoder, folder, "image_encoder")
        save_moa(self.unet, self.prompt, folder / "moa.safetensors", **self.settings())
        features = self.subject_features()
        if len(features) >= ENOUGH * features.shape[1]:
            save_tensors(feature_statistics(features), folder / "subjects.safetensors")
        else:
            print(f"no subjects.safetensors: {len(features)} subjects are too few to know who is unlike "
                  "them. sample.py will refuse nobody")

    @torch.no_grad()
    def subject_features(self) -> Tensor:
        """(N, F) of subjects of the first samples."""
        count, found, shards = min(STATISTICS, len(self.samples)), [], self.encoded.shards
        with self.encode.precision():
            for start in range(0, count, CHUNK):  # not all at once
                indices = range(start, min(start + CHUNK, count))
                if shards is not None:
                    rows = shards.rows(indices)
                    features, present = rows["features"], rows["present"]
                else:
                    part = [self.samples.read(index) for index in indices]
                    features, present = self.encode.references(part), self.encode.texts(part)["present"]
                found.append(features[present].float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def health(self) -> dict[str, float | list[float]]:
        """Of the step's last turn, per transformer block in forward order: the prior's weight on the
        people and on the background, mean of self- and cross-attention, and the attention to a
        subject's token inside its mask. Of the whole step: the norms of the parts' gradients."""
        routing, maps, masks, present = self.watched
        people = people_of(masks)
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
        # By name, so that what an edit adds to a layer counts as well: with the experts.
        parts = {"experts": [], "routers": [], "prompt": []}
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                part = "experts" if name.startswith("unet.") else "prompt"
                parts["routers" if ".router." in name else part].append(p.grad)
        for part, gradients in parts.items():
            values[f"gradient_norm_{part}"] = float(torch.nn.utils.get_total_norm(gradients))
        return values


def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Where the image features (N, F) of the training subjects lie, so that `sample.py` can refuse a
    subject of another world: mean (F,), precision (F, F) and the largest usual distance ()."""
    mean, spread = features.mean(0), torch.cov(features.T)
    # Without the ridge, directions in which people hardly differ count as much as all others. What is plain
    # in those, such as text on white, then passes for somebody.
    ridge = SHRINKAGE * spread.diagonal().mean()
    precision = torch.linalg.inv(spread + ridge * torch.eye(len(mean)))
    distances = squared_distance(features, mean, precision)
    return {"mean": mean, "precision": precision, "limit": 1.05 * distances.quantile(0.999)}
