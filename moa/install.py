"""Put Mixture-of-Attention into a UNet, watch it, and keep what was trained."""
import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa.mixture import ExpertContext, MixtureOfAttention
from moa.prompt import MultimodalPrompt, PositionalEncoding, PromptConfig

FREQUENCIES = "prompt.encoding.frequencies"


def add_moa(unet: nn.Module, router_hidden: int | None = None) -> nn.Module:
    """Replace every attention of `unet` by a `MixtureOfAttention`, in place; returns `unet`.

    Call it after the base weights were loaded: the personalized experts are copies of them. All
    other parameters are frozen. Ask any UNet: it needs `transformer_blocks()` in forward order.
    Raises ValueError when the UNet has MoA already.
    """
    unet.requires_grad_(False)
    for layer, block in enumerate(unet.transformer_blocks()):
        if isinstance(block.attn1, MixtureOfAttention):
            raise ValueError("this UNet has Mixture-of-Attention already")
        block.attn1 = MixtureOfAttention(block.attn1, layer, router_hidden)
        block.attn2 = MixtureOfAttention(block.attn2, layer, router_hidden)
    return unet


def moa_layers(unet: nn.Module) -> Iterator[tuple[int, str, MixtureOfAttention]]:
    """(l, "self" or "cross", the layer) of all MoA layers, in forward order: 32 in SD1.5."""
    for layer, block in enumerate(unet.transformer_blocks()):
        yield layer, "self", block.attn1
        yield layer, "cross", block.attn2


def base_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by the names that they have without MoA: of an attention the prior."""
    return {name.replace(".prior", ""): module for name, module in unet.named_modules()
            if not {"personalized", "router"} & set(name.split("."))}


def trainable_state(unet: nn.Module) -> dict[str, Tensor]:
    """The tensors of all personalized experts and routers, by their names in the UNet."""
    return {k: v for k, v in unet.state_dict().items() if ".personalized." in k or ".router." in k}


class RoutingKey(NamedTuple):
    """Which router a map comes from."""

    layer: int  # l, in forward order
    kind: str  # "self" or "cross"


@contextmanager
def record_routing(unet: nn.Module) -> Iterator[dict[RoutingKey, Tensor]]:
    """Collect the router weights of each UNet call made inside: {(l, kind): (B, N, E)}.

    Each call overwrites the last one's. Gradients flow through what is collected (not under
    reentrant checkpointing, which runs the layers without them).
    """
    routing: dict[RoutingKey, Tensor] = {}

    def recorder(key: RoutingKey):
        return lambda module, args, output: routing.__setitem__(key, output)

    hooks = [moa.router.register_forward_hook(recorder(RoutingKey(layer, kind)))
             for layer, kind, moa in moa_layers(unet)]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def record_subject_attention(unet: nn.Module, positions: Tensor,
                             trained: Container[int] | None = None) -> Iterator[dict[int, Tensor]]:
    """Collect how the personalized cross-attentions attend to the subjects' tokens.

    positions: (B, S) int64 token indices. trained: the layers l through whose maps gradients flow, by
    default all. Yields {l: (B, H, N, S)}, filled by a UNet call inside.
    """
    maps: dict[int, Tensor] = {}

    def recorder(layer: int):
        def record(module, args, output):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (trained is None or layer in trained)):
                maps[layer] = module.token_maps(*args, positions)
        return record

    hooks = [moa.personalized.register_forward_hook(recorder(layer))
             for layer, kind, moa in moa_layers(unet) if kind == "cross"]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def force_routing(unet: nn.Module, prior: float | Tensor) -> Iterator[None]:
    """Inside, every router gives the prior this weight instead of its own.

    1.0 is the base model (the personalized experts are not even computed), 0.0 all personalized; a
    map (h, w) or (B, h, w) of weights in [0, 1] is brought to each layer's grid.
    Raises ValueError for weights outside [0, 1].
    """
    values = torch.as_tensor(prior)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"the prior's weight must be in [0, 1], not {prior}")
    with set_routers(unet, forced=values if values.ndim else float(values)):
        yield


@contextmanager
def scale_personalized(unet: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the personalized experts get `strength` times the weight that the routers give them, at
    most 1, and the prior the rest: 0 is the base model, 1 changes nothing.

    Raises ValueError for a negative or infinite strength.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"the subjects' strength must be 0 or more, not {strength}")
    with set_routers(unet, strength=float(strength)):
        yield


@contextmanager
def set_routers(unet: nn.Module, **values) -> Iterator[None]:
    """Inside, every router has these attributes."""
    routers = [moa.router for _, _, moa in moa_layers(unet)]
    before = [{name: getattr(router, name) for name in values} for router in routers]
    try:
        for router in routers:
            vars(router).update(values)
        yield
    finally:
        for router, old in zip(routers, before, strict=True):
            vars(router).update(old)


def save_moa(unet: nn.Module, prompt: MultimodalPrompt, path: str | Path,
             dtype: torch.dtype = torch.float16, **settings) -> None:
    """Write personalized experts, routers, the multimodal prompt and their config to one file.

    `settings` (JSON values) are kept in the metadata, such as how the file was trained.
    """
    state = trainable_state(unet) | {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    write_moa(state, moa_config(unet, prompt, **settings), path, dtype)


def moa_config(unet: nn.Module, prompt: MultimodalPrompt, **settings) -> dict:
    """What a MoA file says about itself in its metadata."""
    router = next(moa_layers(unet))[2].router.f
    return {"prompt": asdict(prompt.cfg), "encoding_units": PositionalEncoding.units, "settings": settings,
            "router_hidden": router[0].out_features if isinstance(router, nn.Sequential) else None}


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

    Raises ValueError when the file is none of `save_moa` or does not fit this UNet.
    """
    config, state = read_moa(path)
    weight = next(unet.parameters())
    try:
        check_sizes(config, state)
        prompt = MultimodalPrompt(PromptConfig(**config["prompt"])).to(weight.device, weight.dtype)
        if not isinstance(next(unet.transformer_blocks()).attn1, MixtureOfAttention):
            add_moa(unet, config["router_hidden"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a MoA file: its config cannot be used: {error}") from error
    prompt.encoding.float()
    expected = trainable_state(unet) | {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    wrong = sorted(expected.keys() ^ state.keys())
    wrong += [k for k in sorted(expected.keys() & state.keys()) if expected[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this UNet: {len(wrong)} tensors are missing, unexpected "
                         f"or of another shape, such as {', '.join(wrong[:5])}")
    # Older files have frequencies of the raw timestep and layer.
    units = torch.tensor(PositionalEncoding.units) / torch.tensor(config.get("encoding_units", (1, 1)))
    state[FREQUENCIES] = state[FREQUENCIES] * units[:, None]
    with torch.no_grad():
        for key, value in expected.items():  # state_dict's tensors are the parameters' own memory
            value.copy_(state[key])
    return prompt.eval()


def check_sizes(config: dict, state: dict[str, Tensor]) -> None:
    """Raise an error unless the sizes that a config claims are those of the tensors beside it, before
    anything is made of these sizes."""
    with torch.device("meta"):
        prompt = MultimodalPrompt(PromptConfig(**config["prompt"])).state_dict()
    claimed = {f"prompt.{k}": v.shape for k, v in prompt.items()}
    routers = [v.shape[0] for k, v in state.items() if k.endswith(".router.f.0.weight") and v.ndim]
    if any(state[k].shape != shape for k, shape in claimed.items() if k in state) or (
            config["router_hidden"] not in (routers or [None])):
        raise ValueError("its tensors have other sizes")


def read_moa(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a MoA file. Raises ValueError."""
    try:
        with safe_open(path, "pt") as file:
            config = config_in(file)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no iterator
    except (SafetensorError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a MoA file: its metadata holds no MoA config")
    return config, state


def config_in(file: safe_open):
    """The MoA config in an open file's metadata; None where there is none."""
    return json.loads((file.metadata() or {}).get("moa", "null"))


def belongs_to_encoder(path: str | Path) -> bool:
    """Whether a MoA file was trained together with an image encoder, which it does not hold."""
    with safe_open(path, "pt") as file:
        settings = config_in(file).get("settings")
    preset = settings.get("preset") if isinstance(settings, dict) else None
    return isinstance(preset, dict) and bool(preset.get("image_layers"))


__all__ = ["ExpertContext", "add_moa", "base_modules", "belongs_to_encoder", "force_routing", "load_moa",
           "moa_config", "moa_layers", "record_routing", "record_subject_attention", "save_moa",
           "scale_personalized", "write_moa"]
