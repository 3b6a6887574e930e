"""Put Mixture-of-Attention into a UNet, and find its layers."""
from collections.abc import Iterator

import torch.nn as nn

from moa.mixture import MixtureOfAttention


def add_moa(unet: nn.Module, router_hidden: int | None = None) -> nn.Module:
    """Replace every attention of `unet` by a `MixtureOfAttention`, in place; returns `unet`.

    Call it after the base weights were loaded: the personalized experts are copies of them. All
    other parameters are frozen. Any UNet will do that has `transformer_blocks()` in forward order.
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
    """The base model's modules by the names that they have without MoA: for an attention, its prior."""
    mixtures = [module for module in unet.modules() if isinstance(module, MixtureOfAttention)]
    added = {module for mixture in mixtures for name, child in mixture.named_children() if name != "prior"
             for module in child.modules()}
    return {name.replace(".prior", ""): module for name, module in unet.named_modules()
            if module not in added}
