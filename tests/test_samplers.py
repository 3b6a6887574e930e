"""Samplers against diffusers, on a small nonlinear network, and against solutions by hand."""

import math

import pytest
import torch

from samplers import (
    NUM_TIMESTEPS,
    SAMPLERS,
    SPACINGS,
    add_noise,
    alpha_bar,
    alpha_sigma,
    guided,
    invert_ddim,
    noise_level,
    sample_ddim,
    sample_unipc,
    timesteps,
    timesteps_of,
)

STEPS = (1, 4, 20, 48)
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": NUM_TIMESTEPS,
    "steps_offset": 1,
}
DDIM = SD15 | {"set_alpha_to_one": False, "clip_sample": False}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def toy_network(strength=1.0):
    """eps(x, t): mixes channels, nonlinear in x and in t; every sample by itself."""
    mix_in, mix_out, shift = (normal(4, 4, seed=seed) for seed in (1, 2, 3))

    def denoise(x, t):
        assert t.dtype == torch.int64 and t.shape == x.shape[:1]
        phase = (t.to(x.dtype) / 170).view(-1, 1, 1, 1) + shift[0].to(x.dtype).view(-1, 1, 1)
        mixed = torch.einsum("oc,bchw->bohw", mix_in.to(x.dtype), x)
        hidden = torch.tanh(mixed + torch.sin(phase))
        return strength * (
            0.3 * x + 0.4 * torch.einsum("oc,bchw->bohw", mix_out.to(x.dtype), hidden)
        )

    return denoise


def recorded(denoise):
    """`denoise`, and the list that collects its inputs and timesteps."""
    calls = []

    def record(x, t):
        calls.append((x.clone(), int(t[0])))
        return denoise(x, t)

    return record, calls


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def trajectory(scheduler, denoise, x, steps, eta=None, own=None):
    """All states of a diffusers scheduler, the initial noise and the result included."""
    scheduler.set_timesteps(steps)
    states = [x]
    for t in scheduler.timesteps:
        options = {}
        if eta:
            noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in own])
            options = {"eta": eta, "variance_noise": noise}
        eps = denoise(x, t.expand(len(x)))
        x = scheduler.step(eps, t, x, **options).prev_sample
        states.append(x)
    return states


def worst(ours, theirs):
    """Largest difference over a whole trajectory, each state relative to its own largest value."""
    assert len(ours) == len(theirs)
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


# Schedule


def test_alpha_bar_equals_diffusers(diffusers):
    theirs = diffusers.DDIMScheduler(**DDIM).alphas_cumprod.double()
    ours = torch.tensor(alpha_bar(), dtype=torch.float64)
    assert ours.shape == (1000,)
    assert ((ours - theirs).abs() / theirs).max() < 2e-6  # theirs is a product in float32
    assert alpha_bar()[0] == pytest.approx(0.99915, abs=1e-12)
    level = noise_level(999)
    assert level.sigma / level.alpha == pytest.approx(14.6146, abs=1e-4)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-15)
    assert level.lam == pytest.approx(-math.log(14.6146), abs=1e-5)


# fmt: off
TABLE = [
    ("leading", False, [951, 901], [51, 1]), ("leading", True, [941, 894], [95, 48]),
    ("linspace", False, [999, 946], [53, 0]), ("linspace", True, [999, 949], [100, 50]),
    ("trailing", False, [999, 949], [99, 49]), ("trailing", True, [999, 949], [99, 49]),
]
# fmt: on


@pytest.mark.parametrize("spacing, end_node, first, last", TABLE)
def test_timesteps_of_20_steps(spacing, end_node, first, last):
    ts = timesteps(20, spacing, end_node)
    assert len(ts) == 20 and ts[:2] == first and ts[-2:] == last


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_timesteps_equal_diffusers_for_every_number_of_steps(diffusers, name, spacing):
    theirs = getattr(diffusers, name)(**SD15, timestep_spacing=spacing)
    end_node = name.startswith("UniPC")
    refused = []
    for steps in range(1, NUM_TIMESTEPS + 1):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        if expected == [0]:  # one step from t = 0, where there is no noise: ours starts at 999
            expected = [NUM_TIMESTEPS - 1]
        if spacing == "trailing" and expected[-1] == -1:  # numpy.arange makes one too many
            expected.pop()
        try:
            assert timesteps(steps, spacing, end_node) == expected
        except ValueError:
            assert len(set(expected)) < steps or max(expected) > 999
            refused.append(steps)
    by_hand = {
        ("leading", False): [1000],
        ("leading", True): [999, 1000],
        ("linspace", True): [1000],
    }
    assert refused == by_hand.get((spacing, end_node), [])


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 7), (3,)])
def test_add_noise_equals_diffusers(diffusers, shape):
    x0, eps, t = normal(*shape, seed=1), normal(*shape, seed=2), torch.tensor([0, 500, 999])
    theirs = diffusers.DDIMScheduler(**DDIM).add_noise(x0, eps, t)
    assert (add_noise(x0, eps, t) - theirs).abs().max() < 2e-6
    half = add_noise(x0.bfloat16(), eps.bfloat16(), t)
    assert half.dtype == torch.bfloat16 and (half - theirs).abs().max() < 0.05


def test_add_noise_keeps_the_gradient_after_inference_mode():
    alpha_bar.cache_clear()
    x0, t = normal(2, 4, seed=1), torch.tensor([5, 700])
    with torch.inference_mode():
        add_noise(x0, x0, t)
    x0.requires_grad_()
    add_noise(x0, torch.zeros(2, 4), t).sum().backward()
    assert torch.allclose(x0.grad, alpha_sigma(t, 2)[0].expand(2, 4))


# Samplers against diffusers


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_unipc_equals_diffusers(diffusers, spacing, order, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        **SD15, timestep_spacing=spacing, solver_order=order
    )
    x = normal(2, 4, 5, 6, seed=7)
    denoise, calls = recorded(toy_network())
    result = sample_unipc(denoise, x, steps, spacing, order)
    theirs = trajectory(scheduler, toy_network(), x, steps)
    assert [t for _, t in calls] == scheduler.timesteps.tolist()
    assert worst([state for state, _ in calls] + [result], theirs) < 1e-4


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(diffusers, eta, steps):
    scheduler = diffusers.DDIMScheduler(**DDIM)
    x = normal(2, 4, 5, 6, seed=7)
    denoise, calls = recorded(toy_network())
    result = sample_ddim(denoise, x, steps, eta=eta, generator=generators(2) if eta else None)
    theirs = trajectory(scheduler, toy_network(), x, steps, eta, generators(2))
    assert [t for _, t in calls] == scheduler.timesteps.tolist()
    assert worst([state for state, _ in calls] + [result], theirs) < 1e-4


@pytest.mark.parametrize("steps", STEPS)
def test_plain_inversion_equals_diffusers(diffusers, steps):
    x = normal(2, 4, 5, 6, seed=7)
    theirs = trajectory(diffusers.DDIMInverseScheduler(**DDIM), toy_network(), x, steps)
    denoise, calls = recorded(toy_network())
    result = invert_ddim(denoise, x, steps)
    assert worst([state for state, _ in calls] + [result], theirs) < 1e-4


# Samplers against solutions known by hand


@pytest.mark.parametrize("steps", [1, 4, 20, 30, 48])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name, end", [("unipc", (1, 0)), ("ddim", noise_level(0)[:2])])
def test_one_image_with_one_noise_stays_on_its_line(name, end, spacing, steps):
    """With the true eps at hand, x is alpha x0 + sigma eps at each t that the network is told."""
    x0, eps = (normal(2, 4, 5, 6, seed=seed, dtype=torch.float64) for seed in (1, 2))
    denoise, calls = recorded(lambda x, t: eps)
    first = noise_level(timesteps(steps, spacing, end_node=name == "unipc")[0])
    result = SAMPLERS[name](denoise, first.alpha * x0 + first.sigma * eps, steps, spacing)
    assert len(calls) == steps
    for x, t in calls:
        assert torch.allclose(x, noise_level(t).alpha * x0 + noise_level(t).sigma * eps, atol=1e-9)
    assert torch.allclose(result, end[0] * x0 + end[1] * eps, atol=1e-9)


MEAN, DEVIATION = 0.7, 0.4


def gaussian_network(x, t):
    """The optimal eps for data N(MEAN, DEVIATION^2)."""
    alpha, sigma, _ = noise_level(int(t[0]))
    return sigma * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)


def gaussian(level):
    """Where the exact flow has the data MEAN + DEVIATION z, z in [-3, 3], at a level."""
    z = torch.linspace(-3, 3, 61, dtype=torch.float64).view(1, 1, 1, -1)
    return level.alpha * MEAN + math.hypot(level.alpha * DEVIATION, level.sigma) * z


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_converges_to_the_gaussian_with_order_1(spacing):
    errors = []
    for steps in (25, 50, 100, 200):
        x = gaussian(noise_level(timesteps(steps, spacing)[0]))
        result = sample_ddim(gaussian_network, x, steps, spacing)
        errors.append(float((result - gaussian(noise_level(0))).abs().max()))
    assert errors[-1] < 0.03
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.7 < coarse / fine < 2.3


@pytest.mark.parametrize(
    "order, at_10, at_320", [(1, 4e-2, 3e-3), (2, 4e-3, 1e-3), (3, 3e-3, 7e-4)]
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_unipc_follows_the_gaussian(spacing, order, at_10, at_320):
    """Up to the last timestep; the step from there to sigma = 0 is x0 by definition. DDIM: 3e-1."""
    for steps, bound in ((10, at_10), (320, at_320)):
        ts = timesteps(steps, spacing, end_node=True)
        first, last = noise_level(ts[0]), noise_level(ts[-1])
        result = sample_unipc(gaussian_network, gaussian(first), steps, spacing, order)
        x = gaussian(last)
        x0 = (x - last.sigma * gaussian_network(x, ts[-1:])) / last.alpha
        assert (result - x0).abs().max() < bound


def test_ddim_with_eta_1_keeps_the_gaussian():
    count = 20000
    x = normal(1, 1, 1, count, seed=5)
    result = sample_ddim(gaussian_network, x, 200, "trailing", 1.0, generators(1))
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(DEVIATION, abs=0.02)


# Inversion


def test_inversion_comes_back_and_iterations_are_why():
    x0, denoise = normal(2, 4, 5, 6, seed=11), toy_network()
    errors = []
    for iterations in (0, 1, 5):
        counted, calls = recorded(denoise)
        noise = invert_ddim(counted, x0, 50, iterations)
        assert len(calls) == 50 * (1 + iterations)
        errors.append(float((sample_ddim(denoise, noise, 50) - x0).abs().max()))
    assert errors[0] > 5 * errors[1] and errors[1] > 100 * errors[2]
    assert errors[2] < 1e-2


# The calling convention


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedules_are_the_samplers_own(name):
    for steps in (1, 7, 20):
        denoise, calls = recorded(lambda x, t: x)
        SAMPLERS[name](denoise, normal(2, 3, seed=1), steps=steps)
        assert timesteps_of(SAMPLERS[name], steps) == [t for _, t in calls]


@pytest.mark.parametrize("name, options", [("unipc", {}), ("ddim", {}), ("ddim", {"eta": 0.7})])
def test_image_of_a_batch_equals_the_image_alone(name, options):
    x, sample = normal(3, 4, 5, 6, seed=7), SAMPLERS[name]
    own = [{"generator": generators(3, first=40)} if options else {}]
    own += [{"generator": generators(1, first=40 + k)} if options else {} for k in range(3)]
    batch = sample(toy_network(), x, 10, **options, **own[0])
    for k in range(3):
        alone = sample(toy_network(), x[k : k + 1], 10, **options, **own[1 + k])
        assert torch.allclose(alone[0], batch[k], atol=1e-5)
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


RUNS = {
    "unipc": lambda *a, **k: sample_unipc(*a, 8, **k),
    "ddim": lambda *a, **k: sample_ddim(*a, 8, eta=0.5, generator=generators(2), **k),
    "invert": lambda *a, **k: invert_ddim(*a, 8, iterations=1, **k),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_x_is_the_networks_and_the_results(name, dtype):
    x = normal(2, 4, 5, 6, seed=7, dtype=dtype)
    before, x0_dtypes = x.clone(), set()
    denoise, calls = recorded(toy_network())
    result = RUNS[name](denoise, x, progress=lambda step, total, t, x0: x0_dtypes.add(x0.dtype))
    assert torch.equal(x, before)
    assert result.dtype == dtype and {state.dtype for state, _ in calls} == {dtype}
    assert x0_dtypes == {torch.float64 if dtype == torch.float64 else torch.float32}
    exact = RUNS[name](toy_network(), before.double())
    accuracy = max(8 * torch.finfo(dtype).eps, 1e-12)
    assert (result - exact).abs().max() / exact.abs().max() < accuracy


@pytest.mark.parametrize("name", RUNS)
def test_progress_is_called_once_per_step(name):
    seen = []
    denoise, calls = recorded(toy_network())
    result = RUNS[name](denoise, normal(2, 4, 5, 6, seed=7), progress=lambda *a: seen.append(a))
    assert [step for step, *_ in seen] == list(range(1, 9))
    assert {total for _, total, *_ in seen} == {8}
    assert [t for _, _, t, _ in seen] == list(dict.fromkeys(t for _, t in calls))
    assert all(x0.shape == result.shape for *_, x0 in seen)
    if name == "unipc":
        assert torch.equal(seen[-1][-1], result)


@pytest.mark.parametrize("name", RUNS)
def test_no_graph_is_kept(name):
    weight = torch.ones(1, requires_grad=True)
    result = RUNS[name](lambda x, t: weight * x, normal(2, 4, 5, 6, seed=7))
    assert not result.requires_grad


def test_guided_doubles_the_batch_and_extrapolates():
    context = torch.tensor([1.0, 2.0, 30.0, 40.0]).view(4, 1, 1, 1)  # [uncond; cond] of two samples

    def denoise(x, t):
        assert x.shape[0] == t.shape[0] == 4 and t.tolist() == [5, 6, 5, 6]
        return x * context

    x, t = normal(2, 4, 5, 6, seed=7), torch.tensor([5, 6])
    uncond, cond = x * context[:2], x * context[2:]
    for scale in (0.0, 1.0, 7.5):
        eps = guided(denoise, scale)(x, t)
        assert torch.allclose(eps, uncond + scale * (cond - uncond), atol=1e-4)


# Errors

X = torch.zeros(2, 4, 5, 6)
ERRORS = {
    "no steps": (lambda: sample_unipc(None, X, 0), "steps must be in 1..1000, got 0"),
    "leaves 0..999": (lambda: sample_ddim(None, X, 1000), "1000 leading timesteps would"),
    "repeats": (lambda: sample_unipc(None, X, 1000), "1000 linspace timesteps would"),
    "spacing": (lambda: sample_ddim(None, X, 9, "karras"), "'karras'.*leading, linspace, trai"),
    "order": (lambda: sample_unipc(None, X, order=4), "order must be 1, 2 or 3, got 4"),
    "eta": (lambda: sample_ddim(None, X, eta=1.5), "eta must be in 0..1, got 1.5"),
    "no generators": (lambda: sample_ddim(None, X, eta=0.5), "needs a list of 2 generators"),
    "shape of eps": (lambda: add_noise(X, X[:1], torch.tensor([1, 2])), "one shape"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("t", [-1, 1000])
def test_add_noise_never_wraps_around(t):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        add_noise(X, X, torch.tensor([0, t]))
