"""Keep what was trained, and load it again: one safetensors file beside the base model's."""
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa.install import add_moa, moa_layers
from moa.mixture import MixtureOfAttention
from moa.prompt import MultimodalPrompt, PositionalEncoding, PromptConfig

FREQUENCIES = "prompt.encoding.frequencies"


def save_moa(unet: nn.Module, prompt: MultimodalPrompt, path: str | Path,
             dtype: torch.dtype = torch.float16, **settings) -> None:
    """Write all that is trained in `unet`, the multimodal prompt and their config to one file.

    `settings` (JSON values) are kept in the metadata, such as how the file was trained.
    """
    state = moa_state(unet) | {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    write_moa(state, moa_config(unet, prompt, **settings), path, dtype)


def moa_state(unet: nn.Module) -> dict[str, Tensor]:
    """MoA's tensors, and whatever else of `unet` has requires_grad, by name."""
    added = {id(p) for _, _, moa in moa_layers(unet) for module in moa.children() if module is not moa.prior
             for p in module.parameters()}
    base = {name for name, p in unet.named_parameters() if not p.requires_grad and id(p) not in added}
    return {k: v for k, v in unet.state_dict().items() if k not in base}


def moa_config(unet: nn.Module, prompt: MultimodalPrompt, **settings) -> dict:
    """What a MoA file says about itself in its metadata."""
    _, _, moa = next(moa_layers(unet))
    return {"prompt": asdict(prompt.cfg), "encoding_units": PositionalEncoding.units,
            "router_hidden": moa.router_hidden, "settings": settings}


def write_moa(state: dict[str, Tensor], config: dict, path: str | Path,
              dtype: torch.dtype = torch.float16) -> None:
    """Write a MoA file, whole or not at all: its tensors by their names in it, and `moa_config`."""
    # Rounded to half precision, a frequency of 30 would be .01 off.
    state = {k: v.detach().to("cpu", torch.float32 if k == FREQUENCIES else dtype).contiguous()
             for k, v in state.items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(state, temporary, {"moa": json.dumps(config)})
        temporary.chmod(0o644)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_moa(unet: nn.Module, path: str | Path) -> MultimodalPrompt:
    """Add MoA to `unet` if it has none, load a MoA file into it, strictly; returns the prompt module.

    All that MoA adds must be in the file, and all that is in the file must be here.
    Raises ValueError when the file is none of `save_moa` or does not fit this UNet.
    """
    config, state = read_moa(path)
    weight = next(unet.parameters())
    try:
        check_sizes(config, state)
        prompt = MultimodalPrompt(PromptConfig(**config["prompt"])).to(weight.device, weight.dtype)
        if not isinstance(next(unet.transformer_blocks()).attn1, MixtureOfAttention):
            add_moa(unet, config["router_hidden"])
        # Older files have frequencies of the raw timestep and layer.
        units = torch.tensor(PositionalEncoding.units) / torch.tensor(config.get("encoding_units", (1, 1)))
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a MoA file: its config cannot be used: {error}") from error
    prompt.encoding.float()  # phases need full precision
    ours = {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    needed, known = moa_state(unet) | ours, unet.state_dict() | ours
    wrong = sorted((needed.keys() - state.keys()) | (state.keys() - known.keys()))
    wrong += [k for k in sorted(known.keys() & state.keys()) if known[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this UNet, or was trained with other code: {len(wrong)} "
                         "tensors are missing, unexpected or of another shape, such as "
                         f"{', '.join(wrong[:3])}")
    state[FREQUENCIES] = state[FREQUENCIES] * units[:, None]
    with torch.no_grad():
        for key, value in state.items():  # state_dict's tensors are the parameters' own memory
            known[key].copy_(value)
    unet.eval()  # what `add_moa` made
    return prompt.eval()


def check_sizes(config: dict, state: dict[str, Tensor]) -> None:
    """Raise an error unless the sizes that a config claims are those of the tensors beside it, before
    memory is taken for them."""
    with torch.device("meta"):
        prompt = MultimodalPrompt(PromptConfig(**config["prompt"])).state_dict()
    claimed = {f"prompt.{k}": v.shape for k, v in prompt.items()}
    widths = {size for k, v in state.items() if ".router." in k for size in v.shape}
    if any(state[k].shape != shape for k, shape in claimed.items() if k in state) or (
            config["router_hidden"] is not None and config["router_hidden"] not in widths):
        raise ValueError("its tensors have other sizes")


def read_moa(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a MoA file. Raises ValueError."""
    try:
        with safe_open(path, "pt") as file:
            config = config_in(file)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no iterator
    except (SafetensorError, OSError, RecursionError) as error:
        cure = ": of a checkpoint weights/export_moa.py makes one" if str(path).endswith(".pt") else ""
        raise ValueError(f"{path} is not a readable safetensors file{cure} ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a MoA file: its metadata holds no MoA config")
    return config, state


def config_in(file: safe_open) -> dict | None:
    """The MoA config in an open file's metadata; None where there is none."""
    return json.loads((file.metadata() or {}).get("moa", "null"))


def training_of(path: str | Path) -> dict:
    """How a MoA file says that it was trained: the preset's values, and on what its `references` stood,
    "grey" or "noise"; empty where it says nothing."""
    with safe_open(path, "pt") as file:
        settings = config_in(file).get("settings")
    preset = settings.get("preset") if isinstance(settings, dict) else None
    return {**preset, "references": settings.get("references")} if isinstance(preset, dict) else {}
