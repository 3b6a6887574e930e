"""ControlNet against diffusers, its files, what it does while sampling, and the skeletons that it follows."""
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import small_models
from layouts import CONTROLNET_LAYOUTS, ldm_controlnet, put, under
from parity_full import (LIMIT, OUTPUTS, PARAMETERS, SMALL_CONTROLNET, controlled_outputs, count, errors,
                         exact_in_half, pair, public, random, randomize, relative_error)
from PIL import Image

import sample
from toyworld import skeleton
import toyworld
from toyworld import activities
from models.controlnet import ControlNet, ControlNetConfig
from models.load import carry_over, load_part, read_config, save_part
from models.unet import UNet, UNetConfig
from moa import add_moa
from images import read_picture, read_settings, to_uint8
from models.controlnet import Control
from pipeline import Pipeline, Subject
from weights import convert_controlnet, convert_sd15
from weights.controlnet import load_controlnet

OTHER = ControlNetConfig(channels=(24, 48, 72), layers=1, heads=6, context_dim=20, groups=8,
                         hint_channels=(8, 12, 20))


def base(cfg: ControlNetConfig) -> UNetConfig:
    """The sizes of the UNet that it steers."""
    return UNetConfig(**{k: v for k, v in asdict(cfg).items() if k in asdict(UNetConfig())})


# Models

@pytest.fixture(scope="module")
def both():
    """Our ControlNet and diffusers', of the same random values."""
    return pair("controlnet", SMALL_CONTROLNET)


@pytest.mark.parametrize("cfg, size", [(SMALL_CONTROLNET, (16, 16)), (SMALL_CONTROLNET, (9, 21)),
                                       (OTHER, (12, 8)), (replace(OTHER, global_pool=True), (8, 8))])
def test_controlnet_and_its_unet_equal_diffusers(cfg, size):
    ours, theirs = pair("controlnet", cfg)
    found, expected = (OUTPUTS["controlnet"](net, cfg, *size) for net in (ours, theirs))
    assert max(errors(found, expected).values()) < LIMIT
    unet, their_unet = pair("unet", base(cfg))
    steered = controlled_outputs(unet, found, cfg, *size)
    expected = controlled_outputs(their_unet, expected, cfg, *size)
    assert max(errors(steered, expected).values()) < LIMIT
    plain = OUTPUTS["unet"](unet, cfg, *size)
    assert relative_error(steered["eps"], plain["eps"]) > 0.01  # it does something


def test_it_has_the_340_tensors_of_sd15(both):
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig())
    assert (len(net.state_dict()), count(net)) == (340, PARAMETERS["controlnet"]) == (340, 361_279_120)
    assert net.state_dict().keys() == both[1].state_dict().keys()


@torch.no_grad()
def test_a_new_one_is_the_encoder_and_changes_nothing():
    unet = randomize(UNet(base(OTHER)))
    net = ControlNet.of(unet, OTHER.hint_channels)
    assert net.cfg == OTHER
    copied = {k for k in net.state_dict() if not k.startswith("controlnet_")}
    rest = ("up_blocks.", "conv_norm_out.", "conv_out.")
    assert copied == {k for k in unet.state_dict() if not k.startswith(rest)}
    assert all(torch.equal(net.state_dict()[k], unet.state_dict()[k]) for k in copied)
    x, t, text = random(2, 4, 8, 8), torch.tensor([3, 900]), random(2, 5, 20)
    residuals = net(x, t, text, random(2, 3, 32, 32))
    assert not any(residual.any() for residual in residuals)
    assert torch.equal(unet(x, t, text, residuals), unet(x, t, text))
    with pytest.raises(KeyError):
        ControlNet.of(add_moa(unet), OTHER.hint_channels)


def test_the_number_of_residuals_must_fit():
    unet = randomize(UNet(base(OTHER)))
    with pytest.raises(ValueError, match="shorter"):
        unet(random(1, 4, 8, 8), torch.tensor([3]), random(1, 5, 20), [torch.zeros(())] * 3)


# Files

@pytest.fixture(scope="module")
def theirs():
    """Values that half precision holds exactly."""
    return exact_in_half(public("controlnet", SMALL_CONTROLNET))


@pytest.fixture(scope="module")
def expected(theirs):
    return OUTPUTS["controlnet"](theirs, SMALL_CONTROLNET)


def convert(*arguments) -> None:
    convert_controlnet.main([str(a) for a in arguments])


def agree(net, expected) -> None:
    assert net.cfg == SMALL_CONTROLNET
    assert max(errors(OUTPUTS["controlnet"](net, net.cfg), expected).values()) < LIMIT


@pytest.mark.parametrize("layout", CONTROLNET_LAYOUTS)
def test_layouts(layout, theirs, expected, tmp_path):
    """Converted first, or read directly; what was written is read again as it is."""
    unet = public("unet", base(SMALL_CONTROLNET)).state_dict()
    source, out = CONTROLNET_LAYOUTS[layout](theirs.state_dict(), unet, tmp_path / "there"), tmp_path / "out"
    convert(source, "--output", out)
    agree(load_part(out, "controlnet"), expected)
    for path in (source, out, out / "controlnet.safetensors"):
        agree(load_controlnet(str(path)), expected)
    record = read_config(out)["conversion"]
    assert record["source"] == source.name
    assert ("model" in record["dropped"]) == ("whole model" in layout)
    again = tmp_path / "again"
    convert(out, "--output", again)
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in again.iterdir())


@pytest.mark.parametrize("name, pooled", [("saved", True), ("shuffled", False)])
def test_a_folder_as_diffusers_saves_it(name, pooled, tmp_path):
    """Heads, groups and pooling are known from its config alone."""
    cfg = replace(OTHER, global_pool=pooled)
    theirs = public("controlnet", cfg)
    theirs.save_pretrained(tmp_path / name)
    for source in (tmp_path / name, tmp_path / name / "diffusion_pytorch_model.safetensors"):
        net = load_controlnet(str(source))
        assert net.cfg == cfg
        assert max(errors(*(OUTPUTS["controlnet"](m, cfg) for m in (net, theirs))).values()) < LIMIT


@pytest.mark.parametrize("name", ["control_v11e_sd15_shuffle.pth",
                                  "Control_V11e_Shuffle/diffusion_pytorch_model.safetensors",
                                  "models--lllyasviel--control_v11e_sd15_shuffle/snapshots/01/model.bin"])
def test_shuffle_is_known_by_its_name(name, theirs, tmp_path, monkeypatch):
    source = put(ldm_controlnet(theirs.state_dict()), tmp_path / "there" / name)
    monkeypatch.chdir(source.parent)
    assert load_controlnet(source.name).cfg == replace(SMALL_CONTROLNET, global_pool=True)


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert, expect an exit code, return the one line; nothing may have been left behind."""
    def run(code: int, source) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            convert(source, "--output", tmp_path / "out")
        assert stop.value.code == code
        assert sorted(tmp_path.rglob("*")) == before
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(source) in line
        return line
    return run


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("change, code, message", [
    (lambda s: {**s, "difference": torch.zeros(1)}, 2, "only the difference"),
    (lambda s: {**s, ATTENTION: torch.zeros(32, 1024)}, 2, "is an SD2 checkpoint"),
    (lambda s: {**s, ATTENTION: torch.zeros(32, 2048)}, 2, "is an SDXL checkpoint"),
    (lambda s: {**s, "add_embedding.linear_1.bias": torch.zeros(4)}, 2, "is an SDXL checkpoint"),
    (lambda s: {**s, "conv_in.weight": torch.zeros(32, 9, 3, 3)}, 2, "is an inpainting checkpoint"),
    (lambda s: {"lora_unet_down_x.lora_up.weight": torch.zeros(4, 4)}, 2, "is a LoRA"),
    (lambda s: {"lllite_unet_x.conditioning1.0.weight": torch.zeros(4, 4)}, 2, "is a control-LoRA"),
    (lambda s: {"adapter.body.0.in_conv.weight": torch.zeros(4, 4)}, 2, "is a T2I-Adapter"),
    (lambda s: {k: v for k, v in s.items() if not k.startswith("controlnet_")}, 2, "is no ControlNet"),
    (lambda s: under("model.diffusion_model.", {"out.2.bias": torch.zeros(4)}), 2, "is no ControlNet"),
    (lambda s: {k: v for k, v in s.items() if "mid_block.resnets.1" not in k}, 3, "missing (mid_block"),
    (lambda s: {**s, "time_embed.0.bias": s["time_embedding.linear_1.bias"].clone()}, 3, "twice"),
    (lambda s: {**s, "conv_in.bias": torch.full((32,), float("nan"))}, 3, "not finite")])
def test_what_is_refused(change, code, message, theirs, tmp_path, refused):
    put(change(dict(theirs.state_dict())), tmp_path / "control.safetensors")
    assert message in refused(code, tmp_path / "control.safetensors")


def test_other_folders_are_refused(theirs, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "is no folder of a ControlNet" in refused(2, tmp_path / "empty")
    put({**theirs.state_dict()}, tmp_path / "sd3" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "sd3" / "config.json").write_text(json.dumps({"_class_name": "SD3ControlNetModel"}))
    assert "config.json says SD3ControlNetModel" in refused(2, tmp_path / "sd3")
    (tmp_path / "sd3" / "config.json").write_text(json.dumps(
        {"_class_name": "ControlNetModel", "controlnet_conditioning_channel_order": "bgr"}))
    assert "'bgr'" in refused(2, tmp_path / "sd3")
    put({**theirs.state_dict()}, tmp_path / "diff_control_sd15.safetensors")
    assert "only the difference" in refused(2, tmp_path / "diff_control_sd15.safetensors")
    assert "does not exist" in refused(2, tmp_path / "nothing.pth")


def test_the_base_model_s_converter_says_where_to_go(theirs, tmp_path, capsys):
    put(under("control_model.", ldm_controlnet(theirs.state_dict())), tmp_path / "control.pth")
    with pytest.raises(SystemExit):
        convert_sd15.main([str(tmp_path / "control.pth"), "--output", str(tmp_path / "out")])
    assert "a ControlNet, which weights/convert_controlnet.py reads" in capsys.readouterr().err


def test_it_is_carried_over_with_a_base_model(tmp_path):
    save_part(UNet(base(OTHER)), tmp_path / "one", "unet")
    save_part(ControlNet(OTHER), tmp_path / "one", "controlnet")
    (tmp_path / "two").mkdir()
    carry_over(tmp_path / "one", tmp_path / "two")
    assert load_part(tmp_path / "two", "controlnet").cfg == OTHER
    assert {file.name for file in (tmp_path / "two").iterdir()} == {
        "config.json", "unet.safetensors", "controlnet.safetensors"}


def test_a_base_model_s_folder_is_not_overwritten(theirs, tmp_path, capsys):
    source = put(dict(theirs.state_dict()), tmp_path / "control.safetensors")
    save_part(randomize(UNet(base(OTHER))), tmp_path / "base", "unet")
    with pytest.raises(SystemExit) as stop:
        convert(source, "--output", tmp_path / "base")
    assert stop.value.code == 2
    assert "holds unet.safetensors" in capsys.readouterr().err


# While sampling

HINT = (4, 8, 8, 8)
PROMPT = "a woman on the beach"


@pytest.fixture
def pipeline(world) -> Pipeline:
    return Pipeline.load(world, world / "moa.safetensors")


@pytest.fixture
def net() -> ControlNet:
    return randomize(ControlNet.of(small_models()["unet"], HINT)).eval().requires_grad_(False)


def hints(n: int = 1, side: int = 64, seed: int = 4) -> torch.Tensor:
    return random(n, 3, side, side, seed=seed).sigmoid()


def draw(pipeline: Pipeline, *controls: Control, seeds=(1, 2), steps: int = 4, **options) -> torch.Tensor:
    return pipeline.generate([PROMPT] * len(seeds), seeds, size=(64, 64), steps=steps, controls=controls,
                             **options)


class Spy:
    """Sees what a module is called with."""

    def __init__(self, module):
        self.calls = []
        self.hook = module.register_forward_pre_hook(lambda _, args: self.calls.append(args))


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1, "prior_only": True}])
def test_scale_0_is_none_bit_for_bit(options, pipeline, net):
    plain = draw(pipeline, **options)
    assert torch.equal(draw(pipeline, Control(net, hints(), scale=0), **options), plain)
    assert torch.equal(draw(pipeline, Control(net, hints(), start=0.9, end=0.95), **options), plain)
    steered = draw(pipeline, Control(net, hints()), **options)
    assert (steered - plain).abs().mean() > 0.01
    assert not torch.equal(draw(pipeline, Control(net, hints(), scale=0.5), **options), steered)


@pytest.mark.parametrize("start, end", [(0.0, 0.5), (0.2, 0.7)])
@pytest.mark.parametrize("sampler", ["unipc", "ddim"])
def test_start_and_end(start, end, sampler, pipeline, net):
    spy, steps = Spy(pipeline.models.unet), 10
    draw(pipeline, Control(net, hints(), start=start, end=end), steps=steps, sampler=sampler, seeds=[1])
    assert [bool(args[3]) for args in spy.calls] == [
        not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]


def test_it_sees_the_plain_text_whatever_the_subjects(pipeline, net):
    """Of the negative prompt and of the prompt, the same in each step."""
    spy, subject = Spy(net), Subject(2, random(16, seed=9))
    draw(pipeline, Control(net, hints()), subjects=[[subject], [subject]], negative_prompt="old man")
    with torch.no_grad():
        text = pipeline.encode_text(["old man"] * 2 + [PROMPT] * 2)
    assert len(spy.calls) == 4
    assert all(torch.equal(args[2], text) for args in spy.calls)


def test_prior_only_is_the_base_model_with_the_same_control(pipeline, net, world):
    control = Control(net, hints())
    alone = draw(Pipeline.load(world), control)
    assert torch.equal(draw(pipeline, control, prior_only=True), alone)
    assert torch.equal(draw(pipeline, control, prior_above=0), alone)
    assert not torch.equal(draw(pipeline, control), alone)


def test_several_add_up(pipeline, net):
    spy, other = Spy(pipeline.models.unet), hints(seed=8)
    draw(pipeline, Control(net, hints(), scale=0.3), Control(net, other, scale=0.7), seeds=[1], steps=1)
    x, t, _, residuals = spy.calls[0]
    with torch.no_grad():
        text = pipeline.encode_text(["", PROMPT])
        one, two = (net(x, t, text, hint) for hint in (hints(), other))
    assert len(residuals) == 13
    for found, a, b in zip(residuals, one, two, strict=True):
        assert torch.allclose(found, 0.3 * a + 0.7 * b, atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_pooled_ones_steer_the_prompt_s_half_alone(pooled, pipeline, net):
    """As diffusers does."""
    net.cfg = replace(net.cfg, global_pool=pooled)
    theirs = public("controlnet", net.cfg)
    theirs.load_state_dict(net.state_dict())
    spy = Spy(pipeline.models.unet)
    draw(pipeline, Control(net, hints(), scale=0.7), steps=1)
    x, t, _, residuals = spy.calls[0]
    with torch.no_grad():
        text = pipeline.encode_text([""] * 2 + [PROMPT] * 2)
        rows = slice(2, 4) if pooled else slice(0, 4)
        skips, middle = theirs(x[rows], t[rows], text[rows], hints(), 0.7, return_dict=False)
    for found, wanted in zip(residuals, [*skips, middle], strict=True):
        assert relative_error(found[rows].expand(wanted.shape), wanted) < LIMIT
        assert len(found) == 4 and not (pooled and found[:2].any())


def test_picture_k_of_a_batch_is_picture_k_alone(pipeline, net):
    """Each with its own hint, or all with one."""
    own = hints(2)
    batch = draw(pipeline, Control(net, own))
    for k, seed in enumerate((1, 2)):
        alone = draw(pipeline, Control(net, own[k:k + 1]), seeds=[seed])
        assert torch.allclose(batch[k:k + 1], alone, atol=1e-4)
        shared = draw(pipeline, Control(net, own[k:k + 1]))
        assert torch.allclose(shared[k:k + 1], alone, atol=1e-4)


def test_equal_noise_with_unequal_hints(pipeline, net):
    """Where the prior draws alone, samples of one noise and text are computed once: not these."""
    batch = draw(pipeline, Control(net, hints(2)), seeds=(1, 1), prior_only=True)
    assert (batch[0] - batch[1]).abs().mean() > 0.01
    shared = draw(pipeline, Control(net, hints()), seeds=(1, 1), prior_only=True)
    assert torch.allclose(shared[0], shared[1], atol=1e-5)


def test_the_hint_is_brought_to_the_picture_s_size(pipeline, net):
    spy = Spy(net)
    draw(pipeline, Control(net, hints(side=96)), Control(net, hints(side=64)), steps=1)
    large, same = (args[3] for args in spy.calls)
    assert large.shape[-2:] == same.shape[-2:] == (64, 64)
    assert torch.equal(same, hints())
    assert large.min() >= 0 and large.max() <= 1


def test_a_controlnet_of_another_base_model_is_refused(pipeline):
    other = ControlNet(replace(OTHER, hint_channels=(4, 4)))
    with pytest.raises(ValueError, match=r"another base model: it has channels \(24, 48, 72\), not"):
        draw(pipeline, Control(other, hints()))
    wrong = ControlNet.of(pipeline.models.unet if pipeline.prompt is None else small_models()["unet"], (4, 4))
    with pytest.raises(ValueError, match="it has factor 2, not 8"):
        draw(pipeline, Control(wrong, hints()))


# The command

@pytest.fixture
def room(place, world, net) -> dict[str, str]:
    """A working directory with a ControlNet's folder, and what to steer."""
    save_part(net, place / "control", "controlnet")
    return {"--weights": str(world), "--prompt": PROMPT, "--seed": "5", "--controlnet": "control",
            "--control-image": "ada.png", "--width": "64", "--height": "64"}


def command(room: dict, *flags: str) -> None:
    sample.main([word for item in room.items() for word in item] + list(flags))


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_command_draws_what_the_pipeline_does(room, pipeline, net, place, capsys):
    command(room, "--prior-only", "--output", "steered.png")
    assert capsys.readouterr().err == ""
    hint = read_picture(place / "ada.png")[None]
    wanted = pipeline.generate([PROMPT], [5], size=(64, 64), steps=3, guidance_scale=3.0, prior_only=True,
                               controls=[Control(load_part(place / "control", "controlnet"), hint)])
    assert np.abs(pixels("steered.png").astype(int) - to_uint8(wanted)[0]).max() <= 1
    settings = read_settings(place / "steered.png")
    assert settings["controls"] == [{"controlnet": "control", "image": "ada.png", "scale": 1.0, "start": 0.0,
                                     "end": 1.0}]
    with Image.open("steered.png") as image:
        assert ('ControlNet 0: "Model: control, Weight: 1.0, Guidance Start: 0.0, Guidance End: 1.0"'
                in image.info["parameters"])


def test_the_command_with_scale_0_several_and_a_subject(room, capsys):
    def draw(*flags: str) -> np.ndarray:
        command(room, "--subject", "bob.png", "--output", "a.png", *flags)
        return pixels("a.png")

    steered, nothing = draw(), draw("--control-scale", "0")
    twice = ["--controlnet", "control/controlnet.safetensors", "--control-image", "bob.png"]
    assert (draw(*twice, "--control-scale", "1", "--control-scale", "0") == steered).all()
    assert (draw(*twice) != steered).any() and (steered != nothing).any()
    assert (draw("--control-end", "0.5") != steered).any()
    for flag in ("--controlnet", "--control-image"):
        room.pop(flag)
    assert (draw() == nothing).all()
    assert capsys.readouterr().err == ""


def test_the_command_warns(room, place, capsys):
    Image.new("RGB", (80, 40)).save(place / "wide.png")
    command({**room, "--control-image": "wide.png"}, "--control-start", "0.4", "--control-end", "0.5")
    absent, stretched = capsys.readouterr().err.splitlines()
    assert "leave none of the 3 steps between them" in absent
    assert stretched == "warning: --control-image wide.png has 80 x 40 pixels and is stretched to 64 x 64"


@pytest.mark.parametrize("change, flags, message", [
    ({}, ["--control-image", "bob.png"], "1 --controlnet with 2 --control-image"),
    ({}, ["--control-scale", "-1"], "--control-scale must be in 0..10, not -1"),
    ({}, ["--control-start", "0.5", "--control-end", "0.5"], "0.5 must be smaller than --control-end 0.5"),
    ({}, ["--control-scale", "1", "--control-scale", "2"], "2 --control-scale for 1 --controlnet"),
    ({}, ["--output", "ada.png"], "is a subject's photo or another file that is read"),
    ({"--control-image": "missing.png"}, [], "missing.png does not exist"),
    ({"--controlnet": "missing"}, [], "--controlnet missing: missing does not exist"),
    ({"--controlnet": "base.safetensors"}, [], "is no ControlNet"),
    ({"--controlnet": "other"}, [], "it has channels (24, 48, 72), not (8, 16, 16, 16)")])
def test_the_command_refuses(change, flags, message, room, place, capsys):
    """Exit status 2, one line, and nothing written."""
    save_part(ControlNet(OTHER), place / "other", "controlnet")
    put(dict(small_models()["unet"].state_dict()), place / "base.safetensors")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        command({**room, **change}, *flags)
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


# Skeletons

def test_joints_lie_on_their_people():
    """Where nothing stands before them; hidden joints are given all the same."""
    hits, before = [], ("drinking boba", "reading a book", "holding a bouquet of roses")
    for seed in range(60):
        scene = toyworld.sample_scene(seed, "test")
        if scene.activity in before:
            continue
        _, masks = toyworld.render_scene(scene)
        joints = skeleton.scene_joints(scene)
        assert joints.shape == (len(scene.subjects), 18, 2)
        x, y = joints.round().astype(int).clip(0, 127).transpose(2, 0, 1)
        hits.append(np.take_along_axis(masks.reshape(len(masks), -1), y * 128 + x, 1))
    hits = np.concatenate(hits).mean(0)
    assert min(hits) > 0.9 and np.mean(hits) > 0.98, dict(zip(skeleton.JOINTS, hits, strict=True))


def test_right_is_on_the_viewer_s_left():
    order = {name: i for i, name in enumerate(skeleton.JOINTS)}
    for seed in range(100):
        joints = skeleton.scene_joints(toyworld.sample_scene(seed, "train"))
        for part in ("shoulder", "hip", "eye", "ear"):
            assert (joints[:, order[f"right {part}"], 0] < joints[:, order[f"left {part}"], 0]).all()
        assert len(joints) == 1 or joints[0, 1, 0] < joints[1, 1, 0]  # from left to right


def test_watching_leaves_the_renderer_as_it_was(monkeypatch):
    scene = toyworld.sample_scene(3, "train")
    before, draw_person = toyworld.render_scene(scene)[0], activities.draw_person
    skeleton.scene_joints(scene)
    assert activities.draw_person is draw_person
    assert (toyworld.render_scene(scene)[0] == before).all()
    monkeypatch.setitem(activities.ACTIVITY_PAINTERS, scene.activity, lambda stage: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        skeleton.scene_joints(scene)
    assert activities.draw_person is draw_person


def test_skeletons_do_not_depend_on_the_size_that_is_watched(monkeypatch):
    scenes = [toyworld.sample_scene(seed, "train") for seed in range(40)]
    small, render = [skeleton.scene_joints(scene) for scene in scenes], toyworld.render_scene
    monkeypatch.setattr(toyworld, "render_scene", lambda scene, size: render(scene))
    assert all((skeleton.scene_joints(scene) == joints).all()
               for scene, joints in zip(scenes, small, strict=True))


def test_colours_are_openpose_s():
    assert skeleton.COLORS[:4] == [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0)]
    joints = np.full((1, 18, 2), 200.0)  # all but two outside
    joints[0, 2], joints[0, 3] = (40, 40), (40, 100)
    picture = skeleton.draw_skeletons(joints)
    assert picture.shape == (128, 128, 3)
    assert tuple(picture[40, 40]) == skeleton.COLORS[2] and tuple(picture[100, 40]) == skeleton.COLORS[3]
    assert tuple(picture[70, 40]) == (153, 102, 0)  # the upper arm, the third limb, at 0.6
    assert not picture[:, :30].any()


def test_the_skeleton_command(tmp_path, capsys):
    path = tmp_path / "new" / "pose.png"
    skeleton.main(["--output", str(path), "--seed", "2", "--activity", "dancing", "--size", "256"])
    assert "dancing" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size == (256, 256) and image.mode == "RGB"
        assert np.asarray(image).any() and not np.asarray(image)[0].any()


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--size", "4"], ["--output", "pose.jpg"],
                                   ["--activity", "sleeping"], ["--output", "/dev/null/pose.png"]])
def test_the_skeleton_command_refuses(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        skeleton.main(["--output", str(tmp_path / "pose.png"), *flags])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
