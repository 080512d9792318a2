"""Picture files to tensors: values, and what it takes to read them."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from tina.errors import DataError
from tina.images import LONGEST, checked, read_image, shrink


@pytest.mark.parametrize("size", [(700, 1000), (600, 800), (3, 3), (LONGEST, LONGEST + 1)])
def test_a_white_picture_stays_white_and_no_more(size):
    found = shrink(torch.ones(1, 3, *size))
    assert found.amax() <= 1
    assert found.amin() > 1 - 1e-5
    assert found.shape[-1] == min(*size, LONGEST)


def test_a_large_picture_is_in_memory_once(tmp_path):
    width, height = 2000, 1500
    Image.new("RGB", (width, height), (255, 0, 51)).save(tmp_path / "a.png")
    tracemalloc.start()
    try:
        image = read_image(tmp_path / "a.png", channels=3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert image.shape == (1, 3, height, width)
    np.testing.assert_allclose(image[0, :, 0, 0], [1, 0, 0.2])
    assert peak < 1.3 * 4 * image.numel()


def stroke(mode, shade=0):
    """A bar of a shade and its half-covered edge, on what is transparent and of that shade too."""
    image = Image.new("LA", (4, 3), (shade, 0))
    image.paste((shade, 255), (0, 0, 1, 3))
    image.paste((shade, 128), (1, 0, 2, 3))
    return image.convert("RGBA").convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("shade", [0, 200])
def test_a_transparent_picture_lies_on_white(tmp_path, mode, channels, shade):
    stroke(mode, shade).save(tmp_path / "a.png")
    expected = [shade, 255 - (255 - shade) * 128 / 255, 255, 255]
    found = read_image(tmp_path / "a.png", channels=channels)
    assert found.shape == (1, channels, 3, 4)
    np.testing.assert_allclose(255 * found[0, :, 0], [expected] * channels, atol=1)


@pytest.mark.parametrize(
    ("mode", "options", "format"),
    [
        ("1", {"transparency": 0}, "PNG"),
        ("L", {"transparency": 0}, "PNG"),
        ("RGB", {"transparency": (0, 0, 0)}, "PNG"),
        ("P", {"transparency": 0}, "PNG"),
        ("P", {"transparency": bytes([0, 255])}, "PNG"),
        ("P", {"transparency": 0}, "GIF"),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_colour_may_be_what_is_transparent(tmp_path, mode, options, format, channels):
    values = np.array([[0, 1, 0]], dtype=np.uint8)
    image = Image.fromarray(values if mode == "P" else 255 * values)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.convert(mode).save(tmp_path / "a", format, **options)
    assert read_image(tmp_path / "a", channels=channels).unique().tolist() == [1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_opaque_picture_is_what_it_was(tmp_path, mode, channels):
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    image.save(tmp_path / "a", "TIFF" if mode == "CMYK" else "PNG")
    expected = np.atleast_3d(image.convert("L" if channels == 1 else "RGB"))
    found = read_image(tmp_path / "a", channels=channels)
    np.testing.assert_array_equal((255 * found[0]).round().permute(1, 2, 0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_up_to_255_are_refused_and_bytes_are_not(dtype):
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    images[0, 0, 0, 0] = 255
    with pytest.raises(DataError, match=r"takes floats in \[0, 1\] or uint8 up to 255, .* to 255$"):
        checked(images.to(dtype), channels=3)
    assert torch.equal(checked(images, channels=3), images)
    fractions = images.to(dtype) / 255 * 1.5  # as what disturbs pictures may have them
    assert torch.equal(checked(fractions, channels=3), fractions.float())
    assert not len(checked(images[:0].to(dtype), channels=3))


@pytest.mark.parametrize("kind", ["compile", "export", "vmap", "jacrev"])
def test_where_values_cannot_be_looked_at_they_are_not(kind):
    class Check(torch.nn.Module):
        def forward(self, images):
            return 2 * checked(images, channels=3)

    images, check = torch.rand(2, 3, 5, 4), Check()
    if kind == "compile":
        found = torch.compile(check, fullgraph=True, backend="eager")(images)
    elif kind == "export":
        found = torch.export.export(check, (images,)).module()(images)
    elif kind == "vmap":
        found = torch.vmap(check)(images[None])[0]
    else:
        found = (torch.func.jacrev(check)(images).flatten(4).sum(4) * images).squeeze()
    assert torch.equal(found, 2 * images)
