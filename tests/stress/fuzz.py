"""Feed broken files to everything that reads a stranger's bytes.

    python tests/stress/fuzz.py --cases 10000
    python tests/stress/fuzz.py --family LoRA --case 4711

Each case takes a valid input and breaks it: bytes, fields of a header or of JSON, names, shapes and values
of tensors, operations of a pickle, entries of an archive. What reads it may take it or refuse it with the
error that its command turns into one line on stderr. Everything else is a failure: another error, no
message, more than 10 seconds of a processor, more than 3 GB, a process that dies. A case is a function of
--seed, its family and its number; --case repeats one and shows its traceback.

Exit status: 0 no failures, 1 some.
"""
import argparse
import copy
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import sample
from apps import story
from data import build
from data.fastcomposer import DataError, read_ids, read_sample
from data.shards import ShardError, Shards, build_shards
from moa import load_moa
from models import WeightsError, load, load_models
from models.clip_text import open_clip
from models.controlnet import ControlNet
from models.load import ALL_PARTS, load_part, read_config, read_tensors, save_part
from weights.lora import LoRASetting
from images import read_picture, read_settings, save_png
from pipeline import Pipeline
from subjects import bind_rows, bind_subjects, read_masks
from training.checkpoints import Run
from tests.conftest import save_world
from tests.layouts import ldm, ldm_controlnet, ldm_vae, under
from tests.test_build import add_picture
from tests.test_data import write_folder
from tests.test_train import SMALL
from weights import convert_sd15, parts
from weights.checkpoints import Notes
from weights.controlnet import load_controlnet
from weights.parts import check_together, fit, open_part, read_value

SECONDS, BYTES = 10, 3 << 30  # that one case may take
Read = Callable[[], object]
Case = Callable[[random.Random], Read]  # writes a broken input and returns what reads it
FAMILIES: dict[str, tuple[Callable[[Path], Case], tuple]] = {}


def family(name: str, *errors: type[Exception]):
    """Name a function that writes valid inputs into a folder and returns the cases made of them."""
    def register(make: Callable[[Path], Case]) -> Callable[[Path], Case]:
        FAMILIES[name] = make, errors
        return make
    return register


# Breaking things ---------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 7, 127, 255, 65535, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63 - 1, 2 ** 63,
           2 ** 64 - 1)
NASTY = (None, True, False, 0, -1, 1, 3, 77, 2 ** 31, 2 ** 63, 10 ** 12, 10 ** 30, 0.5, 1e308, float("nan"),
         float("inf"), "", " ", "0", "a" * 100_000, "\0", "\ud800", "é中🙂", "../../etc/passwd",
         "/etc/passwd", "%s%n{}", [], [[]], {},
         {"": None}, [0] * 5000, [-1, 10 ** 12], ["x"] * 3, {"a": {"b": {"c": []}}})


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Up to four changes anywhere, or cut short."""
    data = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(max(1, min(len(data), rng.choice((16, 200, len(data) or 1)))))
        kind, length = rng.randrange(7), rng.choice((1, 2, 4, 8, 64))
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place:place + length] = rng.randbytes(length)
        elif kind == 2:
            size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(NUMBERS) % (1 << 8 * size)
            data[place:place + size] = number.to_bytes(size, order)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place:place + length]
        elif kind == 5:
            data[place:place] = rng.randbytes(length)
        else:
            data[place:place] = data[place:place + 64] * rng.choice((1, 2, 100))
    return bytes(data)


def nodes(value, path: tuple = ()) -> list[tuple]:
    """Where something is in nested lists and objects."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in nodes(part, (*path, key)))]


def spoil_values(value, rng: random.Random):
    """Up to three changes anywhere in nested lists and objects."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(0, 3)):
        path = rng.choice(nodes(value))
        if not path:
            if rng.random() < 0.1:
                return rng.choice(NASTY)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind, old = rng.randrange(6), parent[path[-1]]
        if kind < 3:
            parent[path[-1]] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3:
            del parent[path[-1]]
        elif kind == 4 and isinstance(parent, dict):
            name = str(rng.choice(("", "x", "a.b", f"{path[-1]}x", "é", path[-1] * 2)))
            parent[name] = parent.pop(path[-1])
        elif isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[path[-1]] = rng.choice((-old, old * 10 ** 6, old + 1, float(old), str(old)))
        else:
            parent[path[-1]] = [old] * rng.choice((1, 2, 300))
    return value


def spoil_json(value, rng: random.Random) -> bytes:
    """A broken JSON text: mostly of the values, sometimes of the text."""
    text = json.dumps(spoil_values(value, rng)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.02:
        text = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000, b"\xff\xfe", b""))
    return spoil_bytes(text, rng) if rng.random() < 0.3 else text


def spoil_tensors(state: dict, rng: random.Random) -> dict:
    """Up to three tensors under other names, of other shapes, types and values, or gone."""
    state = dict(state)
    for _ in range(rng.randint(0, 3)):
        key = rng.choice(list(state))
        value, kind = state[key], rng.randrange(9)
        if kind == 0:
            del state[key]
        elif kind == 1:
            state[rng.choice(("", "x", f"{key}.x", key[:-3], key.replace(".", "_"), "a" * 5000, "lora_A", "é",
                              key.replace("0", "99999999999")))] = state.pop(key)
        elif kind == 2:
            state[rng.choice((f"{key}.alpha", "alpha", key.upper(), "model_ema.x"))] = value
        elif kind == 3:
            shape = rng.choice(((), (0,), (1,), (1, 1), (2, 0, 3), (*value.shape, 1), (1, *value.shape),
                                tuple(value.shape)[::-1], (3, 3, 3, 3), (1,) * 20))
            state[key] = torch.ones(shape)
        elif kind == 4:
            dtype = rng.choice((torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16,
                                torch.float8_e4m3fn, torch.complex64, torch.int16))
            state[key] = value.to(dtype)
        elif kind == 5 and value.numel():
            state[key] = value.clone().float()
            state[key].view(-1)[rng.randrange(value.numel())] = rng.choice((float("nan"), float("inf"), 3e38))
        elif kind == 6:
            state[key] = value[:len(value) // 2].clone() if value.dim() else value
        else:
            state[key] = torch.full((), rng.choice((0.0, -1.0, 1e30, float("nan"))))
        if not state:
            break
    return {key: value.clone().contiguous() for key, value in state.items()}


def spoil_safetensors(state: dict, rng: random.Random, metadata: dict | None = None) -> bytes:
    """A broken safetensors file: of its bytes, its header, or its tensors."""
    kind = rng.randrange(4)
    if kind == 0:
        return save(spoil_tensors(state, rng), metadata)
    data = save(state, metadata)
    if kind == 1:
        return spoil_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    keys = rng.sample(list(header), min(4, len(header)))
    spoiled = spoil_values({key: header[key] for key in keys}, rng) if kind == 2 else {}
    header |= spoiled if isinstance(spoiled, dict) else {}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind == 3:
        text = spoil_bytes(text, rng)
    length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2 ** 64
    return length.to_bytes(8, "little") + text + data[8 + size:]


PICKLES = (
    b"\x80\x02cos\nsystem\n(X\x06\0\0\0exit 1tR.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
    b"\x80\x02}.",
    b"\x80\x02" + b"(" * 100_000 + b".", b"\x80\x02" + b"]" * 10 + b"a" * 9 + b".", b"\x80\x02N.",
    b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 40) + b"x.",
    b"\x80\x02X" + struct.pack("<I", 2 ** 31 - 1) + b"x.",
    b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", b"\x80\x02]q\0h\0a.", b"\x80\x02}q\0X\1\0\0\0ah\0s.",
    b"\x80\x02" + b"]" + b"h\0q\0" * 3 + b".", b"\x80\x04N\x94" * 20_000 + b".",
    b"\x80\x02" + b"N\x85" * 50_000 + b".",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(tR.", b"\x80\x02ctorch\nFloatStorage\n)R.",
    b"\x80\x02ctorch\nload\nX\1\0\0\0x\x85R.", b"\x80\x02cnumpy\ndtype\nX\2\0\0\0O8\x85R.",
    b"\x80\x02ccollections\nOrderedDict\n)R(X\1\0\0\0aNu.")


def spoil_pickle(value, rng: random.Random) -> bytes:
    """A broken file of torch.save: of its bytes, of the pickle inside, or one that never was a tensor's."""
    if rng.random() < 0.05:
        inside = rng.choice(PICKLES)
        if rng.random() < 0.5:
            return spoil_bytes(inside, rng) if rng.random() < 0.5 else inside
    else:
        inside = None
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=rng.random() < 0.75)
    data = file.getvalue()
    if not data.startswith(b"PK") or (inside is None and rng.random() < 0.3):
        return spoil_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice([name for name in entries if name.endswith("data.pkl")] * 20 + list(entries))
    entries[name] = inside or spoil_bytes(entries[name], rng)
    if rng.random() < 0.05:
        entries[rng.choice(list(entries))] = bytes(3 * 10 ** 8 if rng.random() < 0.01 else 1000)
    if rng.random() < 0.1:
        del entries[rng.choice(list(entries))]
    if rng.random() < 0.05:
        entries[rng.choice(("../x", "/x", " ", "archive/data/../../x"))] = b"x"
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return spoil_bytes(file.getvalue(), rng) if rng.random() < 0.05 else file.getvalue()


@cache
def shared() -> tempfile.TemporaryDirectory:
    """A small world, which is made once for all processes."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    save_world(Path(folder.name) / "world")
    return folder


def copy_world(folder: Path) -> Path:
    return Path(shutil.copytree(Path(shared().name) / "world", folder))


def put(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


# Weights -----------------------------------------------------------------------------------------

COMMAND = (ValueError, OSError)  # what `sample.execute` turns into one line


@family("weights: a part's safetensors", WeightsError)
def weights_files(folder: Path) -> Case:
    copy_world(folder / "world")
    state = load_file(folder / "world" / "vae.safetensors")

    def case(rng: random.Random) -> Read:
        put(folder / "world" / "vae.safetensors", spoil_safetensors(state, rng))
        return partial(load_part, folder / "world", "vae")
    return case


@family("weights: config.json", WeightsError, *COMMAND)
def configs(folder: Path) -> Case:
    copy_world(folder / "world")
    config = read_config(folder / "world")
    # A part is loaded once for each of its sizes: the others' are as in an earlier case.
    load.load_part = kept(load.load_part, lambda world, part, *_: (part, repr(read_config(world).get(part))))

    def read(world: Path) -> None:
        models = load_models(world)
        args = sample.parse_args(["--prompt", "a man"])
        sample.fill_in(args, models.config)
        models.tokenize(["a man"])
        Pipeline(models).noise([0], (args.height, args.width))

    def case(rng: random.Random) -> Read:
        spoiled = config
        if rng.random() < 0.7:  # a part's sizes, which are few among all values
            part = rng.choice(list(SMALL))
            text = json.dumps({**config, part: spoil_values(config.get(part, {}), rng)}, default=str).encode(
                "utf-8", "surrogatepass")
        else:
            text = spoil_json(spoiled, rng)
        put(folder / "world" / "config.json", text)
        return partial(read, folder / "world")
    return case


@family("MoA files", ValueError)
def moa_files(folder: Path) -> Case:
    world = copy_world(folder / "world")
    state, unet = load_file(world / "moa.safetensors"), load_part(world, "unet")
    load_moa(unet, world / "moa.safetensors")
    from moa import read_moa
    config = read_moa(world / "moa.safetensors")[0]

    def case(rng: random.Random) -> Read:
        text = spoil_json(config, rng) if rng.random() < 0.5 else json.dumps(config).encode()
        data = {"moa": text.decode("utf-8", "replace")}
        path = put(folder / "moa.safetensors", spoil_safetensors(state, rng, data)
                   if rng.random() < 0.6 else save(state, data))
        return partial(load_moa, unet, path)
    return case


@family("checkpoints of --resume", WeightsError, ValueError)
def checkpoints(folder: Path) -> Case:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    trained = dict(module.named_parameters())
    averages = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), fused=True)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    fresh = copy.deepcopy(optimizer.state_dict())
    run = {"stage": "vae", "seed": 0}
    (folder / "checkpoints").mkdir(exist_ok=True)
    state = {"run": run, "step": 3, "parameters": {k: p.detach() for k, p in trained.items()},
             "average": averages, "optimizer": fresh, "moa": None}

    def read(path: Path) -> None:
        again = torch.optim.AdamW(trained.values(), fused=True)
        Run.resume(SimpleNamespace(output=path.parents[1], identity=run, trained=trained, averages=averages,
                                   optimizer=again))
        module.zero_grad()
        module(torch.ones(1, 3)).sum().backward()
        again.step()

    def case(rng: random.Random) -> Read:
        value, kind = copy.deepcopy(state), rng.randrange(4)
        if kind == 0:
            value = spoil_values(value, rng)
        elif kind == 1:
            value["optimizer"] = spoil_values(fresh, rng)
        elif kind == 2:
            part = rng.choice(("parameters", "average"))
            value[part] = spoil_tensors(value[part], rng)
        if kind < 3:
            torch.save(value, folder / "checkpoints" / "000003.pt")
        else:
            put(folder / "checkpoints" / "000003.pt", spoil_pickle(value, rng))
        return partial(read, folder / "checkpoints" / "000003.pt")
    return case


# Converting --------------------------------------------------------------------------------------

CONVERTING = (WeightsError, OSError, MemoryError, SafetensorError)  # what `run` there expects


def read_vae(path: Path) -> None:
    parts.build("vae", open_part(str(path), "vae", "off", Notes()))


@cache
def plain_states() -> dict[str, dict]:
    """The tensors of models whose sizes the shapes tell, as those of Stable Diffusion 1.5 do."""
    sizes = {"unet": {"channels": (32,) * 4, "context_dim": 64}, "vae": {"channels": (32,) * 4},
             "controlnet": {"channels": (32,) * 4, "context_dim": 64, "hint_channels": (4, 4, 8, 8)},
             "text_encoder": {"dim": 64, "layers": 1, "heads": 1, "vocabulary": 60}}
    return {part: ALL_PARTS[part][0](ALL_PARTS[part][1](**more)).half().state_dict()
            for part, more in sizes.items()}


@family("convert: pickles", *CONVERTING)
def pickles(folder: Path) -> Case:
    state = ldm_vae(plain_states()["vae"])

    def case(rng: random.Random) -> Read:
        chosen = spoil_tensors(state, rng) if rng.random() < 0.2 else state
        value = rng.choice((chosen, {"state_dict": chosen, "callbacks": {"x": np.float64(1)}, "epoch": 3}))
        return partial(read_vae, put(folder / "vae.ckpt", spoil_pickle(value, rng)))
    return case


@family("convert: safetensors", *CONVERTING)
def ldm_files(folder: Path) -> Case:
    state = ldm_vae(plain_states()["vae"])

    def case(rng: random.Random) -> Read:
        return partial(read_vae, put(folder / "vae.safetensors", spoil_safetensors(state, rng)))
    return case


@family("convert: names and shapes of a whole model", *CONVERTING)
def whole_models(folder: Path) -> Case:
    state = ldm(plain_states())

    def read(source: Path, ema: str) -> None:
        """All that `convert` does before it writes."""
        notes = Notes()
        args = convert_sd15.parse_args([str(source), "--output", str(folder / "out"), "--ema", ema])
        parts, base = convert_sd15.gather(args, notes)
        for name, part in parts.items():
            fit(name, part, notes)
        check_together(parts)
        convert_sd15.describe(args, parts, base, notes)
        for part in parts.values():
            for key in list(part.tensors)[::50]:
                read_value(part, key, torch.float32)

    def case(rng: random.Random) -> Read:
        source = put(folder / "model.safetensors", save(spoil_tensors(state, rng)))
        return partial(read, source, rng.choice(("auto", "on", "off")))
    return case


@family("convert: JSON of a diffusers folder", *CONVERTING)
def diffusers_folders(folder: Path) -> Case:
    vae = read_tensors(copy_world(folder / "world") / "vae.safetensors")
    (folder / "model" / "vae").mkdir(parents=True)
    put(folder / "model" / "vae" / "diffusion_pytorch_model.safetensors", save(vae))
    files = {"model_index.json": {"_class_name": "StableDiffusionPipeline"},
             "vae/config.json": {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8],
                                 "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.18215},
             "config.json": {}}

    def case(rng: random.Random) -> Read:
        for name, value in files.items():
            put(folder / "model" / name, spoil_json(value, rng) if rng.random() < 0.6 else
                json.dumps(value).encode())
        return partial(read_vae, folder / "model")
    return case


@family("ControlNets", *CONVERTING)
def controlnets(folder: Path) -> Case:
    state = plain_states()["controlnet"]
    theirs = under("control_model.", ldm_controlnet(state))
    save_part(ControlNet(SMALL["controlnet"]), folder / "own", "controlnet")
    config = read_config(folder / "own")

    def case(rng: random.Random) -> Read:
        kind = rng.randrange(4)
        if kind == 0:
            put(folder / "own" / "config.json", spoil_json(config, rng))
            return partial(load_controlnet, str(folder / "own"))
        if kind == 1:
            return partial(load_controlnet, str(put(folder / "x.pth", spoil_pickle(theirs, rng))))
        chosen = rng.choice((state, theirs))
        return partial(load_controlnet, str(put(folder / "x.safetensors", spoil_safetensors(chosen, rng))))
    return case


@family("LoRA", WeightsError)
def loras(folder: Path) -> Case:
    from tests.test_lora import diffusers, kohya, make_lora, peft, peft_metadata
    pipeline = Pipeline(load_models(copy_world(folder / "world")))
    pipeline.set_loras([])
    low = make_lora(pipeline.merged.layers)
    forms = [(kohya(low), None), (diffusers(low), None), (peft(low), peft_metadata(low))]
    settings = [json.loads(metadata["lora_adapter_metadata"]) if metadata else None for _, metadata in forms]

    def case(rng: random.Random) -> Read:
        number = rng.randrange(len(forms))
        state, metadata = forms[number]
        keys = rng.sample(list(state), 40)  # a whole one takes long
        chosen = {key.rpartition(".lora")[0] for key in keys}
        partners = [key for key in state if key.rpartition(".lora")[0] in chosen]
        state = {key: state[key] for key in partners or keys}
        if settings[number] and rng.random() < 0.5:
            text = spoil_json(settings[number], rng).decode("utf-8", "replace")
            metadata = {"lora_adapter_metadata": text}
        data = save(state, metadata) if rng.random() < 0.2 else spoil_safetensors(state, rng, metadata)
        path = put(folder / "style.safetensors", data)
        scope = rng.choice(("attn", "all"))
        return lambda: pipeline.set_loras([LoRASetting(path, rng.choice((1.0, -100.0)))], scope)
    return case


# Pictures ----------------------------------------------------------------------------------------

def picture_files() -> dict[str, bytes]:
    """A small picture in every format that is read."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8))
    modes = {"RGB": ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "PPM"), "P": ("GIF", "PNG", "BMP", "TIFF"),
             "RGBA": ("PNG", "WEBP", "TIFF"), "L": ("PNG", "JPEG", "PPM", "TIFF"),
             "1": ("PNG", "TIFF", "PPM"),
             "I;16": ("PNG", "TIFF"), "CMYK": ("JPEG", "TIFF"), "F": ("TIFF",)}
    files = {}
    for mode, formats in modes.items():
        for kind in formats:
            for more in ({}, {"compression": "tiff_lzw"}) if kind == "TIFF" else ({},):
                file = io.BytesIO()
                deep = Image.fromarray(np.uint16(image.convert("L")) * 200)
                made = deep if mode == "I;16" else image.convert(mode)
                exif = Image.Exif()
                exif[0x112] = 6
                made.save(file, kind, **more, **({"exif": exif} if kind in ("JPEG", "WEBP") else {}))
                files[f"{kind} {mode} {more}"] = file.getvalue()
    return files


@family("pictures", ValueError)
def pictures(folder: Path) -> Case:
    files = list(picture_files().values())

    def case(rng: random.Random) -> Read:
        return partial(read_picture, put(folder / "x.png", spoil_bytes(rng.choice(files), rng)))
    return case


@family("masks", ValueError)
def masks(folder: Path) -> Case:
    files = [data for name, data in picture_files().items() if name.split()[1] in ("P", "L", "1")]
    picture = torch.zeros(3, 40, 48)

    def case(rng: random.Random) -> Read:
        return partial(read_masks, put(folder / "x.png", spoil_bytes(rng.choice(files), rng)), picture)
    return case


@family("metadata of PNGs")
def metadata(folder: Path) -> Case:
    settings = {"prompt": "a man", "negative_prompt": "", "seed": 1, "steps": 3, "sampler": "unipc",
                "guidance_scale": 5.0, "clip_skip": 1, "width": 64, "height": 64, "weights": "toyworld",
                "vae": None, "loras": [], "controls": []}
    save_png(Image.new("RGB", (64, 64)), folder / "x.png", settings)
    data = (folder / "x.png").read_bytes()

    def case(rng: random.Random) -> Read:
        if rng.random() < 0.5:
            return partial(read_settings, put(folder / "x.png", spoil_bytes(data, rng)))
        from PIL.PngImagePlugin import PngInfo
        info = PngInfo()
        info.add_text("moa", spoil_json(settings, rng).decode("latin1"), zip=rng.random() < 0.5)
        Image.new("RGB", (16, 16)).save(folder / "y.png", pnginfo=info)
        return partial(read_settings, folder / "y.png")
    return case


# Data --------------------------------------------------------------------------------------------

@family("dataset: a sample's three files", DataError)
def samples(folder: Path) -> Case:
    stem = write_folder(folder, 1)[0]
    files = {suffix: stem.with_suffix(suffix).read_bytes() for suffix in (".jpg", ".npy", ".json")}
    record = json.loads(files[".json"])

    def case(rng: random.Random) -> Read:
        chosen = rng.choice((".jpg", ".npy", ".json", ".json"))
        for suffix, data in files.items():
            if suffix == chosen:
                data = spoil_json(record, rng) if suffix == ".json" else spoil_bytes(data, rng)
            put(stem.with_suffix(suffix), data)
        return partial(read_sample, folder, stem.name, 40, augmented=rng.random() < 0.5)
    return case


@family("dataset: lists of ids", DataError)
def lists(folder: Path) -> Case:
    write_folder(folder, 3)
    text = (folder / "image_ids_train.txt").read_bytes()
    odd = (b"../../etc/passwd", b"..", b"/etc/passwd", b"1" * 300, "٣".encode(), b"\0",
           b"000000012\n" * 3, b"-1", b"0" * 9, b"00000", b"\xff", b"1.5")

    def read() -> None:
        failures = []
        for image_id in read_ids(folder, "train"):
            try:
                read_sample(folder, image_id, 40)
            except DataError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def case(rng: random.Random) -> Read:
        data = spoil_bytes(text, rng) if rng.random() < 0.6 else text + b"\n" + rng.choice(odd)
        put(folder / "image_ids_train.txt", data)
        return read
    return case


@family("dataset: what is built into one", DataError)
def built(folder: Path) -> Case:
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    add_picture(folder / "in", "pair")
    files = {path: path.read_bytes() for path in (folder / "in").iterdir()}
    files[folder / "in" / "pair_people.txt"] = b"Ada\nBob\n"

    def read() -> None:
        made = build.convert((0, folder / "in" / "pair.jpg"), folder / "out", build.NOUNS)
        if isinstance(made, list):
            raise DataError("; ".join(made))

    def case(rng: random.Random) -> Read:
        chosen = rng.choice(list(files))
        for path, data in files.items():
            put(path, spoil_bytes(data, rng) if path == chosen else data)
        return read
    return case


@family("the encoded cache", ShardError)
def shards(folder: Path) -> Case:
    rows = {"latents": torch.rand(6, 4, 2, 2), "positions": torch.zeros(6, 2, dtype=torch.int64)}
    build_shards(folder / "cache", 6, lambda numbers: [{k: v[list(numbers)] for k, v in rows.items()}], [0])
    file, = (folder / "cache").glob("*.safetensors")

    def read() -> None:
        Shards(folder / "cache", 6).rows([0, 3, 5])

    def case(rng: random.Random) -> Read:
        put(file, spoil_safetensors(rows, rng))
        return read
    return case


# Texts and flags ---------------------------------------------------------------------------------

@family("files of prompts", *COMMAND)
def prompts(folder: Path) -> Case:
    lines = [{"prompt": "a woman and a man shaking hands", "subjects": ["woman=a.png,b.png", "2=b.png"],
              "seed": 7}, {"prompt": "a man"}, {"prompt": "a boy", "subjects": []}]

    def read(path: Path) -> None:
        for line in sample.read_lines(path, 0):
            bind_subjects(line.prompt, line.subject)

    def case(rng: random.Random) -> Read:
        broken = [spoil_json(line, rng) if rng.random() < 0.5 else json.dumps(line).encode()
                  for line in lines]
        if rng.random() < 0.3:
            broken.append(spoil_bytes(b"a man riding a bike on the beach", rng))
        return partial(read, put(folder / "prompts.jsonl", b"\n".join(broken)))
    return case


@family("stories", ValueError)
def stories(folder: Path) -> Case:
    told = {"characters": {"Ada": {"word": "a woman", "photos": ["ada.png"]},
                           "Bob": {"word": "a man", "photos": ["bob.png", "bob2.png"]}},
            "scenes": [{"prompt": "{Ada} and {Bob} reading a book"}, {"prompt": "{Ada} running", "seed": 7}]}

    def case(rng: random.Random) -> Read:
        return partial(story.read_story, put(folder / "story.json", spoil_json(told, rng)))
    return case


FLAGS = {"--seed": "7", "--steps": "5", "--guidance-scale": "4", "--width": "64", "--height": "64",
         "--num": "3",
         "--clip-skip": "2", "--prior-above": "600", "--strength": "0.5", "--control-scale": "1",
         "--control-start": "0", "--prompt": "a woman and a man", "--subject": "woman=a.png,b.png",
         "--lora": "x.safetensors:0.5:1", "--output": "out/x.png", "--device": "cpu", "--dtype": "fp16",
         "--sampler": "ddim", "--negative-prompt": "blurry"}
ODD = ("", " ", "-1", "0", "1e9", "1000000000", "9" * 400, "9" * 5000, "nan", "inf", "-inf", "1e400", "0x10",
       "é", "a" * 5000, "=", "==", "@", "=@", "a=b=c@1@2", ",", ",,", "+", "a+", "+a", ":", "::", "x:nan",
       "x:inf:1",
       "x:1:1:1", "/", "..", "/dev/null", "/proc/self/mem", "[", "(", "\\", "*", "%s", "\n",
       "\u2028", "1=x", "0=x", "99999999999999999999=x", "woman=", "man=a.png@9" + "9" * 4400)


@family("flags", ValueError, OSError)
def flags(folder: Path) -> Case:
    def read(arguments: list[str]) -> None:
        stderr, sys.stderr = sys.stderr, io.StringIO()
        try:
            args = sample.parse_args(arguments)
        except SystemExit as stop:
            if stop.code == 2:
                raise ValueError("refused by argparse") from stop
            raise
        finally:
            sys.stderr = stderr
        sample.check(args)
        sample.plan_files(args)
        bind_subjects(args.prompt, args.subject)
        if args.subject:
            bind_rows(args.prompt, args.subject)
        for lora in args.lora:
            sample.split_lora(lora)

    def case(rng: random.Random) -> Read:
        chosen = dict(rng.sample(list(FLAGS.items()), rng.randint(0, 5)))
        chosen.setdefault("--prompt", "a man and a woman")
        for name in rng.sample(list(chosen), min(len(chosen), rng.randint(1, 2))):
            if rng.random() < 0.6:
                chosen[name] = rng.choice(ODD)
            else:
                chosen[name] = spoil_bytes(chosen[name].encode(), rng).decode("utf-8", "surrogateescape")
        chosen["--output"] = str(folder / "x.png") if "--output" not in chosen else chosen["--output"]
        return partial(read, [f"{name}={value}" for name, value in chosen.items()])
    return case


# Running -----------------------------------------------------------------------------------------

class TooSlow(BaseException):
    """A case took longer than it may."""


def limit() -> None:
    """In this process: less memory, and a signal that ends what takes long."""
    def stop(*_):
        raise TooSlow
    signal.signal(signal.SIGPROF, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def attempt(read: Read, errors: tuple) -> str:
    """"taken", "refused", or what went wrong."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process, whatever others do
    try:
        read()
        return "taken"
    except errors as error:
        return "refused" if str(error).strip() else f"{type(error).__name__} without a message"
    except TooSlow:
        return f"more than {SECONDS} seconds"
    except BaseException as error:
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            return "refused"  # every command says "not enough memory"
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
                if str(ROOT) in f.filename and "stress" not in f.filename]
        return (f"{type(error).__name__}: {' '.join(str(error).split())[:120]} "
                f"({ours[-1] if ours else ''} in {Path(place.filename).name}:{place.lineno})")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def kept(function: Callable, key: Callable) -> Callable:
    """`function`, the latest results of which are kept for arguments of the same key; errors are not."""
    results: dict = {}

    def keeping(*arguments):
        name = key(*arguments)
        if name not in results:
            if len(results) == 10:
                results.clear()
            results[name] = function(*arguments)
        return results[name]
    return keeping


def unless_empty(draw: Callable) -> Callable:
    """`draw`, which fills a tensor with random values, for tensors that have memory."""
    return lambda tensor, *args, **more: tensor if tensor.is_meta else draw(tensor, *args, **more)


def spare() -> None:
    """In this process: do not do again what no broken byte changes, which is half of the time."""
    for name in ("kaiming_uniform_", "uniform_", "normal_"):
        setattr(torch.nn.init, name, unless_empty(getattr(torch.nn.init, name)))
    parts.build_empty = kept(parts.build_empty, repr)
    parts.rename = lru_cache(10_000)(parts.rename)
    open_clip().tokenizer.SimpleTokenizer = cache(open_clip().tokenizer.SimpleTokenizer)


def work(name: str, seed: int, numbers: range, folder: Path, results) -> None:
    """The cases of a family in a process of its own; sends (number, outcome, seconds, memory) of each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    make, errors = FAMILIES[name]
    spare()
    case = make(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and progress bars have much to say
    limit()
    for number in numbers:
        results.send((number, "the process died", 0, 0))
        read = case(random.Random(f"{seed}/{name}/{number}"))
        begin = time.process_time()
        outcome = attempt(read, errors)
        seconds = time.process_time() - begin
        results.send((number, outcome, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    results.send(None)


def fuzz(name: str, seed: int, count: int) -> tuple[list[str], list[tuple[int, str]]]:
    """A row of the table, and (number, what went wrong) of each failure."""
    context = multiprocessing.get_context("fork")
    outcomes: dict[int, str] = {}
    slowest, memory, first, base = 0.0, 0, 0, None
    while first < count:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, seed, range(first, count), Path(temporary),
                                                         there))
            process.start()
            there.close()
            try:
                while here.poll(20 * SECONDS) and (result := here.recv()) is not None:
                    number, outcomes[number], seconds, peak = result
                    slowest, memory, base = max(slowest, seconds), max(memory, peak), base or peak
            except EOFError:  # it died
                pass
            if process.is_alive():
                process.join(1)
            process.kill()
            process.join()
        if not outcomes:
            raise SystemExit(f"{name}: cannot be set up")
        first = max(outcomes) + 1
    failures = [(number, outcome) for number, outcome in outcomes.items()
                if outcome not in ("taken", "refused")]
    counts = [sum(outcome == wanted for outcome in outcomes.values()) for wanted in ("taken", "refused")]
    row = [name, str(count), *map(str, counts), str(len(failures)), f"{slowest:.2f}",
           f"{max(0, memory - (base or 0)) / 1e6:.0f}"]
    return row, failures


def repeat(name: str, seed: int, number: int) -> None:
    """One case in this process, with its traceback."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        read = FAMILIES[name][0](Path(temporary))(random.Random(f"{seed}/{name}/{number}"))
        limit()
        print("returned", read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each family (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default 0)")
    parser.add_argument("--family", choices=list(FAMILIES), help="this one alone")
    parser.add_argument("--case", type=int, metavar="N", help="repeat this case of --family")
    args = parser.parse_args()
    if args.case is not None:
        return repeat(args.family, args.seed, args.case)
    head = ["family", "cases", "taken", "refused", "failures", "slowest, s", "memory, MB"]
    print(" | ".join(head), "---|" * (len(head) - 1) + "---", sep="\n", flush=True)
    shared(), plain_states()  # before there are other processes
    failed = 0
    for name in [args.family] if args.family else FAMILIES:
        row, failures = fuzz(name, args.seed, args.cases)
        print(" | ".join(row), flush=True)
        failed += len(failures)
        kinds = {outcome: number for number, outcome in reversed(failures)}
        for outcome, number in list(kinds.items())[:12]:
            print(f"    case {number}: {outcome}", file=sys.stderr, flush=True)
    print(f"{failed} failures")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
