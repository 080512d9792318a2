"""Data sets: partitions are sound, sources read the same images, errors say what to do."""

import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tina.datasets
from tina.datasets import PARTITIONS, _Decoded, load_dataset
from tina.errors import ConfigError, DataError
from tina.images import fit, read_image
from tina.jobconfig import DataConfig
from tina.sources import TORCHVISION_FOLDERS, _download
from tina.superclasses import CIFAR100_SUPERCLASSES

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAMES = ["maple_tree", "bus", "sea"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty user cache; returns the folder that cached images go to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TINA_DATA", raising=False)
    return tmp_path / "cache" / "tina" / "images"


def noise(count, *, seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def encode(pixels, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def write_parquet(path, contents, labels, *, names=NAMES, label="label", features=None):
    """A file as Hugging Face's `Dataset.to_parquet` writes it."""
    classes = {"names": list(names), "_type": "ClassLabel"}
    features = features or {"image": {"_type": "Image"}, label: classes}
    image = pa.array(
        [{"bytes": content, "path": None} for content in contents],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    columns = {key for key, kind in features.items() if kind["_type"] == "ClassLabel"} | {label}
    table = pa.table({"image": image} | dict.fromkeys(columns, pa.array(labels, pa.int64())))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=16)
    return path


def small_set(root, *, train=30, test=9, names=NAMES):
    """Train and test shard of lossless images, labels in turn; returns all pixels, train first."""
    pixels = noise(train + test)
    labels = [i % len(names) for i in range(train)], [i % len(names) for i in range(test)]
    contents = [encode(p) for p in pixels]
    write_parquet(root / "train-00000-of-00001.parquet", contents[:train], labels[0], names=names)
    if test:
        write_parquet(
            root / "test-00000-of-00001.parquet", contents[train:], labels[1], names=names
        )
    return pixels


def write_tree(root, *, per_class=6, names=("ant", "bee"), seed=0):
    """Class folders of PNG files; returns pixels in the order of sorted paths."""
    pixels = noise(per_class * len(names), seed=seed)
    for i, image in enumerate(pixels):
        folder = root / names[i // per_class]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(encode(image))
    return pixels


def as_pixels(dataset):
    return dataset.images.permute(0, 2, 3, 1).numpy()


def load(root, name="parquet", **options):
    return load_dataset(DataConfig(name=name, root=str(root), **options))


def refusal(root, name="parquet", **options):
    """The one-line DataError of a load that must fail."""
    with pytest.raises(DataError) as caught:
        load(root, name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- digits and partitions ------------------------------------------------------------------------


def test_digits_are_the_bundled_images_scaled_to_bytes(cache):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = load_dataset(DataConfig())
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    np.testing.assert_allclose(data.images[:, 0].numpy() / 255 * 16, bunch.images, atol=16 / 510)
    assert data.labels.tolist() == bunch.target.tolist()
    assert data.class_names[:3] == ("zero", "one", "two")
    assert data.num_classes == 10
    assert data.groups is None


def test_digits_are_read_without_scikit_learn_once_they_are_cached(cache, monkeypatch):
    first = load_dataset(DataConfig())
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it raises
    assert torch.equal(load_dataset(DataConfig()).images, first.images)


def test_digits_resize():
    assert load_dataset(DataConfig(image_size=16)).images.shape == (1797, 1, 16, 16)


def test_digits_partitions_are_stratified():
    data = load_dataset(DataConfig(report_fraction=0.3, select_fraction=0.1))
    for class_id in range(10):
        total = int((data.labels == class_id).sum())
        report, select, fit = (
            len(data.indices(key, [class_id])) for key in ("report", "select", "fit")
        )
        assert abs(report - 0.3 * total) <= 0.5
        assert abs(select - 0.1 * (total - report)) <= 0.5
        assert fit == total - report - select


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_partitions_are_disjoint_cover_all_and_keep_every_class(data):
    classes = data.draw(st.integers(1, 5))
    counts = st.lists(st.integers(3, 30), min_size=classes, max_size=classes)
    labels = np.repeat(np.arange(classes), data.draw(counts))
    own_test = np.zeros(len(labels), bool)
    if data.draw(st.booleans()):
        own_test[np.unique(labels, return_index=True)[1]] = True
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(labels))
    labels, own_test = labels[order], own_test[order]
    fractions = st.floats(0.01, 0.4)
    config = DataConfig(
        report_fraction=data.draw(fractions),
        select_fraction=data.draw(fractions),
        seed=data.draw(st.integers(0, 2**32)),
    )
    names = [str(i) for i in range(classes)]
    parts = dict(tina.datasets._partition(labels, own_test, names, config))
    assert list(parts) == list(PARTITIONS)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    for index in parts.values():
        assert np.all(np.diff(index) > 0)
        assert set(labels[index]) == set(range(classes))
    if own_test.any():
        np.testing.assert_array_equal(parts["report"], np.flatnonzero(own_test))


@pytest.mark.parametrize("fit", [[0, 1], [0, 1, 2, 3]], ids=["left out", "overlap"])
def test_check_partitions_finds_what_is_wrong(fit):
    good = {"fit": np.array([0, 1, 2]), "select": np.array([3]), "report": np.array([4])}
    tina.datasets._check_partitions(good, 5)
    with pytest.raises(AssertionError, match="overlap or leave"):
        tina.datasets._check_partitions(good | {"fit": np.array(fit)}, 5)


def test_the_seed_alone_decides_the_partition():
    one, same, other = (load_dataset(DataConfig(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one.partitions[key], same.partitions[key]) for key in PARTITIONS)
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert not torch.equal(one.partitions["report"], other.partitions["report"])


def test_mirrored_pictures_are_added_to_fit_alone():
    plain, both = load_dataset(DataConfig()), load_dataset(DataConfig(mirror=True))
    fit = plain.indices("fit")
    for key in ("select", "report"):
        assert torch.equal(both.indices(key), plain.indices(key))
    more = both.indices("fit")[len(fit) :]
    assert torch.equal(both.indices("fit")[: len(fit)], fit)
    assert len(more) == len(fit)
    assert torch.equal(both.views[more], plain.images[fit].flip(-1))
    assert torch.equal(both.labels[more], plain.labels[fit])
    assert both.fingerprint != plain.fingerprint
    # of a class, its pictures and their mirror images
    assert len(both.indices("fit", [3])) == 2 * len(plain.indices("fit", [3]))


def test_select_fraction_does_not_move_the_report():
    one, other = (load_dataset(DataConfig(select_fraction=f)) for f in (0.1, 0.3))
    assert torch.equal(one.partitions["report"], other.partitions["report"])


def test_a_class_too_small_for_three_partitions_is_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [encode(p) for p in noise(5)], [0, 0, 0, 1, 1])
    message = refusal(tmp_path)
    assert "class 'bus' has 2 images and 0 of them in fit" in message


# --- reading a Dataset ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
def test_indices_are_a_partitions_images_of_these_classes(ids):
    data = load_dataset(DataConfig())
    plain = [i for i in data.partitions["select"].tolist() if int(data.labels[i]) in ids]
    assert data.indices("select", ids).tolist() == plain


def test_class_names_have_spaces_for_underscores(tmp_path):
    small_set(tmp_path)
    assert load(tmp_path).class_names == ("maple tree", "bus", "sea")


def test_an_unknown_data_set_lists_the_known():
    with pytest.raises(ConfigError, match="'mnist'; valid: digits, cifar100, caltech101, mini_"):
        load_dataset(DataConfig(name="mnist"))


def test_importing_datasets_imports_nothing_heavy():
    heavy = "{'torchvision', 'sklearn', 'pyarrow', 'PIL', 'safetensors'}"
    code = f"import sys, tina.datasets; assert not {heavy} & set(sys.modules), sys.modules.keys()"
    root = Path(tina.datasets.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# --- parquet and pixels ---------------------------------------------------------------------------


def test_parquet_pixels_labels_and_test_split(tmp_path):
    pixels = small_set(tmp_path)
    data = load(tmp_path)
    np.testing.assert_array_equal(as_pixels(data), pixels)
    assert data.labels.tolist() == [i % 3 for i in range(30)] + [i % 3 for i in range(9)]
    assert data.partitions["report"].tolist() == list(range(30, 39))
    assert len(data.partitions["select"]) == 3


def test_shards_are_read_in_order_and_validation_stands_in_for_test(tmp_path):
    pixels = noise(33)
    for shard, rows in enumerate((range(18), range(18, 30), range(30, 33))):
        name = f"train-0000{shard}-of-00002" if shard < 2 else "validation-00000-of-00001"
        contents = [encode(pixels[i]) for i in rows]
        write_parquet(tmp_path / f"{name}.parquet", contents, [i % 3 for i in rows])
    data = load(tmp_path)
    np.testing.assert_array_equal(as_pixels(data), pixels)
    assert data.partitions["report"].tolist() == [30, 31, 32]


def test_without_test_images_a_stratified_report_is_cut(tmp_path):
    small_set(tmp_path, test=0)
    data = load(tmp_path, report_fraction=0.2)
    assert [len(data.indices("report", [c])) for c in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("column", [["a.png"] * 5, [b"png"] * 5, [{"path": "a.png"}] * 5])
def test_parquet_images_without_their_bytes(tmp_path, column):
    path = write_parquet(tmp_path / "train-0.parquet", [b"png"] * 5, [0, 1, 2, 0, 1])
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "image", pa.array(column)), path)
    assert "has images without their bytes: column 'image' is" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["", "data", "parquet", "parquet/data"])
def test_root_may_be_the_data_set_or_hold_it(tmp_path, where):
    pixels = small_set(tmp_path / where)
    np.testing.assert_array_equal(as_pixels(load(tmp_path)), pixels)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"format": "PNG"}, 0),
        ({"format": "WEBP", "lossless": True}, 0),
        ({"format": "JPEG", "quality": 98, "subsampling": 0}, 6),
    ],
    ids=["png", "webp", "jpeg"],
)
def test_image_formats(tmp_path, options, tolerance):
    ramp = np.linspace(0, 255, 16, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    write_parquet(tmp_path / "train-0.parquet", [encode(image, **options)] * 9, [0, 1, 2] * 3)
    error = as_pixels(load(tmp_path)).astype(int) - image
    assert np.abs(error).max() <= tolerance


def test_gray_images_have_one_channel_and_mixed_ones_three(tmp_path):
    gray = noise(9, shape=(8, 8))
    contents = [encode(p) for p in gray]
    path = write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 3)
    np.testing.assert_array_equal(load(tmp_path).images[:, 0], gray)
    assert load(tmp_path).images.shape == (9, 1, 8, 8)
    write_parquet(path, [*contents[:4], encode(noise(1)[0]), *contents[5:]], [0, 1, 2] * 3)
    mixed = load(tmp_path).images
    assert mixed.shape == (9, 3, 8, 8)
    np.testing.assert_array_equal(mixed[0], np.stack([gray[0]] * 3))


def test_oblong_images_are_cropped_to_their_centre(tmp_path):
    centre = noise(9)
    wide = np.pad(centre, [(0, 0), (0, 0), (6, 6), (0, 0)])
    tall = np.pad(centre, [(0, 0), (10, 10), (0, 0), (0, 0)])
    contents = [encode(w if i % 2 else t) for i, (w, t) in enumerate(zip(wide, tall, strict=True))]
    write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 3)
    np.testing.assert_array_equal(as_pixels(load(tmp_path)), centre)


@pytest.mark.parametrize("shape", [(33, 40, 3), (41, 32, 3), (20, 33, 3)])
def test_photographs_are_cut_and_resized_as_classifiers_do(shape, tmp_path):
    photographs = noise(9, shape=shape)
    write_parquet(tmp_path / "train-0.parquet", [encode(p) for p in photographs], [0, 1, 2] * 3)
    seen = fit(torch.from_numpy(photographs).permute(0, 3, 1, 2) / 255, 16)
    difference = load(tmp_path, image_size=16).images - 255 * seen
    assert difference.abs().max() < 1.5


def test_shrinking_antialiases(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    write_parquet(tmp_path / "train-0.parquet", [encode(board.astype(np.uint8))] * 9, [0, 1, 2] * 3)
    small = load(tmp_path, image_size=8).images.float()
    assert (small - 127.5).abs().max() < 6


@pytest.mark.parametrize(("shape", "side"), [((100, 80), 64), ((20, 30), 20)])
def test_default_size_is_the_shorter_side_up_to_64(tmp_path, shape, side):
    contents = [encode(p) for p in noise(9, shape=(*shape, 3))]
    write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 3)
    assert load(tmp_path).images.shape == (9, 3, side, side)
    config = DataConfig(name="parquet", root=str(tmp_path))
    assert load_dataset(config, largest=224).images.shape[-1] == min(shape)
    assert load_dataset(config, largest=16).images.shape[-1] == 16
    asked = dataclasses.replace(config, image_size=8)
    assert load_dataset(asked, largest=224).images.shape[-1] == 8
    assert load(tmp_path).images.shape[-1] == side  # each has a cache of its own


@pytest.mark.parametrize(("odd", "side"), [(4, 10), (5, 30)])
def test_default_size_is_that_of_most_images_whichever_comes_first(tmp_path, odd, side):
    pictures = [noise(1, shape=(10, 12, 3))[0]] * (9 - odd) + [noise(1, shape=(40, 30, 3))[0]] * odd
    write_parquet(tmp_path / "train-0.parquet", [encode(p) for p in pictures], [0, 1, 2] * 3)
    assert load(tmp_path).images.shape == (9, 3, side, side)


def test_images_lie_as_their_exif_orientation_says(tmp_path):
    upright = noise(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    content = encode(np.rot90(upright).copy(), exif=exif)
    write_parquet(tmp_path / "train-0.parquet", [content] * 9, [0, 1, 2] * 3)
    np.testing.assert_array_equal(as_pixels(load(tmp_path))[0], upright)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_images_are_read_as_a_users_are(tmp_path, mode):
    """On white where they are transparent, and unchanged where they are not."""
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (2, 2, 6, 6))
    images = [Image.fromarray(p).convert(mode) for p in noise(8)] + [clear]
    contents = [encode(image) for image in images]
    write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 3)
    found = load(tmp_path).images
    for content, pixels in zip(contents, found, strict=True):
        expected = read_image(io.BytesIO(content), channels=3)
        torch.testing.assert_close(pixels[None] / 255, expected, rtol=0, atol=0)
    for image, pixels in zip(images[:-1], found, strict=False):
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, expected)
    assert found[-1].unique().tolist() == [0, 255]


def test_large_images_keep_their_order_across_threads(tmp_path):
    shades = np.arange(60, dtype=np.uint8) * 4
    contents = [encode(np.full((140, 140), shade)) for shade in shades]
    write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 20)
    images = load(tmp_path, image_size=2).images
    assert images[:, 0, 0, 0].tolist() == shades.tolist()


def test_cifar100_reads_fine_label_and_knows_its_superclasses(tmp_path):
    names = ["beaver", "maple_tree", "otter"]
    kinds = {"coarse_label": {"names": ["x"], "_type": "ClassLabel"}}
    kinds |= {"image": {"_type": "Image"}, "fine_label": {"names": names, "_type": "ClassLabel"}}
    contents = [encode(p) for p in noise(9)]
    path = tmp_path / "cifar100" / "train-0.parquet"
    write_parquet(path, contents, [0, 1, 2] * 3, label="fine_label", features=kinds)
    data = load(tmp_path, "cifar100")
    groups = [list(CIFAR100_SUPERCLASSES)[g] for g in data.groups]
    assert groups == ["aquatic mammals", "trees", "aquatic mammals"]
    assert data.images.shape == (9, 3, 32, 32)


def test_another_data_set_is_not_taken_for_cifar100(tmp_path):
    small_set(tmp_path / "cifar100", names=["apple", "zebra"])
    assert "cifar100 has no class 'zebra'" in refusal(tmp_path, "cifar100")


def test_caltechs_clutter_is_dropped(tmp_path):
    names = ["ant", "BACKGROUND_Google", "yin_yang"]
    pixels = small_set(tmp_path / "caltech101", names=names)
    data = load(tmp_path, "caltech101", image_size=8)
    assert data.class_names == ("ant", "yin yang")
    kept = [i for i in range(39) if i % 3 != 1]
    np.testing.assert_array_equal(as_pixels(data), pixels[kept])
    assert data.labels.tolist() == [i % 3 // 2 for i in kept]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: b"not an image", id="text"),
        pytest.param(lambda content: content[:60] + b"\0" * 40 + content[100:], id="overwritten"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: None, id="null"),
    ],
)
@pytest.mark.parametrize("row", [0, 20])
def test_a_corrupt_image_is_named_and_nothing_is_cached(tmp_path, cache, damage, row):
    contents = [encode(p) for p in noise(30)]
    contents[row] = damage(contents[row])
    path = write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 10)
    assert f"{path} row {row}" in refusal(tmp_path)
    assert not cache.exists()


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path):
    deep = Image.fromarray(noise(1, shape=(8, 8))[0].astype(np.uint16) * 256)
    path = write_parquet(tmp_path / "train-0.parquet", [encode(deep)] * 9, [0, 1, 2] * 3)
    message = refusal(tmp_path)
    assert f"{path} row 0" in message
    assert "more than 8 bits" in message


@pytest.mark.parametrize("where", ["footer", "page"])
def test_a_corrupt_parquet_file_is_named(tmp_path, cache, where):
    small_set(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    if where == "footer":
        content = content[:-20]
    else:
        content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    assert f"corrupt parquet file {path}" in refusal(tmp_path)
    assert not cache.exists()


def test_shards_are_more_than_files_may_be_open(tmp_path):
    contents = [encode(p) for p in noise(3)]
    for shard in range(100):
        write_parquet(tmp_path / f"train-{shard:03d}.parquet", contents, [0, 1, 2])
    taken = set(map(int, os.listdir("/dev/fd")))
    few = next(n for n in itertools.count() if n - sum(fd < n for fd in taken) == 50)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        found = load(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found.images) == 300


def test_a_file_that_the_system_does_not_open_is_not_called_corrupt(tmp_path, monkeypatch):
    small_set(tmp_path)
    full = OSError(errno.EMFILE, "Failed to open local file: Too many open files")
    monkeypatch.setattr(pq, "ParquetFile", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="Too many open files") as caught:
        load(tmp_path)
    assert caught.value is full


@pytest.mark.parametrize("label", [3, -1, None])
def test_a_label_without_a_class_is_named(tmp_path, label):
    contents = [encode(p) for p in noise(9)]
    path = write_parquet(tmp_path / "train-0.parquet", contents, [0, 1, 2] * 2 + [0, label, 2])
    assert f"label {label} is none of 3 classes in {path} row 7" in refusal(tmp_path)


@pytest.mark.parametrize(
    "features",
    [
        {"image": {"_type": "Image"}, "label": {"_type": "Value"}},
        {"picture": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}},
        {
            "image": {"_type": "Image"},
            "coarse": {"names": NAMES, "_type": "ClassLabel"},
            "fine": {"names": NAMES, "_type": "ClassLabel"},
        },
    ],
    ids=["no class label", "column missing", "two class labels"],
)
def test_a_schema_without_images_and_classes_is_refused(tmp_path, features):
    contents = [encode(p) for p in noise(9)]
    path = tmp_path / "train-0.parquet"
    write_parquet(path, contents, [0, 1, 2] * 3, features=features)
    assert f"{path} needs one Image and one ClassLabel feature" in refusal(tmp_path)


def test_a_class_label_without_names_is_refused(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "num_classes": 3}}
    path = tmp_path / "train-0.parquet"
    write_parquet(path, [encode(p) for p in noise(9)], [0, 1, 2] * 3, features=features)
    assert f"{path} has no names for the classes of label" in refusal(tmp_path)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": {"features": 3}}'])
def test_metadata_that_are_not_the_hubs_are_refused(tmp_path, metadata):
    path = tmp_path / "train-0.parquet"
    write_parquet(path, [encode(p) for p in noise(9)], [0, 1, 2] * 3)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    assert f"{path} has metadata that are not the hub's" in refusal(tmp_path)


def test_shards_of_other_classes_are_refused(tmp_path):
    small_set(tmp_path)
    contents = [encode(p) for p in noise(3)]
    path = write_parquet(tmp_path / "test-1.parquet", contents, [0, 1, 2], names=NAMES[::-1])
    assert f"{path} has other columns or class names" in refusal(tmp_path)


@pytest.mark.parametrize("names", [["oak_tree", "oak tree"], ["Turkey", "turkey"]])
def test_classes_that_read_alike_are_refused(tmp_path, names):
    small_set(tmp_path, names=names)
    assert "two classes have one name to a prompt" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("cifar100", ["cifar100", "cifar-100-python"]),
        ("caltech101", ["caltech101", "caltech101/101_ObjectCategories"]),
        ("mini_imagenet", ["mini_imagenet"]),
        ("parquet", ["parquet", ""]),
        ("folder", ["folder", ""]),
    ],
)
def test_a_missing_data_set_names_each_place_and_downloads_nothing(tmp_path, name, places):
    root = tmp_path / "nowhere"
    message = refusal(root, name)
    assert all(str(root / place) in message for place in places)
    assert "data.root" in message
    assert "TINA_DATA" in message
    assert not root.exists()


def test_roots_are_config_then_variable_then_user_cache(tmp_path, monkeypatch):
    small_set(tmp_path / "cache" / "tina" / "data" / "mini_imagenet", train=9)
    small_set(tmp_path / "variable" / "mini_imagenet", train=12)
    small_set(tmp_path / "config" / "mini_imagenet", train=15)
    assert len(load_dataset(DataConfig(name="mini_imagenet")).labels) == 9 + 9
    monkeypatch.setenv("TINA_DATA", str(tmp_path / "variable"))
    assert len(load_dataset(DataConfig(name="mini_imagenet")).labels) == 12 + 9
    assert len(load(tmp_path / "config", "mini_imagenet").labels) == 15 + 9


@pytest.mark.parametrize("name", ["cifar100", "caltech101"])
def test_a_download_that_is_cut_off_leaves_nothing(monkeypatch, tmp_path, name):
    """What it had unpacked would be taken for the whole: fewer images, parted otherwise."""

    def unpack(root, *, train=True, download=False):
        folder = Path(root) / TORCHVISION_FOLDERS[name]
        (folder / "ant").mkdir(parents=True)
        (folder / "ant" / "a.jpg").write_text("")
        if not whole:
            raise KeyboardInterrupt  # as a kill, but that this test goes on

    monkeypatch.setattr("torchvision.datasets.CIFAR100", unpack)
    monkeypatch.setattr("torchvision.datasets.Caltech101", unpack)
    whole = False
    with pytest.raises(KeyboardInterrupt):
        _download(name, tmp_path, "")
    assert not (tmp_path / TORCHVISION_FOLDERS[name]).exists()
    whole = True
    _download(name, tmp_path, "")
    assert (tmp_path / TORCHVISION_FOLDERS[name] / "ant" / "a.jpg").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {
        TORCHVISION_FOLDERS[name].split("/")[0],
        f".{name}.lock",
    }


@pytest.mark.parametrize("name", ["cifar100", "caltech101"])
def test_a_failed_download_is_one_line(monkeypatch, name):
    def offline(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError, match=r"download failed: .*no route to host") as caught:
        load_dataset(DataConfig(name=name))
    assert "\n" not in str(caught.value)


# --- cache ----------------------------------------------------------------------------------------


def assert_equal(one, other):
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert one.class_names == other.class_names
    assert all(torch.equal(one.partitions[key], other.partitions[key]) for key in PARTITIONS)
    assert one.fingerprint == other.fingerprint


def test_a_second_load_reads_the_cache(tmp_path, cache, monkeypatch):
    small_set(tmp_path)
    first = load(tmp_path)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    monkeypatch.setattr(tina.datasets, "_decode_all", None)
    assert_equal(first, load(tmp_path))


def test_the_cache_follows_the_files_and_the_size(tmp_path, cache):
    small_set(tmp_path)
    first = load(tmp_path)
    path = tmp_path / "train-00000-of-00001.parquet"
    os.utime(path, ns=(1, 1))
    assert_equal(first, load(tmp_path))
    assert len(list(cache.iterdir())) == 2
    write_parquet(path, [encode(p) for p in noise(30, seed=1)], [0, 1, 2] * 10)
    changed = load(tmp_path)
    assert not torch.equal(first.images, changed.images)
    assert first.fingerprint != changed.fingerprint
    assert load(tmp_path, image_size=4).images.shape[-1] == 4
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("part", ["images", "labels", "test", "class_names"])
def test_the_digest_is_of_all_that_was_decoded(part):
    plain = _Decoded(
        images=torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        labels=torch.tensor([0, 1, 1]),
        test=torch.tensor([False, False, True]),
        class_names=("ant", "bee"),
    )
    value = getattr(plain, part)
    other = value[::-1] if part == "class_names" else value.clone()
    if part != "class_names":
        other[0] = 1
    assert dataclasses.replace(plain, **{part: other}).digest != plain.digest


@pytest.mark.parametrize("damage", ["truncated", "header", "pixel", "class name"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, cache, caplog, damage):
    small_set(tmp_path)
    first = load(tmp_path)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    bad = bytearray(good)
    if damage == "truncated":
        bad = bad[: len(bad) // 2]
    elif damage == "header":
        bad[8:40] = bytes(32)
    elif damage == "pixel":
        bad[-5000] ^= 1
    else:
        bad = bytearray(good.replace(b"maple", b"apple"))
    path.write_bytes(bad)
    with caplog.at_level(logging.WARNING, "tina.storage"):
        assert_equal(first, load(tmp_path))
        assert f"cache file {path} is corrupt" in caplog.text
        caplog.clear()
        assert_equal(first, load(tmp_path))
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_only_a_warning(tmp_path, monkeypatch, caplog):
    pixels = small_set(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "tina.storage"):
        np.testing.assert_array_equal(as_pixels(load(tmp_path)), pixels)
    assert f"cannot keep {tmp_path / 'file' / 'tina' / 'images'}/" in caplog.text


# --- folders and torchvision ----------------------------------------------------------------------


def test_folder_of_class_folders(tmp_path):
    pixels = write_tree(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "ant" / "._000.png").write_text("a resource fork")
    (tmp_path / ".git").mkdir()
    data = load(tmp_path, "folder")
    np.testing.assert_array_equal(as_pixels(data), pixels)
    assert data.class_names == ("ant", "bee")
    assert data.labels.tolist() == [0] * 6 + [1] * 6


def test_folder_with_train_and_test(tmp_path):
    train = write_tree(tmp_path / "folder" / "train")
    test = write_tree(tmp_path / "folder" / "test", per_class=2, seed=1)
    data = load(tmp_path, "folder")
    np.testing.assert_array_equal(as_pixels(data), np.concatenate([train, test]))
    assert data.partitions["report"].tolist() == [12, 13, 14, 15]
    assert data.labels[-4:].tolist() == [0, 0, 1, 1]


def test_folder_whose_splits_differ_in_classes(tmp_path):
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "test", names=("ant", "cat"))
    assert "differ in their classes: bee, cat" in refusal(tmp_path, "folder")


def test_a_corrupt_file_in_a_folder_is_named(tmp_path, cache):
    write_tree(tmp_path)
    path = tmp_path / "bee" / "008.png"
    path.write_bytes(path.read_bytes()[:50])
    assert f"corrupt image {path}" in refusal(tmp_path, "folder")
    assert not cache.exists()


def test_caltech101_as_torchvision_keeps_it(tmp_path):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    pixels = write_tree(folder, per_class=11, names=("BACKGROUND_Google", "ant", "yin_yang"))
    data = load(tmp_path, "caltech101", image_size=8)
    assert data.class_names == ("ant", "yin yang")
    fifth = [11 + 4, 11 + 9, 22 + 4, 22 + 9]
    report = as_pixels(data)[data.partitions["report"].numpy()]
    np.testing.assert_array_equal(report, pixels[fifth])
    rest = torch.cat([data.partitions["fit"], data.partitions["select"]]).sort().values.numpy()
    np.testing.assert_array_equal(as_pixels(data)[rest], np.delete(pixels[11:], [4, 9, 15, 20], 0))


def test_cifar100_as_torchvision_keeps_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    pixels = noise(12, shape=(32, 32, 3))
    flat = pixels.transpose(0, 3, 1, 2).reshape(12, -1)
    content = {
        "train": {"data": flat[:9], "fine_labels": [0, 1, 2] * 3},
        "test": {"data": flat[9:], "fine_labels": [0, 1, 2]},
        "meta": {"fine_label_names": ["apple", "maple_tree", "otter"]},
    }
    for name, entry in content.items():
        (folder / name).write_bytes(pickle.dumps(entry))
    assert "is unreadable" in refusal(tmp_path, "cifar100")  # checksums of the real files
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": None})
    data = load(tmp_path, "cifar100")
    np.testing.assert_array_equal(as_pixels(data), pixels)
    assert data.class_names == ("apple", "maple tree", "otter")
    assert data.partitions["report"].tolist() == [9, 10, 11]


# --- several as one -------------------------------------------------------------------------------


def two_sets(root, *, second=("Sea", "ant", "bee")):
    """Parquet sets of three classes each, "sea" in both; returns the pixels of each."""
    first = small_set(root / "mini_imagenet")
    return first, small_set(root / "caltech101", train=33, names=second)


def test_joined_data_sets_are_one_with_the_classes_of_both(tmp_path):
    first, second = two_sets(tmp_path)
    data = load(tmp_path, "mini_imagenet+caltech101", image_size=8)
    assert data.name == "mini_imagenet+caltech101"
    assert data.class_names == ("maple tree", "bus", "sea", "ant", "bee")
    assert data.groups is None
    np.testing.assert_array_equal(as_pixels(data), np.concatenate([first, second]))
    own = [i % 3 for count in (30, 9) for i in range(count)]
    theirs = [2 + i % 3 for count in (33, 9) for i in range(count)]
    assert data.labels.tolist() == own + theirs
    tests = [*range(30, 39), *range(39 + 33, 39 + 33 + 9)]
    assert data.partitions["report"].tolist() == tests


def test_joined_data_sets_are_as_small_as_the_smaller(tmp_path):
    two_sets(tmp_path)
    for name in ("mini_imagenet+caltech101", "caltech101+mini_imagenet"):
        assert load(tmp_path, name).images.shape[-1] == 32


def test_joined_data_sets_have_a_cache_of_their_own_that_follows_both(tmp_path, cache):
    two_sets(tmp_path)
    name = "mini_imagenet+caltech101"
    data = load(tmp_path, name, image_size=8)
    assert torch.equal(load(tmp_path, name, image_size=8).images, data.images)
    assert len(list(cache.iterdir())) == 1
    small_set(tmp_path / "caltech101", train=36, names=("Sea", "ant", "bee"))
    assert len(load(tmp_path, name, image_size=8).images) == len(data.images) + 3


def test_an_image_cannot_be_there_twice(tmp_path):
    two_sets(tmp_path)
    with pytest.raises(ConfigError, match="has caltech101 twice"):
        load(tmp_path, "caltech101+mini_imagenet+caltech101")


@pytest.mark.parametrize("name", ["ant", "sea"])  # the first set has the latter
def test_two_classes_of_one_name_within_a_joined_set_are_refused(tmp_path, name):
    two_sets(tmp_path, second=(name, name.title(), "bee"))
    assert "two classes have one name" in refusal(tmp_path, "mini_imagenet+caltech101")


@pytest.mark.parametrize("name", ["mini_imagenet+folder", "folder+mini_imagenet"])
def test_joined_data_sets_come_from_a_store_whole(tmp_path, name):
    small_set(tmp_path / "data" / "mini_imagenet", test=0)
    write_tree(tmp_path / "data" / "folder")
    found = load(tmp_path / "data", name, image_size=8)
    for _ in range(2):
        again = load((tmp_path / "data").as_uri(), name, image_size=8)
        assert again.fingerprint == found.fingerprint


def test_the_bundled_digits_join_a_set_under_a_relative_root(tmp_path, monkeypatch):
    small_set(tmp_path / "mini_imagenet", test=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINA_DATA", ".")
    data = load_dataset(DataConfig(name="digits+mini_imagenet"))
    assert data.images.shape == (1797 + 30, 3, 8, 8)
    assert data.num_classes == 13


def test_an_unknown_part_is_named(tmp_path):
    two_sets(tmp_path)
    with pytest.raises(ConfigError, match="unknown data set 'imagenet'; valid: digits, "):
        load(tmp_path, "mini_imagenet+imagenet")
    assert "no train-*.parquet" in refusal(tmp_path, "mini_imagenet+parquet+cifar100")


def test_a_part_without_test_images_is_refused_beside_one_that_has_them(tmp_path):
    small_set(tmp_path / "mini_imagenet", names=("owl", "bat", "cow"), test=0)
    small_set(tmp_path / "caltech101")
    message = refusal(tmp_path, "mini_imagenet+caltech101")
    assert "class 'owl' has 10 images and 0 of them in report" in message


# --- real CIFAR-100 -------------------------------------------------------------------------------


def test_superclass_table_is_20_by_5_distinct():
    names = [name for group in CIFAR100_SUPERCLASSES.values() for name in group]
    assert [len(group) for group in CIFAR100_SUPERCLASSES.values()] == [5] * 20
    assert len(set(names)) == 100


def test_superclass_table_equals_the_reference():
    path = SHARED / "cifar100_superclasses.json"
    if not path.exists():
        pytest.skip(f"no reference table at {path}")
    reference = {
        group.replace("_", " "): tuple(name.replace("_", " ") for name in names)
        for group, names in json.loads(path.read_text()).items()
    }
    assert reference == CIFAR100_SUPERCLASSES


@pytest.mark.slow
def test_real_cifar100(cache):
    if not (SHARED / "cifar100").is_dir():
        pytest.skip(f"no CIFAR-100 at {SHARED / 'cifar100'}")
    data = load(SHARED, "cifar100")
    assert data.images.shape == (60_000, 3, 32, 32)
    assert [len(data.indices(key, [0])) for key in PARTITIONS] == [450, 50, 100]
    for key, count in zip(PARTITIONS, (450, 50, 100), strict=True):
        assert torch.bincount(data.labels[data.partitions[key]]).tolist() == [count] * 100
    assert list(data.class_names) == sorted(data.class_names)
    assert sorted(np.bincount(data.groups)) == [5] * 20
    first = pq.ParquetFile(SHARED / "cifar100" / "test-00000-of-00001.parquet").read_row_group(0)
    for i, row in enumerate(first.slice(0, 100).to_pylist()):
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        np.testing.assert_array_equal(as_pixels(data)[50_000 + i], pixels)
        assert data.labels[50_000 + i] == row["label"]
    assert_equal(data, load(SHARED, "cifar100"))
