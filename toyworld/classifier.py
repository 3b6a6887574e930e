"""A classifier for the small world: people, their attributes, the activity and the place of a picture.

Trained on rendered pictures only (`train.py classifier`), so it owes nothing to the models that it scores.
People are read from left to right, as the captions name them.
"""
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import toyworld
from models.load import check_exact, read_tensors
from toyworld.rendered import MAX_SUBJECTS


class Logits(NamedTuple):
    """Of one forward pass."""

    people: Tensor  # (B, 1 + P, 32, 32): background, left person, right person
    attributes: dict[str, Tensor]  # (B, P, classes) by attribute
    activity: Tensor  # (B, activities)
    context: Tensor  # (B, contexts)
    style: Tensor  # (B, styles)
    count: Tensor  # (B, P): one person, two people


class Block(nn.Module):
    """Residual 3x3 convolutions, then a coarser grid."""

    def __init__(self, dim_in: int, dim_out: int, stride: int):
        super().__init__()
        self.down = nn.Conv2d(dim_in, dim_out, 3, stride, 1)
        self.body = nn.Sequential(
            nn.GroupNorm(8, dim_out), nn.ReLU(), nn.Conv2d(dim_out, dim_out, 3, padding=1),
            nn.GroupNorm(8, dim_out), nn.ReLU(), nn.Conv2d(dim_out, dim_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.body(x)


class Classifier(nn.Module):
    """A small convolutional network with a mask head and pooled read-out heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, stride=4)  # 128 px -> 32 x 32
        self.fine = Block(32, 48, 1)
        self.middle = Block(48, 96, 2)
        self.coarse = nn.Sequential(Block(96, 128, 2), Block(128, 128, 1))
        self.coarse_to_fine = nn.Conv2d(128, 48, 1)
        self.middle_to_fine = nn.Conv2d(96, 48, 1)
        self.merge = Block(48, 48, 1)
        self.people = nn.Conv2d(48, 1 + MAX_SUBJECTS, 1)
        # Features at three heights of a person: hair, shirt and trousers can share a colour.
        self.person = nn.Sequential(nn.Linear(3 * 48 + 128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.attributes = nn.ModuleDict(
            {name: nn.Linear(256, len(classes)) for name, classes in toyworld.ATTRIBUTES.items()})
        self.scene = nn.Sequential(nn.Linear(2 * 128, 256), nn.ReLU())
        self.activity = nn.Linear(256, len(toyworld.ACTIVITIES))
        self.context = nn.Linear(256, len(toyworld.CONTEXTS))
        self.style = nn.Linear(256, len(toyworld.STYLES))
        self.count = nn.Linear(256, MAX_SUBJECTS)

    def forward(self, image: Tensor, masks: Tensor | None = None) -> Logits:
        """(B, 3, 128, 128) in [-1, 1] -> Logits.

        `masks` (B, P, 32, 32), the true ones, may replace the predicted ones in training.
        """
        fine = self.fine(self.stem(image))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        size = fine.shape[-2:]
        merged = self.merge(fine + F.interpolate(self.middle_to_fine(middle), size)
                            + F.interpolate(self.coarse_to_fine(coarse), size))
        people = self.people(merged)
        masks = people.softmax(1)[:, 1:] if masks is None else masks
        around = F.interpolate(coarse, size)
        person = self.person(torch.cat([person_features(merged, masks), pool(around, masks)], -1))
        scene = self.scene(torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3))], -1))
        return Logits(people, {name: head(person) for name, head in self.attributes.items()},
                       self.activity(scene), self.context(scene), self.style(scene), self.count(scene))


def pool(features: Tensor, masks: Tensor) -> Tensor:
    """Mean of features (B, D, h, w) under each mask (B, P, h, w) -> (B, P, D)."""
    total = torch.einsum("bdhw,bphw->bpd", features, masks)
    return total / (masks.sum((2, 3))[..., None] + 1e-3)


def person_features(features: Tensor, masks: Tensor) -> Tensor:
    """Pool under the upper, middle and lower part of each mask: -> (B, P, 3 D)."""
    rows = masks.sum(3)  # (B, P, h)
    position = rows.cumsum(2) / (rows.sum(2, keepdim=True) + 1e-3)  # 0 at the head, 1 at the feet
    parts = [pool(features, masks * ((position >= low) & (position < high))[..., None])
             for low, high in ((-1.0, 0.5), (0.5, 0.8), (0.8, 2.0))]
    return torch.cat(parts, -1)


def load_classifier(path: Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier in a file of `train.py classifier`. Raises WeightsError."""
    classifier = Classifier()
    state = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    check_exact(state, classifier.state_dict(), path)
    classifier.load_state_dict(state)
    return classifier.eval().to(device)
