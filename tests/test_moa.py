"""Mixture-of-Attention: what must always hold, and its equations computed by hand."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_full import random, randomize, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.attention import CrossAttention
from models.unet import UNet, UNetConfig
from moa import (ExpertContext, MixtureOfAttention, MultimodalPrompt, PromptConfig, Router, add_moa,
                 force_routing, load_moa, moa_layers, record_routing, record_subject_attention, save_moa,
                 reuse_self_attention, scale_personalized, sparse_routing)
from moa.loss import masked_loss, mean_routing, object_loss, router_loss
from moa import grid
from moa.routing import forced

CFG = UNetConfig(channels=(8, 16, 24, 24), context_dim=12, groups=8, heads=4)  # 16 blocks, 32 layers
SMALL = UNetConfig(channels=(16, 24), layers=1, context_dim=12, groups=8, heads=4)  # 4 blocks
PROMPT = PromptConfig(text_dim=12, image_dim=10, hidden=20)
T = torch.tensor([3, 700])


def base(cfg=CFG, seed=0) -> UNet:
    return randomize(UNet(cfg), seed).eval()


def new_prompt(cfg=CFG) -> MultimodalPrompt:
    blocks = sum(1 for _ in UNet(cfg).transformer_blocks())
    return MultimodalPrompt(PromptConfig(12, 10, 20, layers=blocks))


def inputs(height=8, width=8):
    """x, t, text, features, positions, present: the second sample has one subject of two."""
    return (random(2, 4, height, width), T, random(2, 9, 12, seed=2), random(2, 2, 10, seed=3),
            torch.tensor([[2, 5], [4, 0]]), torch.tensor([[True, True], [True, False]]))


def contexts(prompt, text, features, positions, present, t=T):
    return ExpertContext(text, prompt(text, features, positions, present, t))


@torch.no_grad()
def shake(unet, prompt=None, seed=5):
    """Random values in everything that MoA trains."""
    for _, _, moa in moa_layers(unet):
        seed += 1
        randomize(moa.personalized, seed)
        randomize(moa.router, seed)
        for p in moa.router.parameters():
            p *= 3
    if prompt is not None:
        randomize(prompt, seed)


def trainable(unet):
    return {k: p for k, p in unet.named_parameters() if p.requires_grad}


# 1. The base model stays within reach

@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 7])
def test_right_after_add_moa_the_output_is_the_base(hidden):
    unet, prompt = base(), new_prompt()
    x, t, *rest = inputs()
    before = unet(x, t, rest[0])
    assert add_moa(unet, hidden) is unet
    assert relative_error(unet(x, t, rest[0]), before) < 1e-6
    assert relative_error(unet(x, t, contexts(prompt, *rest)), before) < 1e-6


@torch.no_grad()
def test_forced_to_the_prior_it_is_the_base_bit_for_bit():
    unet, prompt = base(), new_prompt()
    x, t, *rest = inputs()
    before = unet(x, t, rest[0])
    add_moa(unet)
    shake(unet, prompt)
    context = contexts(prompt, *rest)
    assert relative_error(unet(x, t, context), before) > 1e-2
    with force_routing(unet, 1.0):
        assert torch.equal(unet(x, t, context), before)
        assert torch.equal(unet(x, t, rest[0]), before)
    for _, _, moa in moa_layers(unet):  # not even computed
        moa.personalized.to_q.weight.fill_(float("nan"))
    with force_routing(unet, 1), force_routing(unet, torch.tensor(1.0)):
        assert torch.equal(unet(x, t, context), before)


@torch.no_grad()
def test_forced_away_from_the_prior_it_is_all_personalized():
    unet = add_moa(base(SMALL))
    shake(unet)
    x, t, text, *_ = inputs()
    with force_routing(unet, 0.0):
        found = unet(x, t, text)
    plain = base(SMALL)
    attentions = [a for block in plain.transformer_blocks() for a in (block.attn1, block.attn2)]
    for attention, (_, _, moa) in zip(attentions, moa_layers(unet), strict=True):
        attention.load_state_dict(moa.personalized.state_dict())
    assert relative_error(found, plain(x, t, text)) < 1e-6


@torch.no_grad()
def test_forced_by_half_it_is_the_mean_of_the_experts():
    moa = MixtureOfAttention(randomize(CrossAttention(16, 12, 4)), layer=1)
    randomize(moa.personalized, 3)
    z, prior, personalized = random(2, 6, 16), random(2, 9, 12, seed=2), random(3, 2, 9, 12, seed=3)
    a, b = moa.prior(z, prior), moa.personalized(z, personalized[1])  # the context of its own layer
    context = ExpertContext(prior, personalized)
    assert torch.allclose(moa(z, context), (a + b) / 2, atol=1e-6)
    moa.overrides.append(lambda r: torch.tensor([0.25, 0.75]).expand_as(r))
    assert torch.allclose(moa(z, context), 0.25 * a + 0.75 * b, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (6, 16), (10, 7)])
def test_forcing_a_map_works_per_pixel(size):
    unet = add_moa(base(SMALL))
    shake(unet)
    x, t, text, *_ = inputs(*size)
    with force_routing(unet, 1.0):
        prior = unet(x, t, text)
    with force_routing(unet, 0.0):
        personalized = unet(x, t, text)
    for value, expected in ((1.0, prior), (0.0, personalized)):
        for map_ in (torch.full(size, value), torch.full((2, *size), value)):
            with force_routing(unet, map_):
                assert relative_error(unet(x, t, text), expected) < 1e-5
    left = torch.zeros(size)
    left[:, :size[1] // 2] = 1
    with force_routing(unet, torch.stack([left, 1 - left])), record_routing(unet) as routing:
        unet(x, t, text)
    for weights in routing.values():
        assert torch.allclose(weights.sum(-1), torch.ones(()))
        height, width = grid(weights.shape[1], size[0] / size[1])
        maps = weights[..., 0].reshape(2, height, width)
        edges = maps[..., [0, -1]]  # the maps' left and right ends
        assert torch.allclose(edges[0], torch.tensor([1.0, 0.0]))
        assert torch.allclose(edges[1], torch.tensor([0.0, 1.0]))
    fine = next(iter(routing.values()))[0, :, 0].reshape(size)
    assert torch.allclose(fine, left, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_map_is_forced_in_low_precision(dtype):
    """Which a CPU cannot resize."""
    weights = forced(torch.ones(8, 8), torch.rand(2, 16, 2).to(dtype))
    assert torch.equal(weights[..., 0], torch.ones(2, 16, dtype=dtype))


@torch.no_grad()
def test_forcing_ends_with_the_block_and_refuses_what_is_no_weight():
    unet = add_moa(base(SMALL))
    with pytest.raises(KeyError), force_routing(unet, 1.0):
        with force_routing(unet, 0.5):
            pass
        assert all(moa.prior_only and len(moa.overrides) == 1 for _, _, moa in moa_layers(unet))
        raise KeyError
    assert not any(moa.prior_only or moa.overrides for _, _, moa in moa_layers(unet))
    for wrong in (1.1, -0.1, float("nan"), torch.tensor([[0.5, 2.0]])):
        with pytest.raises(ValueError, match="must be in"), force_routing(unet, wrong):
            pass


# Sparse routing

@torch.no_grad()
def test_sparse_at_0_is_the_dense_layer_and_at_1_the_base():
    unet, prompt = base(), new_prompt()
    x, t, *rest = inputs()
    plain = unet(x, t, rest[0])
    add_moa(unet)
    shake(unet, prompt)
    context = contexts(prompt, *rest)
    dense = unet(x, t, context)
    with sparse_routing(unet, 0):
        assert relative_error(unet(x, t, context), dense) < 2e-5
    with sparse_routing(unet, 1):
        assert torch.equal(unet(x, t, context), plain)
    assert torch.equal(unet(x, t, context), dense)  # it ends with the block


@torch.no_grad()
@pytest.mark.parametrize("context", [None, random(3, 7, 24, seed=1),
                                     ExpertContext(random(3, 7, 24, seed=1), random(2, 3, 7, 24, seed=2))])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_a_sparse_layer_is_dense_above_the_threshold_and_the_prior_below(context, threshold):
    unet = add_moa(base(SMALL))
    layer = MixtureOfAttention(randomize(CrossAttention(24, 24, 4), 1), layer=1)
    randomize(layer.personalized, 2)
    layer.router.f.weight.normal_(generator=torch.Generator().manual_seed(3))
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1 = layer
    z = random(3, 20, 24, seed=4)
    z[1] *= 3  # samples that need different numbers of pixels
    dense, prior = layer(z, context), layer.prior(z, layer.contexts(context)[0])
    above = layer.router(z)[..., 1] > threshold
    counts = above.sum(1)
    assert 0 < counts.max() < 18 and counts.min() < counts.max()  # neither none nor all of them
    queries = []
    layer.personalized.to_q.register_forward_pre_hook(lambda module, args: queries.append(args[0].shape))
    with sparse_routing(unet, threshold):
        found = layer(z, context)
    assert queries == [(3, counts.max(), 24)]
    assert relative_error(found[above], dense[above]) < 2e-6
    assert torch.equal(found[~above], prior[~above])


@torch.no_grad()
def test_sparse_routing_takes_forced_and_scaled_weights():
    unet = add_moa(base())
    shake(unet)
    x, t, text, *_ = inputs()
    half = torch.zeros(8, 8)
    half[:, :4] = 1
    for inside in (force_routing(unet, half), force_routing(unet, 0.4), force_routing(unet, 1.0),
                   scale_personalized(unet, 0.5)):
        with inside:
            dense = unet(x, t, text)
            with sparse_routing(unet, 0):
                assert relative_error(unet(x, t, text), dense) < 2e-5


@torch.no_grad()
def test_self_attention_is_reused_in_every_second_call():
    """With weights of its own. On the same input it is the dense layer each time."""
    unet, kept, seen = add_moa(base()), {}, []
    shake(unet)
    x, t, text, *_ = inputs()
    layer = next(moa for _, kind, moa in moa_layers(unet) if kind == "self")
    layer.personalized.register_forward_pre_hook(lambda *_: seen.append(1))
    dense = unet(x, t, text)
    with reuse_self_attention(unet, kept), record_routing(unet) as routing:
        for calls in (2, 2, 3, 3):
            assert relative_error(unet(x, t, text), dense) < 2e-5 and len(seen) == calls
        first = unet(x, t, text)
        assert routing and relative_error(unet(2 * x, t, text), first) > 0.01
        kept.clear()  # another picture
        new = unet(2 * x, t, text)
    assert relative_error(new, unet(2 * x, t, text)) < 2e-5
    with force_routing(unet, 1.0):
        plain = unet(x, t, text)
        with reuse_self_attention(unet, {}):
            assert torch.equal(unet(x, t, text), plain)


@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan")])
def test_strengths_that_are_no_factor_are_refused(strength):
    unet = add_moa(base(SMALL))
    with pytest.raises(ValueError, match="strength must be 0 or more"), scale_personalized(unet, strength):
        pass


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_that_are_no_weight_are_refused(threshold):
    unet = add_moa(base(SMALL))
    with pytest.raises(ValueError, match="threshold of sparse routing"), sparse_routing(unet, threshold):
        pass



def test_add_moa_twice_is_refused():
    with pytest.raises(ValueError, match="already"):
        add_moa(add_moa(base(SMALL)))


# 2. What is frozen, what is trained, what is saved

def full_loss(unet, prompt):
    """Eq. 11 on the inputs above."""
    x, t, *rest = inputs()
    positions, present = rest[2:]
    masks = torch.zeros(2, 2, 8, 8)
    masks[:, 0, 2:6, :4] = 1
    masks[:, 1, 1:7, 4:] = 1
    people = (masks * present[..., None, None]).amax(1)
    with record_routing(unet) as routing, record_subject_attention(unet, positions) as attention:
        eps_hat = unet(x, t, contexts(prompt, *rest))
    prior = mean_routing([weights[..., 0] for weights in routing.values()], 8, 8)
    return (masked_loss(eps_hat, random(2, 4, 8, 8, seed=9), people) + 1e-2 * router_loss(prior, people)
            + 1e-2 * object_loss(list(attention.values()), masks, present))


def test_training_leaves_the_base_as_it_was():
    unet, prompt = base(), new_prompt()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    add_moa(unet)
    frozen = {k: p for k, p in unet.named_parameters() if not p.requires_grad}
    assert {k.replace(".prior.", ".") for k in frozen} == before.keys()
    assert len(frozen) == 686
    learned = trainable(unet)
    assert learned.keys() == {k for k in unet.state_dict() if ".personalized." in k or ".router." in k}
    assert len(learned) == 32 * (5 + 2)
    start = {k: p.detach().clone() for k, p in (*learned.items(), *prompt.named_parameters())}
    optimizer = torch.optim.AdamW([*learned.values(), *prompt.parameters()], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = full_loss(unet, prompt)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for k, p in frozen.items():
        assert torch.equal(p, before[k.replace(".prior.", ".")]), k
    for k, p in (*learned.items(), *prompt.named_parameters()):
        assert not torch.equal(p, start[k]), k
    x, t, text, *_ = inputs()
    plain = UNet(CFG).eval()
    plain.load_state_dict(before)
    with torch.no_grad(), force_routing(unet, 1.0):
        assert torch.equal(unet(x, t, text), plain(x, t, text))


@pytest.mark.parametrize("hidden", [None, 6])
def test_gradients_reach_all_that_is_trained_and_nothing_else(hidden):
    unet, prompt = add_moa(base(SMALL), hidden), new_prompt(SMALL)
    shake(unet, prompt)
    full_loss(unet, prompt).backward()
    for k, p in (*unet.named_parameters(), *prompt.named_parameters()):
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, k
        else:
            assert p.grad is None, k
    assert all(p.requires_grad for p in prompt.parameters())


@pytest.fixture
def saved(tmp_path):
    unet, prompt = add_moa(base(SMALL)), new_prompt(SMALL)
    shake(unet, prompt)
    path = tmp_path / "moa.safetensors"
    save_moa(unet, prompt, path, torch.float32, stage="test", steps=3)
    return unet, prompt, path


@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("installed", [False, True])
def test_save_and_load_give_the_same_output(tmp_path, hidden, installed):
    unet, prompt = add_moa(base(SMALL), hidden), new_prompt(SMALL)
    shake(unet, prompt)
    save_moa(unet, prompt, tmp_path / "moa.safetensors", torch.float32, note="x")
    other = base(SMALL)
    if installed:
        add_moa(other, hidden)
    loaded = load_moa(other, tmp_path / "moa.safetensors")
    assert loaded.cfg == prompt.cfg and not loaded.training
    x, t, *rest = inputs()
    assert torch.equal(other(x, t, contexts(loaded, *rest)), unet(x, t, contexts(prompt, *rest)))
    assert [p.name for p in tmp_path.iterdir()] == ["moa.safetensors"]
    assert (tmp_path / "moa.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_file_holds_what_is_trained_and_its_config(saved):
    unet, prompt, path = saved
    assert load_file(path).keys() == trainable(unet).keys() | {f"prompt.{k}" for k in prompt.state_dict()}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["moa"])
    assert config["settings"] == {"stage": "test", "steps": 3} and config["prompt"]["layers"] == 4


@torch.no_grad()
def test_half_precision(saved, tmp_path):
    unet, prompt, _ = saved
    save_moa(unet, prompt, tmp_path / "half.safetensors")
    state = load_file(tmp_path / "half.safetensors")
    assert {str(v.dtype) for k, v in state.items() if "frequencies" not in k} == {"torch.float16"}
    x, t, *rest = inputs()
    expected = unet(x, t, contexts(prompt, *rest))
    full = base(SMALL)
    loaded = load_moa(full, tmp_path / "half.safetensors")
    assert relative_error(full(x, t, contexts(loaded, *rest)), expected) < 1e-2
    for dtype, limit in ((torch.float16, 2e-2), (torch.bfloat16, 0.15)):
        half = base(SMALL).to(dtype)
        loaded = load_moa(half, tmp_path / "half.safetensors")
        assert {p.dtype for p in half.parameters()} == {dtype}
        assert torch.equal(loaded.encoding.frequencies, prompt.encoding.frequencies)
        text, features = rest[0].to(dtype), rest[1].to(dtype)
        tokens = loaded(text, features, *rest[2:], t)
        assert tokens.dtype == dtype
        out = half(x.to(dtype), t, ExpertContext(text, tokens))
        assert out.dtype == dtype and relative_error(out.float(), expected) < limit


def rewrite(path, change, metadata=None):
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, kept if metadata is None else metadata)


def test_files_that_do_not_fit_are_refused(saved, tmp_path):
    path = saved[2]
    for cfg in (CFG, UNetConfig(channels=(16, 32), layers=1, context_dim=12, groups=8, heads=4)):
        with pytest.raises(ValueError, match="does not fit this UNet"):
            load_moa(base(cfg), path)
    with pytest.raises(ValueError, match="does not fit this UNet"):
        load_moa(add_moa(base(SMALL), 6), path)
    key = next(k for k in load_file(path) if ".router." in k)
    for change in (lambda s: s.pop(key), lambda s: s.update(extra=torch.zeros(1)),
                   lambda s: s.update({key: torch.zeros(3)})):
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(path.read_bytes())
        rewrite(bad, change)
        with pytest.raises(ValueError, match="1 tensors are missing, unexpected"):
            load_moa(base(SMALL), bad)


@pytest.mark.parametrize("metadata", [
    {}, {"moa": "null"}, {"moa": "[1]"}, {"moa": "{"}, {"moa": "{}"}, {"moa": "[" * 100_000},
    {"moa": '{"prompt": {"text_dim": 12}, "settings": {}}'}, {"moa": '{"prompt": 3, "router_hidden": null}'},
    {"moa": '{"prompt": {"colour": 1}, "router_hidden": null}'},
    {"moa": '{"prompt": {"text_dim": "x"}, "router_hidden": null}'},
    {"moa": '{"prompt": {"text_dim": -5}, "router_hidden": null}'},
    {"moa": '{"prompt": {}, "router_hidden": "x"}'}])
def test_metadata_that_is_no_config_is_refused(saved, metadata):
    rewrite(saved[2], lambda state: None, metadata)
    with pytest.raises(ValueError):
        load_moa(base(SMALL), saved[2])


def test_files_that_cannot_be_read_are_refused(saved, tmp_path):
    whole = saved[2].read_bytes()
    for name, content in (("empty", b""), ("short", whole[:-1]), ("header", whole[:100]),
                          ("junk", b"junk" * 99), ("huge", b"\xff" * 64)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_moa(base(SMALL), tmp_path / name)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_moa(base(SMALL), path)


def test_save_that_fails_leaves_nothing(saved, tmp_path):
    unet, prompt, path = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_moa(unet, prompt, path, note=object())
    path.with_name("folder").mkdir()
    with pytest.raises(OSError):
        save_moa(unet, prompt, path.with_name("folder"))
    with pytest.raises(OSError, match="x.safetensors cannot be written"):
        save_moa(unet, prompt, path.with_name("absent") / "x.safetensors")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", path.name]


# Router

@pytest.mark.parametrize("experts, hidden", [(2, None), (3, None), (2, 5)])
def test_router_weights_sum_to_one_and_start_equal(experts, hidden):
    router, z = Router(16, experts, hidden), random(2, 6, 16)
    assert (router(z) == 1 / experts).all()
    randomize(router)
    weights = router(z)
    assert weights.shape == (2, 6, experts) and weights.std() > 0.05
    assert torch.allclose(weights.sum(-1), torch.ones(2, 6)) and (weights > 0).all()
    logits = router.f(z)
    assert torch.allclose(weights, logits.exp() / logits.exp().sum(-1, keepdim=True))


@torch.no_grad()
def test_record_routing_has_all_layers_in_forward_order():
    unet = add_moa(base())
    shake(unet)
    order = []
    hooks = [moa.register_forward_hook(lambda *_, key=(layer, kind): order.append(key))
             for layer, kind, moa in moa_layers(unet)]
    x, t, text, *_ = inputs()
    with record_routing(unet) as routing:
        unet(x, t, text)
        first = dict(routing)
        unet(x + 1, t, text)
    for hook in hooks:
        hook.remove()
    keys = [(layer, kind) for layer in range(16) for kind in ("self", "cross")]
    assert list(routing) == keys == order[:32]
    assert all(moa.layer == layer for layer, _, moa in moa_layers(unet))
    down, up = [64, 64, 16, 16, 4, 4], [4] * 3 + [16] * 3 + [64] * 3
    assert [first[k].shape[1] for k in keys[::2]] == [*down, 1, *up]
    assert not any(torch.equal(first[k], routing[k]) for k in keys)  # the last call's
    unet(x, t, text)
    assert not any(torch.equal(first[k], routing[k]) for k in keys)  # and none after the block
    assert not any(moa.router._forward_hooks for _, _, moa in moa_layers(unet))


def test_recordings_carry_gradients_and_end_on_errors():
    unet = add_moa(base(SMALL))
    shake(unet)
    x, t, text, *_ = inputs()
    positions = torch.tensor([[1], [3]])
    with (pytest.raises(KeyError), record_routing(unet) as routing,
          record_subject_attention(unet, positions) as maps):
        unet(x, t, text)
        raise KeyError
    for _, _, moa in moa_layers(unet):
        assert not moa.router._forward_hooks and not moa.personalized._forward_hooks
    sum(weights[..., 0].sum() for weights in routing.values()).backward(retain_graph=True)
    assert all(moa.router.f.weight.grad.abs().max() > 0 for _, _, moa in moa_layers(unet))
    assert list(maps) == [0, 1, 2, 3]
    cross = [moa.personalized for _, kind, moa in moa_layers(unet) if kind == "cross"]
    unet.zero_grad()
    sum(m.sum() for m in maps.values()).backward()
    assert all(p.grad.abs().max() > 0 for moa in cross for p in (moa.to_q.weight, moa.to_k.weight))


@pytest.mark.parametrize("size", [(64, 64), (10, 14), (9, 21), (96, 64), (5, 40), (1, 8), (2, 24), (63, 17)])
def test_grid_finds_the_sizes_on_the_way_down(size):
    height, width = size
    for _ in range(4):
        assert grid(height * width, size[0] / size[1]) == (height, width)
        height, width = -(-height // 2), -(-width // 2)


def test_grid_always_divides():
    for pixels in range(1, 200):
        for aspect in (0.01, 0.5, 1, 1.9, 100):
            height, width = grid(pixels, aspect)
            assert height * width == pixels


# Attention maps

def test_token_maps_equal_an_explicit_softmax():
    attention = randomize(CrossAttention(16, 12, 4))
    x, context = random(2, 6, 16).requires_grad_(), random(2, 9, 12, seed=2).requires_grad_()
    positions = torch.tensor([[2, 7, 0], [8, 8, 3]])
    maps = attention.token_maps(x, context, positions)
    q, k = (p.unflatten(-1, (4, 4)).transpose(1, 2) for p in (attention.to_q(x), attention.to_k(context)))
    probabilities = (q @ k.transpose(-1, -2) / 4**0.5).softmax(-1)
    expected = torch.stack([probabilities[b, :, :, positions[b]] for b in range(2)])
    assert maps.shape == (2, 4, 6, 3) and torch.allclose(maps, expected, atol=1e-6)
    weight = random(2, 4, 6, 3, seed=4)
    wanted = (x, context, attention.to_q.weight, attention.to_k.weight)
    for a, b in zip(torch.autograd.grad((maps * weight).sum(), wanted),
                    torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        assert relative_error(a, b) < 1e-5


def test_token_maps_keep_no_map_of_all_tokens():
    """For the backward pass: at SD1.5's size it would be gigabytes."""
    attention, kept = randomize(CrossAttention(32, 24, 4)), []
    positions = torch.tensor([[2, 7], [8, 3]])
    x, context = random(2, 64, 32).requires_grad_(), random(2, 77, 24, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.shape) or v, lambda v: v):
        maps = attention.token_maps(x, context, positions)
    assert maps.requires_grad and not any(shape[-2:] == (64, 77) for shape in kept)


def test_maps_of_layers_outside_the_loss_carry_no_gradient():
    unet, prompt = add_moa(base(SMALL)), new_prompt(SMALL)
    x, t, *rest = inputs()
    context, layers = contexts(prompt, *rest), set(range(len(list(unet.transformer_blocks()))))
    for trained, expected in ((None, layers), ((1, 2), {1, 2})):
        with record_subject_attention(unet, rest[2], trained) as maps:
            unet(x, t, context)
        assert {layer for layer, a in maps.items() if a.requires_grad} == expected and maps.keys() == layers


@torch.no_grad()
def test_recorded_attention_is_the_personalized_experts():
    unet, prompt = add_moa(base(SMALL)), new_prompt(SMALL)
    shake(unet, prompt)
    x, t, *rest = inputs()
    context, seen = contexts(prompt, *rest), {}
    hooks = [moa.register_forward_hook(lambda m, args, out: seen.__setitem__(m.layer, args[0]))
             for _, kind, moa in moa_layers(unet) if kind == "cross"]
    with record_subject_attention(unet, rest[2]) as maps:
        unet(x, t, context)
    for hook in hooks:
        hook.remove()
    for layer, kind, moa in moa_layers(unet):
        if kind == "cross":
            expected = moa.personalized.token_maps(seen[layer], context.personalized[layer], rest[2])
            assert torch.equal(maps[layer], expected)


# Multimodal prompt

@torch.no_grad()
def test_the_prompt_starts_as_the_text():
    text, *rest = inputs()[2:]
    tokens = MultimodalPrompt(PROMPT)(text, *rest, T)
    assert tokens.shape == (16, 2, 9, 12) and (tokens == text).all()


@torch.no_grad()
def test_the_prompt_changes_only_the_subjects_tokens():
    prompt = randomize(MultimodalPrompt(PROMPT))
    text, features, positions, present = inputs()[2:]
    tokens = prompt(text, features, positions, present, T)
    changed = (tokens != text).any(-1)  # (L, B, M)
    expected = torch.zeros(2, 9, dtype=torch.bool)
    expected[0, [2, 5]] = expected[1, 4] = True
    assert (changed == expected).all()
    assert (prompt(text, features, positions, present & False, T) == text).all()


@torch.no_grad()
def test_the_prompt_depends_on_layer_timestep_and_image():
    prompt = randomize(MultimodalPrompt(PROMPT))
    text, features, positions, present = inputs()[2:]
    tokens = prompt(text, features, positions, present, T)
    subject = tokens[:, 0, 2]
    assert (torch.cdist(subject, subject) + torch.eye(16) > 1e-3).all()
    assert not torch.allclose(prompt(text, features, positions, present, T + 1), tokens)
    assert not torch.allclose(prompt(text, features + random(10), positions, present, T), tokens)
    for i in range(2):  # each sample alone
        alone = prompt(*(v[i:i + 1] for v in (text, features, positions, present, T)))
        assert torch.allclose(alone[:, 0], tokens[:, i], atol=1e-6)
    swapped = prompt(text, features.flip(1), positions, present, T)[:, 0]  # each subject has its own place
    only = prompt(text, features, positions, present & torch.tensor([True, False]), T)[:, 0]
    assert not torch.allclose(swapped[:, 2], tokens[:, 0, 2])
    assert torch.allclose(only[:, 2], tokens[:, 0, 2], atol=1e-6) and (only[:, 5] == text[0, 5]).all()


@torch.no_grad()
def test_the_prompt_is_equation_8():
    prompt = randomize(MultimodalPrompt(PROMPT))
    text, features, positions, present = inputs()[2:]
    m, frequencies = torch.cat([features[0, 1], text[0, 5]]), prompt.encoding.frequencies
    angles = 3 / 1024 * frequencies[0] + 11 / 16 * frequencies[1]  # t = 3, l = 11
    pe = torch.cat([angles.sin(), angles.cos()])
    expected = text[0, 5] + prompt.mlp(prompt.norm_m(m) + prompt.norm_pe(pe))
    assert torch.allclose(prompt(text, features, positions, present, T)[11, 0, 5], expected, atol=1e-5)


# Losses

def test_masked_loss_by_hand():
    a, b, mask = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=2), random(2, 3, 5, seed=3).sigmoid()
    weight = torch.tensor([0.5, 2.0])
    x, y, m = (v.double().numpy() for v in (a, b, mask))
    samples = [np.mean([(m[i] * (x[i, c] - y[i, c])) ** 2 for c in range(4)]) for i in range(2)]
    assert masked_loss(a, b, mask).item() == pytest.approx(np.mean(samples), rel=1e-5)
    weighted = (0.5 * samples[0] + 2 * samples[1]) / 2
    assert masked_loss(a, b, mask, weight).item() == pytest.approx(weighted, rel=1e-5)
    assert masked_loss(a, b, torch.zeros_like(mask)) == 0
    assert masked_loss(a, b, torch.ones_like(mask)).item() == pytest.approx(F.mse_loss(a, b).item(), rel=1e-5)


def test_router_loss_by_hand():
    r, mask = random(3, 4, 6).sigmoid(), random(3, 4, 6, seed=2).sigmoid()
    total = 0.0
    for i in range(3):
        for y in range(4):
            for x in range(6):
                total += ((1 - mask[i, y, x].item()) * (1 - r[i, y, x].item())) ** 2
    assert router_loss(r, mask).item() == pytest.approx(total / 3, rel=1e-5)
    assert router_loss(r, torch.ones_like(mask)) == 0 == router_loss(torch.ones_like(r), mask)
    assert router_loss(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)) == 64 * 64  # a sum


def test_mean_routing_by_hand():
    fine, coarse = random(2, 4 * 6).sigmoid(), random(2, 2 * 3, seed=2).sigmoid()
    up = np.zeros((2, 4, 6))
    c = coarse.numpy().reshape(2, 2, 3)
    for y in range(4):
        for x in range(6):
            v, u = (y + 0.5) / 2 - 0.5, (x + 0.5) / 2 - 0.5
            y0, x0 = int(np.floor(v)), int(np.floor(u))
            for yy, wy in ((y0, 1 - (v - y0)), (y0 + 1, v - y0)):
                for xx, wx in ((x0, 1 - (u - x0)), (x0 + 1, u - x0)):
                    up[:, y, x] += wy * wx * c[:, min(max(yy, 0), 1), min(max(xx, 0), 2)]
    expected = (up + fine.numpy().reshape(2, 4, 6)) / 2
    np.testing.assert_allclose(mean_routing([fine, coarse], 4, 6), expected, atol=1e-6)


def test_object_loss_by_hand():
    maps = [random(2, 3, 24, 2).sigmoid(), random(2, 3, 24, 2, seed=2).sigmoid()]
    masks = (random(2, 2, 4, 6, seed=3) > 0).float()
    present = torch.tensor([[True, True], [True, False]])
    terms = ([], [])  # of each sample: what several processes average must be a mean over samples
    for a in maps:
        for i, s in ((0, 0), (0, 1), (1, 0)):
            m = masks[i, s].reshape(-1).double()
            for h in range(3):
                p = a[i, h, :, s].double()
                terms[i].append(((p * (1 - m)).sum() / (1 - m).sum() - (p * m).sum() / m.sum()).item())
    assert object_loss(maps, masks, present).item() == pytest.approx(
        np.mean([np.mean(t) for t in terms]), rel=1e-4, abs=1e-6)
    assert object_loss(maps, masks, present & False) == 0


def test_object_loss_brings_masks_to_the_maps_grid():
    masks = torch.zeros(1, 1, 8, 12)
    masks[..., :6] = 1  # the left half, of each grid
    present = torch.ones(1, 1, dtype=torch.bool)
    inside = F.interpolate(masks, (4, 6), mode="area").reshape(1, 1, 24, 1)
    assert object_loss([inside], masks, present).item() == pytest.approx(-1, abs=0.1)
    assert object_loss([1 - inside], masks, present).item() == pytest.approx(1, abs=0.1)
    empty = object_loss([inside], torch.zeros_like(masks), present)
    assert empty.isfinite() and empty.item() == pytest.approx(0.5, abs=1e-4)
