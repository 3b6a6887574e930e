"""The classifier of the small world: it reads its pictures (`toyworld/classifier.py`)."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import toyworld
from data.sample import batch_indices
from toyworld.classifier import Classifier
from toyworld.rendered import Cache, render_cache
from models.load import save_tensors, write_json
from images import to_picture
from training.stage import Stage, step_generator


class ClassifierStage(Stage):
    """Reads attributes, activity, place and masks off rendered pictures (`toyworld/classifier.py`)."""

    reads = ()
    shareable = False  # means over the attributes that are visible, of which samples have unequal numbers

    def setup(self) -> None:
        self.module = Classifier().to(memory_format=torch.channels_last)
        self.scenes, self.test = self.samples, render_cache("scenes", 2000, "test")
        self.labels = {id(c): {name: torch.as_tensor(c.labels(name))
                               for name in ("activity", "context", "style", "attributes")}
                       for c in (self.scenes, self.test)}

    def labelled(self, cache: Cache, indices: np.ndarray) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pictures (B, 3, S, S), masks (B, P, 32, 32) and labels."""
        masks = F.adaptive_avg_pool2d(torch.from_numpy(cache.masks(indices)).float(), 32)
        labels = {k: v[indices].to(self.device) for k, v in self.labels[id(cache)].items()}
        return to_picture(cache.images[indices], self.device), masks.to(self.device), labels

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        image, masks, labels = self.labelled(
            self.scenes, batch_indices(self.seed, step, self.config.batch_size, len(self.scenes)))
        generator = step_generator(self.seed, step)
        if torch.rand((), generator=generator) < 0.5:  # generated pictures are a little soft
            factor = 1 + torch.rand((), generator=generator).item()
            small = F.interpolate(image, scale_factor=1 / factor, mode="bilinear", antialias=True)
            image = F.interpolate(small, image.shape[-2:], mode="bilinear")
        image = image + 0.05 * self.noise(image.shape, generator, turn)
        return {"image": image.contiguous(memory_format=torch.channels_last), "masks": masks, **labels}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        masks, labels = batch["masks"], batch
        verdict = self.module(batch["image"], masks)
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
            image, masks, labels = self.labelled(self.test, np.arange(len(self.test))[start:start + 100])
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
        save_tensors(self.module.state_dict(), folder / "classifier.safetensors", torch.float16)
