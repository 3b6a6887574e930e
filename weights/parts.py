"""From checkpoints of any layout to the parts of Stable Diffusion 1.5: clean names, checked, written.

Whatever is something else is refused, and told what it is.
"""
import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.clip_text import EOS, CLIPTextConfig
from models.load import ALL_PARTS, PARTS, build_config, build_empty, differences, write_whole
from samplers.schedule import BETA_FIRST, BETA_LAST, NUM_TIMESTEPS, alpha_bar
from weights.checkpoints import (FLOATS, REQUIRED, Lazy, Notes, Refusal, State, WrongKind, WrongTensors,
                                 choose, locate, open_file, read_json)
from weights.names import (CONTROLNET, DROPPED, FOREIGN, LABELS, PREFIXES, TAKES, owner, refuse_foreign,
                           rename, unwrap)


@dataclass
class Part:
    """One model as found: its tensors under clean names and what its config.json says."""

    tensors: State
    path: Path
    settings: dict
    cfg: object = None  # its sizes, where the source is a weights folder; otherwise the shapes tell
    ema: str = "none in the source"

    def add(self, name: str, key: str, tensor: Lazy) -> None:
        """Take a tensor, which the file calls `key`, under its clean name. Raises WrongTensors."""
        if name in self.tensors:
            raise WrongTensors(f"{self.path} has {name} twice, once as {key}: it is a faulty merge")
        self.tensors[name] = tensor


# 1. From any layout to parts with clean names.

def open_source(source: str, ema: str, notes: Notes) -> dict[str, Part]:
    """Every part that a file, folder or repository holds. Raises WeightsError."""
    path = locate(source)
    if path.is_file():
        if world := read_json(path.parent / "config.json").get("world"):
            raise WrongKind(f"{path} is a part of the small world ({world}), whose folder is ready as it is: "
                            f"give --weights {path.parent} to the other commands; {TAKES}")
        return split(open_file(path, notes), path, {}, ema, notes)
    config = read_json(path / "config.json")
    if "unet" in config:
        return {name: Part(open_file(path / f"{name}.safetensors", notes), path, config,
                           build_config(config, name))
                for name in PARTS if (path / f"{name}.safetensors").exists()}
    pipeline = str(read_json(path / "model_index.json").get("_class_name"))
    for word, kind in (("XL", "an SDXL"), ("Diffusion3", "an SD3"), ("Flux", "a Flux"),
                       ("Consistency", "an LCM")):
        if word in pipeline:
            raise WrongKind(f"{path} is {kind} folder (model_index.json says {pipeline}): {TAKES}")
    schedule = read_json(path / "scheduler" / "scheduler_config.json")
    parts: dict[str, Part] = {}
    for folder in [path / name for name in REQUIRED if (path / name).is_dir()] or [path]:
        if state := open_folder(folder, notes):
            noise = {key: schedule.get(key) for key in SCHEDULE} if folder.name == "unet" else {}
            parts |= split(state, folder, {**noise, **read_json(folder / "config.json")}, ema, notes)
    if not parts:
        raise WrongKind(f"{path} is no model folder: it has no unet/diffusion_pytorch_model.safetensors or "
                        f".bin, nor model.safetensors{not_taken(path)}")
    return parts


def not_taken(folder: Path) -> str:
    """Files of a folder and its parts' folders that are models by other names, for messages."""
    found = [str(file.relative_to(folder)) for place in (folder, *(folder / name for name in REQUIRED))
             if place.is_dir() for file in sorted(place.iterdir())
             if file.suffix.lower() in MODELS and not choose([file.name])]
    return f"; what it has ({', '.join(found[:3])}) can only be given as a file" if found else ""


# Suffixes of models' files, whoever reads them.
MODELS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".msgpack", ".onnx", ".h5", ".xml", ".gguf")


def open_folder(folder: Path, notes: Notes) -> State:
    """The tensors of one model's folder, all shards; {} where there are none."""
    state: State = {}
    for name in choose(f.name for f in folder.iterdir()):
        state |= open_file(folder / name, notes)
    return state


def open_part(source: str, name: str, ema: str, notes: Notes) -> Part:
    """One part of a file, folder or repository. Raises WeightsError."""
    found = open_source(source, ema, notes)
    if name not in found:
        raise WrongKind(f"{source} has no {LABELS[name]}: it holds "
                        f"{' and '.join(LABELS[other] for other in found)} only")
    return found[name]


def split(state: State, path: Path, settings: dict, ema: str, notes: Notes) -> dict[str, Part]:
    """Sort tensors into parts, rename them, drop what no part needs. Raises Refusal."""
    # The first ControlNets came in one file with the whole model, which will do.
    whole = any("model.diffusion_model." in key for key in state)
    refuse_foreign(state, path, FOREIGN if whole else FOREIGN | CONTROLNET, "the base model's file")
    state = {short: state[name] for name, short in unwrap(state).items()}
    single = any(key.startswith(tuple(PREFIXES)) for key in state)
    state, choice = take_ema(state, ema, path) if single else (state, Part.ema)
    parts: dict[str, Part] = {}
    for key, tensor in state.items():
        prefix = next((p for p in PREFIXES if key.startswith(p)), "")
        name, part = key.removeprefix(prefix), PREFIXES.get(prefix) if single else owner(key, state.keys())
        if part is None or DROPPED.fullmatch(name):
            notes.dropped["position_ids" if name.endswith("position_ids") else name.split(".")[0]] += 1
            check_positions(key, tensor, notes)
            check_schedule(key, tensor, path)
            continue
        found = parts.setdefault(part, Part({}, path, settings))
        found.add(rename(part, name), key, tensor)
    if "image_encoder" in parts:
        join_vision(parts["image_encoder"].tensors)
    if not parts:
        raise WrongKind(f"{path} is no model that this project knows (its first names are "
                        f"{', '.join(list(state)[:3])}): {TAKES}")
    if "unet" in parts:
        parts["unet"].ema = choice
    return parts


def take_ema(state: State, ema: str, path: Path) -> tuple[State, str]:
    """Put the averaged copies, whose names have lost their dots, in the UNet's place if wanted."""
    copies = sum(key.startswith("model_ema.") for key in state)
    if ema == "off" or (copies <= 100 and ema == "auto"):
        return state, f"{ema}: plain weights" if copies else Part.ema
    names = {key: "model_ema." + key.removeprefix("model.").replace(".", "")
             for key in state if key.startswith("model.diffusion_model.")}
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise WrongTensors(f"{path} lacks {len(missing)} EMA copies ({'; '.join(missing[:5])}): give "
                           "--ema off")
    return {key: state[names.get(key, key)] for key in state}, f"{ema}: EMA weights"


def check_positions(key: str, tensor: Lazy, notes: Notes) -> None:
    """position_ids are always 0, 1, 2, ...; say so where a merge has left something else in the file."""
    if key.endswith("position_ids"):
        ids = tensor.read().flatten().long()
        wrong = int((ids != torch.arange(len(ids))).sum())
        if wrong:
            notes.repaired.append(f"{wrong} of {len(ids)} position_ids were wrong; pictures that others made "
                                  "with this file may differ")


def check_schedule(key: str, tensor: Lazy, path: Path) -> None:
    """Raise WrongKind for a buffer that shows another noise schedule, as zero terminal SNR has."""
    if key == "alphas_cumprod" and tensor.shape == (NUM_TIMESTEPS,):
        last, ours = tensor.read()[-1].item(), alpha_bar()[-1]
        if not ours / 2 < last < 2 * ours:  # which leaves room for 8 bits
            raise WrongKind(f"{path} has another noise schedule (its alphas_cumprod ends at {last:.3g}, not "
                            f"at {ours:.3g}): {TAKES}")


def join_vision(state: State) -> None:
    """transformers keeps queries, keys, values apart and the projection transposed; open_clip does not."""
    for name in list(state):
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            names = [f"{match[1]}.self_attn.{x}_proj.{match[2]}" for x in "qkv"]
            if state.keys() >= set(names):
                three = [state.pop(n) for n in names]
                shape = (sum(t.shape[0] for t in three), *three[0].shape[1:])
                state[f"{match[1]}.attn.in_proj_{match[2]}"] = Lazy(
                    shape, three[0].dtype, lambda three=three: torch.cat([t.read() for t in three]))
    if tensor := state.pop("visual_projection.weight", None):
        state["visual.proj"] = Lazy(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


# 2. Sizes, from shapes; what shapes cannot tell comes from config.json or is SD1.5's.

# Field of our config -> its name in diffusers' or transformers' config.json.
CONVOLUTIONAL = {"latent_channels": "latent_channels", "channels": "block_out_channels",
                 "layers": "layers_per_block", "groups": "norm_num_groups"}
CLIP = {"dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
UNET_FIELDS = {**CONVOLUTIONAL, "latent_channels": "in_channels", "context_dim": "cross_attention_dim",
               "heads": "attention_head_dim"}  # which is their number
FIELDS = {
    "unet": UNET_FIELDS,
    "controlnet": {**UNET_FIELDS, "hint_channels": "conditioning_embedding_out_channels",
                   "global_pool": "global_pool_conditions"},
    "vae": CONVOLUTIONAL,
    "text_encoder": {**CLIP, "length": "max_position_embeddings", "vocabulary": "vocab_size"},
    "image_encoder": {**CLIP, "image_size": "image_size", "patch_size": "patch_size"},
}
# What the code has built in, so no other value will do.
SCHEDULE = {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": BETA_FIRST,
            "beta_end": BETA_LAST, "rescale_betas_zero_snr": False}
FIXED = {**SCHEDULE, "scaling_factor": 0.18215, "hidden_act": "quick_gelu",
         "controlnet_conditioning_channel_order": "rgb"}


def count(state: State, pattern: str) -> int:
    """How many different numbers stand in the group of `pattern`."""
    return len({match[1] for match in map(re.compile(pattern).match, state) if match})


def infer(part: str, state: State) -> dict:
    """The sizes that the shapes show. Raises KeyError, IndexError or ValueError where they show none."""
    shape = {name: tensor.shape for name, tensor in state.items()}
    if part in ("unet", "controlnet", "vae"):
        side, latent = ("encoder.", "decoder.conv_in.weight") if part == "vae" else ("", "conv_in.weight")
        levels = range(count(state, rf"{side}down_blocks\.(\d+)\."))
        if not levels:
            raise KeyError(f"{side}down_blocks")
        attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        return {"latent_channels": shape[latent][1],
                "channels": tuple(shape[f"{side}down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
                "layers": count(state, rf"{side}down_blocks\.0\.resnets\.(\d+)\."),
                **({"context_dim": shape[attention][1]} if part != "vae" else {}),
                **({"hint_channels": hint_channels(shape)} if part == "controlnet" else {})}
    if part == "text_encoder":
        rows, dim = shape["text_model.embeddings.token_embedding.weight"]
        sizes = {"vocabulary": rows, "length": shape["text_model.embeddings.position_embedding.weight"][0]}
    else:
        dim, _, patch, _ = shape["visual.conv1.weight"]
        side = math.isqrt(shape["visual.positional_embedding"][0] - 1)
        sizes = {"patch_size": patch, "image_size": patch * side, "output_dim": shape["visual.proj"][1]}
    # All of CLIP's heads are 64 wide.
    return {**sizes, "dim": dim, "heads": max(1, round(dim / 64)),
            "layers": count(state, r"[\w.]+\.(?:layers|resblocks)\.(\d+)\.")}


def hint_channels(shape: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Widths of a ControlNet's hint network, of which every second block is wider than the one before."""
    name = "controlnet_cond_embedding"
    blocks = range(1, count(shape, rf"{name}\.blocks\.(\d+)\."), 2)
    layers = "conv_in", *(f"blocks.{i}" for i in blocks)
    return tuple(shape[f"{name}.{layer}.weight"][0] for layer in layers)


def find_sizes(name: str, part: Part):
    """The config of a part, checked against what its own config.json says. Raises Refusal."""
    said = part.settings.get({"text_encoder": "text_config", "image_encoder": "vision_config"}.get(name))
    said = said if isinstance(said, dict) else part.settings
    for key, value in FIXED.items():
        if said.get(key) not in (None, value):
            raise WrongKind(f"{part.path} has {key} {said[key]!r} in its configs, not {value!r}: {TAKES}")
    try:
        sizes = infer(name, part.tensors)
    except (KeyError, IndexError, ValueError):
        sizes = {}  # the comparison with SD1.5's names will say what is missing
    for key, theirs in FIELDS[name].items():
        value = tuple(said[theirs]) if isinstance(said.get(theirs), list) else said.get(theirs)
        kind = tuple if key in ("channels", "hint_channels") else int
        if kind is int and isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]  # one for each level, all alike
        if value is not None and not isinstance(value, kind):
            raise WrongTensors(f"{part.path}: config.json says {theirs} {said[theirs]!r}, not "
                               f"{'one whole number' if kind is int else 'a list of them'}")
        if value is not None and key not in ("heads", "groups") and value != sizes.get(key, value):
            raise WrongTensors(f"{part.path}: config.json says {theirs} {value}, the tensors {sizes[key]}")
        if value is not None:
            sizes[key] = value
    return ALL_PARTS[name][1](**sizes)


def leave_out_rows(part: Part, notes: Notes) -> None:
    """Take the rows of a token embedding that CLIP's tokenizer knows; textual inversions add others.
    Raises WrongTensors where some are missing."""
    name = "text_model.embeddings.token_embedding.weight"
    table = part.tensors.get(name)
    if table is None or len(table.shape) != 2 or table.shape[0] == EOS + 1:
        return
    rows, dim = table.shape
    if rows <= EOS:
        raise WrongTensors(f"{part.path}: {name} has {rows} rows, CLIP's tokenizer {EOS + 1} words: it is a "
                           "text encoder for another tokenizer")
    part.tensors[name] = Lazy((EOS + 1, dim), table.dtype, lambda: table.read()[:EOS + 1])
    part.settings = {k: v for k, v in part.settings.items() if k != "vocab_size"}
    notes.repaired.append(f"{rows - EOS - 1} added rows of {name} left out: CLIP's tokenizer has no words "
                          "for them")


def fit(name: str, part: Part, notes: Notes) -> None:
    """Set the sizes, reshape 1x1 convolutions, require exactly our names and shapes. Raises WeightsError."""
    if name == "text_encoder" and part.cfg is None:
        leave_out_rows(part, notes)
    try:
        part.cfg = part.cfg or find_sizes(name, part)
        expected = build_empty(part.cfg).state_dict()
    except (TypeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise WrongTensors(f"{part.path}, {LABELS[name]}: {error}") from error
    if name == "text_encoder" and part.cfg.length != CLIPTextConfig.length:
        notes.repaired.append(f"text_model.embeddings.position_embedding.weight has {part.cfg.length} rows, "
                              f"Stable Diffusion 1.5's {CLIPTextConfig.length}: prompts have so many tokens")
    found = part.tensors
    convolutions = [k for k in sorted(found.keys() & expected.keys())
                    if found[k].shape != expected[k].shape
                    and strip(found[k].shape) == strip(expected[k].shape)]
    for key in convolutions:
        shape, lazy = tuple(expected[key].shape), found[key]
        found[key] = Lazy(shape, lazy.dtype, lambda t=lazy, s=shape: t.read().reshape(s))
    if convolutions:
        notes.repaired.append(f"{len(convolutions)} tensors of the {LABELS[name]} reshaped: 1x1 convolutions")
    if wrong := differences(found, expected):
        raise WrongTensors(f"{part.path}: its {LABELS[name]} is not Stable Diffusion 1.5's: {wrong}")
    for key, lazy in found.items():
        if lazy.dtype not in FLOATS.values():
            raise WrongTensors(f"{part.path}: {key} is {lazy.dtype}, not floating point")


def strip(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing ones."""
    return strip(shape[:-1]) if shape[-1:] == (1,) else shape


def check_together(parts: dict[str, Part]) -> None:
    """Raise WrongTensors if the parts belong to different models."""
    unet, vae, text = (parts[name].cfg for name in REQUIRED)
    for what, given, wanted in (("the text encoder's width", text.dim, unet.context_dim),
                                ("the VAE's latent channels", vae.latent_channels, unet.latent_channels)):
        if given != wanted:
            raise WrongTensors(f"{what} is {given}, the UNet reads {wanted}: they belong to different models")


# 3. Values: loaded or written, one tensor in memory at a time.

DTYPES = {"keep": None, "fp16": torch.float16, "fp32": torch.float32}


def read_value(part: Part, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor, cast and checked. Raises WrongTensors."""
    value = part.tensors[name].read().to(dtype)
    if not value.float().isfinite().all():
        advice = "" if dtype == torch.float32 else ", or needs --dtype fp32"
        raise WrongTensors(f"{part.path}: {name} has values that are not finite (as {dtype}): the file is "
                           f"damaged{advice}")
    return value.contiguous()


def build(name: str, part: Part) -> torch.nn.Module:
    """A part as found, for inference in float32. Raises WeightsError."""
    fit(name, part, Notes())
    module = build_empty(part.cfg)
    module.load_state_dict({key: read_value(part, key, torch.float32) for key in part.tensors}, assign=True)
    return module.eval().requires_grad_(False)


def check_output(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise WrongKind if the folder cannot take the parts, or would keep files that do not belong to them."""
    if args.output.exists() and not args.output.is_dir():
        raise WrongKind(f"--output {args.output} is a file: give a folder")
    stale = {p.name for p in args.output.glob("*.safetensors")} - {f"{name}.safetensors" for name in names}
    if stale and not (args.source and Path(args.source).resolve() == args.output.resolve()):
        raise WrongKind(f"--output {args.output} holds {', '.join(sorted(stale))}, which would not belong to "
                        "these weights: give another folder, or delete it")


def write_parts(parts: dict[str, Part], files: dict[str, Path], dtype: torch.dtype | None) -> None:
    """Write each part to its file. `dtype` None keeps each tensor's. Raises WrongTensors and OSError."""
    total = sum(len(part.tensors) for part in parts.values())
    with tqdm(total=total, desc="writing", unit="tensor", disable=None) as bar:
        for name, part in parts.items():
            write_tensors(part, files[name], dtype, bar)


def write_tensors(part: Part, path: Path, dtype: torch.dtype | None, bar: tqdm) -> None:
    """A safetensors file, without having all of it in memory. Raises WrongTensors and OSError."""
    names, header, end = {dtype: name for name, dtype in FLOATS.items()}, {}, 0
    types = {key: dtype or lazy.dtype for key, lazy in part.tensors.items()}
    order = sorted(types, key=lambda key: (-types[key].itemsize, key))  # so that all are aligned
    for key in order:
        shape = part.tensors[key].shape
        start, end = end, end + math.prod(shape) * types[key].itemsize
        header[key] = {"dtype": names[types[key]], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def stream(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                file.write(read_value(part, key, types[key]).reshape(-1).view(torch.uint8).numpy())
                bar.update()
    write_whole(path, stream)
