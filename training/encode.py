"""What a training step needs of its samples: computed on the spot, or once and kept on disk."""
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.processes import in_processes, worker_count
from data.sample import Sample, Samples
from data.shards import Shards, build_shards, shards_of
from models.clip_image import CLIPImageEncoder
from models.clip_text import CLIPTextEncoder, Tokenizer
from models.vae import AutoencoderKL
from images import to_picture
from training.distributed import rank, wait, world_size
from training.stage import Stage

CHUNK = 32  # pictures that are encoded at a time where all are


@dataclass
class Encoder:
    """The models that make a training batch of samples."""

    vae: AutoencoderKL
    text_encoder: CLIPTextEncoder
    image_encoder: CLIPImageEncoder | None  # None where nobody asks for features
    tokenize: Tokenizer
    device: torch.device
    bf16: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """All that `images`, `texts` and, with an image encoder, `references` give, float32."""
        with self.precision():
            features = {"features": self.references(samples)} if self.image_encoder else {}
            return {**self.images(samples), **self.texts(samples), **features}

    def precision(self) -> torch.autocast:
        """Inside, models whose weights are in bf16 can be used."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def images(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """latents (B, 4, h, w), scaled; masks (B, S, h, w), the share of a cell that a subject covers."""
        pictures = to_picture(np.stack([sample.image for sample in samples]), self.device)
        latents = self.vae.encode(pictures).float()
        masks = torch.from_numpy(np.stack([sample.masks for sample in samples])).to(self.device)
        return {"latents": latents, "masks": F.adaptive_avg_pool2d(masks.float(), latents.shape[-2:])}

    @torch.no_grad()
    def texts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """text (B, M, C); positions (B, S) int64 of the subjects' nouns; present (B, S) bool, whether
        there is one. A noun behind the last token that fits is not there, nor one that has no embedding."""
        shape = (len(samples), len(samples[0].masks))
        positions, present = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for i, sample in enumerate(samples):
            for s, end in enumerate(sample.ends):
                position = len(self.tokenize.encode(sample.caption[:end]))
                known = not self.tokenize.unknown_words(sample.caption[:end].split()[-1])
                if known and position < self.tokenize.length - 1:  # the last is the end of the text
                    positions[i, s], present[i, s] = position, True
        text = self.text_encoder(self.tokenize([sample.caption for sample in samples]).to(self.device))
        return {"text": text.float(), "positions": positions.to(self.device),
                "present": present.to(self.device)}

    def references(self, samples: Sequence[Sample]) -> Tensor:
        """Image features (B, S, F) of the subjects; zero where there is none."""
        people = [(i, s) for i, sample in enumerate(samples) for s in range(len(sample.ends))]
        features = torch.zeros(len(samples), len(samples[0].masks), self.image_encoder.cfg.output_dim,
                               device=self.device)
        if people:
            pictures = to_picture(np.stack([samples[i].references[s] for i, s in people]), self.device)
            found = self.image_encoder(self.image_encoder.preprocess(pictures / 2 + 0.5)).float()
            rows, columns = torch.tensor(people, device=self.device).unbind(1)
            features = features.index_put((rows, columns), found)
        return features

    def key(self) -> str:
        """Changes with the weights."""
        return "-".join(fingerprint(m) for m in (self.vae, self.text_encoder, self.image_encoder) if m)


class Encoded:
    """The encoded samples of a stage, turn by turn: computed on the spot, or all once and kept in a
    folder."""

    def __init__(self, stage: Stage, encoder: Encoder, folder: Path | None):
        self.stage, self.encoder = stage, encoder
        with encoder.precision():
            self.null = encoder.text_encoder(encoder.tokenize([""]).to(stage.device)).float()  # (1, M, C)
        self.shards = encode_all(stage.samples, encoder, folder) if folder else None

    def __call__(self, step: int, turn: int) -> dict[str, Tensor]:
        """What the encoder gives for the samples of a turn, float32."""
        if self.shards is None:
            return self.encoder(self.stage.read(step, turn))
        with torch.autocast("cpu", enabled=False):  # which cannot join float16
            rows = self.shards.rows(self.stage.order(step, turn)[:, 0])
        return {k: v.to(self.stage.device, torch.float32 if v.is_floating_point() else None)
                for k, v in rows.items()}


def fingerprint(module: nn.Module) -> str:
    """A checksum of all weights, eight hexadecimal digits."""
    checksum = 0
    for value in module.state_dict().values():
        checksum = crc32(value.detach().float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def encode_all(samples: Samples, encoder: Encoder, folder: Path) -> Shards:
    """Every sample's batch row, from a folder in `folder` that is named after samples and weights, or
    computed and written there, by all processes together. Floats are kept as float16. Raises ShardError."""
    folder = folder / f"{samples.key}-{encoder.key()}"

    def make(rows: range) -> Iterator[dict[str, Tensor]]:
        read = in_processes(partial(samples.read, epoch=0), rows, "reading", workers=worker_count(),
                            shown=False)
        some = list(islice(read, CHUNK))
        with ThreadPoolExecutor(1) as ahead:  # the readers wait when they have a little
            while some:
                following = ahead.submit(lambda: list(islice(read, CHUNK)))
                yield {k: v.half() if v.is_floating_point() else v for k, v in encoder(some).items()}
                some = following.result()

    build_shards(folder, len(samples), make, range(rank(), len(shards_of(len(samples))), world_size()))
    wait()
    return Shards(folder, len(samples))
