"""Read and write a weights folder: `config.json` and one safetensors file per model."""
import json
import os
import pickle
import secrets
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.clip_image import CLIPImageConfig, CLIPImageEncoder
from models.clip_text import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from models.controlnet import ControlNet, ControlNetConfig
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig

# Part of a base model -> (its class, the class of its sizes).
PARTS: dict[str, tuple[type[nn.Module], type]] = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "image_encoder": (CLIPImageEncoder, CLIPImageConfig),
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


@dataclass
class Models:
    """The base model, without MoA: `add_moa(models.unet)` is the caller's line."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextEncoder
    tokenize: Callable[[list[str]], Tensor]
    image_encoder: CLIPImageEncoder | None
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


def read_config(folder: Path) -> dict:
    """`config.json` of a weights folder as a dict. Raises WeightsError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} not found: {folder} is not a weights folder "
                           "(make one with weights/convert_sd15.py)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object")
    return config


def build_config(config: dict, part: str):
    """The sizes of one part, as its dataclass. Raises WeightsError."""
    cls = ALL_PARTS[part][1]
    if part not in config:
        raise WeightsError(f"config.json has no sizes for {part!r}: a run writes them at its end")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()})
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"config.json has no usable sizes for {part!r}: {error}") from error


def build_empty(part: str, cfg) -> nn.Module:
    """One part whose tensors have shapes but no memory. Raises WeightsError where the sizes make no model."""
    try:
        for name in ("layers", "channels", "hint_channels"):
            value = getattr(cfg, name, 0)
            if (value if isinstance(value, int) else len(value)) > MOST_LAYERS:
                raise ValueError(f"{name} has or is more than {MOST_LAYERS}")
        with torch.device("meta"):
            return ALL_PARTS[part][0](cfg)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"the sizes of {part!r} make no model: {error}") from error


def load_part(folder: Path, part: str, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build one part without memory, then hand it the file's tensors. Raises WeightsError."""
    folder = Path(folder)
    module = build_empty(part, build_config(read_config(folder), part))
    path = folder / f"{part}.safetensors"
    state = {k: v.to(device=device, dtype=dtype) for k, v in read_tensors(path).items()}
    check_exact(state, module.state_dict(), path)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file as a dict. Raises WeightsError."""
    if not Path(path).is_file():
        raise WeightsError(f"{path} not found")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def check_archive(path: Path) -> None:
    """Raise WeightsError for a zip file that unpacks to more than it is: torch compresses nothing, and a
    bomb unpacks to anything."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
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


def differences(found: dict, expected: dict) -> list[str]:
    """What is missing, unexpected or of another shape; both map names to things that have a `.shape`."""
    return [*(f"missing {k}" for k in sorted(expected.keys() - found.keys())),
            *(f"unexpected {k}" for k in sorted(found.keys() - expected.keys())),
            *(f"{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}"
              for k in sorted(found.keys() & expected.keys()) if found[k].shape != expected[k].shape)]


def check_exact(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise WeightsError unless keys and shapes agree; the message lists the first five differences."""
    if wrong := differences(found, expected):
        raise WeightsError(f"{path} does not fit its config.json, {len(wrong)} differences: "
                           + "; ".join(wrong[:5]))


def save_part(module: nn.Module, folder: Path, part: str, dtype: torch.dtype = torch.float16) -> None:
    """Write one part and its sizes into a weights folder, each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(module.state_dict(), folder / f"{part}.safetensors", dtype)
    config = read_config(folder) if (folder / "config.json").exists() else {}
    write_json({**config, part: asdict(module.cfg)}, folder / "config.json")


def carry_over(source: Path, folder: Path) -> None:
    """Copy all models of the weights folder `source`, with their sizes, into `folder`."""
    source, folder = Path(source), Path(folder)
    config = read_config(source)
    names = [name for name in ALL_PARTS if (source / f"{name}.safetensors").exists()]
    for name in names:
        file = source / f"{name}.safetensors"
        write_whole(folder / file.name, partial(shutil.copyfile, file), file.stat().st_size)
    kept = {k: v for k, v in config.items() if k != "training"}
    mine = read_config(folder) if (folder / "config.json").exists() else {}
    write_json({**kept, **mine}, folder / "config.json")


def save_tensors(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None,
                 metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it. `dtype` None keeps each."""
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    write_whole(path, lambda temporary: save_file(state, temporary, metadata), tensor_bytes(state.values()))


def write_json(value, path: Path) -> None:
    """Write JSON under a temporary name, then rename it."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory that tensors take, which is nearly their file's."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_whole(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """`write` to a temporary file beside `path`, flush it to disk, rename: whole or not at all.

    size: in bytes, where it is known, for the message. Raises OSError.
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
        need = f"it needs {size / 1e6:.1f} MB, " if size else ""
        with suppress(OSError):
            need += f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free there; "
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{path} cannot be written ({reason}): {need}what was there before is left as it "
                      "was") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, files: Container[Path]) -> None:
    """Delete what processes that were killed in `write_whole` left of these files of a folder, but for what
    changed just now: another process may be writing it."""
    for left in folder.glob(".*.*.tmp"):
        with suppress(OSError):
            target = folder / left.name[1:].rsplit(".", 2)[0]
            if target in files and time.time() - left.stat().st_mtime > LEFT_ALONE:
                left.unlink()
