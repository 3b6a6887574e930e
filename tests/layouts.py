"""The layouts in which others keep Stable Diffusion 1.5 and CLIP: names and files, from public states.

`states` maps unet, vae, text_encoder and image_encoder to tensors under their modern public names.
"""
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from samplers import alpha_bar

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def ldm_places() -> dict[str, str]:
    """Modules of the UNet and the VAE, modern name -> LDM's, enumerated as the checkpoints have them."""
    places = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
              "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}
    for i in range(4):
        for j in range(2):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * (i + 1)}.0.op"
        for j in range(3):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}"
    return places


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def ldm_unet(state: dict) -> dict:
    places, out = ldm_places(), {}
    for key, value in state.items():
        place = next(p for p in sorted(places, key=len, reverse=True) if key.startswith(p + "."))
        inner = key[len(place) + 1:]
        if ".resnets." in key:
            module, kind = inner.split(".")
            inner = f"{RESNET[module]}.{kind}"
        out[f"{places[place]}.{inner}"] = value
    return out


def ldm_controlnet(state: dict) -> dict:
    """lllyasviel's names of a ControlNet with 12 + 1 zero convolutions, without their prefix."""
    hint = "controlnet_cond_embedding."
    places = {f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0." for i in range(12)}
    places |= {"controlnet_mid_block.": "middle_block_out.0.", f"{hint}conv_in.": "input_hint_block.0.",
               f"{hint}conv_out.": "input_hint_block.14."}
    places |= {f"{hint}blocks.{i}.": f"input_hint_block.{2 * i + 2}." for i in range(6)}
    added = {k: v for k, v in state.items() if k.startswith("controlnet_")}
    out = ldm_unet({k: v for k, v in state.items() if k not in added})
    for key, value in added.items():
        place = next(p for p in places if key.startswith(p))
        out[places[place] + key.removeprefix(place)] = value
    return out


def ldm_vae(state: dict, dimensions: int = 4) -> dict:
    places = {f"{side}.mid_block.{theirs}": f"{side}.mid.{name}" for side in ("encoder", "decoder")
              for theirs, name in (("resnets.0", "block_1"), ("resnets.1", "block_2"),
                                   ("attentions.0", "attn_1"))}
    for i in range(4):
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{3 - i}.upsample"
        for j in range(3):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{3 - i}.block.{j}"
    inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
             "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
    out = {}
    for key, value in state.items():
        name = key
        for place, theirs in places.items():
            name = name.replace(place + ".", theirs + ".")
        for modern, old in inner.items():
            name = name.replace(f".{modern}.", f".{old}.")
        if ".attn_1." in name and value.dim() == 2:
            value = value.reshape(*value.shape, *[1] * (dimensions - 2))
        out[name] = value
    return out


def old_vae(state: dict) -> dict:
    """A diffusers VAE as it was saved in 2022."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for modern, old in names.items():
        state = {k.replace(f"attentions.0.{modern}.", f"attentions.0.{old}."): v for k, v in state.items()}
    return state


def under(prefix: str, state: dict) -> dict:
    return {prefix + k: v for k, v in state.items()}


def ldm(states: dict, dimensions: int = 4, flat: bool = False) -> dict:
    text = states["text_encoder"]
    text = {k.removeprefix("text_model.") if flat else k: v for k, v in text.items()}
    return (under("model.diffusion_model.", ldm_unet(states["unet"]))
            | under("first_stage_model.", ldm_vae(states["vae"], dimensions))
            | under("cond_stage_model.transformer.", text))


def extras() -> dict:
    names = ["betas", "sqrt_alphas_cumprod", "posterior_mean_coef2", "logvar"]
    return ({name: torch.rand(1000) for name in names} | {"alphas_cumprod": torch.tensor(alpha_bar())}
            | {"scale_factor": torch.tensor(0.18215), "cond_stage_model.logit_scale": torch.tensor(4.6),
               "first_stage_model.loss.logvar": torch.zeros(1),
               "control_model.input_blocks.0.0.bias": torch.ones(4),
               "first_stage_model.loss.discriminator.main.0.weight": torch.rand(4, 3, 4, 4),
               "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]})


def own(state: dict) -> dict:
    """Copies that share no memory, as safetensors needs them."""
    return {k: v.detach().clone().contiguous() for k, v in state.items()}


def half(state: dict, dtype=torch.float16) -> dict:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def ema_copies(unet: dict) -> dict:
    flat = {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in unet.items()}
    return flat | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}


def openai_names(states) -> dict:
    text = {"token_embedding.weight": torch.rand(9, 8), "positional_embedding": torch.rand(7, 8),
            "transformer.resblocks.0.ln_1.weight": torch.rand(8), "ln_final.bias": torch.rand(8),
            "text_projection": torch.rand(8, 8), "logit_scale": torch.tensor(4.6)}
    return open_clip_names(states["image_encoder"]) | text


def hugging_face_names(states) -> dict:
    vision = {k if k.startswith("visual_") else f"vision_model.{k.removeprefix('vision_model.')}": v
              for k, v in states["image_encoder"].items()}
    return (vision | states["text_encoder"]
            | {"text_projection.weight": torch.rand(24, 32), "logit_scale": torch.tensor(4.6),
               "vision_model.embeddings.position_ids": torch.arange(17)[None],
               "text_model.embeddings.position_ids": torch.arange(77)[None]})


def open_clip_names(state: dict) -> dict:
    """transformers' names of the vision transformer -> open_clip's."""
    state = {k.removeprefix("vision_model."): v for k, v in state.items() if not k.endswith("position_ids")}
    ours = {"class_embedding": state["embeddings.class_embedding"],
            "conv1.weight": state["embeddings.patch_embedding.weight"],
            "positional_embedding": state["embeddings.position_embedding.weight"],
            "proj": state["visual_projection.weight"].T}
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(sum(k.endswith(".layer_norm1.weight") for k in state)):
        block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        names |= {f"{block}.ln_1": f"{layer}.layer_norm1", f"{block}.ln_2": f"{layer}.layer_norm2",
                  f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
                  f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
        for kind in ("weight", "bias"):
            ours[f"{block}.attn.in_proj_{kind}"] = torch.cat(
                [state[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
    ours |= {f"{mine}.{kind}": state[f"{theirs}.{kind}"]
             for mine, theirs in names.items() for kind in ("weight", "bias")}
    return {f"visual.{k}": v for k, v in ours.items()}




# Files. All values are exact in fp16 and bf16, so every layout holds the same model.

def read_states(saved: Path) -> dict[str, dict]:
    """The tensors of a folder that diffusers and transformers wrote; the text encoder's with their prefix."""
    states = {part: load_file(next((saved / part).glob("*.safetensors")))
              for part in (*WEIGHTS, "image_encoder")}
    text = {k.removeprefix("text_model."): v for k, v in states["text_encoder"].items()}
    return {**states, "text_encoder": under("text_model.", text)}


def put(state: dict, file: Path, **options) -> Path:
    """Write a safetensors file or a pickle, by the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        torch.save(state, file, **options)
    return file


def averaged(states: dict) -> dict:
    """A training checkpoint: wrong plain weights beside the averaged ones."""
    copies = ldm_unet(states["unet"])
    plain = under("model.diffusion_model.", {k: v + 1 for k, v in copies.items()})
    return {"state_dict": ldm(states) | plain | ema_copies(copies) | extras(), "global_step": 840000}


def bins(states: dict, folder: Path) -> Path:
    """A diffusers folder of 2022, in half precision."""
    for part in WEIGHTS:
        state = old_vae(states[part]) if part == "vae" else states[part]
        stem = "pytorch_model" if part == "text_encoder" else WEIGHTS[part]
        put(half(state), folder / part / f"{stem}.fp16.bin")
    return folder


BAD_IDS = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None] * 0.999}
# What it is -> its writer: (states, folder) -> the converter's arguments.
LAYOUTS: dict[str, Callable[[dict, Path], list]] = {
    "one file, fp32 `.safetensors`": lambda states, folder: [
        put(ldm(states) | extras(), folder / "model.safetensors")],
    "one file, fp16 `.safetensors`, old CLIP names, broken position_ids": lambda states, folder: [
        put(half(ldm(states, 3, flat=True) | BAD_IDS), folder / "model.safetensors")],
    "one file, bf16 `.safetensors`": lambda states, folder: [
        put(half(ldm(states, 2), torch.bfloat16), folder / "model.safetensors")],
    "one file, fp32 `.ckpt` under `state_dict`, with EMA copies": lambda states, folder: [
        put(averaged(states), folder / "model.ckpt")],
    "one file, fp16 `.ckpt`, bare, in the format before torch 1.6": lambda states, folder: [
        put(half(ldm(states)), folder / "model.ckpt", _use_new_zipfile_serialization=False)],
    "folder, fp16 `.bin`, old VAE names": lambda states, folder: [bins(states, folder / "bins")],
    "parts by flag; CLIP whole, in transformers' layout": lambda states, folder: [
        "--unet", put(ldm_unet(states["unet"]), folder / "unet.safetensors"),
        "--vae", put({"state_dict": ldm_vae(states["vae"])}, folder / "vae.pt"),
        "--text-encoder", put(hugging_face_names(states), folder / "clip.safetensors"),
        "--image-encoder", folder / "clip.safetensors"],
    "one file without VAE, `--vae`, CLIP in OpenAI's layout": lambda states, folder: [
        "--vae", put(old_vae(states["vae"]), folder / "vae.safetensors"), put(
            {k: v for k, v in ldm(states).items() if "first_stage" not in k}, folder / "model.safetensors"),
        "--image-encoder", put(openai_names(states), folder / "clip.safetensors")],
}


# The same for a ControlNet: (its state, the base model's UNet, folder) -> the converter's argument.
CONTROLNET_LAYOUTS: dict[str, Callable[[dict, dict, Path], Path]] = {
    "ControlNet v1.1, fp32 `.pth`": lambda state, unet, folder: put(
        under("control_model.", ldm_controlnet(state)), folder / "control_v11p_sd15_openpose.pth"),
    "ControlNet v1.0, `.pth` with the whole model": lambda state, unet, folder: put(
        {"state_dict": extras() | under("model.diffusion_model.", ldm_unet(unet))
         | under("control_model.", ldm_controlnet(state))}, folder / "control_sd15_openpose.pth"),
    "ControlNet, fp16 `.safetensors`, names without prefix": lambda state, unet, folder: put(
        half(ldm_controlnet(state)), folder / "control.safetensors"),
    "ControlNet, diffusers' `.safetensors`, bf16": lambda state, unet, folder: put(
        half(state, torch.bfloat16), folder / "diffusion_pytorch_model.safetensors"),
    "ControlNet, diffusers' folder, fp16 `.bin`": lambda state, unet, folder: put(
        half(state), folder / "bins" / "diffusion_pytorch_model.fp16.bin").parent,
}
