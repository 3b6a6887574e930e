"""Read strangers' checkpoints: safetensors, pickles, folders and repositories, of which no code is run.

Headers and shapes are read first, values when they are asked for. What a checkpoint is of, `parts` finds out.
"""
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models import load
from models.load import WeightsError, check_archive, what_is_wrong

# The parts of a base model, which are also diffusers' folders.
REQUIRED = ("unet", "vae", "text_encoder")


class Refusal(WeightsError):
    """A file cannot be used; the message says what it is, why, and what to do."""

    code: int  # exit status of the converters


class WrongKind(Refusal):
    code = 2


class WrongTensors(Refusal):
    code = 3


class Unsafe(Refusal):
    code = 4


# Floating-point types by the names that safetensors files have for them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, "I8")


class Lazy(NamedTuple):
    """A tensor whose shape is known and whose values are read only when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # safetensors' name where it is no floating-point type
    read: Callable[[], Tensor]


State = dict[str, Lazy]


@dataclass
class Notes:
    """What config.json tells about the conversion, besides the models' sizes."""

    dropped: Counter = field(default_factory=Counter)
    repaired: list[str] = field(default_factory=list)


# 1. Reading files.

def open_file(path: Path, notes: Notes) -> State:
    """The tensors of a safetensors file or a pickle. Raises Refusal."""
    if not path.exists():
        raise WrongKind(f"{path} leads to no file, as after a download that was stopped: download it again")
    state = open_pickle(path, notes) if is_pickle(path) else open_safetensors(path)
    if not state:
        raise WrongKind(f"{path} holds no named tensors: it is no checkpoint")
    return apply_scales(state)


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch's, not of safetensors."""
    with path.open("rb") as file:
        head = file.read(9)
    return head.startswith((b"PK", b"\x80")) and head[8:9] != b"{"


def open_safetensors(path: Path) -> State:
    try:
        with safe_open(path, "pt") as file:
            slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118  it has no iterator
            return {k: Lazy(tuple(s.get_shape()), FLOATS.get(s.get_dtype(), s.get_dtype()),
                            partial(read_tensor, path, k)) for k, s in slices.items()}
    except SafetensorError as error:
        raise WrongKind(f"{path} {what_is_wrong(path, error)}") from error


def read_tensor(path: Path, name: str) -> Tensor:
    # Opened anew each time: a file that stays open keeps in memory all that was ever read of it.
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def open_pickle(path: Path, notes: Notes) -> State:
    """A .ckpt, .pt or .bin, bare or under `state_dict`, nested dicts flattened."""
    found = load_pickle(path)
    if not isinstance(found, dict):
        return {}
    while isinstance(found.get("state_dict"), dict):
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


# What is kept beside a weight of 8 bits: its scale, by ComfyUI's name or diffusers'; hints for kernels.
SCALE = re.compile(r"(.+\.)(scale_weight|weight_scale)")
HINT = re.compile(r"(.+\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")


def apply_scales(state: State) -> State:
    """Weights of 8 bits times the scales that are kept beside them, as 16 bits."""
    scaled = {match[1] + "weight": state[match[0]] for match in map(SCALE.fullmatch, state) if match}
    scaled = {name: scale for name, scale in scaled.items()
              if name in state and state[name].dtype in EIGHT_BITS}
    kept = {name: tensor for name, tensor in state.items() if not HINT.fullmatch(name) and not (
        (match := SCALE.fullmatch(name)) and match[1] + "weight" in scaled)}
    return kept | {name: Lazy(state[name].shape, torch.float16, partial(read_scaled, state[name], scale))
                   for name, scale in scaled.items()}


def read_scaled(weight: Lazy, scale: Lazy) -> Tensor:
    """A weight times its scale, which is one number or one for each row; float32."""
    values = weight.read().float()
    return values * scale.read().float().reshape(-1, *[1] * (values.dim() - 1))


class StandIn:
    """Takes the place of an object in a pickle: accepts anything and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class EmptyDict:
    """The same for kinds of dicts, which the unpickler fills only when they are exactly that."""

    def __new__(cls, *args, **kwargs):
        return {}


class EmptyList:
    """And of lists."""

    def __new__(cls, *args, **kwargs):
        return []


# What training scripts leave beside tensors. A checkpoint may mention these names; each becomes inert.
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|pathlib|datetime|typing|collections)\..+|"
    r"(builtins|__builtin__)\.(dict|list|set|tuple|int|float|str|bool|object|frozenset|complex|bytearray|"
    r"range|xrange|slice|Ellipsis|NotImplemented)|"
    r"argparse\.Namespace|types\.SimpleNamespace|uuid\.UUID|decimal\.Decimal|fractions\.Fraction|"
    r"torch\.torch_version\.TorchVersion")


def load_pickle(path: Path):
    """`torch.load` that never runs code of the file. Raises Refusal, naming what the file asks for."""
    allowed: dict[str, type] = {}
    while True:
        inert = torch.serialization.safe_globals([(cls, name) for name, cls in allowed.items()])
        try:
            check_archive(path)
            with inert, warnings.catch_warnings(), path.open("rb") as file:
                warnings.simplefilter("ignore")  # about pickle protocols and TorchScript
                # torch goes by the name: a pickle that is called .safetensors has to come without one.
                mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
                return torch.load(path if mapped else file, "cpu", weights_only=True, mmap=mapped)
        except WeightsError as error:
            raise WrongKind(f"{path}: {error}") from error
        except Exception as error:  # a hostile file can make the unpickler raise anything
            asked = re.search(r"GLOBAL (\S+)", str(error))
            name = asked and (asked[1] if "." in asked[1] else f"builtins.{asked[1]}")
            if name and INERT.fullmatch(name) and name not in allowed:
                kind = (EmptyDict if re.search("dict$|Counter$", name, re.IGNORECASE) else
                        EmptyList if re.search("list$|deque$", name) else StandIn)
                allowed[name] = type(kind.__name__, (kind,), {})
            elif name:
                raise Unsafe(f"{path} is an unsafe pickle: it asks for {name}, which could run code. "
                             "Nothing was run: find the .safetensors of this model") from error
            elif "TorchScript" in str(error):
                raise WrongKind(f"{path} is a TorchScript program, not a checkpoint: take the .safetensors "
                                "or the Hugging Face layout") from error
            else:
                raise WrongKind(f"{path} is truncated or damaged, or no PyTorch checkpoint but a pickle that "
                                "could run code. Nothing was run: download it again") from error


# 2. Finding files: a file, a folder or a repository.

FILE = re.compile(r"(diffusion_pytorch_model|model|pytorch_model|open_clip_model|open_clip_pytorch_model)"
                  r"((?:[.-](?:fp32|fp16|bf16|\d{5}-of-\d{5}))*)\.(safetensors|bin)", re.IGNORECASE)
PRECISIONS = ("bf16", "fp16", "fp32")  # the best last


def choose(names: Iterable[str]) -> list[str]:
    """The weight files to take of one folder, all shards: safetensors before .bin, full before half."""
    groups: dict[tuple, list[str]] = {}
    for match in filter(None, map(FILE.fullmatch, sorted(names))):
        precision = tuple(word in match[2].lower() for word in PRECISIONS)  # none of them sorts first
        count = re.search(r"-of-(\d{5})", match[2].lower())
        kind = (match[3].lower() == "bin", precision, bool(count), match[1], int(count[1]) if count else 1)
        groups.setdefault(kind, []).append(match[0])
    if not groups:
        return []
    *first, count = min(groups)
    if len([kind for kind in groups if kind[:-1] == tuple(first)]) > 1:
        raise WrongTensors(f"shards of several savings are mixed, as {groups[(*first, count)][0]}, one of "
                           f"{count}: delete those of the older ones")
    chosen = groups[(*first, count)]
    if len(chosen) != count:
        raise WrongTensors(f"{len(chosen)} of {count} shards found ({', '.join(chosen[:5])}): "
                           "download the rest")
    return chosen


def locate(source: str) -> Path:
    """The local path of a source, downloaded if it is a Hugging Face repository. Raises Refusal."""
    if Path(source).exists():
        snapshots = list(Path(source).glob("snapshots/*/"))  # as Hugging Face's cache keeps a repository
        return snapshots[0] if len(snapshots) == 1 else Path(source)
    elsewhere = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).parent.exists()
    if not elsewhere or re.search(r"\.(safetensors|ckpt|bin|pth?)$", source):
        raise WrongKind(f"{source} does not exist: give a file, a folder or a Hugging Face repository")
    try:
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
    """A JSON object, {} where there is none. Raises WeightsError."""
    value = load.read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
