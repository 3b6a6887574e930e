"""The path between two noises, and pictures that start from given noise."""
import math

import pytest
import torch

from pipeline import Pipeline, slerp


def test_slerp_is_the_arc():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for amount in (0.0, 0.25, 0.5, 0.9, 1.0):
        angle = amount * math.pi / 2
        expected = 2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(a, b, amount), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slerp_of_noise_is_noise_and_ends_in_its_ends(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 64, 64).to(dtype)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    middle = slerp(a, b, 0.5)
    assert middle.dtype == dtype and abs(middle.float().std() - 1) < 0.02
    torch.testing.assert_close(slerp(b, a, 0.3), slerp(a, b, 0.7))


def test_slerp_without_an_arc_is_a_line():
    a = torch.randn(5)
    for b in (a, 3 * a, -a, torch.zeros(5)):
        assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(slerp(a, -a, 0.25), a / 2)


def test_pictures_from_given_noise(world):
    pipeline = Pipeline.load(world)
    first, second = pipeline.noise([3, 8])
    given = pipeline.generate(["a man"] * 2, [second, 3], steps=2)
    expected = pipeline.generate(["a man"] * 2, [8, 3], steps=2)
    assert torch.equal(given, expected) and (given[0] - given[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"must be \(4, 8, 16\) for pictures 128 pixels wide and 64 high"):
        pipeline.noise([3, second], (64, 128))


def test_the_prior_alone_beside_others_in_a_batch(world):
    """Without a person is not the same as without MoA."""
    pipeline = Pipeline.load(world, world / "moa.safetensors")
    prompts, seeds = ["a man on the beach"] * 2, [3, 3]
    mixed = pipeline.generate(prompts, seeds, [None, []], steps=3)
    for picture, alone in zip(mixed, (True, False), strict=True):
        expected, = pipeline.generate(prompts[:1], seeds[:1], prior_only=alone, steps=3)
        assert (picture - expected).abs().max() < 1e-4
    assert (mixed[0] - mixed[1]).abs().max() > 0.1
