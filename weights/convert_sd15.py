"""Convert Stable Diffusion 1.5, in any of its usual layouts, into a weights folder.

    python weights/convert_sd15.py v1-5-pruned.ckpt --output weights/sd15
    python weights/convert_sd15.py SOURCE --vae better.safetensors --output weights/sd15
    python weights/convert_sd15.py weights/sd15 --image-encoder openai/clip-vit-large-patch14 \\
        --output weights/sd15

SOURCE is one LDM (CompVis) file, a diffusers folder, a Hugging Face repository or an earlier output;
without it give --unet, --vae and --text-encoder. Subjects need an --image-encoder.

Exit codes: 1 cannot read or write, 2 the wrong kind of file, 3 the right kind with wrong or missing
tensors, 4 a pickle that asks for code. No tensor tells SDXL's VAE, v-prediction, or a CLIP ViT-L/14
that is not OpenAI's from what is wanted here: a lone file of these is taken for the right one.
"""
import argparse
import hashlib
import json
import math
import os
import pickletools
import re
import signal
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

# A script has only its own folder on the path. Sizes, names and the writer are those of the loader.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import one_line
from models.load import (ALL_PARTS, PARTS, WeightsError, build_config, build_empty, check_archive,
                         differences, write_json, write_whole)

REQUIRED = ("unet", "vae", "text_encoder")
DTYPES = {"keep": None, "fp16": torch.float16, "fp32": torch.float32}
DEFAULTS = {"image_size": 512, "sampling": {"guidance_scale": 5.0, "steps": 20}}
TAKES = "this project takes Stable Diffusion 1.5 only"
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "image_encoder": "image encoder",
          "controlnet": "ControlNet"}
OWN = "weights folder"


class Refusal(Exception):
    """The source cannot be converted; the message says what it is, why, and what to do."""

    code: int


class WrongKind(Refusal):
    code = 2


class WrongTensors(Refusal):
    code = 3


class Unsafe(Refusal):
    code = 4


# Floating-point types by the names that safetensors files have for them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class Lazy(NamedTuple):
    """A tensor whose shape is known and whose values are read only when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # safetensors' name where it is no floating-point type
    read: Callable[[], Tensor]


State = dict[str, Lazy]


@dataclass
class Part:
    """One model as found: its tensors under clean names and what its config.json says."""

    tensors: State
    path: Path
    layout: str
    settings: dict
    cfg: object = None  # its sizes, where the source is a weights folder; otherwise the shapes tell
    ema: str = "none in the source"

    def add(self, name: str, key: str, tensor: Lazy) -> None:
        """Take a tensor, which the file calls `key`, under its clean name. Raises Refusal."""
        if name in self.tensors:
            raise WrongTensors(f"{self.path} has {name} twice, once as {key}: it is a faulty merge")
        self.tensors[name] = tensor


@dataclass
class Notes:
    """What config.json tells about the conversion, besides the models' sizes."""

    files: list[Path] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    repaired: list[str] = field(default_factory=list)


# 1. Reading files. Headers and shapes first, values later.

def open_file(path: Path, notes: Notes) -> State:
    """The tensors of a safetensors file or a pickle. Raises Refusal."""
    with path.open("rb") as file:
        head = file.read(64)
    length, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    if not head:
        raise WrongKind(f"{path} is empty (0 bytes): download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WrongKind(f"{path} is a git-LFS pointer (it starts so), not the file: run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise WrongKind(f"{path} is a web page (it starts with <): the download needs a login")
    if head[8:9] == b"{" and length > size - 8:
        raise WrongKind(f"{path} is truncated ({size} bytes, its header alone {length}): download it again")
    notes.files.append(path)
    if head[8:9] == b"{":
        state = open_safetensors(path)
    elif head.startswith((b"PK", b"\x80")) or pickle_globals(path):
        state = open_pickle(path, notes)
    else:
        raise WrongKind(f"{path} is not a model file (it starts with {head[:8]!r}): give a "
                                  ".safetensors or .ckpt")
    if not state:
        raise WrongKind(f"{path} holds no named tensors: it is no checkpoint")
    return state


def open_safetensors(path: Path) -> State:
    try:
        with safe_open(path, "pt") as file:
            slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118  it has no iterator
            return {k: Lazy(tuple(s.get_shape()), FLOATS.get(s.get_dtype(), s.get_dtype()),
                            partial(read_tensor, path, k)) for k, s in slices.items()}
    except SafetensorError as error:
        raise WrongKind(f"{path} is truncated or damaged ({error}): download it again") from error


def read_tensor(path: Path, name: str) -> Tensor:
    # Opened anew each time: a file that stays open keeps in memory all that was ever read of it.
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def open_pickle(path: Path, notes: Notes) -> State:
    """A .ckpt, .pt or .bin, bare or under `state_dict`, nested dicts flattened."""
    found = load_pickle(path)
    if not isinstance(found, dict):
        return {}
    if isinstance(found.get("state_dict"), dict):
        notes.dropped.update(str(k) for k in found if k != "state_dict")
        found = found["state_dict"]
    try:
        return dict(flatten("", found, set()))
    except RecursionError as error:
        raise WrongKind(f"{path} nests its dictionaries without end: it is no checkpoint") from error


def flatten(prefix: str, tree: dict, seen: set[int]) -> Iterator[tuple[str, Lazy]]:
    """The usual tensors in nested dicts, each dict once, with their full names; anything else is left out."""
    seen.add(id(tree))
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(f"{prefix}{key}.", value, seen) if id(value) not in seen else ()
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            yield f"{prefix}{key}", Lazy(tuple(value.shape), value.dtype, lambda value=value: value)


class StandIn:
    """Takes the place of a Lightning object in a pickle: accepts anything and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# The only names besides tensors' own that a checkpoint may mention; each becomes inert.
INERT = re.compile(
    r"(pytorch_lightning|lightning|omegaconf)\..+|numpy\.(core|_core)\.multiarray\.scalar|numpy\.dtype")
TENSORS = re.compile(r"torch\.|collections\.OrderedDict$|_codecs\.encode$")


def load_pickle(path: Path):
    """`torch.load` that never runs code of the file. Raises Refusal, naming what the file asks for."""
    allowed: dict[str, type] = {}
    while True:
        inert = torch.serialization.safe_globals([(cls, name) for name, cls in allowed.items()])
        try:
            check_archive(path)
            with inert, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols and TorchScript
                return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a hostile file can make the unpickler raise anything
            asked = re.search(r"GLOBAL (\S+)", str(error))
            name = asked[1] if asked else next(iter(pickle_globals(path)), None)
            if asked and INERT.fullmatch(name) and name not in allowed:
                # The unpickler fills dicts only when they are exactly that.
                allowed[name] = dict if name.endswith("Dict") else type("StandIn", (StandIn,), {})
            elif name:
                raise Unsafe(f"{path} is an unsafe pickle: it asks for {name}, which could run code. "
                                      "Nothing was run: find the .safetensors of this model") from error
            elif "TorchScript" in str(error):
                raise WrongKind(f"{path} is a TorchScript program, not a checkpoint: take the "
                                          ".safetensors or the Hugging Face layout") from error
            else:
                raise WrongKind(f"{path} is truncated or damaged, or no PyTorch checkpoint "
                              f"({type(error).__name__}: {str(error)[:90]}): download it again") from error


def pickle_globals(path: Path) -> list[str]:
    """What a bare pickle would import besides tensors, read without unpickling; [] for other files."""
    strings, names = [""] * 2, []
    with path.open("rb") as file:
        started = file.read(1) == b"\x80"
        file.seek(0)
        try:
            for op, value, _ in pickletools.genops(file):
                if op.name in ("GLOBAL", "STACK_GLOBAL"):
                    names.append(value.replace(" ", ".") if value else ".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
        except Exception:  # no pickle, or one cut short
            names = names if started else []
    return [name for name in names if not TENSORS.match(name)]


# 2. Finding files: a file, a folder or a repository.

FILE = re.compile(r"(diffusion_pytorch_model|model|pytorch_model|open_clip_model|open_clip_pytorch_model)"
                  r"((?:[.-](?:fp16|\d{5}-of-\d{5}))*)\.(safetensors|bin)")


def choose(names: Iterable[str]) -> list[str]:
    """The weight files to take of one folder, all shards: safetensors before .bin, full before fp16."""
    groups: dict[tuple, list[str]] = {}
    for match in filter(None, map(FILE.fullmatch, sorted(names))):
        kind = (match[3] == "bin", "fp16" in match[2], "-of-" in match[2], match[1])
        groups.setdefault(kind, []).append(match[0])
    chosen = groups[min(groups)] if groups else []
    shards = re.search(r"-of-(\d{5})", "".join(chosen[:1]))
    if shards and len(chosen) != int(shards[1]):
        raise WrongTensors(f"{len(chosen)} of {int(shards[1])} shards found ({', '.join(chosen[:5])}): "
                           "download the rest")
    return chosen


def locate(source: str) -> Path:
    """The local path of a source, downloaded if it is a Hugging Face repository. Raises Refusal."""
    if Path(source).exists():
        return Path(source)
    elsewhere = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).parent.exists()
    if not elsewhere or re.search(r"\.(safetensors|ckpt|bin|pth?)$", source):
        raise WrongKind(f"{source} does not exist: give a file, a folder or a Hugging Face repository")
    try:
        import huggingface_hub  # comes with open_clip
        files = [Path(f.rfilename) for f in huggingface_hub.HfApi().repo_info(source, timeout=20).siblings]
        wanted = [str(Path(folder, name)) for folder in (".", *REQUIRED)
                  for name in choose(f.name for f in files if f.parent == Path(folder))]
        return Path(huggingface_hub.snapshot_download(
            source, allow_patterns=[*wanted, "*config.json", "model_index.json"]))
    except Refusal:
        raise
    except Exception as error:  # those of its HTTP client have no class in common with the others
        raise WrongKind(f"{source} is no file or folder here, and could not be fetched from Hugging Face "
                        f"({type(error).__name__}: {str(error)[:120]}): check the name, or download it where "
                        "there is a network and give its path") from error


def read_json(path: Path) -> dict:
    """A JSON object, {} where there is none. Raises Refusal."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise WrongTensors(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def open_source(source: str, ema: str, notes: Notes) -> dict[str, Part]:
    """Every part that a file, folder or repository holds. Raises Refusal."""
    path = locate(source)
    if path.is_file():
        return split(open_file(path, notes), path, {}, ema, notes)
    config = read_json(path / "config.json")
    if "unet" in config:
        return {name: Part(open_file(path / f"{name}.safetensors", notes), path, OWN, config,
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
        state: State = {}
        for name in choose(f.name for f in folder.iterdir()):
            state |= open_file(folder / name, notes)
        if state:
            config = {"prediction_type": schedule.get("prediction_type"), **read_json(folder / "config.json")}
            parts |= split(state, folder, config, ema, notes)
    if not parts:
        raise WrongKind(f"{path} is no model folder: it has no unet/diffusion_pytorch_model.safetensors or "
                        ".bin, nor model.safetensors")
    return parts


# 3. What it is, from names and shapes alone. The first match wins.

# Pattern of a tensor's name -> what a file with such a name is.
FOREIGN = {
    r"lora_(unet|te)|lora[_.](down|up|mid)|lora_[AB]\b|_lora\.|dora_scale": "a LoRA",
    r"hada_|lokr_|oft_|\.diff(_b)?$|\.on_input$": "a LoRA's kin (LoHa, LoKr, OFT, IA3 or full difference)",
    r"^ip_adapter\.|^image_proj\.|_k_ip\b": "an IP-Adapter",
    r"^string_to_param|^emb_params": "a textual inversion",
    r"motion_modules": "an AnimateDiff motion module",
    r"lllite_|lora_controlnet": "a control-LoRA",
    r"^(adapter\.)?body\.\d": "a T2I-Adapter",
    r"^(model\.diffusion_model\.)?joint_blocks\.|^pos_embed\.proj\.": "an SD3 checkpoint",
    r"^(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\.": "a Flux checkpoint",
    r"^conditioner\.embedders\.|label_emb\.|^add_embedding\.": "an SDXL checkpoint",
    r"^cond_stage_model\.model\.": "an SD2 checkpoint",
    r"time_embed(ding)?\.cond_proj\.": "an LCM (latent consistency) checkpoint",
    r"^v_pred$": "a v-prediction checkpoint",
}
CONTROLNET = {r"^(control_model|controlnet_cond_embedding|input_hint_block|zero_convs)\.":
              "a ControlNet, which weights/convert_controlnet.py reads"}
CHANNELS = {9: "an inpainting", 8: "an instruct-pix2pix", 5: "a depth-to-image", 7: "an upscaler"}
CONTEXTS = {1024: "an SD2", 2048: "an SDXL", 1280: "an SDXL refiner"}


def refuse_foreign(state: State, path: Path, foreign: dict[str, str], wanted: str) -> None:
    """Raise Refusal for everything that is not a part of Stable Diffusion 1.5; `wanted` is what to give."""
    def refuse(what: str, evidence: str) -> None:
        raise WrongKind(f"{path} is {what} ({evidence}): {TAKES}; give {wanted}")

    for pattern, what in foreign.items():
        for key in filter(re.compile(pattern).search, state):
            refuse(what, f"{key} found")
    if len(state) == 1 and re.fullmatch(r"[^.]+", next(iter(state))):
        refuse("a textual inversion", f"{next(iter(state))} is its only tensor")
    for key, (shape, *_) in state.items():
        channels = shape[1] if len(shape) > 1 else 0
        if key.endswith("attn2.to_k.weight") and channels in CONTEXTS:
            refuse(f"{CONTEXTS[channels]} checkpoint", f"{key} reads {channels} channels, not 768")
        if re.fullmatch(r"(.*\.)?input_blocks\.0\.0\.weight|conv_in\.weight", key) and channels != 4:
            kind = CHANNELS.get(channels, "an unknown")
            refuse(f"{kind} checkpoint", f"{key} reads {channels} channels, not 4")
        if re.fullmatch(r"(first_stage_model\.)?decoder\.conv_in\.weight", key) and channels != 4:
            refuse("the VAE of another model, as SD3's or Flux's", f"{key} reads {channels} channels, not 4")


# 4. From any layout to parts with clean names.

LDM = {"model.diffusion_model.": "unet", "first_stage_model.": "vae",
       "cond_stage_model.transformer.": "text_encoder"}
# Inside a part, but not of it: position_ids, which merges break, leftovers of training, CLIP's other half.
DROPPED = re.compile(r"(.*\.)?position_ids|loss\..*|logit_(scale|bias)|text_projection(\.weight)?")


def split(state: State, path: Path, settings: dict, ema: str, notes: Notes) -> dict[str, Part]:
    """Sort tensors into parts, rename them, drop what no part needs. Raises Refusal."""
    # The first ControlNets came in one file with the whole model, which will do.
    whole = any(key.startswith("model.diffusion_model.") for key in state)
    refuse_foreign(state, path, FOREIGN if whole else FOREIGN | CONTROLNET, "the base model's file")
    single = any(key.startswith(tuple(LDM)) for key in state)
    state, choice = take_ema(state, ema, path) if single else (state, Part.ema)
    parts: dict[str, Part] = {}
    for key, tensor in state.items():
        prefix = next((p for p in LDM if key.startswith(p)), "")
        name, part = key.removeprefix(prefix), LDM.get(prefix) if single else owner(key, state)
        if part is None or DROPPED.fullmatch(name):
            notes.dropped["position_ids" if name.endswith("position_ids") else name.split(".")[0]] += 1
            check_positions(key, tensor, notes)
            continue
        found = parts.setdefault(part, Part({}, path, "LDM" if single else layout(part, state), settings))
        found.add(rename(part, name), key, tensor)
    if "image_encoder" in parts:
        join_vision(parts["image_encoder"].tensors)
    if not parts:
        raise WrongKind(f"{path} is no model that this project knows (its first names are "
                        f"{', '.join(list(state)[:3])}): {TAKES}")
    if "unet" in parts:
        parts["unet"].ema = choice
    return parts


def owner(key: str, state: State) -> str | None:
    """The part that a tensor of a file without LDM's prefixes belongs to; None if no part needs it."""
    if {"conv_in.weight", "input_blocks.0.0.weight"} & state.keys():
        return "unet"
    if {"decoder.conv_in.weight", "encoder.conv_in.weight"} & state.keys():
        return "vae"
    if "embeddings.class_embedding" in state or re.match(r"(vision_model|visual|visual_projection)\.", key):
        return "image_encoder"
    text = re.match(r"(text_model\.)?(embeddings|encoder|final_layer_norm)\.", key)
    return "text_encoder" if text else None


def layout(part: str, state: State) -> str:
    """What to call the layout of a file without LDM's prefixes."""
    if part in ("unet", "vae"):
        ldm = any(key.startswith(("input_blocks.", "encoder.mid.", "decoder.mid.")) for key in state)
        return "LDM, bare" if ldm else "diffusers"
    return "OpenAI" if "visual.conv1.weight" in state else "transformers"


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


# 5. Names. Rules apply in order to the name below its prefix; clean names pass unchanged.

def input_block(match: re.Match) -> str:
    block, layer = divmod(int(match[1]) - 1, 3)
    if match[2] == "0.op":
        return f"down_blocks.{block}.downsamplers.0.conv."
    return f"down_blocks.{block}.{'resnets' if match[2] == '0' else 'attentions'}.{layer}."


def output_block(match: re.Match) -> str:
    block, layer = divmod(int(match[1]), 3)
    if match[2].endswith(".conv"):
        return f"up_blocks.{block}.upsamplers.0.conv."
    return f"up_blocks.{block}.{'resnets' if match[2] == '0' else 'attentions'}.{layer}."


def hint_layer(match: re.Match) -> str:
    layer = int(match[1]) // 2  # every second one is an activation
    name = {0: "conv_in", 7: "conv_out"}.get(layer, f"blocks.{layer - 1}")
    return f"controlnet_cond_embedding.{name}."


UNET = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."), (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."), (r"^out\.0\.", "conv_norm_out."), (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."), (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^input_blocks\.(\d+)\.(0\.op|\d)\.", input_block),
    (r"^output_blocks\.(\d+)\.(\d\.conv|\d)\.", output_block),
    (r"\.in_layers\.0\.", ".norm1."), (r"\.in_layers\.2\.", ".conv1."),
    (r"\.out_layers\.0\.", ".norm2."), (r"\.out_layers\.3\.", ".conv2."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."), (r"\.skip_connection\.", ".conv_shortcut."))
RULES = {
    "unet": UNET,
    "controlnet": (
        (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
        (r"^middle_block_out\.0\.", "controlnet_mid_block."), (r"^input_hint_block\.(\d+)\.", hint_layer),
        *UNET),
    "vae": (
        (r"^encoder\.down\.(\d)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.up\.(\d)\.", lambda match: f"decoder.up_blocks.{3 - int(match[1])}."),  # reversed
        (r"\.block\.(\d)\.", r".resnets.\1."), (r"\.downsample\.", ".downsamplers.0."),
        (r"\.upsample\.", ".upsamplers.0."), (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."), (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
        (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
        (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
        (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
        (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out.")),
    "text_encoder": ((r"^(?!text_model\.)", "text_model."),),
    "image_encoder": (
        (r"^(vision_model\.)?(?!visual)", "visual."), (r"\.embeddings\.class_embedding$", ".class_embedding"),
        (r"\.embeddings\.patch_embedding\.", ".conv1."), (r"\.pre_layrnorm\.", ".ln_pre."),
        (r"\.embeddings\.position_embedding\.weight$", ".positional_embedding"),
        (r"\.post_layernorm\.", ".ln_post."), (r"\.encoder\.layers\.", ".transformer.resblocks."),
        (r"\.self_attn\.out_proj\.", ".attn.out_proj."), (r"\.layer_norm(\d)\.", r".ln_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj.")),
}


def rename(part: str, name: str) -> str:
    for pattern, replacement in RULES[part]:
        name = re.sub(pattern, replacement, name)
    return name


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


# 6. Sizes, from shapes; what shapes cannot tell comes from config.json or is SD1.5's.

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
FIXED = {"prediction_type": "epsilon", "scaling_factor": 0.18215, "hidden_act": "quick_gelu",
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
            raise WrongKind(f"{part.path} has {key} {said[key]!r} in its config.json, not {value!r}: {TAKES}")
    try:
        sizes = infer(name, part.tensors)
    except (KeyError, IndexError, ValueError):
        sizes = {}  # the comparison with SD1.5's names will say what is missing
    for key, theirs in FIELDS[name].items():
        value = tuple(said[theirs]) if isinstance(said.get(theirs), list) else said.get(theirs)
        if value is not None and key not in ("heads", "groups") and value != sizes.get(key, value):
            raise WrongTensors(f"{part.path}: config.json says {theirs} {value}, the tensors {sizes[key]}")
        if value is not None:
            sizes[key] = value
    return ALL_PARTS[name][1](**sizes)


def fit(name: str, part: Part, notes: Notes) -> None:
    """Set the sizes, reshape 1x1 convolutions, require exactly our names and shapes. Raises Refusal."""
    try:
        part.cfg = part.cfg or find_sizes(name, part)
        expected = build_empty(name, part.cfg).state_dict()
    except (TypeError, ValueError, WeightsError) as error:
        raise WrongTensors(f"{part.path}, {LABELS[name]}: {error}") from error
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
        raise WrongTensors(f"{part.path}: its {LABELS[name]} is not Stable Diffusion 1.5's, {len(wrong)} "
                           f"differences: {'; '.join(wrong[:5])}")
    for key, lazy in found.items():
        if lazy.dtype not in FLOATS.values():
            raise WrongTensors(f"{part.path}: {key} is {lazy.dtype}, not floating point")


def strip(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing ones."""
    return strip(shape[:-1]) if shape[-1:] == (1,) else shape


# 7. The command.

def open_part(source: str, name: str, ema: str, notes: Notes) -> Part:
    """One part of a file, folder or repository. Raises Refusal."""
    found = open_source(source, ema, notes)
    if name not in found:
        raise WrongKind(f"{source} has no {LABELS[name]}: it holds "
                        f"{' and '.join(LABELS[other] for other in found)} only")
    return found[name]


def load_vae(source: str) -> torch.nn.Module:
    """The VAE of anything that can be converted, for inference in float32. Raises Refusal, WeightsError."""
    return build("vae", open_part(source, "vae", "off", Notes()))


def build(name: str, part: Part) -> torch.nn.Module:
    """A part as found, for inference in float32. Raises Refusal."""
    fit(name, part, Notes())
    module = build_empty(name, part.cfg)
    module.load_state_dict({key: read_value(part, key, torch.float32) for key in part.tensors}, assign=True)
    return module.eval().requires_grad_(False)


def gather(args: argparse.Namespace, notes: Notes) -> tuple[dict[str, Part], dict]:
    """The parts to convert, and config.json of the source if that is a weights folder. Raises Refusal."""
    parts, base = open_source(args.source, args.ema, notes) if args.source else {}, {}
    if parts and "unet" not in parts and not args.unet:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in parts)
        raise WrongKind(f"{args.source} holds {' and '.join(LABELS[name] for name in parts)} only, no UNet: "
                        f"give it as {flags} beside a checkpoint")
    if parts and next(iter(parts.values())).layout == OWN:
        base = next(iter(parts.values())).settings
        notes.files.clear()  # its record says where they came from
    for name in PARTS:
        if source := getattr(args, name):
            parts[name] = open_part(source, name, args.ema if name == "unet" else "off", notes)
    if missing := [name for name in REQUIRED if name not in parts]:
        raise WrongTensors(f"{args.source} has no {' and no '.join(LABELS[name] for name in missing)}: add "
                           f"{' and '.join('--' + name.replace('_', '-') + ' FILE' for name in missing)}")
    return {name: parts[name] for name in PARTS if name in parts}, base


def check_together(parts: dict[str, Part]) -> None:
    """Raise Refusal if the parts belong to different models."""
    unet, vae, text = (parts[name].cfg for name in REQUIRED)
    for what, given, wanted in (("the text encoder's width", text.dim, unet.context_dim),
                                ("the VAE's latent channels", vae.latent_channels, unet.latent_channels)):
        if given != wanted:
            raise WrongTensors(f"{what} is {given}, the UNet reads {wanted}: they belong to different models")


def describe(args: argparse.Namespace, parts: dict[str, Part], base: dict, notes: Notes) -> dict:
    """config.json: sizes, defaults and where everything came from. What a weights folder says stays."""
    old = base.get("conversion", {})
    if not isinstance(old, dict) or not all(isinstance(old.get(key, kind()), kind) for key, kind in (
            ("layout", dict), ("sha256", dict), ("dropped", dict), ("repaired", list))):
        old = {}  # not ours
    source = args.source or args.unet
    layouts = {name: part.layout for name, part in parts.items() if part.layout != OWN or not old}
    record = {"source": Path(source).resolve().name if Path(source).exists() else source,
              "prediction_type": FIXED["prediction_type"],
              **old,
              "ema": old["ema"] if "ema" in old and not args.unet else parts["unet"].ema,
              "layout": {**old.get("layout", {}), **layouts},
              "sha256": {**old.get("sha256", {}), **dict(map(digest, dict.fromkeys(notes.files)))},
              "dropped": {**old.get("dropped", {}), **notes.dropped},
              "repaired": [*old.get("repaired", []), *notes.repaired]}
    sizes = {name: asdict(part.cfg) for name, part in parts.items()}
    return {**DEFAULTS, **base, **sizes, "conversion": record}


def digest(path: Path) -> tuple[str, str]:
    """A file's name, after its part's folder if it has one, and its sha256."""
    sha = hashlib.sha256()
    with path.open("rb") as file, tqdm(total=path.stat().st_size, desc="hashing", unit="B", unit_scale=True,
                                       leave=False, disable=None) as bar:
        while block := file.read(1 << 22):
            sha.update(block)
            bar.update(len(block))
    return f"{path.parent.name}/{path.name}" if path.parent.name in PARTS else path.name, sha.hexdigest()


def read_value(part: Part, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor, cast and checked. Raises Refusal."""
    value = part.tensors[name].read().to(dtype)
    if not value.float().isfinite().all():
        advice = "" if dtype == torch.float32 else ", or needs --dtype fp32"
        raise WrongTensors(f"{part.path}: {name} has values that are not finite (as {dtype}): the file is "
                           f"damaged{advice}")
    return value.contiguous()


def write_tensors(part: Part, path: Path, dtype: torch.dtype | None, bar: tqdm) -> None:
    """Write a safetensors file with one tensor in memory at a time. Raises Refusal and OSError."""
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
    write_whole(path, stream, 8 + len(text) + end)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder whose contents go to `output` at the end: a failure leaves nothing."""
    anchor = next(p for p in (output, *output.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=anchor) as temporary:
        folder = Path(temporary) / "weights"
        folder.mkdir()
        yield folder
        if output.exists():
            for file in sorted(folder.iterdir()):
                os.replace(file, output / file.name)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(output)


def write_parts(parts: dict[str, Part], files: dict[str, Path], dtype: torch.dtype | None) -> None:
    """Write each part to its file. Raises Refusal and OSError."""
    total = sum(len(part.tensors) for part in parts.values())
    with tqdm(total=total, desc="writing", unit="tensor", disable=None) as bar:
        for name, part in parts.items():
            write_tensors(part, files[name], dtype, bar)


def check_output(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise Refusal if the folder cannot take the parts, or would keep files that do not belong to them."""
    if args.output.exists() and not args.output.is_dir():
        raise WrongKind(f"--output {args.output} is a file: give a folder")
    stale = {p.name for p in args.output.glob("*.safetensors")} - {f"{name}.safetensors" for name in names}
    if stale and not (args.source and Path(args.source).resolve() == args.output.resolve()):
        raise WrongKind(f"--output {args.output} holds {', '.join(sorted(stale))}, which would not belong to "
                        "these weights: give another folder, or delete it")


def convert(args: argparse.Namespace) -> None:
    notes = Notes()
    parts, base = gather(args, notes)
    check_output(args, parts)
    for name, part in parts.items():
        fit(name, part, notes)
    check_together(parts)
    config = describe(args, parts, base, notes)
    with staged(args.output) as folder:
        write_parts(parts, {name: folder / f"{name}.safetensors" for name in parts}, DTYPES[args.dtype])
        write_json(config, folder / "config.json")
    for name, part in parts.items():
        print(f"{LABELS[name]}: {len(part.tensors)} tensors from {part.path} ({part.layout})")
    for line in (f"EMA: {parts['unet'].ema}", *notes.repaired, f"written to {args.output}"):
        print(line)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="checkpoint, folder, repository or earlier output")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the weights folder to write")
    for name in PARTS:
        add(f"--{name.replace('_', '-')}", metavar="FILE", help=f"take the {LABELS[name]} from here")
    add("--ema", choices=["auto", "on", "off"], default="auto",
        help="the averaged copies of the UNet: where there are any (auto, default), required, never")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the written tensors (default: as they are)")
    args = parser.parse_args(argv)
    if not args.source and not all(getattr(args, name) for name in REQUIRED):
        parser.error("give SOURCE, or all of --unet, --vae and --text-encoder")
    return args


def run(work: Callable[[], None]) -> None:
    """Do the work of a command; say in one line what is wrong, and leave with its code."""
    try:
        work()
    except (Refusal, WeightsError, OSError, MemoryError, SafetensorError) as error:
        print("error:", one_line(error) or type(error).__name__, file=sys.stderr)
        sys.exit(error.code if isinstance(error, Refusal) else 3 if isinstance(error, WeightsError) else 1)
    except RuntimeError as error:
        if "allocate" not in str(error):  # torch has no error class for it on a CPU
            raise
        print("error: not enough memory", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run(lambda: convert(args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    main()
