"""The path between two noises."""
import math

import pytest
import torch

from pipeline import slerp


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
