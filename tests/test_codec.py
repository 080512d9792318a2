"""theta <-> tokens: an exact inverse that keeps layers apart."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tina.classifiers import FAMILIES, ConvNet, Head, build_family
from tina.codec import Codec, fit_codec
from tina.errors import ConfigError
from tina.layout import ParamLayout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec_of(layout, *, chunk, exponents=(0, 0)):
    """Scales that are powers of two: dividing and multiplying by them rounds nothing."""
    generator = torch.Generator().manual_seed(layout.size)
    low, high = exponents

    def scale(n):
        return 2.0 ** torch.randint(low, high + 1, (n,), generator=generator)

    return Codec(
        layout=layout,
        chunk=chunk,
        body_scale=scale(layout.body_size),
        row_scale=scale(layout.row_size),
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
        codec_of(layout, chunk=576),
        body_scale=normal(layout.body_size).exp() * 1e-2,
        row_scale=normal(layout.row_size).exp() * 1e-2,
    )
    body, rows = residuals(codec, 2)
    decoded_body, decoded_rows = codec.decode(codec.encode(body, rows))
    torch.testing.assert_close(decoded_body, body, atol=0, rtol=3e-7)
    torch.testing.assert_close(decoded_rows, rows, atol=0, rtol=3e-7)


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


def test_decode_is_linear_and_its_gradient_is_the_scale():
    codec = codec_of(ParamLayout.of(ConvNet(1, (3,), (1,), 2)), chunk=8, exponents=(-3, 3))
    tokens = normal(1, codec.body_tokens + 2, codec.width).requires_grad_()
    body, rows = codec.decode(tokens)
    (body.sum() + rows.sum()).backward()
    scales = codec.encode(
        codec.body_scale.square()[None], codec.row_scale.square().expand(1, 2, -1)
    )
    assert torch.equal(tokens.grad, scales)


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
    assert seen == list(range(codec.layout.body_size))


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


def test_scales_are_root_mean_squares_per_layer():
    layout = ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 2))
    first, second = (slot.numel for slot in layout.body)
    signs = normal(5, layout.body_size).sign()
    body = signs * torch.cat([torch.full((first,), 0.5), torch.full((second,), 4.0)])
    rows = normal(5, 2, layout.row_size, seed=1).sign()
    rows[..., :-1] *= 0.25
    rows[..., -1] *= 8
    codec = fit_codec(layout, chunk=20, body=body, rows=rows, class_mask=everyone(5, 2))
    assert torch.equal(codec.body_scale, body[0].abs())
    assert torch.equal(codec.row_scale, rows[0, 0].abs())


def test_a_fitted_codec_makes_tokens_of_unit_size():
    layout = ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 4))
    body, rows = normal(50, layout.body_size), normal(50, 4, layout.row_size, seed=1)
    body[:, : layout.body[0].numel] *= 1e-3
    mask = torch.arange(4) < torch.arange(50)[:, None] % 3 + 2
    codec = fit_codec(layout, chunk=20, body=body, rows=rows, class_mask=mask)
    tokens, valid = codec.encode(body, rows * mask[..., None]), codec.valid(mask)
    assert not tokens[~valid].any()
    assert tokens[valid].square().mean() == pytest.approx(1, rel=1e-4)
    conv = tokens[:, :2][valid[:, :2]]  # the first layer has 27 values, two tokens
    assert len(conv) == 50 * 27
    assert conv.square().mean() == pytest.approx(1, rel=1e-4)


def test_rows_of_absent_classes_do_not_count():
    layout = ParamLayout.of(Head(6, 3))
    rows, body = normal(9, 3, 7), torch.zeros(9, 0)
    mask = everyone(9, 3)
    mask[:, 2] = False
    spoilt = rows.clone()
    spoilt[:, 2] = 1e6
    options = {"chunk": 5, "body": body}
    expected = fit_codec(layout, rows=rows[:, :2], class_mask=mask[:, :2], **options).row_scale
    found = fit_codec(layout, rows=spoilt, class_mask=mask, **options).row_scale
    assert torch.equal(found, expected)


@pytest.mark.parametrize("part", ["first layer", "second layer", "weights", "biases"])
def test_a_layer_that_nothing_was_learnt_in_is_refused(part):
    layout = ParamLayout.of(ConvNet(1, (3, 4), (1, 1), 2))
    body, rows = normal(5, layout.body_size), normal(5, 2, layout.row_size, seed=1)
    first = layout.body[0].numel
    {
        "first layer": body[:, :first],
        "second layer": body[:, first:],
        "weights": rows[..., :-1],
        "biases": rows[..., -1],
    }[part].zero_()
    with pytest.raises(ConfigError, match="do not differ from the generic model: train them"):
        fit_codec(layout, chunk=20, body=body, rows=rows, class_mask=everyone(5, 2))


def test_scales_of_another_layout_are_refused():
    layout = ParamLayout.of(ConvNet(1, (3,), (1,), 2))
    codec = codec_of(layout, chunk=8)
    with pytest.raises(ConfigError, match="row_scale has 5 values, a row has 4"):
        dataclasses.replace(codec, row_scale=torch.ones(5))
    with pytest.raises(ConfigError, match="body_scale has 26 values, the body has 27"):
        dataclasses.replace(codec, body_scale=torch.ones(26))
