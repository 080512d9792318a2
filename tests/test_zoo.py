"""Zoo and generic model: what is written is read back, what does not belong is refused."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.families import family_of
from tina.errors import DataError
from tina.families import build_family
from tina.finetune import Lesson, accuracy
from tina.generic import GenericModel, as_tensors, load_generic, save_generic
from tina.tensors import write_tensors
from tina.zoo import build_rows, describe_zoo, open_zoo, read_zoo, zoo_schema

WIDTH = 6


def row(task_id, *, split="train", theta=None):
    theta = torch.randn(WIDTH) if theta is None else theta
    return {
        "task_id": task_id,
        "class_ids": [3, 1],
        "class_names": ["three", "one"],
        "split": split,
        "num_classes": 2,
        "theta": theta.numpy(),
        "accuracy": 0.5,
        "seed": 2**40,
        "steps": 20,
    }


def write(folder, rows, name="part-0", *, width=WIDTH):
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=zoo_schema(width)), file)
    return file


def state(folder):
    """Everything that can be seen of a folder's files."""
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.iterdir())}


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A zoo folder that may be spoilt."""
    return shutil.copytree(tiny_run.folder / "zoo", tmp_path / "zoo")


# --- Parquet --------------------------------------------------------------------------------------


def test_schema_is_the_contract():
    assert {field.name: field.type for field in zoo_schema(7)} == {
        "task_id": pa.string(),
        "class_ids": pa.list_(pa.int32()),
        "class_names": pa.list_(pa.string()),
        "split": pa.string(),
        "num_classes": pa.int32(),
        "theta": pa.list_(pa.float32(), 7),
        "accuracy": pa.float32(),
        "seed": pa.int64(),
        "steps": pa.int32(),
    }


def test_written_file_has_the_schema(tiny_run):
    (file,) = (tiny_run.folder / "zoo").glob("*.parquet")
    size = tiny_run.family.layout(4).size
    assert pq.read_schema(file).equals(zoo_schema(size))


def test_round_trip_is_exact_and_sorted_over_files(tmp_path):
    thetas = {name: torch.randn(WIDTH) for name in "dbca"}
    rows = {name: row(name, theta=theta) for name, theta in thetas.items()}
    rows["a"] |= {"split": "val", "accuracy": 0.25, "steps": 7, "class_ids": [4, 0, 2]}
    write(tmp_path, [rows["d"], rows["b"]], "part-0")
    write(tmp_path, [rows["c"], rows["a"]], "part-1")
    zoo = read_zoo(tmp_path)
    assert zoo.task_ids == ("a", "b", "c", "d")
    assert zoo.class_ids == ((4, 0, 2), (3, 1), (3, 1), (3, 1))
    assert zoo.splits == ("val", "train", "train", "train")
    assert torch.equal(zoo.theta, torch.stack([thetas[name] for name in "abcd"]))
    assert zoo.accuracy.tolist() == [0.25, 0.5, 0.5, 0.5]
    assert zoo.steps.tolist() == [7, 20, 20, 20]


def test_only_keeps_rows_together(tmp_path):
    rows = [row("a"), row("b", split="val"), row("c"), row("d", split="val")]
    write(tmp_path, rows)
    whole = read_zoo(tmp_path)
    for split, places in {"train": [0, 2], "val": [1, 3], "held_out": []}.items():
        part = whole.only(split)
        assert part.task_ids == tuple("abcd"[i] for i in places)
        assert set(part.splits) <= {split}
        assert torch.equal(part.theta, whole.theta[places])
        assert len(part.class_ids) == len(part.accuracy) == len(part.steps) == len(places)


def test_rows_say_what_they_hold(tiny_run):
    run, zoo = tiny_run, tiny_run.read_zoo("zoo")
    layout = run.family.layout(run.config.tasks.max_classes)
    tasks = {task.task_id: task for task in run.zoo_tasks("zoo")}
    assert set(zoo.task_ids) == set(tasks)
    assert zoo.splits.count("train") == len(run.space.train)
    assert zoo.splits.count("val") == len(run.space.val)
    _, rows = layout.split(zoo.theta)
    for z, task_id in enumerate(zoo.task_ids):
        task, k = tasks[task_id], tasks[task_id].num_classes
        assert zoo.class_ids[z] == task.class_ids
        assert (rows[z, k:] == 0).all()
        assert (rows[z, :k].abs().sum(1) > 0).all()
        body, head = layout.split(zoo.theta[z])
        lesson = Lesson.of(run.dataset, task.class_ids, seed=task.seed, partition="select")
        theta = run.family.layout(k).join(body, head[:k])
        found = accuracy(run.family, theta, run.store, lesson)
        assert zoo.accuracy[z] == pytest.approx(found)


def test_a_row_depends_on_its_task_alone(tiny_run):
    run, task = tiny_run, tiny_run.zoo_tasks("zoo")[3]
    (alone,) = build_rows(
        [task],
        family=run.family,
        dataset=run.dataset,
        store=run.store,
        generic=run.generic,
        recipe=run.recipe("zoo"),
        max_classes=run.config.tasks.max_classes,
        stacked=False,
    )
    zoo = run.read_zoo("zoo")
    place = zoo.task_ids.index(task.task_id)
    assert torch.equal(torch.from_numpy(alone["theta"]), zoo.theta[place])


# --- opening --------------------------------------------------------------------------------------


def test_new_folder_is_made_and_continued(tiny_run, tmp_path):
    folder, description = tmp_path / "new" / "zoo", tiny_run.describe_zoo("zoo")
    assert open_zoo(folder, description) == set()
    assert json.loads((folder / "zoo.json").read_text()) == description
    assert open_zoo(folder, description) == set()
    write(folder, [row("a"), row("b")])
    assert open_zoo(folder, description) == {"a", "b"}


def test_open_knows_what_is_built(tiny_run, copied):
    done = open_zoo(copied, tiny_run.describe_zoo("zoo"))
    assert done == {task.task_id for task in tiny_run.zoo_tasks("zoo")}


def test_another_recipe_is_refused_and_nothing_touched(tiny_run, copied):
    recipe = replace(tiny_run.recipe("zoo"), lr=1e-4)
    classifier = replace(tiny_run.config.classifier, finetune=recipe)
    other = type(tiny_run)(replace(tiny_run.config, classifier=classifier))
    before = state(copied)
    with pytest.raises(DataError, match="another recipe: choose another name") as refused:
        open_zoo(copied, other.describe_zoo("zoo"))
    assert "\n" not in str(refused.value)
    assert state(copied) == before


@pytest.mark.parametrize(
    "key", ["format_version", "dataset", "dataset_fingerprint", "family", "max_classes", "generic"]
)
def test_each_part_of_the_description_counts(tiny_run, copied, key):
    description = tiny_run.describe_zoo("zoo") | {key: "other"}
    with pytest.raises(DataError, match=f"another {key}:"):
        open_zoo(copied, description)


def test_a_description_says_all_that_rows_depend_on(tiny_run, monkeypatch):
    run = tiny_run
    plain = [run.dataset, run.family, "hash", run.recipe("zoo"), 4]
    others = {
        1: build_family("cnn15k", channels=1, image_size=8),
        2: "another hash",
        3: replace(run.recipe("zoo"), lr=1e-4),
        4: 5,
    }
    want = describe_zoo(*plain)
    assert describe_zoo(*plain) == want
    differing = {}
    for place, other in others.items():
        found = describe_zoo(*plain[:place], other, *plain[place + 1 :])
        differing[place] = {key for key in want if found[key] != want[key]}
    assert differing == {
        1: {"family", "layout"},
        2: {"generic"},
        3: {"recipe"},
        4: {"max_classes", "layout"},
    }
    monkeypatch.setattr("tina.zoo.version", lambda package: f"{package} 0")
    assert describe_zoo(*plain)["versions"] == {"torch": "torch 0"}


# --- spoilt folders -------------------------------------------------------------------------------


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="build the zoo first"):
        read_zoo(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_truncated_parquet(copied, keep):
    (file,) = copied.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match="unreadable zoo file"):
        read_zoo(copied)


def test_a_task_that_two_jobs_have_made_is_read_once(tmp_path):
    first, second = [row("a"), row("b")], [row("b")]
    write(tmp_path, first, "part-0")
    write(tmp_path, second, "part-1")
    zoo = read_zoo(tmp_path)
    assert zoo.task_ids == ("a", "b")
    assert zoo.theta[1].tolist() == list(map(float, first[1]["theta"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_theta_that_is_not_finite(tmp_path, value):
    spoilt = torch.randn(WIDTH)
    spoilt[4] = value
    write(tmp_path, [row("a"), row("b", theta=spoilt)])
    with pytest.raises(DataError, match="NaN or infinite"):
        read_zoo(tmp_path)


def test_thetas_of_two_lengths(tmp_path):
    write(tmp_path, [row("a")], "part-0")
    write(tmp_path, [row("b", theta=torch.randn(9))], "part-1", width=9)
    with pytest.raises(DataError, match="unreadable zoo file"):
        read_zoo(tmp_path)


def test_a_file_without_rows(tmp_path):
    write(tmp_path, [])
    with pytest.raises(DataError, match="build the zoo first"):
        read_zoo(tmp_path)


# --- generic model --------------------------------------------------------------------------------


def test_generic_round_trip(tiny_run, tmp_path):
    generic = tiny_run.generic
    save_generic(tmp_path / "g.safetensors", generic, tiny_run.family, tiny_run.dataset)
    again = load_generic(tmp_path / "g.safetensors", tiny_run.family)
    assert again.class_ids == generic.class_ids
    assert torch.equal(again.body, generic.body)
    assert torch.equal(again.rows, generic.rows)


def test_generic_brings_its_trunk(tiny_run, tmp_path):
    family, fresh = (build_family("resnet20_head", channels=1, image_size=8) for _ in range(2))
    trunk = family.new_trunk()
    for name, buffer in trunk.named_buffers():  # running statistics are part of a trunk
        if "running" in name:
            buffer.uniform_(0.5, 2)
    family.attach_trunk(trunk)
    generic = GenericModel(class_ids=(0, 2), body=torch.zeros(0), rows=torch.randn(2, 65))
    save_generic(tmp_path / "g.safetensors", generic, family, tiny_run.dataset)
    again = load_generic(tmp_path / "g.safetensors", fresh)
    assert torch.equal(again.rows, generic.rows)
    assert not any(p.requires_grad for p in fresh.trunk.parameters())
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(fresh.embed(images), family.embed(images))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_unreadable_generic_model(tiny_run, tmp_path, content):
    file = tmp_path / "g.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match="not a readable generic model"):
        load_generic(file, tiny_run.family)


@pytest.mark.parametrize("change", ["one less", "one more", "another shape", "none"])
def test_a_generic_model_with_another_trunk_is_refused(tiny_run, tmp_path, change):
    family, file = family_of("resnet20_head"), tmp_path / "g.safetensors"
    generic = GenericModel(class_ids=(0, 2), body=torch.zeros(0), rows=torch.randn(2, 65))
    tensors = as_tensors(generic, family)
    if change == "one less":
        del tensors["trunk.bn.running_var"]
    elif change == "one more":
        tensors["trunk.more"] = torch.zeros(1)
    elif change == "another shape":  # of three channels
        tensors["trunk.stem.weight"] = torch.zeros(16, 3, 3, 3)
    else:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("trunk.")}
    write_tensors(file, tensors)
    with pytest.raises(
        DataError, match=r"not a readable generic model: .*ResNet20Trunk"
    ) as refused:
        load_generic(file, family)
    assert "\n" not in str(refused.value)


def test_selection_takes_own_rows_and_the_mean_for_unseen_classes():
    generic = GenericModel(class_ids=(5, 2, 9), body=torch.randn(4), rows=torch.randn(3, 6))
    picked = generic.select([9, 7, 5])
    assert torch.equal(picked[0], generic.rows[2])
    assert torch.equal(picked[1], generic.rows.mean(0))
    assert torch.equal(picked[2], generic.rows[0])


def test_inheriting_one_hot_is_selection(tiny_generator):
    vocabulary, generic = tiny_generator.vocabulary, tiny_generator.generic
    own = vocabulary.embeddings
    between = torch.nn.functional.normalize(own[4] + own[7], dim=0)
    body, rows = tiny_generator.inherit(torch.stack([own[[9, 5]], torch.stack([between, own[2]])]))
    assert torch.equal(body, torch.stack([generic.body] * 2))
    torch.testing.assert_close(rows[0], generic.select([9, 5]))
    weights = vocabulary.attention(between)
    assert weights.count_nonzero() > 1
    torch.testing.assert_close(rows[1, 0], weights @ generic.rows)
    torch.testing.assert_close(rows[1, 1], generic.select([2])[0])
