"""Read a ControlNet of Stable Diffusion 1.5 in any of its usual layouts."""
from pathlib import Path

from models.controlnet import ControlNet
from models.load import build_config
from weights.checkpoints import Notes, State, WrongKind, locate, open_file, read_json
from weights.names import FOREIGN, TAKES, refuse_foreign, rename, unwrap
from weights.parts import Part, build, not_taken, open_folder

PART, PREFIX = "controlnet", "control_model."
WANTED = "a ControlNet of Stable Diffusion 1.5"


def open_controlnet(source: str, notes: Notes) -> Part:
    """The ControlNet of a file, folder or repository. Raises WeightsError."""
    path = locate(source)
    folder = path if path.is_dir() else path.parent
    config, own = read_json(folder / "config.json"), folder / f"{PART}.safetensors"
    if PART in config and own in (path, path / own.name):
        return Part(open_file(own, notes), path, config, build_config(config, PART))
    if path.is_file():
        of_file = config if config.get("_class_name") == "ControlNetModel" else {}
        return find_controlnet(open_file(path, notes), path, of_file, notes)
    if config.get("_class_name") not in (None, "ControlNetModel"):
        raise WrongKind(f"{path} is no ControlNet of this project's kind (config.json says "
                        f"{config['_class_name']}): {TAKES}; give {WANTED}")
    state = open_folder(path, notes)
    if not state:
        raise WrongKind(f"{path} is no folder of a ControlNet: it has no {own.name} with its config.json and "
                        f"no diffusion_pytorch_model.safetensors or .bin{not_taken(path)}")
    return find_controlnet(state, path, config, notes)


def find_controlnet(state: State, path: Path, settings: dict, notes: Notes) -> Part:
    """Take the ControlNet's tensors and rename them. Raises Refusal."""
    if "difference" in state or path.name.startswith("diff_"):
        raise WrongKind(f"{path} is only the difference between a ControlNet and its base model: give the "
                        "whole ControlNet")
    inside = any(PREFIX in key for key in state)
    found = {key: tensor for key, tensor in state.items() if PREFIX in key or not inside}
    notes.dropped.update(key.split(".")[0] for key in state.keys() - found.keys())
    refuse_foreign(found, path, FOREIGN, WANTED)
    found = {short: found[name] for name, short in unwrap(found).items()}
    names = {key: rename(PART, key.removeprefix(PREFIX)) for key in found}
    if not any(name.startswith("controlnet_cond_embedding.") for name in names.values()):
        raise WrongKind(f"{path} is no ControlNet (it has neither input_hint_block nor "
                        f"controlnet_cond_embedding, its first names are {', '.join(list(state)[:3])}): give "
                        f"{WANTED}")
    # Nothing inside the file tells: its name, its folder's, or that of a repository in Hugging Face's cache.
    *folders, folder, file = path.absolute().parts
    called = " ".join([file, folder, *(name for name in folders if name.startswith("models--"))])
    settings = {"global_pool_conditions": "shuffle" in called.lower(), **settings}
    part = Part({}, path, settings)
    for key, tensor in found.items():
        part.add(names[key], key, tensor)
    return part


def load_controlnet(source: str) -> ControlNet:
    """The ControlNet of anything that can be converted, for inference in float32.

    Raises WeightsError.
    """
    return build(PART, open_controlnet(source, Notes()))
