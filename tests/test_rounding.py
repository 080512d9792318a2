"""Rounding for small checkpoints: how far values move, that twice is once, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tina.rounding import SCALE, in_eight_bits, in_full, in_half
from tina.tensors import pack_tensors

matrices = arrays(
    "float32",
    array_shapes(min_dims=2, max_dims=3, max_side=6),
    elements=st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4),
).map(torch.from_numpy)


@settings(deadline=None)
@given(matrices)
def test_no_value_moves_by_more_than_half_a_step(matrix):
    packed = in_eight_bits({"w": matrix})
    assert packed["w"].dtype == torch.int8
    step = packed["w" + SCALE].float().unsqueeze(-1)
    (again,) = in_full(packed).values()
    assert ((again - matrix).abs() <= step * 0.501).all()
    # the largest of each row is kept as well as its scale, of eight bits, allows
    most = matrix.abs().amax(-1)
    torch.testing.assert_close(again.abs().amax(-1), most, rtol=2**-8, atol=0)


@settings(deadline=None)
@given(matrices)
def test_rounded_again_it_is_the_same(matrix):
    packed = in_eight_bits({"w": matrix})
    assert pack_tensors(in_eight_bits(in_full(packed))) == pack_tensors(packed)


def test_vectors_are_halved_and_whole_numbers_kept():
    tensors = {"bias": torch.tensor([1 / 3]), "ids": torch.tensor([[70_000]]), "w": torch.eye(2)}
    packed = in_eight_bits(tensors)
    assert {k: v.dtype for k, v in packed.items()} == {
        "bias": torch.float16,
        "ids": torch.int64,
        "w": torch.int8,
        "w" + SCALE: torch.bfloat16,
    }
    again = in_full(packed)
    assert list(again) == list(tensors)
    assert torch.equal(again["ids"], tensors["ids"])
    assert torch.equal(again["bias"], tensors["bias"].half().float())
    assert torch.equal(in_full(in_half(tensors))["w"], tensors["w"])


@pytest.mark.parametrize("scales", [None, torch.ones(1), torch.ones(3)])
def test_a_matrix_without_its_scales_is_refused(scales):
    packed = in_eight_bits({"w": torch.randn(2, 3)})
    del packed["w" + SCALE]
    if scales is not None:
        packed["w" + SCALE] = scales
    with pytest.raises((KeyError, RuntimeError)):
        in_full(packed)


def test_scales_of_nothing_are_not_lost():
    """A checkpoint that holds them is refused, as it is with any other unknown tensor."""
    strange = {"w": torch.eye(2), "w" + SCALE: torch.ones(2)}
    assert list(in_full(strange)) == list(strange)
