"""Picture files to tensors: values, and what it takes to read them."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from tina.images import LONGEST, read_image, shrink


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
