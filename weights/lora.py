"""LoRA (arXiv 2106.09685): read it in any of its layouts, merge it into weights and take it out, train it.

A layer's weight W becomes W + scale * alpha / r * up @ down. Where no alpha is given it is r, the rank.
Layers are named as in diffusers, `unet.` or `text_encoder.` in front; callers give them as a dict of
name -> module, so that nothing here has to know what a model is made of.
"""
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from models.load import WeightsError, read_json, read_safetensors
from weights.checkpoints import Notes, is_pickle, open_file
from weights.names import ADAPTERS, WRAPPERS, refuse_foreign, rename

SCOPES = ("attn", "all")
ATTENTION = re.compile(r"^unet\..*\.attn[12]\.")
TAKES = "only LoRA and LoCon files of Stable Diffusion 1.5 can be used"
PAIR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.weight")
ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.alpha")


class LoRAError(WeightsError):
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


class LoRASetting(NamedTuple):
    """Which file to use and how much of it."""

    file: Path
    scale: float = 1.0

    def __str__(self) -> str:
        """As a flag would say it, the file by its name only."""
        return f"{self.file.name}:{self.scale:g}"


class MergedLoRAs:
    """Several LoRAs in the weights of a model."""

    def __init__(self, layers: dict[str, nn.Module]):
        """layers: name -> `nn.Linear` or `nn.Conv2d`."""
        self.layers = layers
        self.pristine: dict[str, Tensor] = {}

    def set(self, settings: Sequence[LoRASetting], scope: str = "attn") -> None:
        """Have these LoRAs, in place of those from before; none brings the first weights back, bit for bit.

        Scope "attn" takes the attention of the UNet alone (with MoA the prior expert's, as in the paper's
        Fig. 21), "all" takes all that the files hold. Their changes are summed in float32 and added to the
        first weights, always in one order, so that the order of `settings` does not matter.
        Raises WeightsError, and leaves all as it was; warns where the scope leaves out layers.
        """
        if scope not in SCOPES:
            raise LoRAError(f"the scope of a LoRA must be one of {', '.join(SCOPES)}, not {scope!r}")
        changes: dict[str, list[tuple[float, Factors]]] = {}
        for file, scale in sorted(settings):
            found = load_lora(file, self.layers)
            taken = {name: factors for name, factors in found.items()
                     if scope == "all" or ATTENTION.match(name)}
            if not taken:
                raise LoRAError(f"{file} has nothing for the UNet's attention, which is all that scope attn "
                                "changes: use scope all")
            if left_out := len(found) - len(taken):
                warnings.warn(f"{file}: {left_out} of its {len(found)} layers are not the UNet's attention, "
                              "scope attn leaves them out; scope all takes them", stacklevel=3)
            for name, factors in taken.items() if scale else ():
                changes.setdefault(name, []).append((scale, factors))
        for name in sorted(self.pristine.keys() | changes.keys()):
            weight = self.layers[name].weight
            if name in changes:
                before = self.pristine.setdefault(name, weight.data)
                change = sum(scale * factors.delta(before) for scale, factors in changes[name])
                weight.data = (before.float() + change).to(before.dtype)
            else:
                weight.data = self.pristine.pop(name)


def load_lora(path: str | Path, layers: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """Read a LoRA in kohya's, LyCORIS', LDM's, diffusers', PEFT's or ComfyUI's names, safetensors or pickled:
    the factors by the layer's name.

    Raises WeightsError unless all of it fits.
    """
    path = Path(path)
    if path.is_file() and is_pickle(path):
        state, metadata = {key: lazy.read() for key, lazy in open_file(path, Notes()).items()}, {}
    else:
        state, metadata = read_safetensors(path)
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    refuse_foreign(state, path, ADAPTERS, "a LoRA or LoCon file of it")
    if words := [key for key in state if key.startswith("bundle_emb.")]:
        warnings.warn(f"{path}: its own words are left out ({', '.join(words[:3])})", stacklevel=4)
    tensors, alphas = group({key: value for key, value in state.items() if key not in words}, path)
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
    return found


def group(state: dict[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Factors and alphas by the layers' names as the file spells them. Raises LoRAError."""
    tensors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for key, value in state.items():
        if (match := PAIR.fullmatch(key)) and value.dim():
            kind = {"A": "down", "B": "up"}.get(match[2], match[2])
            tensors.setdefault(match[1], {})[kind] = value
        elif (match := ALPHA.fullmatch(key)) and value.numel() == 1:
            alphas[match[1]] = value.item()
        else:
            strange.append(key)
    if strange or not tensors:
        what = "more than a" if tensors else "no"
        raise LoRAError(f"{path} is {what} LoRA: {len(strange)} of its {len(state)} tensors are no part of "
                        f"one ({', '.join(strange[:3])}): {TAKES}")
    half = [name for name, parts in tensors.items() if not {"down", "up"} <= parts.keys()]
    half += [name for name in alphas if name not in tensors]
    if half:
        raise LoRAError(f"{path}: {len(half)} layers have only one of the two factors, such as "
                        f"{', '.join(half[:5])}: it is damaged")
    if broken := [key for key, value in state.items() if not value.float().isfinite().all()]:
        raise LoRAError(f"{path}: {broken[0]} has values that are not finite: it is damaged")
    return tensors, alphas


def check(found: dict[str, Factors], layers: Mapping[str, nn.Module], path: Path) -> None:
    """Raise LoRAError unless all factors fit their layers."""
    wrong = [f"{name} is {tuple(layers[name].weight.shape)}, its factors are "
             f"{tuple(factors.up.shape)} and {tuple(factors.down.shape)}"
             for name, factors in found.items() if not factors.fits(layers[name].weight)]
    if wrong:
        raise LoRAError(f"{path} does not fit this model, {len(wrong)} layers differ: {'; '.join(wrong[:5])}")


# Alphas that PEFT keeps outside of the tensors.

def peft_alpha(path: Path, state: Mapping[str, Tensor],
               metadata: Mapping[str, str]) -> Callable[[str, int], float | None]:
    """Where PEFT's settings are, in the metadata or in adapter_config.json beside the file: the alpha of
    a layer of a rank, None where they do not say. Raises WeightsError if they cannot be read."""
    beside, text = path.with_name("adapter_config.json"), metadata.get("lora_adapter_metadata")
    source = f"the metadata of {path}" if text else beside
    try:
        config = json.loads(text or "{}")
        if text is None and beside.is_file() and any(".lora_A." in key for key in state):
            config = read_json(beside)
        # Diffusers keeps those of several models in one object, their names in front.
        parts = {part: {key.removeprefix(f"{part}."): value for key, value in config.items()
                        if key.startswith(f"{part}.") or "." not in key} for part in ("unet", "text_encoder")}
        patterns = {part: {name: float(number) for name, number in (own.get("alpha_pattern") or {}).items()}
                    for part, own in parts.items()}
        alphas = {part: float(own.get("lora_alpha") or 0) for part, own in parts.items()}
        numbers = [*alphas.values(), *(number for own in patterns.values() for number in own.values())]
        names = [name for own in patterns.values() for name in own]
        if odd := [name for name in names if not re.fullmatch(r"[\w.]+", name)]:
            raise ValueError(f"alpha_pattern {odd[0]!r} is a regular expression, not the name of a layer")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"not all of the alphas {numbers} are finite")
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise LoRAError(f"{source} cannot be read as PEFT's settings: {error}") from error
    if any(part.get("use_dora") for part in parts.values()):
        raise LoRAError(f"{path} is a DoRA (use_dora in {source}): {TAKES}")

    def alpha(layer: str, rank: int) -> float | None:
        part, _, name = layer.partition(".")
        value = next((number for end, number in patterns[part].items() if f".{name}".endswith(f".{end}")),
                     alphas[part])
        # Rank-stabilised LoRA divides by the root of the rank.
        return value * math.sqrt(rank) if value and parts[part].get("use_rslora") else value
    return alpha


# Names.

def plain(spelled: str) -> str:
    """A layer's name in a file without what differs between programs but its dots."""
    spelled = re.sub(r"(?<![^.])base_model\.model\.|(?<=\.)processor\.", "", spelled)
    spelled = re.sub(r"^lora_te1_", "lora_te_", spelled)  # diffusers numbers the only text encoder, too
    spelled = re.sub(r"^(model\.)?diffusion_model\.", "unet.", spelled)  # ComfyUI
    spelled = re.sub(r"^(text_encoders\.)?clip_l\.(transformer\.)?", "text_encoder.", spelled)
    return re.sub(r"(?<=_)(_orig_mod|module)_", "", spelled.replace(".", "_"))  # wrappers in kohya's names


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of a layer's name, with underscores for dots -> the layer's name."""
    names: dict[str, str] = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        if part == "unet":
            short = name.replace("to_out.0", "to_out")
            prefixes, variants = (part, "lora_unet", "lycoris"), [name, ldm_name(name), short]
        else:  # programs built on a flat text encoder leave `text_model.` out; old ones know no `q_proj`
            old = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", name)
            prefixes = (part, "lora_te")
            variants = [v for long in (name, old) for v in (long, long.removeprefix("text_model."))]
        for variant in variants:
            for spelled in (variant, *(f"{prefix}.{variant}" for prefix in prefixes)):
                names[spelled.replace(".", "_")] = layer
    return names


# Where layers are in CompVis' UNet, for SD1.5's two layers per level: our name -> theirs, both up to a dot.
BLOCKS = ("time_embed.0.", "time_embed.2.", "input_blocks.0.0.", "out.2.",
          *(f"middle_block.{i}." for i in range(3)),
          *(f"input_blocks.{i}.{j}." for i in range(1, 12) for j in (0, 1)),
          *(f"output_blocks.{i}.{j}." for i in range(12) for j in (0, 1)),
          *(f"input_blocks.{i}.0.op." for i in (3, 6, 9)),
          "output_blocks.2.1.conv.", "output_blocks.5.2.conv.", "output_blocks.8.2.conv.")
LDM = {rename("unet", block + inner): block + inner
       for inner in ("in_layers.2.", "out_layers.3.", "emb_layers.1.", "skip_connection.", "")
       for block in BLOCKS}


def ldm_name(name: str) -> str:
    """What a UNet layer is called in CompVis' code."""
    ours = next((ours for ours in LDM if f"{name}.".startswith(ours)), "")
    return (LDM.get(ours, "") + f"{name}."[len(ours):]).removesuffix(".")


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
