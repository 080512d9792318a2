"""theta <-> tokens: an exact inverse that keeps layers apart."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tina.codec import DAMPING, Codec, fit_codec
from tina.curvature import Curvature
from tina.errors import ConfigError
from tina.families import FAMILIES, ConvNet, Head, build_family
from tina.layout import ParamLayout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permutation(n, *, seed):
    """An orthogonal matrix whose products round nothing."""
    return torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def codec_of(layout, *, chunk, exponents=(0, 0)):
    """Directions that are axes and scales that are powers of two: neither rounds anything."""
    generator = torch.Generator().manual_seed(layout.size)
    low, high = exponents

    def scale(n):
        return 2.0 ** torch.randint(low, high + 1, (n,), generator=generator)

    sides = [(slot.shape[0], slot.numel // slot.shape[0]) for slot in layout.body]
    return Codec(
        layout=layout,
        chunk=chunk,
        left=tuple(permutation(o, seed=o) for o, _ in sides),
        right=tuple(permutation(i, seed=i) for _, i in sides),
        body_scale=scale(layout.body_size),
        row_right=permutation(layout.row_size, seed=1),
        row_scale=scale(layout.row_size),
    )


def turned(codec, *, seed=0):
    """The same codec with directions that are no axes."""

    def orthogonal(like, seed):
        return torch.linalg.qr(normal(*like.shape, seed=seed).double()).Q.float()

    return dataclasses.replace(
        codec,
        left=tuple(orthogonal(m, seed + i) for i, m in enumerate(codec.left)),
        right=tuple(orthogonal(m, seed + 10 + i) for i, m in enumerate(codec.right)),
        row_right=orthogonal(codec.row_right, seed + 20),
    )


@st.composite
def codecs(draw):
    """Any small layout, heads without a body included, cut at any length."""
    classes = draw(st.integers(1, 5))
    widths = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    if widths:
        network = ConvNet(draw(st.sampled_from([1, 3])), widths, (1,) * len(widths), classes)
    else:
        network = Head(draw(st.integers(1, 9)), classes)
    chunk = draw(st.integers(1, 80))
    return codec_of(ParamLayout.of(network), chunk=chunk, exponents=(-8, 8))


def residuals(codec, batch, seed=0):
    layout = codec.layout
    body = normal(batch, layout.body_size, seed=seed)
    return body, normal(batch, layout.num_classes, layout.row_size, seed=seed + 1)


def everyone(batch, classes):
    return torch.ones(batch, classes, dtype=torch.bool)


# --- inverse --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(codecs(), st.integers(1, 3))
def test_decode_is_the_inverse_of_encode(codec, batch):
    body, rows = residuals(codec, batch)
    tokens = codec.encode(body, rows)
    assert tokens.shape == (batch, codec.body_tokens + codec.layout.num_classes, codec.width)
    decoded_body, decoded_rows = codec.decode(tokens)
    assert torch.equal(decoded_body, body)
    assert torch.equal(decoded_rows, rows)


@settings(deadline=None)
@given(codecs())
def test_encode_is_the_inverse_of_decode_on_values_that_carry_something(codec):
    k = codec.layout.num_classes
    valid = codec.valid(everyone(2, k))
    tokens = normal(2, codec.body_tokens + k, codec.width)
    assert torch.equal(codec.encode(*codec.decode(tokens)), tokens * valid)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_survives_scales_of_any_size(name):
    layout = build_family(name, channels=3, image_size=32).layout(10)
    codec = dataclasses.replace(
        turned(codec_of(layout, chunk=576)),
        body_scale=normal(layout.body_size).exp() * 1e-2,
        row_scale=normal(layout.row_size).exp() * 1e-2,
    )
    body, rows = residuals(codec, 2)
    decoded_body, decoded_rows = codec.decode(codec.encode(body, rows))
    # float32's rounding in the sums over up to 576 values, twice
    torch.testing.assert_close(decoded_body, body, atol=2e-5, rtol=0)
    torch.testing.assert_close(decoded_rows, rows, atol=2e-5, rtol=0)


@settings(deadline=None)
@given(codecs(), st.integers(0, 99))
def test_lengths_are_kept_where_no_direction_is_scaled(codec, seed):
    plain = dataclasses.replace(
        turned(codec, seed=seed),
        body_scale=torch.ones_like(codec.body_scale),
        row_scale=torch.ones_like(codec.row_scale),
    )
    body, rows = residuals(plain, 2)
    tokens = plain.encode(body, rows)
    expected = body.square().sum(1) + rows.square().sum((1, 2))
    torch.testing.assert_close(tokens.square().sum((1, 2)), expected)


@settings(deadline=None)
@given(codecs())
def test_zeros_decode_to_no_residual_and_back(codec):
    body, rows = codec.decode(torch.zeros(1, codec.body_tokens + 3, codec.width))
    assert body.shape == (1, codec.layout.body_size)
    assert rows.shape == (1, 3, codec.layout.row_size)
    assert not body.any()
    assert not rows.any()
    assert not codec.encode(body, rows).any()


def test_any_number_of_classes_fits_one_codec():
    codec = codec_of(ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 6)), chunk=10)
    body, rows = residuals(codec, 2)
    few = codec.encode(body, rows[:, :2])
    assert torch.equal(few, codec.encode(body, rows)[:, : codec.body_tokens + 2])
    assert torch.equal(codec.decode(few)[1], rows[:, :2])


def test_the_gradient_of_decode_is_its_transpose():
    codec = turned(codec_of(ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 2)), chunk=8))
    x, y = normal(2, 1, codec.body_tokens + 2, codec.width).requires_grad_(), None
    body, rows = codec.decode(x[0])
    a, b = normal(*body.shape, seed=3), normal(*rows.shape, seed=4)
    (y,) = torch.autograd.grad((body * a).sum() + (rows * b).sum(), x)
    # linear: its value along any x is the product with the gradient
    other, others = codec.decode(x[1])
    torch.testing.assert_close((y[0] * x[1]).sum(), (other * a).sum() + (others * b).sum())


def test_decode_is_as_exact_within_an_autocast():
    codec = turned(codec_of(ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 2)), chunk=8))
    tokens = normal(1, codec.body_tokens + 2, codec.width)
    with torch.autocast("cpu", torch.bfloat16):
        inside = codec.decode(tokens)
    for value, plain in zip(inside, codec.decode(tokens), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, plain)


# --- tokens ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(codecs())
def test_a_chunk_never_crosses_a_layer(codec):
    seen = []
    for token in codec.body_index:
        places = token[token >= 0].tolist()
        assert 1 <= len(places) <= codec.chunk
        homes = {
            slot.name
            for slot in codec.layout.body
            for place in places
            if slot.offset <= place < slot.offset + slot.numel
        }
        assert len(homes) == 1
        seen += places
    assert sorted(seen) == list(range(codec.layout.body_size))


@settings(deadline=None)
@given(codecs())
def test_a_layer_begins_with_its_steepest_directions(codec):
    """The unit is smallest there."""
    for slot in codec.layout.body:
        inside = (codec.body_index >= slot.offset) & (codec.body_index < slot.offset + slot.numel)
        units = codec.body_scale[codec.body_index[inside]]
        assert (units.diff() >= 0).all()


@settings(deadline=None)
@given(codecs(), st.data())
def test_valid_counts_the_parameters_of_the_classes_that_are_there(codec, data):
    k = codec.layout.num_classes
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=k, max_size=k)))
    valid = codec.valid(torch.stack([mask, torch.ones_like(mask)]))
    present = codec.layout.body_size + int(mask.sum()) * codec.layout.row_size
    assert valid.sum((1, 2)).tolist() == [present, codec.layout.size]
    assert valid[0, codec.body_tokens :].any(1).tolist() == mask.tolist()


def test_a_row_is_one_token():
    codec = codec_of(ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 6)), chunk=10)
    body, rows = residuals(codec, 1)
    order = torch.tensor([2, 5, 0, 1, 4, 3])
    tokens, permuted = codec.encode(body, rows), codec.encode(body, rows[:, order])
    s = codec.body_tokens
    assert torch.equal(permuted[:, :s], tokens[:, :s])
    assert torch.equal(permuted[:, s:], tokens[:, s:][:, order])


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    # CNN-5K: 432 values in one chunk, 4,608 in eight of 576
    [("cnn5k", 1 + 8, 576), ("resnet20_head", 0, 65), ("vitb32_head", 0, 513)],
)
def test_tokens_of_the_papers_families(name, tokens, width):
    codec = codec_of(build_family(name, channels=3, image_size=32).layout(10), chunk=576)
    assert (codec.body_tokens, codec.width) == (tokens, width)


# --- scales ---------------------------------------------------------------------------------------


def test_a_unit_costs_a_constant_where_it_is_steep_and_is_one_where_it_is_flat():
    layout = ParamLayout.of(ConvNet(1, (2,), (1,), 2))
    plain = codec_of(layout, chunk=20)
    fisher = torch.tensor([1e6, 1e3, 0.0]).repeat(6)
    curvature = Curvature(
        left=plain.left,
        right=plain.right,
        body=fisher,
        row_right=plain.row_right,
        row=fisher[:3],
    )
    codec = fit_codec(layout, curvature, chunk=20)
    steep = fisher > 0
    cost = 0.5 * (fisher * codec.body_scale.square())[steep]
    torch.testing.assert_close(cost, torch.full_like(cost, DAMPING**2 / 2), rtol=1e-4, atol=0)
    assert (codec.body_scale[~steep] == 1).all()
    assert torch.equal(codec.row_scale, codec.body_scale[:3])


@pytest.mark.parametrize("name", ["left.0", "right.0", "body_scale", "row_right", "row_scale"])
def test_tensors_of_another_layout_are_refused(name):
    codec = codec_of(ParamLayout.of(ConvNet(1, (3,), (1,), 2)), chunk=8)
    tensors = codec.tensors()
    assert Codec.of(codec.layout, chunk=8, tensors=tensors) == codec
    tensors[name] = torch.ones(5)
    with pytest.raises(ConfigError, match=rf"{name} has shape \(5,\), the classifier needs"):
        Codec.of(codec.layout, chunk=8, tensors=tensors)
