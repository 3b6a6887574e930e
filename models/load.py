"""Read and write a weights folder: `config.json` and one safetensors file per model.

Every file that this project writes, it writes whole or not at all: `write_whole`, `whole_folder`.
"""
import json
import os
import pickle
import secrets
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from models.controlnet import ControlNet, ControlNetConfig
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig

# Kind of image encoder, as config.json calls it -> (its class, the class of its sizes, its own). Another one
# is a line here and a module with `cfg.output_dim`, `preprocess(image)` and `forward(pixels)` -> (B, F), as
# CLIPImageEncoder has. Only `image_layers` in training/moa.py needs more of it.
IMAGE_ENCODERS: dict[str, tuple[type[nn.Module], type]] = {
    "clip": (CLIPImageEncoder, CLIPImageConfig),
}
# Part of a base model -> (its class, the class of its sizes).
PARTS: dict[str, tuple[type[nn.Module], type]] = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "image_encoder": IMAGE_ENCODERS["clip"],
}
# The same with what may lie beside it, or in a folder of its own.
ALL_PARTS = {**PARTS, "controlnet": (ControlNet, ControlNetConfig)}
LEFT_ALONE = 10  # seconds since its last change in which a temporary file may still be written
MOST_LAYERS = 100  # of one part; a file may claim any number, and each layer takes its time
# What a checkpoint of train.py holds. `moa` is the config of the MoA file that can be made of it.
CHECKPOINT = {"run": dict, "step": int, "parameters": dict, "average": dict, "optimizer": dict,
              "moa": dict | None}


class WeightsError(ValueError):
    """A weights folder or file cannot be used; the message says why and what to do."""

    code = 3  # exit status of the converters


@dataclass
class Models:
    """The base model, without MoA: `add_moa(models.unet)` is the caller's line."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextEncoder
    tokenize: Callable[[list[str]], Tensor]
    image_encoder: nn.Module | None  # one of IMAGE_ENCODERS
    config: dict  # all of config.json


def load_models(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Models:
    """Load a weights folder, strictly, for inference. Raises WeightsError."""
    folder = Path(folder)
    config = read_config(folder)
    modules = {part: load_part(folder, part, device, dtype) for part in ("unet", "vae", "text_encoder")}
    has_images = (folder / "image_encoder.safetensors").exists()
    image_encoder = load_part(folder, "image_encoder", device, dtype) if has_images else None
    tokenize = Tokenizer(modules["text_encoder"].cfg)
    return Models(**modules, tokenize=tokenize, image_encoder=image_encoder, config=config)


def load_part(folder: Path, part: str, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build one part without memory, then hand it the file's tensors. Raises WeightsError."""
    path = Path(folder) / f"{part}.safetensors"
    module = build_empty(build_config(read_config(folder), part))
    state = read_tensors(path)
    check_exact(state, module.state_dict(), path)
    module.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in state.items()}, assign=True)
    return module.eval().requires_grad_(False)


# Sizes -------------------------------------------------------------------------------------------

def read_json(path: Path):
    """A JSON file in any Unicode encoding, with or without byte order mark. Raises WeightsError."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error


def read_config(folder: Path) -> dict:
    """`config.json` of a weights folder as a dict. Raises WeightsError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} not found: {folder} is not a weights folder "
                           "(make one with weights/convert_sd15.py)")
    config = read_json(path)
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object")
    return config


def build_config(config: dict, part: str):
    """The sizes of one part, as its dataclass. Raises WeightsError."""
    try:
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()}
        kind = sizes.pop("kind", "clip")  # which older folders do not say
        return (IMAGE_ENCODERS[kind] if part == "image_encoder" else ALL_PARTS[part])[1](**sizes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"config.json has no usable sizes for {part!r} ({error}): a run writes them at "
                           "its end, go on with it by --resume") from error


def describe_sizes(cfg) -> dict:
    """What config.json says about a part: its sizes, and the kind of an image encoder."""
    kind = kind_of(cfg)
    return {**({"kind": kind} if kind else {}), **asdict(cfg)}


def kind_of(cfg) -> str | None:
    """The kind of image encoder that has these sizes, None of another part. Raises WeightsError."""
    kinds = [kind for kind, (_, sizes) in IMAGE_ENCODERS.items() if type(cfg) is sizes]
    if len(kinds) > 1:
        raise WeightsError(f"the image encoders {' and '.join(kinds)} share {type(cfg).__name__}: give each "
                           "kind a class of sizes of its own")
    return kinds[0] if kinds else None


def build_empty(cfg) -> nn.Module:
    """A part of these sizes, whose tensors have shapes but no memory. Raises WeightsError."""
    kind, modules = kind_of(cfg), {sizes: module for module, sizes in ALL_PARTS.values()}
    try:
        for name in ("layers", "channels", "hint_channels"):
            value = getattr(cfg, name, 0)
            if (value if isinstance(value, int) else len(value)) > MOST_LAYERS:
                raise ValueError(f"{name} has or is more than {MOST_LAYERS}")
        with torch.device("meta"):
            return (IMAGE_ENCODERS[kind][0] if kind else modules[type(cfg)])(cfg)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"the sizes {cfg} make no model: {error}") from error


# Tensors -----------------------------------------------------------------------------------------

# How a file begins that is no safetensors file -> what it is, and the cure.
PICKLE = "a pickle, which could run code: take the .safetensors, or convert it with weights/convert_sd15.py"
BEGINNINGS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file: run `git lfs pull`",
    b"<": "a web page, since the download needs a login: download it again",
    b"PK": PICKLE, b"\x80": PICKLE,
    **dict.fromkeys((b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b"), "an archive: unpack it"),
    b"GGUF": "a GGUF file, quantized for other programs: take the .safetensors",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"), "a picture: give a .safetensors file"),
}


def what_is_wrong(path: Path, error: Exception | str = "") -> str:
    """What a file is that cannot be read as safetensors, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")  # of the header
        file.seek(8)
        text = file.read(min(length, size))
    if not head:
        return "is empty (0 bytes): download it again"
    if head[8:9] != b"{":
        begin = next((begin for begin in BEGINNINGS if head.lstrip().startswith(begin)), None)
        return (f"is {BEGINNINGS[begin]}" if begin else
                f"is not a model file (it starts with {head[:8]!r}): give a .safetensors file")
    metadata = {}
    with suppress(ValueError, RecursionError, AttributeError, TypeError, LookupError):
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        length += max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length > size:
        return f"is truncated ({size} of {8 + length} bytes): download it again"
    odd = {k: v for k, v in metadata.items() if type(v) is not str} if type(metadata) is dict else metadata
    if odd:
        return (f"has {odd!r} in its __metadata__, where only text may be: its tensors are whole, write it "
                "again without that")
    return f"is damaged ({error}): download it again"


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """A safetensors file as a dict, mapped into memory. Raises WeightsError."""
    return read_safetensors(path)[0]


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} {'is a folder: give the file in it' if path.is_dir() else 'not found'}")
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no iterator
            return state, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} {what_is_wrong(path, error)}") from error


def differences(found: Mapping, expected: Mapping) -> str:
    """How many are missing, unexpected or of another shape, with the first three of each; "" if none. Both
    map names to things that have a `.shape`."""
    shapes = [f"{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}"
              for k in sorted(found.keys() & expected.keys()) if found[k].shape != expected[k].shape]
    groups = {"missing": sorted(expected.keys() - found.keys()),
              "unexpected": sorted(found.keys() - expected.keys()), "of another shape": shapes}
    return "; ".join(f"{len(names)} {what} ({', '.join([*names[:3], *['...'] * (len(names) > 3)])})"
                     for what, names in groups.items() if names)


def check_exact(found: Mapping, expected: Mapping, path: Path) -> None:
    """Raise WeightsError unless names and shapes agree."""
    if wrong := differences(found, expected):
        raise WeightsError(f"{path} does not fit its config.json: {wrong}")


def check_archive(path: Path) -> None:
    """Raise WeightsError for a zip file that torch has not written, or that unpacks to more than it is: torch
    compresses nothing, and a bomb unpacks to anything."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise WeightsError("it is an archive of other files: unpack it, and give what was in it")
        if size > path.stat().st_size:
            raise WeightsError(f"it would unpack to {size} bytes, and no file that torch has written does")


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py; no code in the file is run. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: give a checkpoint of train.py, such as "
                           "runs/moa/checkpoints/001000.pt")
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle that is not torch's
            state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(state.get(name), kind)]
    except Exception as error:  # a broken file raises whatever its bytes lead to
        why = ("it is damaged, no file of torch, or a pickle that could run code"
               if isinstance(error, (pickle.UnpicklingError, EOFError)) else str(error)[:100])
        raise WeightsError(f"{path} is not a checkpoint that can be read: {why}") from error
    if wrong:
        raise WeightsError(f"{path} is not a checkpoint that can be read: no {', no '.join(wrong)} in it")
    return state


# Writing -----------------------------------------------------------------------------------------

def save_part(module: nn.Module, folder: Path, part: str, dtype: torch.dtype = torch.float16) -> None:
    """Write one part and its sizes into a weights folder, each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(module.state_dict(), folder / f"{part}.safetensors", dtype)
    config = read_config(folder) if (folder / "config.json").exists() else {}
    write_json({**config, part: describe_sizes(module.cfg)}, folder / "config.json")


def carry_over(source: Path, folder: Path) -> None:
    """Copy all models of the weights folder `source`, with their sizes, into `folder`."""
    source, folder = Path(source), Path(folder)
    kept = {k: v for k, v in read_config(source).items() if k != "training"}
    for file in (source / f"{name}.safetensors" for name in ALL_PARTS):
        if file.exists():
            write_whole(folder / file.name, partial(shutil.copyfile, file))
    mine = read_config(folder) if (folder / "config.json").exists() else {}
    write_json({**kept, **mine}, folder / "config.json")


def save_tensors(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None,
                 metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. `dtype` None keeps each tensor's."""
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    write_whole(path, lambda temporary: save_file(state, temporary, metadata))


def write_json(value, path: Path) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` to a temporary file beside `path`, flush it to disk, rename: whole or not at all.

    Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # safetensors writes 0600
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{path} cannot be written ({reason}): what was there before is left as it was"
                      ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder whose contents go to `output` at the end: a failure leaves nothing."""
    anchor = next(p for p in (output, *output.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(prefix=".new-", dir=anchor) as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        yield folder
        if output.exists():
            for file in sorted(folder.iterdir()):
                os.replace(file, output / file.name)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(output)


def remove_leftovers(folder: Path, files: Container[Path]) -> None:
    """Delete what processes that were killed in `write_whole` left of these files of a folder, but for what
    changed just now: another process may be writing it."""
    for left in folder.glob(".*.*.tmp"):
        with suppress(OSError):
            target = folder / left.name[1:].rsplit(".", 2)[0]
            if target in files and time.time() - left.stat().st_mtime > LEFT_ALONE:
                left.unlink()
