"""CLIP's text encoder and its tokenizer: a prompt -> the 77 tokens that the UNet attends to.

With the default config: 196 tensors, 123,060,480 parameters (the text half of CLIP ViT-L/14).
"""
import re
import unicodedata
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.errors import near
from models.open_clip_import import open_clip

BOS, EOS = 49406, 49407  # start of text; end of text, which is also Stable Diffusion's padding
MAX_CHARACTERS = 4000  # far more than 77 tokens; byte-pair encoding one long word takes quadratic time


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes; the defaults are SD1.5's."""

    dim: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 77
    vocabulary: int = 49408
    # Token ids that have a row in the embedding, ascending; empty when all have one. A small world
    # needs a hundred words of CLIP's 49,408.
    kept_tokens: tuple[int, ...] = ()
    words: tuple[str, ...] = ()  # what the kept tokens spell, to be named in messages

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"width {self.dim} is not divisible by {self.heads} heads")

    @property
    def rows(self) -> int:
        """Rows of the token embedding."""
        return len(self.kept_tokens) or self.vocabulary


class Attention(nn.Module):
    """Causal multi-head self-attention. Padding is attended to, as in Stable Diffusion."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, M, C) -> (B, M, C)
        q, k, v = (rearrange(proj(x), "b m (h d) -> b h m d", h=self.heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out, "b h m d -> b m (h d)"))


class MLP(nn.Module):
    """Two layers with CLIP's "quick" GELU, x sigmoid(1.702 x)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.layer_norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Token plus position embedding."""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.kept_tokens = cfg.kept_tokens
        self.token_embedding = nn.Embedding(cfg.rows, cfg.dim)
        self.position_embedding = nn.Embedding(cfg.length, cfg.dim)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, M) -> (B, M, C)
        if self.kept_tokens:
            kept = torch.tensor(self.kept_tokens, device=tokens.device)
            rows = torch.searchsorted(kept, tokens.contiguous()).clamp(max=len(kept) - 1)
            if (kept[rows] != tokens).any():
                raise ValueError("a token id is not among the kept tokens of this text encoder")
            tokens = rows
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTransformer(nn.Module):
    """Embeddings, layers, final norm; a module of its own because the files have its name."""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(cfg.dim, cfg.heads) for _ in range(cfg.layers))
        self.final_layer_norm = nn.LayerNorm(cfg.dim)

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.encoder.layers[: len(self.encoder.layers) - skip]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextEncoder(nn.Module):
    """`text_encoder(tokens) -> (B, 77, C)`, the context of the UNet."""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.cfg = cfg
        self.text_model = TextTransformer(cfg)

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """(B, 77) int64 -> (B, 77, C), after the final norm.

        `skip` leaves out that many of the last layers ("clip skip 2" elsewhere is skip=1 here).
        """
        return self.text_model(tokens, skip)


def cut(text: str) -> str:
    """The text without the characters that no 77 tokens can reach."""
    return re.sub(r"[ \t\n]+", " ", text)[:MAX_CHARACTERS]


class Tokenizer:
    """CLIP's byte-pair encoding, as open_clip ships it, padded as Stable Diffusion does."""

    def __init__(self, cfg: CLIPTextConfig):
        self.length = cfg.length
        self.kept_tokens = frozenset(cfg.kept_tokens)
        self.known_words = cfg.words
        self.bpe = open_clip().tokenizer.SimpleTokenizer()

    def __call__(self, texts: list[str]) -> Tensor:
        """(B,) strings -> (B, 77) int64. Warns about words that are unknown or do not fit."""
        rows = []
        for text in texts:
            complaint, ids = self.complaint(text), self.encode(text)
            if complaint:
                warnings.warn(complaint, stacklevel=2)
            room = self.length - 2
            if len(ids) > room:
                warnings.warn(f"the prompt is longer than {room} tokens; lost: "
                              f"{self.bpe.decode(ids[room:]).strip()!r}", stacklevel=2)
            ids = [BOS, *ids[:room], EOS]
            rows.append(ids + [EOS] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64)

    def encode(self, text: str) -> list[int]:
        """The ids of a text without start, end and padding. Tokens without an embedding are dropped."""
        # A prompt that spells a special token must not become one.
        ids = [i for i in self.bpe.encode(cut(text)) if i < BOS]
        return [i for i in ids if i in self.kept_tokens] if self.kept_tokens else ids

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text of which a part has no embedding, in order, each once; no punctuation."""
        if not self.kept_tokens:
            return []
        return list(dict.fromkeys(
            word for word in self.words(text) if not self.kept_tokens.issuperset(self.bpe.encode(word))))

    def words(self, text: str) -> list[str]:
        """Words and emoji of a text as the byte-pair encoding splits it, in lower case; no punctuation."""
        found = self.bpe.pat.findall(self.bpe.clean_fn(cut(text)))
        return [word for word in found if any(c.isalnum() or unicodedata.category(c) == "So" for c in word)]

    def complaint(self, text: str) -> str | None:
        """Which words of a text are unknown, and known ones like them; None where there is nothing to say."""
        unknown = [word + near(word, self.known_words) for word in self.unknown_words(text)]
        return (f"these weights do not know the words: {', '.join(unknown)}. config.json lists all that they "
                "know") if unknown else None

    def word_positions(self, text: str, word: str) -> list[int]:
        """Where a word stands: of each occurrence the index of its last token in the 77.

        Occurrences that were cut off are left out, and those of a word without an embedding.
        """
        if not word or self.unknown_words(word):
            return []
        positions = []
        for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE):
            positions.append(len(self.encode(text[: match.end()])))  # BOS shifts by one
        return [p for p in positions if p < self.length - 1]
