"""What tensors' names tell: which model a file is of, and what its layers are called here.

Everything that decides by a name is in these tables.
"""
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from weights.checkpoints import WrongKind

TAKES = "this project takes Stable Diffusion 1.5 only"
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "image_encoder": "image encoder",
          "controlnet": "ControlNet"}

# 1. What it is, from names and shapes alone. The first match wins.

# Pattern of a tensor's name -> what a file with such a name is.
ADAPTERS = {
    r"\bdora_scale$|\blora_magnitude_vector\b": "a DoRA",
    r"\bhada_": "a LoHa, a kin of LoRA", r"\blokr_": "a LoKr, a kin of LoRA",
    r"\boft_": "an OFT, a kin of LoRA",
    r"\.[ab][12]\.weight$": "a GLoRA", r"\.on_input$|\bia3_": "an IA3, a kin of LoRA",
    r"\.diff(_b)?$|\.[wb]_norm$": "a full difference, a kin of LoRA",
    r"^lora_te2_|\b(text_encoder_2|clip_g)\..*lora": "an SDXL LoRA",
    r"^(lora_)?transformer[_.].*lora|(double|single|joint)_(transformer_)?blocks.*lora":
        "an SD3 or Flux LoRA",
}
LORA = {r"lora_(unet|te)|lora[_.](down|up|mid)|lora_[AB]\b|_lora\.": "a LoRA, which sample.py --lora reads"}
CONTROLNET = {r"\b(control_model|controlnet_cond_embedding|input_hint_block|zero_convs)\.":
              "a ControlNet, which weights/convert_controlnet.py reads"}
FOREIGN = {
    r"lllite_|lora_controlnet": "a control-LoRA",
    **ADAPTERS, **LORA,
    r"\bip_adapter\.|\bimage_proj\.|_k_ip\b": "an IP-Adapter",
    r"\bstring_to_param|^emb_params|^clip_[lg]$": "a textual inversion",
    r"motion_modules": "an AnimateDiff motion module",
    r"^(adapter\.)?body\.\d": "a T2I-Adapter",
    r"\bjoint_blocks\.|\bpos_embed\.proj\.": "an SD3 checkpoint",
    r"\b(double_blocks|single_transformer_blocks)\.": "a Flux checkpoint",
    r"\bconditioner\.embedders\.|\blabel_emb\.|\badd_embedding\.": "an SDXL checkpoint",
    r"\bcond_stage_model\.model\.": "an SD2 checkpoint",
    r"time_embed(ding)?\.cond_proj\.": "an LCM (latent consistency) checkpoint",
    r"^v_pred$": "a v-prediction checkpoint", r"^ztsnr$": "a checkpoint for zero terminal SNR",
    r"(^|\.|^taesd_)(encoder|decoder)\.(layers\.)?\d+\.(weight|conv\.\d)|^\d+\.(weight|conv\.\d+\.weight)$":
        "a TAESD, a tiny VAE for previews",
    r"\bquantize\.embedding\b": "a VQ autoencoder",
    r"\btime_(stack|mixer|conv_out|res_block)|\btemporal_": "a video model's part",
    r"\bencoder\.block\.\d+\.layer\.|\bword_embeddings\b": "a text encoder that is not CLIP",
}
CHANNELS = {9: "an inpainting", 8: "an instruct-pix2pix", 5: "a depth-to-image", 7: "an upscaler"}
VISION = re.compile(r"\b(visual\.conv1|embeddings\.patch_embedding)\.weight$")
OPEN_CLIP = {1280: "a ViT-H", 1408: "a ViT-g", 1664: "a ViT-bigG"}  # other activations or heads, by width
CONTEXTS = {1024: "an SD2", 2048: "an SDXL", 1280: "an SDXL refiner"}  # width of the text that is read


def refuse_foreign(state: Mapping, path: str | Path, foreign: Mapping[str, str], wanted: str) -> None:
    """Raise WrongKind for everything that is not of Stable Diffusion 1.5.

    state: maps names to things that have a `.shape`. foreign: as FOREIGN. wanted: what to give in its place.
    """
    def refuse(what: str, evidence: str) -> None:
        raise WrongKind(f"{path} is {what} ({evidence}): {TAKES}; give {wanted}")

    for pattern, what in foreign.items():
        for key in filter(re.compile(pattern).search, state):
            refuse(what, f"{key} found")
    if len(state) == 1 and re.fullmatch(r"[^.]+", next(iter(state))):
        refuse("a textual inversion", f"{next(iter(state))} is its only tensor")
    for key, tensor in state.items():
        channels = tensor.shape[1] if len(tensor.shape) > 1 else 0
        if channels in CONTEXTS and re.search(r"attn2[._](processor\.)?to_[kv](_lora)?\.", key):
            kind = "LoRA" if "lora" in key else "checkpoint"
            refuse(f"{CONTEXTS[channels]} {kind}", f"{key} reads {channels} channels, not 768")
        if channels != 4 and re.search(r"\binput_blocks\.0\.0\.weight$|^(unet\.)?conv_in\.weight$", key):
            kind = CHANNELS.get(channels, "an unknown")
            refuse(f"{kind} checkpoint", f"{key} reads {channels} channels, not 4")
        if VISION.search(key) and tensor.shape[0] in OPEN_CLIP:
            refuse(f"{OPEN_CLIP[tensor.shape[0]]} of OpenCLIP", f"{key} is {tensor.shape[0]} wide")
        if channels != 4 and re.search(r"\bdecoder\.conv_in\.weight$", key):
            refuse("the VAE of another model, as SD3's or Flux's", f"{key} reads {channels} channels, not 4")


# 2. Prefixes. What wraps a model while it is trained puts its own name into those of the tensors.

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# Prefix -> the part behind it, in LDM's files and in those that hold a whole pipeline, ComfyUI's last.
PREFIXES = {"model.diffusion_model.": "unet", "first_stage_model.": "vae",
            "cond_stage_model.transformer.": "text_encoder",
            "unet.": "unet", "vae.": "vae", "text_encoder.": "text_encoder",
            "diffusion_model.": "unet", "text_encoders.clip_l.transformer.": "text_encoder"}
# First parts of names that belong to a model; any other that all names of a file share is a wrapper's.
FIRST = re.compile(r"(model\.diffusion_model|model_ema|(first|cond)_stage_model|control_model|unet|vae|"
                   r"text_encoder|text_model|vision_model|visual\w*|embeddings|encoder|decoder|\w+_blocks?|"
                   r"(conv|time|post|quant|mid|final|pre)_\w+|out|input_hint_block|zero_convs)\.")


def unwrap(names: Collection[str]) -> dict[str, str]:
    """Names as a file has them -> those without what wrappers have put there."""
    found = {name: WRAPPERS.sub("", name) for name in names}
    while True:
        firsts = {name.partition(".")[0] for name in found.values()}
        if len(firsts) != 1 or any("." not in name or FIRST.match(name) for name in found.values()):
            return found
        found = {name: short.partition(".")[2] for name, short in found.items()}


# Inside a part, but not of it: position_ids, which merges break, leftovers of training, as the counters that
# stand-alone VAEs have, CLIP's other half.
DROPPED = re.compile(r"(.*\.)?position_ids|loss\..*|model_ema\..*|logit_(scale|bias)|"
                     r"text_projection(\.weight)?")
OWNERS = {
    "image_encoder": r"(vision_model|visual|visual_projection)\.",
    "text_encoder": r"(text_model\.)?(embeddings\.(token|position)_embedding|"
                    r"encoder\.layers\.\d+\.(self_attn|mlp|layer_norm\d)|final_layer_norm)\.",
}


def owner(name: str, names: Collection[str]) -> str | None:
    """The part that a tensor of a file without LDM's prefixes belongs to; None if no part needs it."""
    if {"conv_in.weight", "input_blocks.0.0.weight"} & names:
        return "unet"
    if {"decoder.conv_in.weight", "encoder.conv_in.weight"} & names:
        return "vae"
    if "embeddings.class_embedding" in names:
        return "image_encoder"
    return next((part for part, pattern in OWNERS.items() if re.match(pattern, name)), None)


# 3. Names of layers. Rules apply in order to the name below its prefix; clean names pass unchanged.

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
    """A tensor's name in this project, from any that others give it."""
    for pattern, replacement in RULES[part]:
        name = re.sub(pattern, replacement, name)
    return name
