"""Every model against its public counterpart, with random values in every tensor.

    python tests/parity_full.py            # SD1.5's sizes: 15 minutes, 9 GB of memory, 25 GB of disk
    python tests/parity_full.py --small    # the same at small sizes: a minute; the tests do this too

It saves the public models with random tensors, writes them in each layout that the converter reads, converts
each, compares the outputs of every converted model with the public one's, exports to diffusers and compares
again, draws a picture with random MoA, and does the same for a ControlNet and the UNet that it steers. The
tests use its functions at small sizes.
"""
import argparse
import filecmp
import gc
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import conftest  # noqa: F401  mends torchvision

from layouts import CONTROLNET_LAYOUTS, LAYOUTS, WEIGHTS, open_clip_names, read_states
from models.clip_image import CLIPImageConfig
from models.clip_text import BOS, EOS, CLIPTextConfig, CLIPTextEncoder
from models.controlnet import ControlNet, ControlNetConfig
from models.load import ALL_PARTS, load_part
from models.unet import UNetConfig
from models.vae import AutoencoderKL, VAEConfig
from moa import MultimodalPrompt, PromptConfig, add_moa, moa_layers, save_moa

LIMIT = 2e-5  # of relative errors
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
              "image_encoder": 303_966_208, "controlnet": 361_279_120}


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter: zeros and ones would hide wrong wiring."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.normal_(generator=generator)
        if p.dim() > 1 and "embedding" not in name:
            p /= p[0].numel() ** 0.5
        elif p.dim() > 1:
            p *= 0.5
        else:
            p *= 0.2
            p += float(name.endswith("weight"))  # of norms
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert theirs.isfinite().all() and theirs.std() > 1e-3
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def adopt(cls: type[nn.Module], cfg, state: dict[str, Tensor]) -> nn.Module:
    """Our model with the other's tensors, loaded directly and strictly."""
    with torch.device("meta"):
        module = cls(cfg)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


@torch.no_grad()
def exact_in_half(module: nn.Module) -> nn.Module:
    """Round all values to some that fp16 and bf16 can hold."""
    for p in module.parameters():
        p.copy_(p.bfloat16().half())
    return module


def public_unet(cfg: UNetConfig) -> nn.Module:
    from diffusers import UNet2DConditionModel
    depth = len(cfg.channels) - 1
    return UNet2DConditionModel(
        in_channels=cfg.latent_channels, out_channels=cfg.latent_channels,
        block_out_channels=cfg.channels, layers_per_block=cfg.layers,
        down_block_types=("CrossAttnDownBlock2D",) * depth + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * depth,
        attention_head_dim=cfg.heads, cross_attention_dim=cfg.context_dim, norm_num_groups=cfg.groups)


def public_controlnet(cfg: ControlNetConfig) -> nn.Module:
    from diffusers import ControlNetModel
    return ControlNetModel(
        in_channels=cfg.latent_channels, block_out_channels=cfg.channels, layers_per_block=cfg.layers,
        down_block_types=("CrossAttnDownBlock2D",) * (len(cfg.channels) - 1) + ("DownBlock2D",),
        attention_head_dim=cfg.heads, cross_attention_dim=cfg.context_dim, norm_num_groups=cfg.groups,
        conditioning_embedding_out_channels=cfg.hint_channels, global_pool_conditions=cfg.global_pool)


def public_vae(cfg: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKL as Theirs
    levels = len(cfg.channels)
    return Theirs(latent_channels=cfg.latent_channels, block_out_channels=cfg.channels,
                  layers_per_block=cfg.layers, norm_num_groups=cfg.groups,
                  down_block_types=("DownEncoderBlock2D",) * levels,
                  up_block_types=("UpDecoderBlock2D",) * levels)


def public_text_encoder(cfg: CLIPTextConfig) -> nn.Module:
    from transformers import CLIPTextConfig as TheirConfig
    from transformers import CLIPTextModel
    return CLIPTextModel(TheirConfig(
        hidden_size=cfg.dim, intermediate_size=4 * cfg.dim, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, max_position_embeddings=cfg.length, vocab_size=cfg.vocabulary,
        hidden_act="quick_gelu"))


def public_image_encoder(cfg: CLIPImageConfig) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    return CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=cfg.dim, intermediate_size=4 * cfg.dim, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, image_size=cfg.image_size, patch_size=cfg.patch_size,
        projection_dim=cfg.output_dim, hidden_act="quick_gelu"))


PUBLIC = {"unet": public_unet, "vae": public_vae, "text_encoder": public_text_encoder,
          "image_encoder": public_image_encoder, "controlnet": public_controlnet}


def public(part: str, cfg) -> nn.Module:
    """The public model of a part, with random values."""
    return randomize(PUBLIC[part](cfg)).eval()


def pair(part: str, cfg) -> tuple[nn.Module, nn.Module]:
    """Our model and the public one with the same random values, in the same memory."""
    theirs = public(part, cfg)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")}
    if part == "text_encoder":
        state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
    if part == "image_encoder":
        state = open_clip_names(state)
    return adopt(ALL_PARTS[part][0], cfg, state), theirs


# Part -> what it computes, whether it is ours or the public one, from its sizes and fixed inputs.

@torch.no_grad()
def unet_outputs(model, cfg: UNetConfig, height: int = 10, width: int = 14, batch: int = 2,
                 tokens: int = 77) -> dict[str, Tensor]:
    x = random(batch, cfg.latent_channels, height, width)
    out = model(x, torch.tensor([7, 981])[:batch], random(batch, tokens, cfg.context_dim, seed=2))
    return {"eps": out if isinstance(out, Tensor) else out.sample}


@torch.no_grad()
def controlnet_outputs(model, cfg: ControlNetConfig, height: int = 10, width: int = 14) -> dict[str, Tensor]:
    hint = random(2, 3, height * cfg.factor, width * cfg.factor, seed=3).sigmoid()
    inputs = (random(2, cfg.latent_channels, height, width), torch.tensor([7, 981]),
              random(2, 77, cfg.context_dim, seed=2), hint)
    if isinstance(model, ControlNet):
        residuals = model(*inputs)
    else:
        out = model(*inputs)
        residuals = [*out.down_block_res_samples, out.mid_block_res_sample]
    return {f"residual {i}": residual for i, residual in enumerate(residuals)}


@torch.no_grad()
def controlled_outputs(unet, residuals: dict[str, Tensor], cfg: ControlNetConfig, height: int = 10,
                       width: int = 14) -> dict[str, Tensor]:
    """Of a UNet with a ControlNet's residuals."""
    inputs = (random(2, cfg.latent_channels, height, width), torch.tensor([7, 981]),
              random(2, 77, cfg.context_dim, seed=2))
    *skips, middle = residuals.values()
    if type(unet).__module__ == "models.unet":
        return {"eps": unet(*inputs, [*skips, middle])}
    return {"eps": unet(*inputs, down_block_additional_residuals=skips,
                        mid_block_additional_residual=middle).sample}


@torch.no_grad()
def vae_outputs(model, cfg: VAEConfig, height: int = 32, width: int = 48) -> dict[str, Tensor]:
    image = random(2, 3, height, width).tanh()
    latents = random(2, cfg.latent_channels, height // cfg.factor, width // cfg.factor)
    if isinstance(model, AutoencoderKL):
        mean, logvar = model.posterior(image)
        return {"mean": mean, "logvar": logvar, "encode": model.encode(image),
                "decode": model.decode(latents)}
    posterior = model.encode(image).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar, "encode": posterior.mean * 0.18215,
            "decode": model.decode(latents / 0.18215).sample}


@torch.no_grad()
def text_outputs(model, cfg: CLIPTextConfig) -> dict[str, Tensor]:
    """Of three prompts with 5, 0 and 75 tokens, the rest padding; then without the last layer."""
    tokens = torch.full((3, cfg.length), EOS)
    tokens[:, 0] = BOS
    tokens[0, 1:6] = torch.tensor([320, 786, 537, 320, 2308])
    tokens[2, 1:-1] = torch.randint(0, BOS, (cfg.length - 2,), generator=torch.Generator().manual_seed(3))
    if isinstance(model, CLIPTextEncoder):
        return {"last": model(tokens), "skip 1": model(tokens, skip=1)}
    out = model(tokens, output_hidden_states=True)
    norm = getattr(model, "text_model", model).final_layer_norm
    return {"last": out.last_hidden_state, "skip 1": norm(out.hidden_states[-2])}


@torch.no_grad()
def image_outputs(model, cfg: CLIPImageConfig) -> dict[str, Tensor]:
    out = model(random(2, 3, cfg.image_size, cfg.image_size))
    return {"features": out if isinstance(out, Tensor) else out.image_embeds}


OUTPUTS = {"unet": unet_outputs, "vae": vae_outputs, "text_encoder": text_outputs,
           "image_encoder": image_outputs, "controlnet": controlnet_outputs}


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: relative_error(ours[name], theirs[name]) for name in theirs}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


FULL = {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPTextConfig(),
        "image_encoder": CLIPImageConfig()}
SMALL = {"unet": UNetConfig(channels=(32, 64, 96, 96), context_dim=32),  # 686 tensors
         "vae": VAEConfig(channels=(32, 64, 96, 96)),  # 248 tensors
         "text_encoder": CLIPTextConfig(dim=32, layers=3, heads=1),
         "image_encoder": CLIPImageConfig(image_size=32, patch_size=8, dim=128, layers=2, heads=2,
                                          output_dim=24)}
# Beside them, so that the layouts of a base model stay what they are.
FULL_CONTROLNET = ControlNetConfig()
SMALL_CONTROLNET = ControlNetConfig(channels=(32, 64, 96, 96), context_dim=32, hint_channels=(8, 16, 24, 32))
# Runs a script in a fresh process and prints the most memory that it had, in KiB.
MEASURED = f"""
import runpy, sys
try:
    sys.argv = sys.argv[1:]
    sys.path[:0] = sys.argv[0].rpartition("/")[0], {str(ROOT)!r}
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def measure(script: str, *arguments) -> tuple[float, float]:
    """Run one of the repository's commands: seconds and GB of memory. Raises CalledProcessError."""
    start = time.time()
    done = subprocess.run([sys.executable, "-c", MEASURED, str(ROOT / script), *map(str, arguments)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return time.time() - start, int(done.stdout.split()[-1]) * 1024 / 1e9


def own_peak() -> float:
    """The most memory that this process had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(step: str, seconds: float, peak: float, error: float | None = None, size: float | None = None):
    """Print one row of the table, and fail if the error is too large."""
    cells = (f"{size:.2f}" if size else "", f"{peak:.2f}", f"{seconds:.0f}",
             f"{error:.1e}" if error is not None else "")
    print("|", step, "|", " | ".join(cells), "|", flush=True)
    assert error is None or error < LIMIT, f"{step}: relative error {error}"


def save_public(sizes: dict, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Save the public models with random values as they themselves do; returns their outputs."""
    expected = {}
    for part, cfg in sizes.items():
        model = exact_in_half(public(part, cfg))
        expected[part] = OUTPUTS[part](model, cfg)
        model.save_pretrained(folder / part)
        del model
        gc.collect()
    return expected


def worst_error(folder: Path, sizes: dict, expected: dict) -> float:
    """Of all outputs of all models in a weights folder."""
    found = []
    for part, cfg in sizes.items():
        if (folder / f"{part}.safetensors").exists():
            model = load_part(folder, part)
            assert model.cfg == cfg and (sizes is not FULL or count(model) == PARAMETERS[part])
            found += errors(OUTPUTS[part](model, cfg), expected[part]).values()
            del model
            gc.collect()
    return torch.tensor(found).max().item()  # NaN if there is one


def export_error(folder: Path, saved: Path, sizes: dict, expected: dict) -> float:
    """Of an exported folder: its tensors are the public ones, diffusers and transformers compute the same."""
    from diffusers import AutoencoderKL as VAE
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
    found = []
    for part, cls in (("unet", UNet2DConditionModel), ("vae", VAE), ("text_encoder", CLIPTextModel)):
        there = load_file(folder / part / f"{WEIGHTS[part]}.safetensors")
        states = read_states(saved)[part]
        assert there.keys() == states.keys() and all(torch.equal(there[k], states[k]) for k in states)
        del there, states
        model = cls.from_pretrained(folder / part)
        found += errors(OUTPUTS[part](model, sizes[part]), expected[part]).values()
        del model
        gc.collect()
    return torch.tensor(found).max().item()


@torch.no_grad()
def write_moa(weights: Path, sizes: dict, path: Path) -> None:
    """A MoA file with random routers, personalized experts and subject tokens."""
    unet = add_moa(load_part(weights, "unet"))
    prompt = MultimodalPrompt(PromptConfig(sizes["text_encoder"].dim, sizes["image_encoder"].output_dim))
    for _, _, layer in moa_layers(unet):
        layer.router.f.weight.normal_(std=0.1)
        for p in layer.personalized.parameters():
            p += 0.1 * p.std() * torch.randn_like(p)
    prompt.mlp[-1].weight.normal_(std=0.1)
    save_moa(unet, prompt, path)


def prove_controlnet(cfg: ControlNetConfig, unet_cfg: UNetConfig, folder: Path) -> None:
    """Layouts and conversion of a ControlNet, and the UNet that it steers. Raises AssertionError."""
    theirs, out, layout = exact_in_half(public("controlnet", cfg)), folder / "out", folder / "layout"
    expected, state = OUTPUTS["controlnet"](theirs, cfg), dict(theirs.state_dict())
    steered, unet = pair("unet", unet_cfg)
    controlled = controlled_outputs(unet, expected, cfg)
    plain = OUTPUTS["unet"](unet, unet_cfg)["eps"]
    assert relative_error(controlled["eps"], plain) > 0.01, "the ControlNet changes nothing"
    for name, write in CONTROLNET_LAYOUTS.items():
        layout.mkdir()
        source = write(state, dict(unet.state_dict()), layout)
        size = sum(f.stat().st_size for f in layout.rglob("*.*") if f.is_file()) / 1e9
        seconds, peak = measure("weights/convert_controlnet.py", source, "--output", out)
        model = load_part(out, "controlnet")
        assert model.cfg == cfg and (cfg != FULL_CONTROLNET or count(model) == PARAMETERS["controlnet"])
        found = OUTPUTS["controlnet"](model, cfg)
        both = errors(found, expected) | errors(controlled_outputs(steered, found, cfg), controlled)
        report(f"{name}, with its UNet", seconds, peak, max(both.values()), size)
        shutil.rmtree(layout)
        shutil.rmtree(out)


def prove(sizes: dict, folder: Path, side: int) -> None:
    """Layouts, conversion, comparison, export, and a picture `side` pixels wide. Raises AssertionError."""
    started, saved, out = time.time(), folder / "saved", folder / "out"
    print("| step | file, GB | memory, GB | seconds | relative error |\n|---|---|---|---|---|")
    expected = save_public(sizes, saved)
    report("public models saved with random values", time.time() - started, own_peak())
    seconds, bare = measure("weights/parts.py")
    report("the converter's imports alone", seconds, bare)

    def convert(name: str, *arguments) -> None:
        paths = [a for a in arguments if isinstance(a, Path)]
        files = {*paths, *(f for a in paths for f in a.rglob("*.*"))}
        size = sum(f.stat().st_size for f in files if f.is_file())
        seconds, peak = measure("weights/convert_sd15.py", *arguments, "--output", out)
        assert (out / "image_encoder.safetensors").exists() or "--image-encoder" not in arguments
        report(name, seconds, peak, worst_error(out, sizes, expected), size / 1e9)
        # A small file is nothing beside the megabytes that Python and torch take as they go.
        assert sizes is SMALL or peak - bare < 1.3 * size / 1e9, f"{name}: {peak - bare} GB above the imports"

    for name, write in LAYOUTS.items():
        (folder / "layout").mkdir()
        convert(name, *write(read_states(saved), folder / "layout"))
        shutil.rmtree(folder / "layout")
        shutil.rmtree(out)
    convert("folder, fp32 `.safetensors`, as diffusers writes it", saved, "--image-encoder",
            saved / "image_encoder")
    shutil.copytree(out, folder / "before")
    convert("its own output, over itself", out)
    names = sorted(file.name for file in out.iterdir())
    assert filecmp.cmpfiles(out, folder / "before", names, shallow=False)[0] == names, "not idempotent"
    shutil.rmtree(folder / "before")

    seconds, peak = measure("weights/export_diffusers.py", out, "--output", folder / "exported")
    report("export to diffusers", seconds, peak,
           export_error(folder / "exported", saved, sizes, expected))
    shutil.rmtree(folder / "exported")
    shutil.rmtree(saved)

    convert("its own output, `--dtype fp16`", out, "--dtype", "fp16")
    write_moa(out, sizes, out / "moa.safetensors")
    draw = ["--weights", out, "--prompt", "a man riding a bike", "--subject", ROOT / "examples" / "max.png",
            "--steps", 2, "--seed", 1, "--width", side, "--height", side]
    for dtype in ("fp32", "bf16"):
        picture = folder / f"{dtype}.png"
        seconds, peak = measure("sample.py", *draw, "--dtype", dtype, "--output", picture)
        with Image.open(picture) as image:
            assert image.size == (side, side) and ImageStat.Stat(image).stddev[0] > 1
        report(f"a picture of {side}x{side} in 2 steps, with MoA, {dtype}", seconds, peak)
    shutil.rmtree(out)
    prove_controlnet(FULL_CONTROLNET if sizes is FULL else SMALL_CONTROLNET, sizes["unet"], folder)
    report("the whole proof, in its own process", time.time() - started, own_peak())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes instead of SD1.5's")
    small = parser.parse_args().small
    with tempfile.TemporaryDirectory() as temporary:
        prove(SMALL if small else FULL, Path(temporary), 64 if small else 512)
