"""Errors about too few classes end with flags that they are enough for."""

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tina.configio import parse_config
from tina.errors import ConfigError
from tina.fitting import FEWEST, task_space
from tina.jobconfig import JobConfig, TaskConfig

# as in configs/caltech101_efficientnet_head.yaml, with fewer tasks
PHOTOGRAPHS = TaskConfig(
    min_classes=10,
    max_classes=10,
    train=40,
    val=8,
    held_out=20,
    excluded_fraction=0.2,
    unseen_counts=(1, 5, 10),
)


def data(classes, groups=None):
    names = tuple(f"class {i}" for i in range(classes))
    return SimpleNamespace(name="mine", class_names=names, num_classes=classes, groups=groups)


def refused(found, config):
    """The error without its advice, and the flags that are advised."""
    with pytest.raises(ConfigError) as caught:
        task_space(found, config)
    message, _, flags = str(caught.value).partition(
        f"; with {found.num_classes} classes this fits: "
    )
    assert "\n" not in message
    return message, flags


def mended(flags, config):
    """What a user gets who adds the flags to the configuration."""
    asked = [
        f"--tasks.{key}={list(value) if isinstance(value, tuple) else value}"
        for key, value in vars(config).items()
    ]
    return parse_config(
        JobConfig, ["--storage", "/", "--name", "mine", *asked, *shlex.split(flags)]
    ).tasks


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(2, 70),
    most=st.integers(2, 12),
    fraction=st.sampled_from([0.0, 0.2, 0.5]),
    counts=st.sets(st.integers(1, 12), max_size=3),
)
def test_the_flags_fit_and_leave_the_rest(classes, most, fraction, counts):
    config = replace(
        PHOTOGRAPHS,
        min_classes=min(most, 10),
        max_classes=most,
        excluded_fraction=fraction,
        unseen_counts=tuple(counts),
    )
    found = data(classes)
    try:
        task_space(found, config)
    except ConfigError:
        _, flags = refused(found, config)
        if flags:
            tasks = mended(flags, config)
            assert task_space(found, tasks).train
            assert tasks.held_out >= FEWEST
            changed = [k for k, v in vars(tasks).items() if v != vars(config)[k]]
            assert flags.count("--tasks.") == len(changed)
            assert tasks.max_classes <= config.max_classes
            assert set(tasks.unseen_counts) <= set(config.unseen_counts)
            assert (tasks.excluded_fraction, tasks.seed) == (fraction, config.seed)


@pytest.mark.parametrize(
    ("classes", "flags"),
    [
        (40, "--tasks.unseen_counts '[1, 5]'"),
        (20, "--tasks.unseen_counts '[1]'"),
        (12, "--tasks.min_classes 2 --tasks.unseen_counts '[1]'"),
    ],
)
def test_no_more_is_changed_than_must_be(classes, flags):
    assert refused(data(classes), PHOTOGRAPHS)[1] == flags


def test_superclasses_are_heeded(monkeypatch):
    monkeypatch.setattr("tina.tasks.MAX_REJECTS", 1000)
    # the shifted axis has whole superclasses, here of two: six sets of two, fifteen of four
    found = data(12, groups=tuple(i // 2 for i in range(12)))
    config = TaskConfig(min_classes=2, max_classes=2, train=20, val=4, held_out=10)
    message, flags = refused(found, config)
    assert "10 held_out tasks of the axis shifted_combination" in message
    assert flags == ""  # smaller tasks have no more of these, and fewer were not tried


@pytest.mark.parametrize("classes", [2, 6])
def test_where_nothing_fits_nothing_is_advised(classes):
    message, flags = refused(data(classes), PHOTOGRAPHS)
    assert (message[:22], flags) == ("tasks.max_classes is 1", "")
