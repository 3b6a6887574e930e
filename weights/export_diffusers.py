"""Write a weights folder in diffusers' layout, so that others can load it and check this project.

    python weights/export_diffusers.py weights/toyworld --output toyworld-diffusers

    StableDiffusionPipeline.from_pretrained("toyworld-diffusers")   # with diffusers: the base model

Image encoder and MoA have no place in that layout and stay behind. A small world's text encoder knows a
few words: their embeddings go to their places in CLIP's whole table, all other rows are zero. This project
leaves unknown words out of a prompt, diffusers reads them as zeros: compare prompts of known words.

Exit codes: 1 cannot read or write, 2 no weights folder or a bad --output, 3 wrong or missing tensors.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own folder there
# First: it says what is not installed.
from models.errors import Parser

import torch
from torch import Tensor

from models.clip_text import BOS, EOS
from models.load import whole_folder, write_json
from models.open_clip_import import open_clip
from models.unet import RESNET_EPS
from models.vae import LATENT_SCALE
from samplers.schedule import BETA_FIRST, BETA_LAST, NUM_TIMESTEPS
from weights.checkpoints import REQUIRED, Lazy, Notes, WrongKind, WrongTensors, read_json
from weights.convert_sd15 import run
from weights.names import LABELS
from weights.parts import FIELDS, Part, check_together, fit, open_source, write_parts

FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
           "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
           "scheduler": ("diffusers", "UniPCMultistepScheduler")}
# Parts that the pipeline may have and this folder has not.
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")
TABLE = "text_model.embeddings.token_embedding.weight"
# `sample_unipc` with its defaults; diffusers would take its spacing from here.
SCHEDULER = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_FIRST, "beta_end": BETA_LAST,
             "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "timestep_spacing": "linspace",
             "steps_offset": 1, "solver_order": 2, "solver_type": "bh2", "predict_x0": True,
             "lower_order_final": True, "final_sigmas_type": "zero", "thresholding": False}
START, END = "<|startoftext|>", "<|endoftext|>"


def export(folder: Path, output: Path) -> None:
    """Write `folder` to `output`. Raises Refusal, WeightsError and OSError."""
    parts, size = open_weights(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WrongKind(f"--output {output} exists already: give a new folder, or delete it")
    configs = {name: describe(name, part.cfg, size // parts["vae"].cfg.factor)
               for name, part in parts.items()}
    fill_table(parts["text_encoder"])
    with whole_folder(output) as new:
        for name in CLASSES:
            (new / name).mkdir()
        write_parts(parts, {name: new / name / f"{FILES[name]}.safetensors" for name in parts}, None)
        for name, config in configs.items():
            write_json(config, new / name / "config.json")
        write_json({"_class_name": CLASSES["scheduler"][1], **SCHEDULER},
                   new / "scheduler" / "scheduler_config.json")
        write_tokenizer(new / "tokenizer", parts["text_encoder"].cfg.length)
        write_json({"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
                    **dict.fromkeys(ABSENT, (None, None)), **CLASSES}, new / "model_index.json")
    print(f"written to {output}")


def open_weights(folder: Path) -> tuple[dict[str, Part], int]:
    """The three models of a weights folder, compared with its sizes, and its picture size."""
    config = read_json(folder / "config.json")
    if "unet" not in config:
        raise WrongKind(f"{folder} is no weights folder (it has no config.json with sizes): make one with "
                        "weights/convert_sd15.py")
    found = open_source(str(folder), "off", Notes())
    if missing := [name for name in REQUIRED if name not in found]:
        raise WrongTensors(f"{folder} has no {' and no '.join(LABELS[name] for name in missing)}")
    size = config.get("image_size")
    if not isinstance(size, int) or size < 1:
        raise WrongTensors(f"{folder}: config.json says image_size {size!r}, which is no number of pixels")
    parts = {name: found[name] for name in REQUIRED}
    for name, part in parts.items():
        fit(name, part, Notes())
    check_together(parts)
    return parts, size


def describe(name: str, cfg, cells: int) -> dict:
    """config.json of one model, by its sizes; `cells` is the side of the usual latent."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS[name].items()}
    if name == "text_encoder":
        return {"architectures": [CLASSES[name][1]], "model_type": "clip_text_model", **sizes,
                "intermediate_size": 4 * cfg.dim, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
                "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS,
                # As diffusers loads its two; transformers alone would take the file's.
                "torch_dtype": "float32"}
    levels = len(cfg.channels)
    if name == "vae":
        return {"_class_name": CLASSES[name][1], **sizes, "in_channels": 3, "out_channels": 3,
                "down_block_types": ["DownEncoderBlock2D"] * levels, "act_fn": "silu",
                "up_block_types": ["UpDecoderBlock2D"] * levels, "scaling_factor": LATENT_SCALE,
                "sample_size": cells * cfg.factor}
    attending = levels - 1
    return {"_class_name": CLASSES[name][1], **sizes, "out_channels": cfg.latent_channels,
            "down_block_types": ["CrossAttnDownBlock2D"] * attending + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attending, "sample_size": cells,
            "act_fn": "silu", "norm_eps": RESNET_EPS, "downsample_padding": 1, "mid_block_scale_factor": 1,
            "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0}


def fill_table(part: Part) -> None:
    """Give the text encoder a row for every token; those that it does not know are zero. Raises Refusal."""
    cfg, kept = part.cfg, part.tensors[TABLE]
    if not cfg.kept_tokens:
        return
    if cfg.vocabulary != EOS + 1:
        raise WrongTensors(f"{part.path}: config.json says vocabulary {cfg.vocabulary}, CLIP's has {EOS + 1}")

    def read() -> Tensor:
        table = torch.zeros(cfg.vocabulary, cfg.dim, dtype=kept.dtype)
        table[list(cfg.kept_tokens)] = kept.read()
        return table
    part.tensors[TABLE] = Lazy((cfg.vocabulary, cfg.dim), kept.dtype, read)
    part.cfg = replace(cfg, kept_tokens=(), words=())


def write_tokenizer(folder: Path, length: int) -> None:
    """CLIP's byte-pair encoding, from open_clip's vocabulary, in the files that transformers reads."""
    bpe = open_clip().tokenizer.SimpleTokenizer()
    vocabulary = {token: i for token, i in bpe.encoder.items() if i < BOS} | {START: BOS, END: EOS}
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.get)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
                                       encoding="utf-8")
    write_json(special, folder / "special_tokens_map.json")
    write_json({"tokenizer_class": CLASSES["tokenizer"][1], "model_max_length": length, "do_lower_case": True,
                "errors": "replace", **special}, folder / "tokenizer_config.json")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a weights folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    args = parser.parse_args(argv)
    run(lambda: export(args.folder, args.output))


if __name__ == "__main__":
    main()
