"""Weights by their name on the Hugging Face hub, as in `--weights user/name` and `--moa user/name@revision`.

What is fetched is kept in the hub's cache, so the second time no network is needed. Only safetensors, JSON
and the model card are fetched.
"""
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

# Of a weights folder. Other files, of whatever repository, are not fetched.
FILES = ("config.json", "unet.safetensors", "vae.safetensors", "text_encoder.safetensors",
         "image_encoder.safetensors", "moa.safetensors", "subjects.safetensors", "controlnet.safetensors")
CARD = "README.md"


def find_weights(name: Path) -> Path:
    """A weights folder: itself where it is one here, else what the hub has under this name.

    Raises ValueError.
    """
    folder = fetch(name, FILES)
    if folder != name and not (folder / "unet.safetensors").is_file():
        raise ValueError(f"{name} on the hub holds no weights of this project ({FILES[0]}, {FILES[1]}, ...): "
                         "download its checkpoint and convert it with weights/convert_sd15.py")
    return folder


def find_moa(name: Path) -> Path:
    """The same for a MoA file."""
    folder = fetch(name, ["moa.safetensors"])
    if folder != name and not (folder / "moa.safetensors").is_file():
        raise ValueError(f"{name} on the hub holds no moa.safetensors")
    return name if folder == name else folder / "moa.safetensors"


def fetch(name: Path, files: Sequence[str]) -> Path:
    """`name` itself unless it reads as user/name[@revision] and there is no folder `user` here; else the
    folder of these files of the hub's repository. Prints its licence. Raises ValueError."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if not found or name.parent.exists():
        return name
    repository, revision = found.groups()
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*files, CARD]))
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name} is no folder here, and on the hub there is none or it is private: for a "
                         "private one give HF_TOKEN, or log in with `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{name} is no folder here, and the hub cannot be reached: without a network only "
                         "what was fetched before can be used") from error
    except Exception as error:  # the network library's own errors among them
        raise ValueError(f"{name} cannot be had from the hub: {str(error).splitlines()[0]}") from error
    licence = ModelCard.load(folder / CARD).data.license if (folder / CARD).is_file() else None
    print(f"{name}: licence {licence or 'not stated'}", flush=True)
    return folder
