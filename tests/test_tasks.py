"""Tasks: splits and axes are disjoint, and fresh draws never touch what is held out."""

import dataclasses
import math
import pickle
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tina.errors import ConfigError
from tina.jobconfig import TaskConfig
from tina.superclasses import CIFAR100_SUPERCLASSES
from tina.tasks import Task, build_task_space, check_disjoint

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CIFAR = sorted(chain.from_iterable(CIFAR100_SUPERCLASSES.values()))
GROUPS = [
    next(g for g, names in enumerate(CIFAR100_SUPERCLASSES.values()) if name in names)
    for name in CIFAR
]
NEW, SHIFTED, UNSEEN = "unseen_combination", "shifted_combination", "unseen_class"
TASK = Task(
    dataset="digits",
    class_ids=(3, 1),
    class_names=("three", "one"),
    split="train",
    axis=NEW,
    seed=7,
)


def digits(**options):
    return build_task_space("digits", DIGITS, None, TaskConfig(**options))


def cifar(**options):
    asked = {"train": 60, "val": 15, "held_out": 40, "excluded_fraction": 0.2, "max_classes": 10}
    return build_task_space("cifar100", CIFAR, GROUPS, TaskConfig(**(asked | options)))


def all_tasks(space):
    return [*space.train, *space.val, *chain.from_iterable(space.held_out.values())]


@pytest.mark.parametrize("fewest", [2, 10])
def test_more_tasks_by_their_number_of_unseen_classes(fewest):
    plain = cifar(min_classes=fewest)
    space = cifar(min_classes=fewest, unseen_counts=(1, 5, 10))
    assert all_tasks(space) == all_tasks(plain)
    assert list(space.unseen) == [1, 5, 10]
    taken = {task.key for task in all_tasks(space)}
    for count, tasks in space.unseen.items():
        assert len(tasks) == 40
        for task in tasks:
            assert len(task.key & set(space.excluded)) == count
            assert max(fewest, count) <= task.num_classes <= 10
            assert (task.split, task.axis) == ("held_out", UNSEEN)
            assert not concentrated(task.class_ids)
        keys = {task.key for task in tasks}
        assert len(keys) == 40
        assert not keys & taken
        taken |= keys


def concentrated(class_ids):
    """The definition, counted from the names: with 4 seen classes in each superclass."""
    homes = {
        home
        for home, names in CIFAR100_SUPERCLASSES.items()
        for i in class_ids
        if CIFAR[i] in names
    }
    return len(homes) <= math.ceil(len(class_ids) / 4)


# --- task -----------------------------------------------------------------------------------------


def test_task_id_is_stable():
    assert TASK.task_id == "6f838f5cc073108f"
    assert TASK.num_classes == 2
    assert TASK.key == {1, 3}


@pytest.mark.parametrize("change", [{"class_ids": (1, 3)}, {"seed": 8}, {"dataset": "digit"}])
def test_task_id_depends_on_data_set_order_and_seed(change):
    assert dataclasses.replace(TASK, **change).task_id != TASK.task_id


def test_order_changes_the_id_but_not_the_key():
    assert dataclasses.replace(TASK, class_ids=(1, 3)).key == TASK.key


# --- digits: all sets can be listed ---------------------------------------------------------------


def test_digits_have_837_sets_and_every_one_can_be_used():
    space = digits(held_out=120, val=80, train=637)
    every = {frozenset(c) for k in range(2, 7) for c in combinations(range(10), k)}
    assert len(every) == 837
    assert {task.key for task in all_tasks(space)} == every
    assert space.missing == {
        SHIFTED: "data set has no superclasses",
        UNSEEN: "no class is excluded from training",
    }
    assert list(space.held_out) == [NEW]


def test_one_set_too_many_names_both_numbers():
    with pytest.raises(ConfigError, match=r"638 train tasks .* digits has class sets for 637"):
        digits(held_out=120, val=80, train=638)


def test_few_sets_are_drawn_uniformly():
    """Sizes follow the number of sets: 45, 120, 210, 252 and 210 of 837."""
    counts = Counter(t.num_classes for s in range(40) for t in digits(seed=s).held_out[NEW])
    total = sum(counts.values())
    for k in range(2, 7):
        share = math.comb(10, k) / 837
        assert abs(counts[k] / total - share) < 4 * math.sqrt(share * (1 - share) / total)


def test_fresh_sizes_follow_those_of_the_training_tasks():
    fresh = digits(held_out=1, val=1, train=1).sample_fresh(np.random.default_rng(0), 5000)
    counts = Counter(map(len, fresh))
    for k in range(2, 7):
        share = math.comb(10, k) / 837
        assert abs(counts[k] / 5000 - share) < 4 * math.sqrt(share * (1 - share) / 5000)


def test_many_sets_are_drawn_with_uniform_sizes():
    counts = Counter(t.num_classes for t in cifar(train=3000, min_classes=5).train)
    for k in range(5, 11):
        assert abs(counts[k] / 3000 - 1 / 6) < 4 * math.sqrt(5 / 36 / 3000)


def test_class_order_is_random():
    tasks = digits(train=600).train
    rising = sum(list(t.class_ids) == sorted(t.class_ids) for t in tasks)
    expected = sum(1 / math.factorial(t.num_classes) for t in tasks)
    assert abs(rising - expected) < 4 * math.sqrt(expected)


# --- both data sets -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), kind=st.sampled_from(["digits", "digits unseen", "cifar"]))
def test_splits_and_axes_are_disjoint_for_every_seed(seed, kind):
    if kind == "cifar":
        space = cifar(seed=seed)
    else:
        space = digits(
            seed=seed,
            train=50,
            held_out=30,
            excluded_fraction=0.2 if kind == "digits unseen" else 0.0,
            unseen_per_task=1,
        )
    tasks = all_tasks(space)
    assert len({t.key for t in tasks}) == len(tasks)
    assert len({t.task_id for t in tasks}) == len(tasks)
    assert (len(space.train), len(space.val)) == (space.config.train, space.config.val)
    assert all(len(found) == space.config.held_out for found in space.held_out.values())
    assert {*space.held_out, *space.missing} == {NEW, SHIFTED, UNSEEN}
    assert not set(space.held_out) & set(space.missing)
    assert sorted(space.seen + space.excluded) == list(range(len(space.class_names)))
    for task in tasks:
        assert task.class_names == tuple(space.class_names[i] for i in task.class_ids)
        assert space.config.min_classes <= task.num_classes <= space.config.max_classes
        unseen = len(task.key & set(space.excluded))
        assert unseen == (space.config.unseen_per_task if task.axis == UNSEEN else 0)
    assert {(t.split, t.axis) for t in space.train} == {("train", NEW)}
    assert {(t.split, t.axis) for t in space.val} == {("val", NEW)}
    for axis, found in space.held_out.items():
        assert {(t.split, t.axis) for t in found} == {("held_out", axis)}


@pytest.mark.parametrize("build", [digits, cifar])
def test_the_seed_alone_decides(build):
    assert build(seed=3) == build(seed=3)
    one, other = build(seed=3), build(seed=4)
    assert {t.key for t in one.held_out[NEW]} != {t.key for t in other.held_out[NEW]}


@pytest.mark.parametrize("build", [digits, cifar])
def test_more_training_tasks_leave_the_others_as_they_are(build):
    few, many = build(train=30), build(train=55)
    assert many.held_out == few.held_out
    assert many.val == few.val
    assert many.train[:30] == few.train


def test_every_task_has_a_seed_of_its_own():
    seeds = [task.seed for task in all_tasks(cifar())]
    assert len(set(seeds)) == len(seeds)


def test_a_task_space_survives_pickling():
    space = cifar()
    space.sample_fresh(np.random.default_rng(0), 2)
    assert pickle.loads(pickle.dumps(space)) == space


# --- excluded classes and superclasses ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_of_cifar100_is_one_class_per_superclass(seed):
    space = cifar(seed=seed)
    assert sorted(GROUPS[i] for i in space.excluded) == list(range(20))


def test_excluded_classes_differ_between_seeds():
    assert len({cifar(seed=seed).excluded for seed in range(4)}) == 4


@pytest.mark.parametrize(("fraction", "most"), [(0.1, 1), (0.37, 2)])
def test_excluded_classes_spread_over_superclasses(fraction, most):
    space = cifar(excluded_fraction=fraction)
    assert len(space.excluded) == round(100 * fraction)
    counts = Counter(GROUPS[i] for i in space.excluded)
    assert max(counts.values()) == most
    assert len(counts) == min(20, len(space.excluded))


def test_without_superclasses_excluded_classes_are_random():
    found = Counter(chain.from_iterable(digits(seed=s, **TWO_OUT).excluded for s in range(100)))
    assert sum(found.values()) == 200
    assert all(abs(found[i] - 20) < 4 * math.sqrt(100 * 0.2 * 0.8) for i in range(10))


TWO_OUT = {"excluded_fraction": 0.2, "held_out": 20, "train": 20}


@pytest.mark.parametrize("seed", range(5))
def test_only_shifted_tasks_are_concentrated(seed):
    space = cifar(seed=seed, min_classes=2, max_classes=10)
    for task in all_tasks(space):
        assert concentrated(task.class_ids) == (task.axis == SHIFTED)


def test_shifted_tasks_hold_whole_superclasses():
    space = cifar(min_classes=5)
    for task in space.held_out[SHIFTED]:
        sizes = sorted(Counter(GROUPS[i] for i in task.class_ids).values(), reverse=True)
        whole, rest = divmod(task.num_classes, 4)
        assert sizes == [4] * whole + [rest] * bool(rest)
    homes = Counter(GROUPS[i] for task in space.held_out[SHIFTED] for i in task.class_ids)
    assert len(homes) == 20


def test_superclasses_that_do_not_divide_the_classes_leave_the_axis_out():
    for groups in ([0] * 10, list(range(10))):
        space = build_task_space("digits", DIGITS, groups, TaskConfig(train=20))
        assert "do not divide" in space.missing[SHIFTED]
        assert SHIFTED not in space.held_out
        assert len(space.sample_fresh(np.random.default_rng(0), 5)) == 5


def test_ragged_superclasses_are_taken_in_as_few_as_hold_them():
    groups = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    config = TaskConfig(min_classes=4, max_classes=6, train=20, val=5, held_out=8)
    space = build_task_space("digits", DIGITS, groups, config)
    for task in space.held_out[SHIFTED]:
        homes = {groups[i] for i in task.class_ids}
        assert len(homes) == math.ceil(task.num_classes / 4)
    with pytest.raises(ConfigError, match=r"9 held_out .* sets for 1$"):
        build_task_space(
            "digits", DIGITS, groups, dataclasses.replace(config, max_classes=4, held_out=9)
        )


def test_the_largest_superclass_alone_does_not_say_how_many_are_needed():
    """Seven classes, 4 + 2 in the two largest."""
    groups = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    config = TaskConfig(min_classes=7, max_classes=7, train=20, val=5, held_out=8)
    space = build_task_space("digits", DIGITS, groups, config)
    for task in all_tasks(space):
        homes = len({groups[i] for i in task.class_ids})
        assert homes == (3 if task.axis == SHIFTED else 4)


# --- fresh tasks ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40), few=st.booleans())
def test_fresh_tasks_never_touch_what_is_held_out(seed, few):
    """Where 200 of 837 sets (digits) are forbidden, 1000 careless draws would hit some for sure."""
    space = digits(seed=seed, train=10) if few else cifar(seed=seed, min_classes=2, max_classes=3)
    forbidden = {t.key for t in all_tasks(space) if t.split != "train"}
    fresh = space.sample_fresh(np.random.default_rng(seed), 1000)
    assert len(fresh) == 1000
    for class_ids in fresh:
        assert frozenset(class_ids) not in forbidden
        assert set(class_ids) <= set(space.seen)
        assert len(set(class_ids)) == len(class_ids)
        assert few or not concentrated(class_ids)


def test_fresh_tasks_reach_every_set_that_is_free():
    space = digits(train=10, held_out=400, val=100)
    fresh = space.sample_fresh(np.random.default_rng(0), 20_000)
    forbidden = {t.key for t in (*space.val, *space.held_out[NEW])}
    assert len({frozenset(c) for c in fresh}) == 837 - len(forbidden)


def test_fresh_tasks_follow_the_generator_and_the_size_asked_for():
    space = cifar(min_classes=7, max_classes=7)
    one, same, other = (space.sample_fresh(np.random.default_rng(seed), 20) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert {len(class_ids) for class_ids in one} == {7}
    assert all(isinstance(i, int) for class_ids in one for i in class_ids)


def test_fresh_order_is_random():
    space = digits(min_classes=3, max_classes=3, train=4, val=4, held_out=4)
    fresh = space.sample_fresh(np.random.default_rng(0), 4000)
    rising = sum(list(c) == sorted(c) for c in fresh)
    assert abs(rising - 4000 / 6) < 4 * math.sqrt(4000 * 5 / 36)


def test_no_set_left_for_fresh_tasks_is_an_error_not_a_hang():
    space = digits(max_classes=2, held_out=40, val=4, train=1)
    assert {frozenset(c) for c in space.sample_fresh(np.random.default_rng(0), 9)} == {
        space.train[0].key
    }
    held = {**space.held_out, NEW: space.held_out[NEW] + space.train}
    with pytest.raises(ConfigError, match="no class set is left"):
        dataclasses.replace(space, held_out=held).sample_fresh(np.random.default_rng(0), 1)


# --- errors and the check itself ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_classes": 11}, "tasks.max_classes is 11, but digits has 10 classes"),
        ({"max_classes": 9, **TWO_OUT}, "tasks.max_classes is 9, but digits has 8 classes"),
        ({"unseen_per_task": 3, **TWO_OUT}, r"unseen_per_task is 3, .* classes \(2\)"),
        ({"unseen_per_task": 0, **TWO_OUT}, "unseen_per_task is 0"),
        ({"unseen_counts": (1, 3), **TWO_OUT}, r"unseen_counts is 3, .* classes \(2\)"),
        (
            {"unseen_counts": (4,), "max_classes": 3, "excluded_fraction": 0.5},
            r"unseen_counts is 4, .* both tasks.max_classes \(3\)",
        ),
        ({"unseen_counts": (1,)}, "unseen_counts is 1"),
        ({"max_classes": 2, "held_out": 46}, r"46 held_out tasks .* class sets for 45"),
        ({"max_classes": 2, **TWO_OUT}, rf"20 held_out tasks .* {UNSEEN} .* class sets for 1$"),
    ],
)
def test_counts_that_cannot_be_met_name_both_numbers(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        digits(**options)
    assert "\n" not in str(caught.value)


def moved(task, **changes):
    return dataclasses.replace(task, **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"train": (*s.train, s.val[0])}, "same class set"),
        (
            lambda s: {
                "val": (moved(s.held_out[UNSEEN][0], class_ids=s.train[0].class_ids[::-1]),)
            },
            "same class set",
        ),
        (
            lambda s: {"train": (moved(s.held_out[UNSEEN][0], axis=NEW),), "held_out": {}},
            "2 excluded classes, not 0",
        ),
        (
            lambda s: {"train": (moved(s.held_out[SHIFTED][0], axis=NEW),), "held_out": {}},
            "wrong number of superclasses",
        ),
        (
            lambda s: {"held_out": {SHIFTED: (moved(s.val[0], axis=SHIFTED),)}, "val": ()},
            "wrong number of super",
        ),
        (lambda s: {"train": (moved(s.train[0], class_ids=(5, 5)),)}, "a class twice"),
    ],
)
def test_check_disjoint_finds_what_is_wrong(spoil, message):
    space = cifar()
    check_disjoint(space)
    with pytest.raises(AssertionError, match=message):
        check_disjoint(dataclasses.replace(space, **spoil(space)))
