"""LoRA (arXiv 2106.09685): read it in any of its layouts, merge it into weights and take it out, train it.

A layer's weight W becomes W + scale * alpha / r * up @ down. Where no alpha is given it is r, the rank.
Layers are named as in diffusers, `unet.` or `text_encoder.` in front; callers give them as a dict of
name -> module, so that nothing here has to know what a model is made of.
"""
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

SCOPES = ("attn", "all")
ATTENTION = re.compile(r"^unet\..*\.attn[12]\.")
TAKES = "only LoRA and LoCon files of Stable Diffusion 1.5 can be used"
# Pattern of a tensor's name -> what a file with such a name is. The first match wins.
KINDS = {
    r"\bhada_": "a LoHa", r"\blokr_": "a LoKr", r"\boft_": "an OFT", r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.on_input$|\bia3_": "an IA3", r"\.diff(_b)?$|\.[wb]_norm$": "a full difference",
    r"\bdora_scale$|\blora_magnitude_vector\b": "a DoRA",
    r"^lora_te[12]_|^text_encoder_2\.": "an SDXL LoRA",
    r"^(lora_)?transformer[_.]|(double|single|joint)_(transformer_)?blocks": "an SD3 or Flux LoRA",
}
# Width of the text that a cross-attention reads, or of a text encoder -> whose it is.
WIDTHS = {1024: "a Stable Diffusion 2 LoRA", 2048: "an SDXL LoRA"}
PAIR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.weight")
ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.alpha")


class LoRAError(ValueError):
    """A LoRA cannot be used; the message names the file, why, and what to do."""


class Factors(NamedTuple):
    """The low-rank change of one layer."""

    down: Tensor  # (r, in), of a convolution (r, in, k, k)
    up: Tensor  # (out, r), of a convolution (out, r, 1, 1)
    mid: Tensor | None  # (r, r, k, k) where a convolution is decomposed further (Tucker); down is 1 x 1 then
    alpha: float

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to a layer's weight at scale 1: of its shape and device, float32."""
        down, up = (t.to(weight.device, torch.float32).flatten(1) for t in (self.down, self.up))
        if self.mid is not None:
            mid = self.mid.to(weight.device, torch.float32)
            down = torch.einsum("pqkl,qi->pikl", mid, down).flatten(1)
        return (self.alpha / len(self.down) * (up @ down)).view(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Whether `delta` has the weight's shape."""
        empty = [None if t is None else t.to("meta") for t in self[:3]]
        try:
            Factors(*empty, self.alpha).delta(weight.to("meta"))
        except (IndexError, RuntimeError, ZeroDivisionError):
            return False
        return len(self.up) == len(weight)


@dataclass(frozen=True)
class LoRA:
    """A LoRA file, read and resolved."""

    sha256: str
    layers: dict[str, Factors]  # by the name of the layer


class LoRASetting(NamedTuple):
    """Which file to use and how much of it."""

    file: Path
    scale: float = 1.0
    text_scale: float | None = None  # of the text encoder; None: `scale` in scope "all", else 0

    def __str__(self) -> str:
        """As a flag would say it, the file by its name only."""
        text = "" if self.text_scale is None else f":{self.text_scale:g}"
        return f"{self.file.name}:{self.scale:g}{text}"

    def strength(self, layer: str, scope: str) -> float:
        """Scale of one layer. Scope "attn" is the attention of the UNet alone (with MoA the prior
        expert's, as in the paper's Fig. 21), "all" is all that the file holds."""
        if layer.startswith("text_encoder."):
            return self.text_scale if self.text_scale is not None else self.scale * (scope == "all")
        return self.scale if scope == "all" or ATTENTION.match(layer) else 0.0


class MergedLoRAs:
    """Several LoRAs in the weights of a model."""

    def __init__(self, layers: dict[str, nn.Module]):
        """layers: name -> `nn.Linear` or `nn.Conv2d`."""
        self.layers = layers
        self.pristine: dict[str, Tensor] = {}

    def set(self, settings: Sequence[LoRASetting], scope: str = "attn") -> None:
        """Have these LoRAs, in place of those from before; none brings the first weights back, bit for bit.

        Their changes are summed in float32 and added to the first weights, always in one order, so that
        the order of `settings` does not matter. Raises LoRAError, and leaves all as it was; warns where
        the scope leaves out layers.
        """
        if scope not in SCOPES:
            raise LoRAError(f"the scope of a LoRA must be one of {', '.join(SCOPES)}, not {scope!r}")
        changes: dict[str, list[tuple[float, Factors]]] = {}
        loras = [(setting, load_lora(setting.file, self.layers)) for setting in settings]
        for setting, lora in sorted(loras, key=lambda pair: (pair[1].sha256, *map(str, pair[0][1:]))):
            strengths = {name: setting.strength(name, scope) for name in lora.layers}
            if setting.scale and not any(strengths.values()):
                raise LoRAError(f"{setting.file} has nothing for the UNet's attention, which is all that "
                                "scope attn changes: use scope all")
            left_out = [name for name, strength in strengths.items() if not strength]
            text = sum(name.startswith("text_encoder.") for name in left_out)
            asked = setting.text_scale == 0 and text == len(left_out)
            if setting.scale and left_out and not asked:
                also = f", a TEXT_SCALE the {text} of the text encoder" if text else ""
                warnings.warn(f"{setting.file}: {len(left_out)} of its {len(strengths)} layers are not the "
                              f"UNet's attention, scope attn leaves them out; scope all takes them{also}",
                              stacklevel=3)
            for name, strength in strengths.items():
                if strength:
                    changes.setdefault(name, []).append((strength, lora.layers[name]))
        for name in sorted(self.pristine.keys() | changes.keys()):
            weight = self.layers[name].weight
            if name in changes:
                before = self.pristine.setdefault(name, weight.data)
                change = sum(strength * factors.delta(before) for strength, factors in changes[name])
                weight.data = (before.float() + change).to(before.dtype)
            else:
                weight.data = self.pristine.pop(name)


def load_lora(path: str | Path, layers: dict[str, nn.Module]) -> LoRA:
    """Read a LoRA in kohya's, LDM's, diffusers' or PEFT's names. Raises LoRAError unless all of it fits."""
    path = Path(path)
    state, metadata = read_file(path)
    for pattern, kind in KINDS.items():
        for key in filter(re.compile(pattern).search, state):
            raise LoRAError(f"{path} is {kind} ({key} found): {TAKES}")
    tensors, alphas = group(state, path)
    refuse_widths(tensors, layers, path)
    names = spellings(layers)
    resolved = {spelled: names.get(plain(spelled)) for spelled in [*tensors, *alphas]}
    if unknown := [spelled for spelled, name in resolved.items() if name is None]:
        raise LoRAError(f"{path}: {len(unknown)} of its {len(resolved)} layers are not in this model, such "
                        f"as {', '.join(unknown[:5])}: it is of another model, or damaged")
    given = {resolved[spelled]: alpha for spelled, alpha in alphas.items()}
    peft = peft_alpha(path, state, metadata)
    found: dict[str, Factors] = {}
    for spelled, parts in tensors.items():
        name = resolved[spelled]
        if name in found:
            raise LoRAError(f"{path} has {name} twice, once as {spelled}: it is a faulty merge")
        rank = len(parts["down"])
        found[name] = Factors(parts["down"], parts["up"], parts.get("mid"),
                              given.get(name) or peft(name, rank) or rank)  # kohya takes 0 for the rank, too
    check(found, layers, path)
    return LoRA(hashlib.sha256(path.read_bytes()).hexdigest(), found)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises LoRAError."""
    if path.is_dir():
        raise LoRAError(f"{path} is a folder: give the .safetensors file in it")
    if not path.is_file():
        raise LoRAError(f"{path} not found: give a .safetensors file")
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] != b"{":  # which is where safetensors begin
        raise LoRAError(f"{path} is not a safetensors file, {mistaken(head)}")
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no iterator
            return state, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{path} is not a readable safetensors file ({error}): download it again") from error


def mistaken(head: bytes) -> str:
    """What a file that begins so is taken for a LoRA's by mistake, and what to do."""
    if head.startswith((b"PK", b"\x80")):
        return "it is a pickle, which could run code: take the LoRA's .safetensors file"
    if head.startswith((b"version https://git-lfs", b"<")):
        return "it is a git-LFS pointer or a web page: download it again"
    pictures = head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"))
    looks = ("is empty" if not head else "looks like a picture" if pictures else
             "looks like a text" if head.isascii() and 0 not in head else f"begins with {head[:8]!r}")
    return f"it {looks}: give a LoRA's .safetensors file"


def group(state: dict[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Factors and alphas by the layers' names as the file spells them. Raises LoRAError."""
    tensors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for key, value in state.items():
        if not (value.is_floating_point() or value.numel() == 1) or not value.float().isfinite().all():
            raise LoRAError(f"{path}: {key} has values that are not finite, or no numbers: it is damaged")
        if match := PAIR.fullmatch(key):
            if not value.dim():
                raise LoRAError(f"{path}: {key} is a single number, no matrix: it is damaged")
            kind = {"A": "down", "B": "up"}.get(match[2], match[2])
            tensors.setdefault(match[1], {})[kind] = value
        elif (match := ALPHA.fullmatch(key)) and value.numel() == 1:
            alphas[match[1]] = value.item()
        else:
            strange.append(key)
    if not tensors:
        first = f" (its first tensors are {', '.join(list(state)[:3])})" if state else ""
        raise LoRAError(f"{path} is no LoRA{first}: {TAKES}")
    if strange:
        raise LoRAError(f"{path}: {len(strange)} tensors are no part of a LoRA, such as "
                        f"{', '.join(strange[:5])}: {TAKES}")
    half = [name for name, parts in tensors.items() if not {"down", "up"} <= parts.keys()]
    half += [name for name in alphas if name not in tensors]
    if half:
        raise LoRAError(f"{path}: {len(half)} layers have only one of the two factors, such as "
                        f"{', '.join(half[:5])}: it is damaged")
    return tensors, alphas


def refuse_widths(tensors: dict[str, dict[str, Tensor]], layers: dict[str, nn.Module], path: Path) -> None:
    """Raise LoRAError if a layer reads a text of another model's width."""
    ours = {module.weight.shape[1] for name, module in layers.items()
            if re.search(r"attn2\.to_k$|self_attn\.q_proj$", name)}
    for name, parts in tensors.items():
        reads_text = re.search(r"attn2[._](processor\.)?to_[kv]$|self_attn[._][qkv]_proj$", name)
        for width in parts["down"].shape[1:2] if reads_text else ():
            if width in WIDTHS and width not in ours:
                raise LoRAError(f"{path} is {WIDTHS[width]} ({name} reads {width} channels): {TAKES}")


def check(found: dict[str, Factors], layers: dict[str, nn.Module], path: Path) -> None:
    """Raise LoRAError unless all factors fit their layers."""
    wrong = [f"{name} is {tuple(layers[name].weight.shape)}, its factors are "
             f"{tuple(factors.up.shape)} and {tuple(factors.down.shape)}"
             for name, factors in found.items() if not factors.fits(layers[name].weight)]
    if wrong:
        raise LoRAError(f"{path} does not fit this model, {len(wrong)} layers differ: {'; '.join(wrong[:5])}")


# Alphas that PEFT keeps outside of the tensors.

def peft_alpha(path: Path, state: dict[str, Tensor],
               metadata: dict[str, str]) -> Callable[[str, int], float | None]:
    """Where PEFT's settings are, in the metadata or in adapter_config.json beside the file: the alpha of
    a layer of a rank, None where they do not say. Raises LoRAError if they cannot be read."""
    beside, text = path.with_name("adapter_config.json"), metadata.get("lora_adapter_metadata")
    source = f"the metadata of {path}" if text else beside
    try:
        if text is None and beside.is_file() and any(".lora_A." in key for key in state):
            text = beside.read_text(encoding="utf-8")
        config = json.loads(text or "{}")
        # Diffusers keeps those of several models in one object, their names in front.
        parts = {part: {key.removeprefix(f"{part}."): value for key, value in config.items()
                        if key.startswith(f"{part}.") or "." not in key} for part in ("unet", "text_encoder")}
        if any(part.get("use_dora") for part in parts.values()):
            raise LoRAError(f"{path} is a DoRA (use_dora in {source}): {TAKES}")
        patterns = {part: dict(parts[part].get("alpha_pattern") or {}) for part in parts}
        for name, number in [*(("lora_alpha", part.get("lora_alpha") or 0) for part in parts.values()),
                             *(item for part in patterns.values() for item in part.items())]:
            if not (isinstance(number, int | float) and math.isfinite(number)):
                raise ValueError(f"{name} is {number!r}, no number")
            if not re.fullmatch(r"[\w.]+", name):
                raise ValueError(f"{name!r} in alpha_pattern is no layer's name")
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, LoRAError):
            raise
        raise LoRAError(f"{source} cannot be read as PEFT's settings: {error}") from error

    def alpha(layer: str, rank: int) -> float | None:
        part, _, name = layer.partition(".")
        value = next((number for end, number in patterns[part].items() if f".{name}".endswith(f".{end}")),
                     parts[part].get("lora_alpha"))
        # Rank-stabilised LoRA divides by the root of the rank.
        return value * math.sqrt(rank) if value and parts[part].get("use_rslora") else value
    return alpha


# Names.

def plain(spelled: str) -> str:
    """A layer's name in a file without what differs between programs but its dots."""
    return re.sub(r"^base_model\.model\.|(?<=\.)processor\.", "", spelled).replace(".", "_")


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of a layer's name, with underscores for dots -> the layer's name."""
    names: dict[str, str] = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        if part == "unet":
            kohya, variants = "lora_unet", [name, ldm_name(name), name.replace("to_out.0", "to_out")]
        else:  # programs built on a flat text encoder leave `text_model.` out; old ones know no `q_proj`
            old = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", name)
            kohya = "lora_te"
            variants = [v for long in (name, old) for v in (long, long.removeprefix("text_model."))]
        for variant in variants:
            for spelled in (variant, f"{part}.{variant}", f"{kohya}.{variant}"):
                names[spelled.replace(".", "_")] = layer
    return names


def down_block(match: re.Match) -> str:
    return f"input_blocks.{3 * int(match[1]) + int(match[3]) + 1}.{int(match[2] == 'attentions')}"


def up_block(match: re.Match) -> str:
    return f"output_blocks.{3 * int(match[1]) + int(match[3])}.{int(match[2] == 'attentions')}"


# Rules from a UNet layer's name to CompVis' name of it; each acts on another end of the name.
LDM = (
    (r"^conv_in$", "input_blocks.0.0"), (r"^conv_out$", "out.2"),
    (r"^time_embedding\.linear_(\d)$", lambda match: f"time_embed.{2 * int(match[1]) - 2}"),
    (r"^mid_block\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)", down_block),
    (r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)", up_block),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv",
     lambda match: f"input_blocks.{3 * int(match[1]) + 3}.0.op"),
    (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.2.1"),  # the coarsest level has no attention
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda match: f"output_blocks.{3 * int(match[1]) + 2}.2"),
    (r"\.conv1$", ".in_layers.2"), (r"\.conv2$", ".out_layers.3"),
    (r"\.time_emb_proj$", ".emb_layers.1"), (r"\.conv_shortcut$", ".skip_connection"),
)


def ldm_name(name: str) -> str:
    """What a UNet layer is called in CompVis' code, for SD1.5's two layers per level."""
    for pattern, replacement in LDM:
        name = re.sub(pattern, replacement, name)
    return name


# Training.

class LoRALayer(nn.Module):
    """A trainable low-rank path beside a frozen layer, which it adds itself to. It starts at zero.

    The names of its tensors are those of kohya's files.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride,
                                       layer.padding, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale, self.enabled = alpha / rank, True
        layer.register_forward_hook(lambda layer, args, output: self(args[0], output))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's input and output -> its output with this LoRA."""
        return output + self.scale * self.lora_up(self.lora_down(x)) if self.enabled else output
