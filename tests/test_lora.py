"""LoRA: every layout against plain formulas, diffusers and PEFT; merging; scopes; what is refused."""
import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layouts import RESNET, ldm_places
from parity_full import adopt, pair, public, random, randomize, relative_error
from safetensors.torch import save_file

from models import Models, WeightsError
from models.clip_text import CLIPTextConfig, CLIPTextEncoder
from weights.lora import Factors, LoRAError, LoRALayer, LoRASetting, ldm_name, load_lora
from models.unet import UNet, UNetConfig
from moa import MultimodalPrompt, PromptConfig, add_moa, force_routing
from pipeline import Pipeline, Subject

UNET = UNetConfig(channels=(16, 24, 32, 32), heads=2, context_dim=16, groups=8)
TEXT = CLIPTextConfig(dim=16, layers=2, heads=2, vocabulary=512)
LIMIT = 2e-6
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
Low = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # layer -> down, up, alpha


@pytest.fixture(scope="module")
def base() -> tuple[dict, dict]:
    """The tensors of a UNet and a text encoder, random in every value."""
    return tuple(pair(part, cfg)[0].state_dict() for part, cfg in (("unet", UNET), ("text_encoder", TEXT)))


def make_pipeline(base) -> Pipeline:
    states = [{k: v.clone() for k, v in state.items()} for state in base]
    unet, text = adopt(UNet, UNET, states[0]), adopt(CLIPTextEncoder, TEXT, states[1])
    pipeline = Pipeline(Models(unet, None, text, None, None, {}))
    pipeline.set_loras([])
    return pipeline


@pytest.fixture
def pipeline(base) -> Pipeline:
    return make_pipeline(base)


@pytest.fixture(scope="module")
def untouched(base) -> dict:
    """The layers of a model that no LoRA is merged into."""
    return make_pipeline(base).merged.layers


@pytest.fixture
def layers(pipeline) -> dict:
    return pipeline.merged.layers


def with_moa(pipeline: Pipeline) -> Pipeline:
    """MoA whose experts, routers and prompt differ from the base in everything."""
    add_moa(pipeline.models.unet)
    prompt = MultimodalPrompt(PromptConfig(16, 8, 16, 16)).eval()
    for module in (prompt, *(block for b in pipeline.models.unet.transformer_blocks()
                             for attention in (b.attn1, b.attn2)
                             for block in (attention.personalized, attention.router))):
        randomize(module, seed=3)
    return Pipeline(pipeline.models, prompt)


def make_lora(layers: dict, seed: int = 0, choose: Callable[[str], bool] = lambda name: True) -> Low:
    """Random factors of every chosen layer; ranks and alphas differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    low = {}
    for i, (name, layer) in enumerate(layers.items()):
        if choose(name):
            rank, weight = 1 + i % 4, layer.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2), generator=generator)
            low[name] = down, up, [0.5, 2.0, 3.0][i % 3]
    return low


def delta(down, up, alpha) -> torch.Tensor:
    """alpha / r up down, by a formula of its own."""
    if down.dim() == 4:
        return alpha / len(down) * torch.einsum("or,rikl->oikl", up[:, :, 0, 0].double(), down.double())
    return alpha / len(down) * torch.einsum("or,ri->oi", up.double(), down.double())


# Layouts: writers that know the names by heart, or from tests/layouts.py. -----------------------


def transformers(name: str) -> bool:
    return ".attentions." in name or name.startswith("text_encoder.")


def attention(name: str) -> bool:
    return any(part in name for part in (".attn1.", ".attn2.", ".self_attn."))


def anything(name: str) -> bool:
    return True


def kohya(low: Low, place: Callable[[str], str] = lambda name: name) -> dict:
    state = {}
    for name, (down, up, alpha) in low.items():
        part, _, rest = name.partition(".")
        stem = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{place(rest).replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                  f"{stem}.alpha": torch.tensor(alpha)}
    return state


def ldm_place(name: str) -> str:
    """CompVis' name of a layer, from the enumerated places."""
    if name.startswith("text_model."):
        return name
    places = ldm_places()
    place = next(p for p in sorted(places, key=len, reverse=True) if f"{name}.".startswith(f"{p}."))
    inner = name[len(place) + 1:]
    return ".".join(filter(None, (places[place], RESNET.get(inner, inner))))


def diffusers(low: Low) -> dict:
    state = {}
    for name, (down, up, alpha) in low.items():
        middle = "lora" if name.startswith("unet.") else "lora_linear_layer"
        state |= {f"{name}.{middle}.down.weight": down, f"{name}.{middle}.up.weight": up,
                  f"{name}.alpha": torch.tensor(alpha)}
    return state


def diffusers_old(low: Low) -> dict:
    """Of 2023: attention processors; here with alphas, which they did not have."""
    state = {}
    for name, (down, up, alpha) in low.items():
        stem, _, layer = name.replace(".to_out.0", ".to_out").rpartition(".")
        layer = layer.replace("out_proj", "to_out").replace("q_proj", "to_q").replace(
            "k_proj", "to_k").replace("v_proj", "to_v")
        stem += ".processor" if name.startswith("unet.") else ""
        state |= {f"{stem}.{layer}_lora.down.weight": down, f"{stem}.{layer}_lora.up.weight": up,
                  f"{stem}.{layer}.alpha": torch.tensor(alpha)}
    return state


def peft(low: Low, prefix: str = "", adapter: str = "") -> dict:
    return {f"{prefix}{name}.{kind}{adapter}.weight": value for name, (down, up, _) in low.items()
            for kind, value in (("lora_A", down), ("lora_B", up))}


def peft_settings(low: Low, part: str) -> dict:
    """As PEFT keeps them: an alpha for all layers, and those that differ by name."""
    alphas = {name.removeprefix(f"{part}."): alpha for name, (_, _, alpha) in low.items()
              if name.startswith(f"{part}.")}
    return {"lora_alpha": 2.0, "r": 4, "use_dora": False, "use_rslora": False,
            "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != 2.0}}


def peft_metadata(low: Low) -> dict[str, str]:
    settings = {f"{part}.{key}": value for part in ("unet", "text_encoder")
                for key, value in peft_settings(low, part).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def one_by_one_flat(low: Low) -> Low:
    """1x1 convolutions as matrices."""
    return {name: (down.flatten(1), up.flatten(1), alpha) if down.shape[2:] == (1, 1) else (down, up, alpha)
            for name, (down, up, alpha) in low.items()}


# Layout -> which layers it can hold, (low, file) -> writes it.
LAYOUTS = {
    "kohya": (anything, lambda low, file: save_file(kohya(low), file)),
    "kohya in half precision": (transformers, lambda low, file: save_file(
        {k: v.half() for k, v in kohya(low).items()}, file)),
    "kohya, matrices for 1x1 convolutions": (anything, lambda low, file: save_file(
        kohya(one_by_one_flat(low)), file)),
    "kohya, as diffusers numbers the text encoder": (transformers, lambda low, file: save_file(
        {k.replace("lora_te_", "lora_te1_"): v for k, v in kohya(low).items()}, file)),
    "ComfyUI": (anything, lambda low, file: save_file(
        {k.replace("unet.", "diffusion_model.", 1).replace(
            "text_encoder.", "text_encoders.clip_l.transformer.", 1): v
         for k, v in diffusers({f"unet.{ldm_place(k[5:])}" if k.startswith("unet.") else k: v
                                for k, v in low.items()}).items()}, file)),
    "kohya, torch.compile": (transformers, lambda low, file: save_file(
        {k.replace("lora_unet_", "lora_unet__orig_mod_"): v for k, v in kohya(low).items()}, file)),
    "PEFT inside of the UNet, CLIP as in ComfyUI's files": (anything, lambda low, file: save_file(
        {k.replace("unet.", "unet.base_model.model.", 1).replace("text_encoder.", "clip_l.transformer.", 1): v
         for k, v in peft(low).items()}, file, peft_metadata(low))),
    "LyCORIS": (lambda name: name.startswith("unet."), lambda low, file: save_file(
        {k.replace("lora_unet_", "lycoris_"): v for k, v in kohya(low).items()}, file)),
    "diffusers, pickled": (transformers, lambda low, file: torch.save(diffusers(low), file)),
    "torch.compile": (transformers, lambda low, file: save_file(
        {k.replace("unet.", "unet._orig_mod."): v for k, v in diffusers(low).items()}, file)),
    "kohya, LDM's names": (anything, lambda low, file: save_file(kohya(low, ldm_place), file)),
    "kohya, flat text encoder": (transformers, lambda low, file: save_file(
        kohya(low, lambda name: name.removeprefix("text_model.")), file)),
    "diffusers": (anything, lambda low, file: save_file(diffusers(low), file)),
    "diffusers, attention processors": (attention, lambda low, file: save_file(diffusers_old(low), file)),
    "PEFT, settings in the metadata": (anything, lambda low, file: save_file(
        peft(low), file, peft_metadata(low))),
    "PEFT's own, settings beside the file": (lambda name: name.startswith("unet."), lambda low, file: (
        save_file(peft({k.removeprefix("unet."): v for k, v in low.items()}, "base_model.model."), file),
        file.with_name("adapter_config.json").write_text(json.dumps(peft_settings(low, "unet"))))),
    "PEFT, with prefix and adapter, text encoder alone": (
        lambda name: name.startswith("text_encoder."), lambda low, file: save_file(
            peft(low, "base_model.model.", ".default"), file, peft_metadata(low))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout, pipeline, layers, tmp_path):
    choose, write = LAYOUTS[layout]
    low, before = make_lora(layers, choose=choose), {n: m.weight.clone() for n, m in layers.items()}
    assert len(low) > 10
    write(low, tmp_path / "lora.safetensors")
    pipeline.set_loras([LoRASetting(tmp_path / "lora.safetensors", 0.7)], "all")
    for name, module in layers.items():
        change = 0.7 * delta(*low[name]) if name in low else torch.zeros_like(before[name])
        expected = before[name].double() + change
        error = (module.weight - expected).abs().max() / expected.abs().max()
        assert error < (1e-3 if "half" in layout else LIMIT), name


def assert_merged_equals_peft(layers: dict, count: int, **models) -> None:
    """Our weights are those that PEFT merges into diffusers' and transformers' models."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    merged = 0
    for part, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
                name = name.removeprefix("text_model.")
                ours = layers[f"{part}.{'text_model.' * (part == 'text_encoder')}{name}"].weight
                assert relative_error(ours, module.get_base_layer().weight) < LIMIT, name
                merged += 1
    assert merged == count > 50


@pytest.mark.parametrize("write", [
    lambda low: kohya(low), lambda low: kohya(low, ldm_place),
    lambda low: {k: v for k, v in diffusers_old(low).items() if not k.endswith(".alpha")}],
    ids=["kohya", "LDM's names", "attention processors"])
def test_diffusers_gives_the_same_weights(write, pipeline, layers, tmp_path, request):
    """It loads the file with PEFT; of kohya's alphas it knows one for all layers only."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    old = "processors" in request.node.name
    low = make_lora(layers, choose=attention if old else transformers)
    low = {name: (down, up, float(len(down)) if old else 3.0) for name, (down, up, _) in low.items()}
    file = tmp_path / "lora.safetensors"
    save_file(write(low), file)
    unet, text = public("unet", UNET), public("text_encoder", TEXT)
    state, alphas = Loader.lora_state_dict(str(file), unet_config=unet.config)
    Loader.load_lora_into_unet(state, alphas, unet)
    Loader.load_lora_into_text_encoder(state, alphas, text)
    pipeline.set_loras([LoRASetting(file)], "all")
    assert_merged_equals_peft(layers, len(low), unet=unet, text_encoder=text)


@pytest.mark.parametrize("program", ["diffusers", "PEFT"])
def test_files_of_peft_and_diffusers_as_they_write_them(program, pipeline, layers, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    unet = public("unet", UNET)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["to_q", "to_out.0", "proj_in", "conv1", "net.2"],
                        alpha_pattern={"mid_block.attentions.0.proj_in": 5, "attn2.to_q": 3},
                        rank_pattern={"conv1": 2}, init_lora_weights=False)
    if program == "diffusers":
        unet.add_adapter(config)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, get_peft_model_state_dict(unet), **_collate_lora_metadata({"unet": unet}))
        file = tmp_path / "pytorch_lora_weights.safetensors"
    else:
        get_peft_model(unet, config).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
    pipeline.set_loras([LoRASetting(file)], "all")
    assert_merged_equals_peft(layers, 32 * 2 + 16 * 2 + 22, unet=unet)


def test_ldm_names_are_those_of_the_checkpoints(untouched):
    names = [name.removeprefix("unet.") for name in untouched if name.startswith("unet.")]
    assert [ldm_name(name) for name in names] == [ldm_place(name) for name in names]
    assert len({ldm_name(name) for name in names}) == len(names) > 200


# The formula -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1, 1), (12, 10, 3, 3)])
@pytest.mark.parametrize("tucker", [False, True])
def test_merged_weights_equal_the_path_beside_the_layer(shape, tucker):
    if tucker and len(shape) == 2:
        pytest.skip("convolutions only")
    weight, scale, alpha = random(*shape, seed=1), 0.8, 3.0
    x = random(4, *shape[1:2], *[7] * (len(shape) - 2), seed=2)
    ones = [1] * (len(shape) - 2)
    up = random(12, 4, *ones, seed=4)
    down = random(4, 10, *(ones if tucker else shape[2:]), seed=3)
    mid = random(4, 4, *shape[2:], seed=5) if tucker else None
    factors = Factors(down, up, mid, alpha)
    assert factors.fits(weight)
    if len(shape) == 2:
        merged = x @ (weight + scale * factors.delta(weight)).T
        beside = x @ weight.T + scale * alpha / 4 * (x @ down.T) @ up.T
    else:
        pad = shape[-1] // 2
        merged = F.conv2d(x, weight + scale * factors.delta(weight), stride=2, padding=pad)
        low = (F.conv2d(F.conv2d(x, down), mid, stride=2, padding=pad) if tucker
               else F.conv2d(x, down, stride=2, padding=pad))
        beside = F.conv2d(x, weight, stride=2, padding=pad) + scale * alpha / 4 * F.conv2d(low, up)
    assert relative_error(merged, beside) < LIMIT


def test_tucker_files_are_read(pipeline, layers, tmp_path):
    name = "unet.down_blocks.1.resnets.0.conv1"
    weight = layers[name].weight.clone()
    down, mid, up = random(3, 16, 1, 1), random(3, 3, 3, 3, seed=2), random(24, 3, 1, 1, seed=3)
    stem = "lora_unet_down_blocks_1_resnets_0_conv1"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid,
               f"{stem}.lora_up.weight": up}, tmp_path / "locon.safetensors")
    pipeline.set_loras([LoRASetting(tmp_path / "locon.safetensors")], "all")
    expected = weight + torch.einsum("op,pqkl,qi->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    assert relative_error(layers[name].weight, expected) < LIMIT


@pytest.mark.parametrize(("alpha", "settings", "expected"), [
    (None, None, 4.0),  # the rank
    (0.0, None, 4.0),  # as kohya takes it
    (2.0, None, 2.0),
    (None, {"lora_alpha": 8}, 8.0),
    (None, {"lora_alpha": 8, "use_rslora": True}, 16.0),
    (None, {"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, 3.0),
    (None, {"lora_alpha": 8, "alpha_pattern": {"to_k": 3, "1.to_q": 3}}, 8.0),  # whole names only
    (None, {"r": 4}, 4.0),
])
@pytest.mark.parametrize("beside", [False, True])
def test_alpha_wherever_it_hides(alpha, settings, expected, beside, untouched, tmp_path):
    file, name = tmp_path / "lora.safetensors", f"{BLOCK}.attn1.to_q"
    state = {f"{name}.lora_A.weight": random(4, 16), f"{name}.lora_B.weight": random(16, 4)}
    if alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha)
    packed = {f"unet.{k}": v for k, v in (settings or {}).items()}
    metadata = {"lora_adapter_metadata": json.dumps(packed)} if settings and not beside else None
    save_file(state, file, metadata)
    if settings and beside:
        file.with_name("adapter_config.json").write_text(json.dumps(settings))
    assert load_lora(file, untouched)[name].alpha == expected


def test_the_training_path_equals_the_merged_file(pipeline, layers, base, tmp_path):
    """A `LoRALayer` beside every layer of a UNet, its state saved as it is, and merged."""
    unet = adopt(UNet, UNET, {k: v.clone() for k, v in base[0].items()})
    names = [name for name in layers if name.startswith("unet.") and not name.endswith("conv_out")]
    modules = dict(unet.named_modules())
    low = torch.nn.ModuleDict({f"lora_unet_{n[5:].replace('.', '_')}": LoRALayer(modules[n[5:]], 3, 6.0)
                               for n in names})
    inputs = random(2, 4, 8, 8), torch.tensor([7, 900]), random(2, 77, 16)
    with torch.no_grad():
        assert torch.equal(unet(*inputs), pipeline.models.unet(*inputs))  # it starts at zero
        randomize(low)
        for path in low.values():
            path.lora_up.weight *= 0.1
        save_file(low.state_dict(), tmp_path / "lora.safetensors")
        before = pipeline.models.unet(*inputs)
        pipeline.set_loras([LoRASetting(tmp_path / "lora.safetensors")], "all")
        beside, merged = unet(*inputs), pipeline.models.unet(*inputs)
        assert relative_error(merged, beside) < 2e-5
        assert relative_error(before, beside) > 0.1
        for path in low.values():
            path.enabled = False
        assert torch.equal(unet(*inputs), before)


# Several, unloading ------------------------------------------------------------------------------


@pytest.fixture
def three(layers, tmp_path) -> list[LoRASetting]:
    for i in range(3):
        save_file(kohya(make_lora(layers, i, transformers)), tmp_path / f"{i}.safetensors")
    return [LoRASetting(tmp_path / "0.safetensors", 0.7), LoRASetting(tmp_path / "1.safetensors", -0.3),
            LoRASetting(tmp_path / "2.safetensors", 1.3)]


def weights(pipeline: Pipeline) -> dict:
    return {f"{i}.{k}": v.clone() for i, module in enumerate(
        (pipeline.models.unet, pipeline.models.text_encoder)) for k, v in module.state_dict().items()}


def differing(a: dict, b: dict) -> set[str]:
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_order_does_not_matter_and_unloading_restores_every_bit(dtype, pipeline, three):
    for module in (pipeline.models.unet, pipeline.models.text_encoder):
        module.to(dtype)
    before, sums = weights(pipeline), []
    for order in list(permutations([*three, three[0]._replace(scale=0.1)]))[::8]:
        pipeline.set_loras(order, "all")
        sums.append(weights(pipeline))
    assert len(differing(before, sums[0])) > 100
    assert not any(differing(sums[0], other) for other in sums)
    assert all(p.dtype == dtype for p in pipeline.models.unet.parameters())
    pipeline.set_loras(three[:1], "all")
    alone = weights(pipeline)
    pipeline.set_loras([], "all")
    assert not differing(before, weights(pipeline))
    assert not pipeline.merged.pristine
    pipeline.set_loras(three[:1], "all")
    assert not differing(alone, weights(pipeline))


def test_several_add_up(pipeline, layers, three):
    name = f"{BLOCK}.attn2.to_v"
    before = layers[name].weight.clone().double()
    changes = []
    for setting in three:
        pipeline.set_loras([setting], "all")
        changes.append(layers[name].weight.double() - before)
    pipeline.set_loras(three, "all")
    assert relative_error(layers[name].weight.double() - before, sum(changes)) < 1e-5


def test_a_setting_is_written_as_its_flag():
    assert str(LoRASetting(Path("a/b.safetensors"))) == "b.safetensors:1"
    assert str(LoRASetting(Path("b.safetensors"), 0.8)) == "b.safetensors:0.8"


def test_scale_zero_changes_nothing(pipeline, three):
    before = weights(pipeline)
    pipeline.set_loras([three[0]._replace(scale=0.0)], "all")
    assert not differing(before, weights(pipeline))


def test_a_file_that_cannot_be_used_leaves_all_as_it_was(pipeline, three, tmp_path):
    pipeline.set_loras(three[:1], "all")
    before = weights(pipeline)
    save_file({"lora_unet_nowhere.lora_down.weight": random(2, 3)}, tmp_path / "bad.safetensors")
    for settings, scope in (([*three, LoRASetting(tmp_path / "bad.safetensors")], "all"), (three, "some")):
        with pytest.raises(LoRAError):
            pipeline.set_loras(settings, scope)
        assert not differing(before, weights(pipeline))


# Scopes ------------------------------------------------------------------------------------------


def test_scope_attn_changes_the_priors_attention_only(pipeline, three):
    pipeline = with_moa(pipeline)
    before = weights(pipeline)
    with pytest.warns(UserWarning, match="76 of its 204 layers are not the UNet's .* scope all takes them"):
        pipeline.set_loras(three[:1])
    changed = differing(before, weights(pipeline))
    assert len(changed) == 32 * 4
    assert all(".prior.to_" in name for name in changed)


def test_scope_all_changes_what_the_experts_share_too_but_no_personalized_expert(pipeline, three):
    pipeline = with_moa(pipeline)
    before = weights(pipeline)
    pipeline.set_loras(three[:1], "all")
    changed = differing(before, weights(pipeline))
    assert len(changed) == 32 * 4 + 16 * 4 + 2 * 6  # and per block ff twice, proj_in, proj_out
    assert not any(".personalized." in name or ".router." in name for name in changed)


def draw(pipeline: Pipeline, context, prior: float | None = None) -> torch.Tensor:
    inputs = random(2, 4, 8, 8), torch.tensor([7, 700])
    with torch.no_grad():
        if prior is None:
            return pipeline.models.unet(*inputs, context)
        with force_routing(pipeline.models.unet, prior):
            return pipeline.models.unet(*inputs, context)


def test_all_prior_with_scope_all_is_the_plain_model_with_the_lora(pipeline, base, three):
    plain = make_pipeline(base)
    moa = with_moa(pipeline)
    tokens = torch.randint(0, 512, (2, 77), generator=torch.Generator().manual_seed(0))
    without = draw(plain, plain.models.text_encoder(tokens))
    for some in (plain, moa):
        some.set_loras(three, "all")
    expected = draw(plain, plain.models.text_encoder(tokens))
    assert torch.equal(draw(moa, moa.models.text_encoder(tokens), 1.0), expected)
    assert relative_error(without, expected) > 0.1


def test_all_personalized_with_scope_attn_is_no_lora(pipeline, three):
    moa = with_moa(pipeline)
    text = random(2, 77, 16, seed=6)
    subjects = [[Subject(3, random(8, seed=7))], []]
    context = moa.context_at(text, subjects)(torch.tensor([7, 700]))
    without, mixed = draw(moa, context, 0.0), draw(moa, context)
    moa.set_loras(three)
    assert torch.equal(draw(moa, moa.context_at(text, subjects)(torch.tensor([7, 700])), 0.0), without)
    assert relative_error(draw(moa, context), mixed) > 1e-2
    moa.set_loras(three, "all")
    assert relative_error(draw(moa, context, 0.0), without) > 1e-2


# Refusals ----------------------------------------------------------------------------------------


STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
TE = "text_model_encoder_layers_0_self_attn_q_proj"


def reads(width: int) -> dict:
    return {f"{STEM}.lora_down.weight": torch.ones(2, width), f"{STEM}.lora_up.weight": torch.ones(320, 2)}


@pytest.mark.parametrize(("state", "match"), [
    ({f"{STEM}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
    ({**GOOD, f"{STEM}.w_norm": torch.ones(2)}, "is a full difference"),
    ({**GOOD, f"{STEM}.dora_scale": torch.ones(1, 16)}, "is a DoRA"),
    ({**GOOD, f"lora_te2_{TE}.lora_down.weight": torch.ones(2, 2)}, "is an SDXL LoRA .lora_te2_"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2)}, "SD3 or Flux"),
    (reads(2048), "is an SDXL LoRA .*reads 2048 channels"),
    (reads(1024), "is an SD2 LoRA .*reads 1024 channels"),
    ({k: v for k, v in GOOD.items() if "lora_down" in k}, f"1 layers have only one .* {STEM}"),
    ({**GOOD, **{f"lora_unet_x{i}.lora_{kind}.weight": torch.ones(2, 2) for i in range(7)
                 for kind in ("up", "down")}},
     "7 of its 8 layers .* lora_unet_x0, lora_unet_x1, lora_unet_x2, lora_unet_x3, lora_unet_x4:"),
    ({**GOOD, "surprise": torch.ones(2)}, "is more than a LoRA: 1 of its 3 .* .surprise"),
    ({"model.diffusion_model.out.2.bias": torch.ones(4)}, r"is no LoRA.*model\.diffusion_model"),
    ({**GOOD, f"{STEM}.lora_up.weight": torch.ones(17, 2)}, "1 layers differ: .*attn2.to_k is"),
    ({**GOOD, f"{STEM}.lora_up.weight": torch.ones(16, 3)}, "does not fit"),
    ({**GOOD, f"{STEM}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "does not fit"),
    ({**GOOD, f"{STEM}.lora_down.weight": torch.full((2, 16), torch.nan)}, "not finite"),
    ({**GOOD, f"{STEM}.alpha": torch.tensor(torch.inf)}, "not finite"),
    ({**GOOD, **peft({f"{BLOCK}.attn2.to_k": (torch.ones(2, 16), torch.ones(16, 2), 1)})}, "twice"),
])
def test_what_cannot_be_used_is_named(state, match, untouched, tmp_path):
    file = tmp_path / "style.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    with pytest.raises(WeightsError, match=match) as caught:
        load_lora(file, untouched)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(("settings", "match"), [
    ("[1, 2]", "cannot be read as PEFT's settings"),
    ('{"lora_alpha": "two"}', "could not convert string to float: 'two'"),
    ('{"lora_alpha": NaN}', "are finite"),
    ('{"lora_alpha": 2, "alpha_pattern": {".*attn1.*": 8}}', "alpha_pattern '.*attn1.*' is a regular expr"),
    ('{"lora_alpha": 2, "use_dora": true}', "is a DoRA"),
])
@pytest.mark.parametrize("beside", [False, True])
def test_settings_of_peft_that_cannot_be_read(settings, match, beside, untouched, tmp_path):
    state = peft({f"{BLOCK}.attn1.to_q": (random(2, 16), random(16, 2), 1.0)})
    save_file(state, tmp_path / "x.safetensors", None if beside else {"lora_adapter_metadata": settings})
    if beside:
        (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(LoRAError, match=match):
        load_lora(tmp_path / "x.safetensors", untouched)


def test_settings_beside_a_file_of_another_program_are_not_its_own(untouched, tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    assert load_lora(tmp_path / "x.safetensors", untouched)[f"{BLOCK}.attn2.to_k"].alpha == 2


def test_embeddings_in_the_bundle_are_left_out_and_said(untouched, tmp_path):
    save_file({**GOOD, "bundle_emb.cat.string_to_param.*": torch.ones(2, 16)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="its own words are left out .bundle_emb.cat"):
        assert load_lora(tmp_path / "x.safetensors", untouched).keys() == {f"{BLOCK}.attn2.to_k"}


def test_files_that_are_no_safetensors(untouched, tmp_path):
    for content, match in ((None, "not found"), (b"PK\x03\x04", "damaged"), (b"a woman", "not a model")):
        if content is not None:
            (tmp_path / "style.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=match):
            load_lora(tmp_path / "style.safetensors", untouched)


def test_a_file_without_attention_is_refused_by_scope_attn(pipeline, layers, tmp_path):
    file = Path(tmp_path / "ff.safetensors")
    save_file(kohya(make_lora(layers, choose=lambda name: ".ff." in name)), file)
    with pytest.raises(LoRAError, match="use scope all"):
        pipeline.set_loras([LoRASetting(file)])
    pipeline.set_loras([LoRASetting(file)], "all")
