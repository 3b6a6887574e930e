"""From checkpoints of any layout to the parts of Stable Diffusion 1.5, under clean names and checked.

Whatever is something else is refused, and told what it is.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.load import ALL_PARTS, PARTS, build_config, build_empty, differences
from weights.checkpoints import (FLOATS, REQUIRED, Lazy, Notes, State, WrongKind, WrongTensors, choose,
                                 locate, open_file, read_json)

TAKES = "this project takes Stable Diffusion 1.5 only"
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "image_encoder": "image encoder",
          "controlnet": "ControlNet"}
OWN = "weights folder"


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
    module = build_empty(part.cfg)
    module.load_state_dict({key: read_value(part, key, torch.float32) for key in part.tensors}, assign=True)
    return module.eval().requires_grad_(False)


def check_together(parts: dict[str, Part]) -> None:
    """Raise Refusal if the parts belong to different models."""
    unet, vae, text = (parts[name].cfg for name in REQUIRED)
    for what, given, wanted in (("the text encoder's width", text.dim, unet.context_dim),
                                ("the VAE's latent channels", vae.latent_channels, unet.latent_channels)):
        if given != wanted:
            raise WrongTensors(f"{what} is {given}, the UNet reads {wanted}: they belong to different models")


def read_value(part: Part, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor, cast and checked. Raises Refusal."""
    value = part.tensors[name].read().to(dtype)
    if not value.float().isfinite().all():
        advice = "" if dtype == torch.float32 else ", or needs --dtype fp32"
        raise WrongTensors(f"{part.path}: {name} has values that are not finite (as {dtype}): the file is "
                           f"damaged{advice}")
    return value.contiguous()


# 1. What it is, from names and shapes alone. The first match wins.

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


# 2. From any layout to parts with clean names.

LDM = {"model.diffusion_model.": "unet", "first_stage_model.": "vae",
       "cond_stage_model.transformer.": "text_encoder"}
# Inside a part, but not of it: position_ids, which merges break, leftovers of training, as the counters that
# stand-alone VAEs have, CLIP's other half.
DROPPED = re.compile(r"(.*\.)?position_ids|loss\..*|model_ema\..*|logit_(scale|bias)|"
                     r"text_projection(\.weight)?")


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


# 3. Names. Rules apply in order to the name below its prefix; clean names pass unchanged.

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


# 4. Sizes, from shapes; what shapes cannot tell comes from config.json or is SD1.5's.

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
        expected = build_empty(part.cfg).state_dict()
    except (TypeError, ValueError) as error:
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
        raise WrongTensors(f"{part.path}: its {LABELS[name]} is not Stable Diffusion 1.5's: "
                           f"{wrong}")
    for key, lazy in found.items():
        if lazy.dtype not in FLOATS.values():
            raise WrongTensors(f"{part.path}: {key} is {lazy.dtype}, not floating point")


def strip(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing ones."""
    return strip(shape[:-1]) if shape[-1:] == (1,) else shape
