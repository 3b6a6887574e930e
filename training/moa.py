"""Personalized experts, routers and multimodal prompt on a frozen base."""
import re
import sys
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from training import distributed
import toyworld
from data.fastcomposer import DataError, Folder
from training.distributed import share
from moa import (ExpertContext, MultimodalPrompt, PromptConfig, add_moa, load_moa, moa_config,
                 record_routing, record_subject_attention, save_moa)
from moa.loss import mean_routing, moa_loss, people_of, subject_attention
from models import load_models
from models.load import Models, carry_over, load_part, save_part, save_tensors, write_whole
from images import to_picture, to_uint8
from images import RoutingSheet
from pipeline import Pipeline, Subject, squared_distance
from training.encode import CHUNK, Encoder
from training.presets import StageError
from training.prior import PriorStage, snr_weight
from training.stage import SHEET_GUIDANCE, SWAP_PROMPTS, checkpoint_blocks, save_grid, step_generator

STATISTICS = 4096  # samples whose subjects' features are summed up for `sample.py`
SHRINKAGE = 0.3  # of their covariance towards a multiple of the identity


class MoAStage(PriorStage):
    """Personalized experts, routers and multimodal prompt on a frozen base (section 3.3), from the
    base's attention on or from those of the file --moa on."""

    reads = ("weights", "data", "cache", "moa")

    def setup(self) -> None:
        if self.weights is None:
            raise StageError("moa needs --weights FOLDER with a complete base model")
        models = load_models(self.weights, self.device)
        if models.image_encoder is None:
            raise StageError(f"{self.weights} has no image encoder")
        self.unet, self.image_encoder = models.unet, models.image_encoder
        self.encode = Encoder(models.vae, models.text_encoder, models.image_encoder, models.tokenize,
                              self.device, bf16=self.config.frozen_bf16)
        self.size = models.config.get("image_size", self.size)
        self.unet.to(memory_format=torch.channels_last)
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
        self.samples = self.training_samples()
        if isinstance(self.samples, Folder) and not self.samples.people:
            raise StageError(f"{self.data} has no subjects to train on")

    def train_image_encoder(self) -> None:
        """Train the last layers of the image encoder as well; its features cannot be cached then."""
        blocks = self.image_encoder.visual.transformer.resblocks
        if self.cache is not None or self.data is None:
            raise StageError("image_layers needs --data, and no --cache: features of an encoder that is "
                             "trained change with every step")
        blocks[-self.config.image_layers:].requires_grad_(True)
        self.module["image_encoder"] = self.image_encoder

    def draw_shown(self, step: int, present: Tensor) -> Tensor:
        """Whose reference is shown, of the subjects that are `present` (B, S)."""
        if self.config.subject_probability == 1:
            return present
        generator = step_generator(self.seed + 1, step)  # not the noise's: its draws stay what they are
        drawn = torch.rand(self.config.batch_size, present.shape[1], generator=generator)
        return present & (share(drawn) < self.config.subject_probability).to(self.device)

    def draw_region(self, step: int, people: Tensor) -> Tensor:
        """Where the masked loss counts: the `people` (B, h, w), or for some samples the whole picture."""
        if self.config.masked_probability == 1:
            return people
        generator = step_generator(self.seed + 2, step)
        drawn = torch.rand(self.config.batch_size, generator=generator)
        whole = share(drawn) >= self.config.masked_probability
        return people.masked_fill(whole[:, None, None].to(self.device), 1.0)

    def inputs(self, step: int) -> dict[str, Tensor]:
        batch = self.encoded(step)
        x, eps, t, text, null = self.noised(batch, step)
        return {"x": x, "eps": eps, "t": t, "text": text, "weight": snr_weight(t, self.config.min_snr),
                **{name: batch[name] for name in ("features", "positions", "masks")},
                "present": self.draw_shown(step, batch["present"] & ~null[:, None]),
                "region": self.draw_region(step, people_of(batch["masks"]))}

    def loss_of(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11. The people's mask is kept on samples without subjects, so that these train too."""
        t, text, masks, positions, present = (
            inputs[name] for name in ("t", "text", "masks", "positions", "present"))
        people = people_of(masks)
        # Layer by layer: the gradient of an index would be as large as the whole, once for each layer.
        context = ExpertContext(text, self.prompt(text, inputs["features"], positions, present, t).unbind())
        with record_routing(self.unet) as routing, record_subject_attention(
                self.unet, positions, self.config.object_layers) as maps:
            eps_hat = self.unet(inputs["x"], t, context).float()
        self.watched = ({key: r.detach() for key, r in routing.items()},
                        {layer: a.detach() for layer, a in maps.items()}, masks, present)
        routing_map = mean_routing([r[..., 0].float() for key, r in routing.items()
                                    if key.layer in self.config.router_layers], *people.shape[-2:])
        attention = [a.float() for layer, a in maps.items() if layer in self.config.object_layers]
        loss, terms = moa_loss(eps_hat, inputs["eps"], routing_map, attention, masks, present,
                               inputs["region"], inputs["weight"], self.config.lambda_router,
                               self.config.lambda_object)
        background = 1 - people
        return loss, {
            **terms,
            "prior_weight_people": (routing_map * people).sum() / people.sum().clamp(min=1),
            "prior_weight_background": (routing_map * background).sum() / background.sum().clamp(min=1)}

    def encoded(self, step: int) -> dict[str, Tensor]:
        if not self.config.image_layers:
            return super().encoded(step)
        samples = self.batch(step)
        return {**self.encode.images(samples), **self.encode.texts(samples),
                "features": self.encode.references(samples)}

    def sheet_subjects(self) -> list[tuple[str, np.ndarray]]:
        """Noun and reference (R, R, 3) of three people that training does not see; of a folder without
        a test list, of its first."""
        if self.data is None:
            rng = np.random.default_rng(11)
            people = [toyworld.sample_identity(rng, "test", "woman") for _ in range(3)]
            return [("woman", toyworld.render_reference(person, i)) for i, person in enumerate(people)]
        samples = list(self.first_samples(64))
        with suppress(DataError):
            test = Folder(self.data, 64, self.size, "test")
            samples = [test.read(i) for i in range(len(test))] if test.people else samples
        found = [(re.findall(r"\w+", sample.caption[:sample.ends[0]])[-1], sample.references[0])
                 for sample in samples if sample.ends]
        return [pair for pair in found if not self.encode.tokenize.unknown_words(pair[0])][:3]

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

        values = {**super().health(), "prior_weight_people_by_layer": ratio("people", "people_cells"),
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
        """First row the prior alone, then one row per subject: same seeds, another person. Beside it, as
        `..._routing.png`, what the routers do in the first picture of the second row."""
        encode, subjects = self.encode, self.sheet_subjects()
        if not subjects:
            print(f"warning: no {path.name}: nobody is to be seen in the first samples", file=sys.stderr)
            return
        models = Models(self.unet, encode.vae, encode.text_encoder, encode.tokenize, self.image_encoder,
                        {"image_size": self.size})
        pipeline = Pipeline(models, self.prompt.eval())
        with encode.precision():
            save_grid(self.swaps(pipeline, subjects), path)
            self.routing_sheet(pipeline, *subjects[0], path.with_name(f"{path.stem}_routing.png"))
        self.prompt.train()

    def swaps(self, pipeline: Pipeline, subjects: list[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """The rows of the sheet, each (1 + prompts, S, S, 3) uint8 with the reference on the left."""
        rows = []
        for row in range(1 + len(subjects)):
            noun, reference = subjects[max(row - 1, 0)]
            prompts, subject = [f"a {noun} {what}" for what in SWAP_PROMPTS], None
            if row:
                subject = [self.bind(pipeline, prompt, noun, reference) for prompt in prompts]
            pictures = pipeline.generate(prompts, range(len(prompts)), subject, steps=20,
                                         guidance_scale=SHEET_GUIDANCE, prior_only=row == 0)
            left = Image.fromarray(reference if row else np.full_like(reference, 255))
            rows.append(np.concatenate([np.array(left.resize((self.size, self.size)))[None],
                                        to_uint8(pictures)]))
        return rows

    def bind(self, pipeline: Pipeline, prompt: str, noun: str, reference: np.ndarray) -> list[Subject]:
        """A subject at the place of its noun."""
        feature, = pipeline.encode_subjects(to_picture(reference[None]) / 2 + 0.5)
        return [Subject(self.encode.tokenize.word_positions(prompt, noun)[0], feature)]

    def routing_sheet(self, pipeline: Pipeline, noun: str, reference: np.ndarray, path: Path) -> None:
        """What the routers give to the personalized experts, by layer and step."""
        prompt, sheet = f"a {noun} {SWAP_PROMPTS[0]}", RoutingSheet(20)
        with record_routing(self.unet) as routing:
            def progress(step: int, steps: int, t: int, x0: Tensor) -> None:
                sheet.add(step, t, routing, x0)
                routing.clear()
            picture = pipeline.generate([prompt], [0], [self.bind(pipeline, prompt, noun, reference)],
                                        steps=20, guidance_scale=SHEET_GUIDANCE, progress=progress)
        image = sheet.draw(Image.fromarray(to_uint8(picture)[0]),
                           [(Image.fromarray(reference), "the subject")])
        write_whole(path, lambda temporary: image.save(temporary, format="PNG"))

    def export(self, folder: Path) -> None:
        carry_over(self.weights, folder)
        if self.config.image_layers:  # the others as they were, not in bf16
            encoder = load_part(self.weights, "image_encoder")
            encoder.load_state_dict({name: p for name, p in self.image_encoder.named_parameters()
                                     if p.requires_grad}, strict=False)
            save_part(encoder, folder, "image_encoder")
        save_moa(self.unet, self.prompt, folder / "moa.safetensors", preset=asdict(self.config))
        features = self.subject_features()
        if len(features) > 1:
            save_tensors(feature_statistics(features), folder / "subjects.safetensors")

    def subject_features(self) -> Tensor:
        """(N, F) of subjects of the first samples."""
        if self.shards is not None:
            rows = self.shards.rows(range(min(STATISTICS, len(self.shards))))
            return rows["features"][rows["present"]].float()
        samples, found = self.first_samples(STATISTICS), []
        with torch.no_grad(), self.encode.precision():
            while part := list(islice(samples, CHUNK)):  # not all pictures at once
                present = self.encode.texts(part)["present"]
                found.append(self.encode.references(part)[present].float().cpu())
        return torch.cat(found)


def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Where the image features (N, F) of the training subjects lie, so that `sample.py` can tell a
    subject of another world: mean (F,), precision (F, F) and the largest usual distance ()."""
    mean, spread = features.mean(0), torch.cov(features.T)
    # Without it directions in which people hardly differ count as much as all others, and what is plain in
    # those, such as text on white, passes for somebody.
    ridge = SHRINKAGE * spread.diagonal().mean()
    precision = torch.linalg.inv(spread + ridge * torch.eye(len(mean)))
    distances = squared_distance(features, mean, precision)
    return {"mean": mean, "precision": precision, "limit": 1.05 * distances.quantile(0.999)}
