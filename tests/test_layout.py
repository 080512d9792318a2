"""Theta and its named tensors: exact inverses, and strict about names and shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tina.errors import CheckpointError, ConfigError
from tina.families import ConvNet, Head
from tina.layout import ParamLayout

NETWORK = ConvNet(1, (4, 6), (2, 1), 3)
LAYOUT = ParamLayout.of(NETWORK)


@st.composite
def networks(draw):
    """Any small classifier: some convolutions, or a head alone."""
    classes = draw(st.integers(1, 6))
    widths = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    if not widths:
        return Head(draw(st.integers(1, 9)), classes)
    return ConvNet(draw(st.sampled_from([1, 3])), widths, (1,) * len(widths), classes)


def draw_theta(layout, *batch):
    return torch.randn(*batch, layout.size, generator=torch.Generator().manual_seed(layout.size))


@settings(deadline=None)
@given(networks())
def test_slots_tile_theta_in_the_order_of_the_parameters(network):
    layout = ParamLayout.of(network)
    offset = 0
    for slot, (name, parameter) in zip(layout.slots, network.named_parameters(), strict=True):
        assert (slot.name, slot.shape, slot.offset) == (name, tuple(parameter.shape), offset)
        offset += parameter.numel()
    assert layout.size == offset
    assert layout.size == layout.body_size + layout.num_classes * layout.row_size
    assert layout.body_size == sum(slot.numel for slot in layout.body)
    assert layout.to_json() == [[n, list(p.shape)] for n, p in network.named_parameters()]


@settings(deadline=None)
@given(networks())
def test_flatten_and_unflatten_are_inverses(network):
    layout = ParamLayout.of(network)
    theta = draw_theta(layout)
    named = layout.unflatten(theta)
    assert torch.equal(layout.flatten(named), theta)
    state = {name: parameter.detach() for name, parameter in network.named_parameters()}
    again = layout.unflatten(layout.flatten(state))
    assert all(torch.equal(again[name], state[name]) for name in state)


@settings(deadline=None)
@given(networks(), st.lists(st.integers(1, 3), max_size=2))
def test_split_and_join_are_inverses(network, batch):
    layout = ParamLayout.of(network)
    theta = draw_theta(layout, *batch)
    body, rows = layout.split(theta)
    assert body.shape == (*batch, layout.body_size)
    assert rows.shape == (*batch, layout.num_classes, layout.row_size)
    assert torch.equal(layout.join(body, rows), theta)
    body_again, rows_again = layout.split(layout.join(-body, 2 * rows))
    assert torch.equal(body_again, -body)
    assert torch.equal(rows_again, 2 * rows)


def test_a_row_is_a_class_its_weights_and_then_its_bias():
    theta = draw_theta(LAYOUT)
    named = LAYOUT.unflatten(theta)
    body, rows = LAYOUT.split(theta)
    assert torch.equal(rows[:, :-1], named["fc.weight"])
    assert torch.equal(rows[:, -1], named["fc.bias"])
    assert torch.equal(body, torch.cat([named[slot.name].flatten() for slot in LAYOUT.body]))


def test_the_body_does_not_depend_on_the_number_of_classes():
    other = ParamLayout.of(ConvNet(1, (4, 6), (2, 1), 8))
    assert other.body == LAYOUT.body
    assert other.row_size == LAYOUT.row_size == 7
    assert (LAYOUT.num_classes, other.num_classes) == (3, 8)


def test_unflatten_is_differentiable_and_copies_nothing():
    theta = draw_theta(LAYOUT).requires_grad_()
    sum(tensor.square().sum() for tensor in LAYOUT.unflatten(theta).values()).backward()
    assert torch.equal(theta.grad, 2 * theta.detach())
    plain = theta.detach().clone()
    LAYOUT.unflatten(plain)["fc.bias"].zero_()
    assert torch.equal(plain[-3:], torch.zeros(3))


@pytest.mark.parametrize("shape", [(LAYOUT.size - 1,), (LAYOUT.size + 1,), (1, LAYOUT.size), ()])
def test_theta_of_another_shape_is_refused(shape):
    with pytest.raises(CheckpointError, match=rf"must have shape \({LAYOUT.size},\), got"):
        LAYOUT.unflatten(torch.zeros(shape))


def drop_bias(state):
    del state["fc.bias"]


def add_one(state):
    state["fc.scale"] = torch.ones(3)


def rename(state):
    state["head.weight"] = state.pop("fc.weight")


def transpose(state):
    state["fc.weight"] = state["fc.weight"].T


@pytest.mark.parametrize("spoil", [drop_bias, add_one, rename, transpose])
def test_tensors_of_another_layout_are_refused(spoil):
    state = LAYOUT.unflatten(draw_theta(LAYOUT))
    spoil(state)
    with pytest.raises(CheckpointError, match=r"another layout: expected .* got "):
        LAYOUT.flatten(state)


class NoBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.conv = nn.Conv2d(1, 2, 3)


@pytest.mark.parametrize("module", [NoBias(), HeadFirst(), nn.Linear(2, 2)])
def test_a_network_must_end_in_its_head(module):
    with pytest.raises(ConfigError, match="must end in a Linear named fc with a bias"):
        ParamLayout.of(module)
