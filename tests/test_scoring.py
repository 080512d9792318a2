"""A classifier on labelled pictures: counts, shares, and which folder is which class."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tina import TinaPipeline
from tina.cli import main
from tina.errors import DataError
from tina.images import read_image
from tina.scoring import Scored, labelled, score

NAMES = ("one", "two", "five")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return TinaPipeline.from_pretrained(tiny_checkpoint)(list(NAMES))


@pytest.fixture(scope="module")
def photos(tmp_path_factory, tiny_run):
    """Ten digits of each of three classes and of one that the classifier has not."""
    folder, data = tmp_path_factory.mktemp("photos"), tiny_run.dataset
    for name, called in (("one", "one"), ("two", "The_Twos"), ("five", "fives"), ("six", "six")):
        (folder / called).mkdir()
        for i, place in enumerate(data.indices("select", [data.class_names.index(name)])[:10]):
            image = Image.fromarray(data.images[place, 0].numpy())
            image.save(folder / called / f"{i}.png")
    return folder


def scored(answers, **changes):
    names = tuple(f"class {i}" for i in range(len(answers)))
    values = {"confidence": 0.5, "others": (), "unread": ()} | changes
    return Scored(class_names=names, answers=torch.tensor(answers), **values)


def test_every_picture_is_counted_as_the_classifier_answers(model, photos):
    found = score(model.classifier, photos)
    expected, sure = torch.zeros(3, 3, dtype=torch.long), []
    for label, called in enumerate(("one", "The_Twos", "fives")):
        for file in (photos / called).iterdir():
            shares = model.classifier(read_image(file, channels=1))[0].softmax(0)
            expected[label, shares.argmax()] += 1
            sure.append(float(shares.max()))
    assert found.answers.tolist() == expected.tolist()
    assert found.confidence == pytest.approx(np.mean(sure))
    assert found.answers.sum() == 30
    assert 10 < found.answers.diagonal().sum() < 30  # or a transposed table would be as good
    assert found.answers.tolist() != found.answers.T.tolist()
    assert found.others == ("six",)
    assert found.missing == []


def test_shares_by_hand():
    found = scored([[8, 2, 0], [3, 1, 0], [0, 0, 0]]).plain()
    assert (found["pictures"], found["accuracy"]) == (14, 9 / 14)
    assert found["mean_of_classes"] == pytest.approx((8 / 10 + 1 / 4) / 2)
    assert found["by_chance"] == 1 / 3
    one, two, none = found["classes"].values()
    assert one["answers"] == {"class 0": 8, "class 1": 2}
    assert list(two["answers"].items()) == [("class 0", 3), ("class 1", 1)]
    assert none == {"pictures": 0, "accuracy": None, "ci95": None, "answers": {}}
    assert json.loads(json.dumps(found)) == found


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(counts):
    right, n = counts
    z, p = 1.959963984540054, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    found = scored([[right, n - right], [0, 0]]).plain()["classes"]["class 0"]["ci95"]
    assert found == pytest.approx(expected, abs=1e-9)


def test_for_people():
    text = str(scored([[8, 2, 1], [0, 4, 0], [0, 0, 0]], confidence=0.875))
    head, one, two, last = text.splitlines()
    assert head.split() == ["class", "pictures", "right", "95", "%", "interval", "taken", "for"]
    assert one.split("  ")[-1].strip() == "class 1 2, class 2 1"
    assert one.index("72.7%") + len("72.7%") == head.index("right") + len("right")
    assert two.endswith("%")  # no one's mistake
    assert last.startswith("80.0% of 15 pictures are told right (95 % interval 55 to 93 %), 86.4%")
    assert last.endswith("by chance 33.3%; it was 87.5% sure")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda folder: folder.rmdir(), "there is no folder"),
        (lambda folder: None, "one, two, five: it has none with pictures"),
        (lambda folder: (folder / "one").mkdir(), "it has none with pictures"),
        (lambda folder: write(folder / "cat" / "a.png"), "one, two, five: it has cat"),
        (lambda folder: write(folder / "one" / "a.png"), "none of 1 pictures in .* can be read"),
    ],
)
def test_what_is_no_folder_of_its_classes(model, tmp_path, prepare, reason):
    folder = tmp_path / "photos"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DataError, match=reason):
        score(model.classifier, folder)


def write(file):
    file.parent.mkdir()
    file.write_bytes(b"no picture")


def test_two_folders_may_hold_one_class(tmp_path):
    for called in ("Otter", "otters", "sea-lion"):
        (tmp_path / called).mkdir()
        (tmp_path / called / "a.jpg").touch()
    found, others = labelled(tmp_path, ["sea lion", "otter"])
    assert sorted((file.parent.name, label) for file, label in found) == [
        ("Otter", 1),
        ("otters", 1),
        ("sea-lion", 0),
    ]
    assert others == ()


def test_classes_and_folders_may_be_written_either_way(tmp_path):
    for called in ("otter", "maple_tree", "boot", "boots"):
        (tmp_path / called).mkdir()
        (tmp_path / called / "a.jpg").touch()
    found, others = labelled(tmp_path, ["otters", "a maple tree", "boots"])
    assert sorted((file.parent.name, label) for file, label in found) == [
        ("boot", 2),
        ("boots", 2),
        ("maple_tree", 1),
        ("otter", 0),
    ]
    assert others == ()
    found, _ = labelled(tmp_path, ["boot", "boots"])
    assert sorted((file.parent.name, label) for file, label in found) == [("boot", 0), ("boots", 1)]


def test_at_the_command_line(model, photos, tmp_path, capsys):
    file = tmp_path / "mine.safetensors"
    replace(model, class_names=("one", "two", "nine")).save(file)
    assert main(["score", str(file), str(photos)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[:2] == ["one", "10"]
    assert said.err == "note: none of its classes: fives, six\nnote: no pictures of: nine\n"
    assert main(["score", str(file), str(photos), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 20


def test_a_picture_that_cannot_be_read_is_told_and_left_out(model, tmp_path, capsys):
    for name in NAMES[:2]:
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "two" / "b.png").write_bytes(b"no picture")
    model.save(tmp_path / "mine.safetensors")
    assert main(["score", str(tmp_path / "mine.safetensors"), str(tmp_path), "--json"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["pictures"] == 2
    assert len(found["unread"]) == 1
    error, note = said.err.splitlines()
    assert error.startswith("error: cannot read image")
    assert error.endswith("it is in no known format")
    assert note == "note: no pictures of: five"
