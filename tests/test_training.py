"""The training loop: exact resume, honest batches, two losses, and no step on a loss gone wrong."""

import copy
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tina.batches import OTHERS_HIDDEN, Batch, BatchSource, encode_zoo
from tina.config import DiffusionConfig
from tina.diffusion import signal_level
from tina.engine import LocalEngine
from tina.errors import CheckpointError, NonFiniteError
from tina.tensors import write_tensors
from tina.training import Progress, losses, shown, train

SCRIPT = Path(__file__).with_name("resume_script.py")


class Stop(Exception):
    """What interrupts a run in these tests."""


@pytest.fixture(scope="module")
def base(tiny_run):
    """The untrained generator; `fresh` copies it."""
    return tiny_run.new_generator()


@pytest.fixture
def fresh(base):
    return lambda: replace(base, denoiser=copy.deepcopy(base.denoiser))


@pytest.fixture
def short(tiny_run):
    """12 steps with states, each validated, at 5, 10 and 12."""
    return replace(tiny_run.config.train, checkpoint_every=5)


def go(run, generator, config, *, engine=None, start=None, report=None, judge=None, **options):
    """`train` with a plain engine; `judge` measures when its result is asked for."""
    judge = judge or run.validator(generator)
    return train(
        config,
        engine=engine or LocalEngine(generator.denoiser, config),
        source=options.pop("source", None) or run.source(generator, config),
        start=start or Progress.start(generator.denoiser),
        report=report or (lambda progress, figures: None),
        validate=lambda ema: partial(judge, ema),
        **options,
    )


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("best_is", ["before the stop", "after it"])
def test_resumed_run_equals_an_undisturbed_one(tiny_run, fresh, short, tmp_path, best_is):
    def judge(ema):
        grown = float(ema["row_out.bias"].abs().sum())  # zero at the start
        value = 1 - grown if best_is == "before the stop" else grown
        return [value, value + 0.01, value - 0.01]

    whole = fresh()
    figures_whole = []
    want = go(
        tiny_run,
        whole,
        short,
        report=lambda p, figures: figures_whole.append(dict(figures)),
        judge=judge,
    )
    assert want.step == 12

    first = fresh()
    engine = LocalEngine(first.denoiser, short)

    def save_and_stop(progress, figures):
        if progress.step < 10:  # the state at 10 is the first to know a validation's result
            return
        engine.save(tmp_path / "engine.safetensors")
        progress.save(tmp_path / "progress.safetensors")
        raise Stop

    with pytest.raises(Stop):
        go(tiny_run, first, short, engine=engine, report=save_and_stop, judge=judge)

    second = fresh()
    engine = LocalEngine(second.denoiser, short)
    engine.load(tmp_path / "engine.safetensors")
    start = Progress.load(tmp_path / "progress.safetensors")
    assert start.step == 10
    figures = []
    found = go(
        tiny_run,
        second,
        short,
        engine=engine,
        start=start,
        report=lambda p, latest: figures.append(dict(latest)),
        judge=judge,
    )
    assert_equal(weights(second.denoiser), weights(whole.denoiser))
    assert_equal(found.ema, want.ema)
    assert_equal(found.best, want.best)
    assert found.best_accuracy == want.best_accuracy > 0
    assert torch.equal(found.top, want.top)
    assert figures[-1] == figures_whole[-1]
    # and the steps since went somewhere
    saved = Progress.load(tmp_path / "progress.safetensors")
    assert not torch.equal(saved.ema["position"], found.ema["position"])
    kept = torch.equal(saved.best["position"], found.best["position"])
    assert kept == (best_is == "before the stop")


def test_engine_state_round_trip(tiny_run, fresh, short, tmp_path):
    generator, other = fresh(), fresh()
    engine = LocalEngine(generator.denoiser, short)
    go(tiny_run, generator, replace(short, steps=2), engine=engine)
    engine.save(tmp_path / "engine.safetensors")
    again = LocalEngine(other.denoiser, short)
    again.load(tmp_path / "engine.safetensors")
    assert_equal(weights(other.denoiser), weights(generator.denoiser))
    mine, theirs = (e.optimizer.state_dict()["state"] for e in (engine, again))
    assert mine.keys() == theirs.keys()
    for place, slot in mine.items():
        assert slot["step"] == 2
        assert_equal(slot, theirs[place])


def test_progress_round_trip(tmp_path):
    ema, best = ({f"a.{i}": torch.randn(3) for i in range(2)} for _ in range(2))
    top = torch.rand(5, dtype=torch.float64)
    progress = Progress(step=17, ema=ema, best=best, best_accuracy=1 / 3, top=top)
    progress.save(tmp_path / "p.safetensors")
    again = Progress.load(tmp_path / "p.safetensors")
    assert (again.step, again.best_accuracy) == (17, 1 / 3)
    assert_equal(again.ema, ema)
    assert_equal(again.best, best)
    assert torch.equal(again.top, top)
    assert len(Progress.start(nn.Linear(2, 2)).top) == 0


def test_progress_of_another_version_is_refused(tmp_path):
    file = tmp_path / "p.safetensors"
    write_tensors(file, {"step": torch.tensor(1), "best_accuracy": torch.tensor(0.5)})
    with pytest.raises(CheckpointError, match="another version of Tina: remove its train/ folder"):
        Progress.load(file)


@pytest.mark.parametrize("left", [0, 20, -1])
def test_progress_that_was_cut_off_is_refused(tmp_path, left):
    file = tmp_path / "p.safetensors"
    Progress.start(nn.Linear(2, 2)).save(file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"is not whole \(.+\): remove its train/ folder"):
        Progress.load(file)


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda tasks: st.lists(
            st.lists(st.integers(0, 100), min_size=tasks, max_size=tasks), min_size=1, max_size=8
        )
    )
)
def test_the_latest_state_within_a_standard_error_of_the_best_is_chosen(percent):
    accuracies = np.array(percent) / 100
    progress = Progress(step=0, ema={}, best={})
    for step, row in enumerate(accuracies):
        own = {"step": torch.tensor(step)}
        progress = replace(progress, step=step, ema=own).settle(torch.from_numpy(row))
    leads = accuracies[accuracies.mean(1).argmax()] - accuracies
    tasks = accuracies.shape[1]
    error = leads.std(1, ddof=1) / tasks**0.5 if tasks > 1 else np.zeros(len(leads))
    (able,) = np.nonzero(leads.mean(1) <= error + 1e-12)
    assume(np.abs(leads.mean(1) - error)[leads.any(1)].min(initial=1) > 1e-9)
    assume(np.unique(accuracies.mean(1).round(9)).size == len(accuracies))
    assert progress.best["step"] == able[-1]
    assert progress.best_accuracy == pytest.approx(accuracies[able[-1]].mean())
    assert progress.top.numpy() == pytest.approx(accuracies[accuracies.mean(1).argmax()])


def test_best_is_a_copy(tiny_run, fresh, short):
    """The averaged weights go on changing in place; the best ones must not.

    The untrained weights are measured too, for comparison, and never taken.
    """
    generator, seen = fresh(), []

    def judge(ema):
        seen.append({name: value.clone() for name, value in ema.items()})
        return [[0.9, 0.3, 0.7, 0.1][len(seen) - 1]]

    progress = go(tiny_run, generator, short, judge=judge)
    assert len(seen) == 4
    assert progress.best_accuracy == 0.7
    assert_equal(progress.best, seen[2])
    assert_equal(progress.ema, seen[3])


def test_a_rank_without_validation_reports_its_losses(tiny_run, fresh, short):
    generator, reports = fresh(), []
    train(
        replace(short, steps=3),
        engine=LocalEngine(generator.denoiser, short),
        source=tiny_run.source(generator, short),
        start=Progress.start(generator.denoiser),
        report=lambda progress, figures: reports.append((progress.step, sorted(figures))),
        validate=None,
        rank=1,
        world=2,
    )
    assert reports == [(3, ["function_loss", "lr", "weight_loss"])]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_own_parts(tiny_run, fresh, short, rank):
    asked, generator = [], fresh()

    class Noted(BatchSource):
        def batch(self, step, *, part=0, parts=1) -> Batch:
            asked.append((step, part, parts))
            return super().batch(step, part=part, parts=parts)

    config = replace(short, steps=2, zoo_batch=4, fresh_tasks=4, accumulation=2)
    train(
        config,
        engine=LocalEngine(generator.denoiser, config),
        source=Noted(**vars(tiny_run.source(generator, config))),
        start=Progress.start(generator.denoiser),
        report=lambda progress, figures: None,
        validate=None,
        rank=rank,
        world=2,
    )
    own = [2 * rank, 2 * rank + 1]
    assert asked == [(step, part, 4) for step in (0, 1) for part in own]


def test_a_validation_is_not_waited_for_before_the_next_report(tiny_run, fresh, short):
    generator, events = fresh(), []

    def begin(ema):
        number = len([e for e in events if e.startswith("begin")])
        events.append(f"begin {number}")

        def wait():
            events.append(f"wait {number}")
            return [0.5 + number / 100]

        return wait

    train(
        short,
        engine=LocalEngine(generator.denoiser, short),
        source=tiny_run.source(generator, short),
        start=Progress.start(generator.denoiser),
        report=lambda progress, figures: events.append(
            f"report {progress.step}: {figures['val_accuracy']:.2f} at {figures['val_step']}"
        ),
        validate=begin,
        on_step=lambda step, figures: events.append(f"step {step}") if step in (1, 6, 11) else None,
        on_validated=lambda step, accuracy: events.append(f"{accuracy:.2f} at {step}"),
    )
    assert events == [
        *["begin 0", "step 1", "wait 0", "0.50 at 0", "begin 1", "report 5: 0.50 at 0"],
        *["step 6", "wait 1", "0.51 at 5", "begin 2", "report 10: 0.51 at 5"],
        *["step 11", "wait 2", "0.52 at 10", "begin 3", "wait 3", "0.53 at 12"],
        "report 12: 0.53 at 12",
    ]


def test_reports_come_every_few_steps_and_at_the_end(tiny_run, fresh, short):
    reports, steps = [], []
    go(
        tiny_run,
        fresh(),
        short,
        report=lambda progress, figures: reports.append(progress.step),
        judge=lambda ema: [0.5],
        on_step=lambda step, figures: steps.append(step),
    )
    assert reports == [5, 10, 12]
    assert steps == list(range(1, 13))


def test_reported_losses_are_means_over_the_steps_since_the_last_report(tiny_run, fresh, short):
    taken, reports = [], []
    go(
        tiny_run,
        fresh(),
        short,
        report=lambda progress, figures: reports.append(dict(figures)),
        judge=lambda ema: [0.5],
        on_step=lambda step, figures: taken.append(figures),
    )
    for figures, steps in zip(reports, (taken[:5], taken[5:10], taken[10:]), strict=True):
        for name in ("weight_loss", "function_loss"):
            assert figures[name] == pytest.approx(mean(f[name] for f in steps), rel=1e-5)
    assert reports[0]["lr"] < short.lr


def test_killed_run_equals_an_undisturbed_one(tiny_run, fresh, tmp_path):
    steps, every = 32, 4
    states = tmp_path / "states"
    command = [sys.executable, str(SCRIPT), str(tiny_run.folder), str(states), str(steps)]
    command += [str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not list(states.glob("step-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "no state was written"
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (states / f"step-{steps:04d}").exists(), "it was not killed in the middle"

    reached = max(int(state.name[-4:]) for state in states.glob("step-*"))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == f"from step {reached}\n"
    assert 0 < reached < steps

    generator = fresh()
    config = replace(tiny_run.config.train, steps=steps, checkpoint_every=every)
    want = go(tiny_run, generator, config)
    last = states / f"step-{steps:04d}"
    found = Progress.load(last / "progress.safetensors")
    assert found.step == steps
    assert found.best_accuracy == want.best_accuracy
    assert_equal(found.ema, want.ema)
    assert_equal(found.best, want.best)
    held = load_file(last / "engine.safetensors")
    module = {k[7:]: v for k, v in held.items() if k.startswith("module.")}
    assert_equal(module, weights(generator.denoiser))


# --- batches --------------------------------------------------------------------------------------


def comparable(batch):
    """Everything in a batch, as tensors."""
    found = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    found |= {f"images.{i}": x for i, x in enumerate(batch.images)}
    return found | {f"labels.{i}": x for i, x in enumerate(batch.labels)}


def test_batches_are_functions_of_seed_step_and_slot(tiny_run, base, short):
    def source(**changes):
        return tiny_run.source(base, replace(short, **changes))

    want = comparable(source().batch(3, part=1, parts=2))
    other = source()
    other.batch(9, part=0, parts=2)  # what was asked before does not count
    torch.manual_seed(99)
    assert_equal(comparable(other.batch(3, part=1, parts=2)), want)
    assert_equal(comparable(source(steps=50, lr=1.0).batch(3, part=1, parts=2)), want)
    for batch in (
        source().batch(3, part=0, parts=2),
        source().batch(4, part=1, parts=2),
        source(seed=1).batch(3, part=1, parts=2),
    ):
        found = comparable(batch)
        for name in ("tokens", "cond", "images.0", "noise", "first"):
            assert not torch.equal(found[name], want[name]), name


def test_noises_of_a_batch_are_independent(tiny_run, base, short):
    batch = tiny_run.source(base, short).batch(3)
    draws = torch.cat([batch.noise, batch.first]).flatten(1)
    off = torch.corrcoef(draws) - torch.eye(len(draws))
    assert off.abs().max() < 6 / draws.shape[1] ** 0.5


@pytest.mark.parametrize(
    ("share", "step", "least", "most"),
    [(0.0, 99, 0, 0), (1.0, 0, 0, 0), (1.0, 50, 16, 48), (0.5, 99, 16, 48), (1.0, 99, 58, 64)],
)
def test_neighbouring_classes_come_in_as_training_goes_on(
    share, step, least, most, tiny_run, base, short, monkeypatch
):
    drawn = []

    def draw(rng, space, cosines, *, num_classes):
        assert cosines.shape == (10, 10)
        drawn.append(num_classes)
        return tuple(range(num_classes))

    monkeypatch.setattr("tina.batches.draw_near", draw)
    config = replace(short, steps=100, fresh_tasks=64, near_tasks=share)
    tiny_run.source(base, config).batch(step)
    assert least <= len(drawn) <= most


def test_neighbours_are_those_of_the_names(tiny_run, base, short, monkeypatch):
    asked = []

    def draw(rng, space, cosines, *, num_classes):
        asked.append((cosines, num_classes))
        return tuple(range(num_classes))

    monkeypatch.setattr("tina.batches.draw_near", draw)
    config = replace(short, steps=100, fresh_tasks=64, near_tasks=1.0)
    tiny_run.source(base, config).batch(99)
    names = base.vocabulary.embeddings
    want = F.cosine_similarity(names[:, None], names, dim=-1)
    torch.testing.assert_close(torch.from_numpy(asked[0][0]), want)
    assert {classes for _, classes in asked} == {2, 3, 4}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_classes_that_are_as_if_new_inherit_of_others(tiny_run, base, short, share):
    config = replace(short, fresh_tasks=200)
    plain = tiny_run.source(base, config)
    hiding = tiny_run.source(base, replace(config, new_classes=share))
    known, batch = plain.batch(3), hiding.batch(3)
    rest = replace(batch, rows=known.rows)
    assert_equal(comparable(rest), comparable(known))  # nothing else is drawn otherwise
    mask = known.mask[-200:]
    new = (batch.rows != known.rows).any(-1)
    assert not new[~mask].any()
    # of K classes none is with a chance of 1 / (K + 1)
    assert 0.6 * share < new.any(1).float().mean() < 0.9 * share
    assert 0.35 * share < new[mask].float().mean() < 0.65 * share
    generic = base.generic
    for row, own in zip(batch.rows[new], known.rows[new], strict=True):
        others = generic.rows[(generic.rows != own).any(1)]
        assert len(others) == len(generic.rows) - 1
        # a convex mixture of the others: least squares finds it, for there are fewer than values
        shares = torch.linalg.lstsq(others.T, row.unsqueeze(1)).solution
        torch.testing.assert_close(others.T @ shares, row.unsqueeze(1), atol=1e-4, rtol=1e-3)
        assert shares.min() > -1e-3
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0), atol=1e-2, rtol=0)


def test_a_class_that_is_as_if_new_finds_another_part_of_the_others_each_time(
    tiny_run, base, short
):
    source = tiny_run.source(base, replace(short, new_classes=1.0))
    rng = np.random.default_rng(0)
    hidden = np.stack([source._hide(rng, (7, 2, 5)) for _ in range(2000)])
    assert hidden.shape == (2000, base.max_classes, 10)
    assert not hidden[:, 3:].any()
    new = hidden.any(-1)[:, :3]
    for row, class_id in enumerate((7, 2, 5)):
        found = hidden[:, row][new[:, row]]
        assert found[:, class_id].all()
        assert abs(np.delete(found, class_id, 1).mean() - OTHERS_HIDDEN) < 0.02
    # as many as chance has it, from none to all
    assert (np.bincount(new.sum(1), minlength=4) > 300).all()


def test_batches_drawn_ahead_are_those_drawn_one_by_one(tiny_run, base, short):
    source = tiny_run.source(base, short)
    ahead = source.batches(range(3, 6), range(1, 3), parts=4)
    wanted = [(step, part) for step in (3, 4, 5) for part in (1, 2)]
    for (step, part), batch in zip(wanted, ahead, strict=True):
        assert_equal(comparable(batch), comparable(source.batch(step, part=part, parts=4)))
    assert not list(source.batches(range(3, 3), range(1, 3), parts=4))


def test_a_thread_draws_the_next_batch_while_one_is_in_use(tiny_run, base, short):
    drawn = {step: threading.Event() for step in range(4)}

    class Noted(BatchSource):
        def batch(self, step, *, part=0, parts=1) -> Batch:
            drawn[step].set()
            if step == 2:
                raise MemoryError("for a batch")
            return super().batch(step, part=part, parts=parts)

    source = Noted(**vars(tiny_run.source(base, short)))
    batches = source.batches(range(4), range(1), parts=1)
    next(batches)
    assert drawn[1].wait(10)
    assert not drawn[2].is_set(), "more than one is kept"
    next(batches)
    with pytest.raises(MemoryError, match="for a batch"):
        next(batches)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_hold_the_same_samples_however_many_there_are(tiny_run, base, short, parts):
    config = replace(short, zoo_batch=8, fresh_tasks=4)
    source = tiny_run.source(base, config)
    whole = source.batch(0)
    found = [source.batch(0, part=part, parts=parts) for part in range(parts)]
    for batch in found:
        assert len(batch.tokens) == 8 // parts
        assert len(batch.images) == len(batch.labels) == len(batch.rows) == 4 // parts
        assert len(batch.cond) == len(batch.mask) == len(batch.noise) == 12 // parts
        assert {len(x) for x in batch.images + batch.labels} == {config.images_per_task}
    for name in ("tokens", "first", "pure"):
        together = torch.cat([getattr(batch, name) for batch in found])
        assert torch.equal(together, getattr(whole, name)), name
    # no draw: products, which some processors round otherwise for another number of rows
    rows = torch.cat([batch.rows for batch in found])
    torch.testing.assert_close(rows, whole.rows, rtol=0, atol=1e-6)
    for name in ("cond", "mask", "noise", "t", "drop"):
        of_zoo = [getattr(batch, name)[: 8 // parts] for batch in found]
        fresh = [getattr(batch, name)[8 // parts :] for batch in found]
        assert torch.equal(torch.cat(of_zoo + fresh), getattr(whole, name)), name
    taken = [x for batch in found for x in batch.images + batch.labels]
    assert all(torch.equal(x, y) for x, y in zip(taken, _in_turn(whole, parts), strict=True))


def _in_turn(whole, parts):
    """Images, then labels, of each part of a whole batch."""
    size = len(whole.images) // parts
    for start in range(0, len(whole.images), size):
        part = slice(start, start + size)
        yield from whole.images[part] + whole.labels[part]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_train_as_the_whole_batch(tiny_run, fresh, short, parts):
    """The same samples in one pass or in several: the same weights but for rounding."""
    results = []
    for accumulation in (1, parts):
        config = replace(
            short, steps=3, zoo_batch=4, fresh_tasks=4, lr=1e-3, accumulation=accumulation
        )
        generator = fresh()
        reports = []
        go(
            tiny_run,
            generator,
            config,
            judge=lambda ema: [0.5],
            report=lambda progress, figures: reports.append(figures),  # noqa: B023
        )
        results.append((weights(generator.denoiser), reports[-1]))
    (whole, figures), (in_parts, again) = results
    start = weights(fresh().denoiser)
    for name, value in whole.items():
        # Adam turns the rounding of a vanishing gradient into a whole step of that one weight
        assert (in_parts[name] - value).norm() <= 1e-2 * (value - start[name]).norm(), name
    for name in ("weight_loss", "function_loss"):
        assert again[name] == pytest.approx(figures[name], rel=1e-4)


def test_tokens_decode_to_the_p_models(tiny_run, base):
    """Zoo tokens, decoded and added to what the prompt inherits, are the zoo's thetas."""
    zoo = tiny_run.read_zoo("zoo")
    body, rows = base.codec.decode(encode_zoo(base, zoo))
    layout = base.family.layout(base.max_classes)
    for z, class_ids in enumerate(zoo.class_ids):
        own_body, own_rows = base.inherit(base.vocabulary.embeddings[list(class_ids)].unsqueeze(0))
        k = len(class_ids)
        want_body, want_rows = layout.split(zoo.theta[z])
        torch.testing.assert_close(own_body[0] + body[z], want_body, rtol=0, atol=1e-5)
        torch.testing.assert_close(own_rows[0] + rows[z, :k], want_rows[:k], rtol=0, atol=1e-5)
        assert (rows[z, k:] == 0).all()


def test_conditions_belong_to_their_p_models(tiny_run, base, short):
    source = tiny_run.source(base, short)
    tokens, vocabulary = encode_zoo(base, source.zoo), base.vocabulary
    batch = source.batch(5)
    for i, own in enumerate(batch.tokens):
        (z,) = [z for z, other in enumerate(tokens) if torch.equal(own, other)]
        ids = list(source.zoo.class_ids[z])
        want = vocabulary.condition(vocabulary.embeddings[ids])
        assert batch.mask[i].tolist() == [k < len(ids) for k in range(base.max_classes)]
        torch.testing.assert_close(batch.cond[i, : len(ids)], want)


class Places:
    """A store that answers with the places themselves, so that a batch tells what it read."""

    def __getitem__(self, index):
        return index


def fresh_tasks(source, batch):
    """The class ids of a batch's fresh tasks, read off their conditions."""
    vocabulary = source.generator.vocabulary
    known = vocabulary.condition(vocabulary.embeddings)
    tasks = []
    for cond, mask in zip(batch.cond, batch.mask, strict=True):
        nearest = (cond[mask].unsqueeze(1) - known).norm(dim=-1).min(1)
        assert nearest.values.max() < 1e-3
        tasks.append(nearest.indices.tolist())
    return tasks[len(batch.tokens) :]


def test_fresh_tasks_are_nobody_elses_and_read_fit_images_only(tiny_run, base, short):
    config = replace(short, fresh_tasks=40, images_per_task=6)
    source = replace(tiny_run.source(base, config), store=Places())
    space, data = tiny_run.space, tiny_run.dataset
    held_out = [task for tasks in space.held_out.values() for task in tasks]
    reserved = {task.key for task in [*space.val, *held_out]}
    fit = set(data.indices("fit").tolist())
    met = []
    for step in range(40):
        batch = source.batch(step)
        for task, places, labels in zip(
            fresh_tasks(source, batch), batch.images, batch.labels, strict=True
        ):
            met.append(frozenset(task))
            assert set(places.tolist()) <= fit
            assert data.labels[places].tolist() == [task[row] for row in labels]
    # 1600 draws from 375 sets: without the rule about 26 of them would be reserved
    assert not reserved & set(met)
    assert len(set(met)) > 300


def test_batches_draw_training_p_models_only(tiny_run, base, short):
    source = tiny_run.source(base, short)
    val = encode_zoo(base, tiny_run.read_zoo("zoo").only("val"))
    for step in range(10):
        for own in source.batch(step).tokens:
            assert not any(torch.equal(own, other) for other in val)


def test_every_p_model_level_and_fit_image_can_be_drawn(tiny_run, base, short):
    config = replace(short, zoo_batch=64, fresh_tasks=16, images_per_task=64)
    source = replace(tiny_run.source(base, config), store=Places())
    batches = [source.batch(step) for step in range(20)]
    tokens = torch.cat([batch.tokens[:, 0] for batch in batches])
    assert len({row.numpy().tobytes() for row in tokens}) == len(source.zoo.task_ids)
    own = torch.cat([batch.t[64:][~batch.pure] for batch in batches])
    for levels in (torch.cat([batch.t[:64] for batch in batches]), own):
        assert levels.max() >= 98
        assert levels.min() <= 1
        assert abs(levels.float().mean() - 49.5) < 4 * (100**2 / 12 / len(levels)) ** 0.5
    read = torch.cat([places for batch in batches for places in batch.images])
    assert set(read.tolist()) == set(tiny_run.dataset.indices("fit").tolist())


# --- losses ---------------------------------------------------------------------------------------


class Answer:
    """An engine whose answer is given; it remembers how it was called."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x, t, cond, mask, drop=None):
        self.calls.append({"x": x, "t": t, "cond": cond, "mask": mask, "drop": drop})
        # the first call of a step asks for fresh tasks alone
        return self.answer[-len(x) :]


def test_function_loss_is_the_decoded_classifiers_cross_entropy(tiny_run, base, short):
    """Value and gradient against torch modules in float64, and central differences of those."""
    config = replace(short, zoo_batch=1, fresh_tasks=2)
    batch = tiny_run.source(base, config).batch(2)
    z = len(batch.tokens)
    torch.manual_seed(0)
    guess = (0.3 * torch.randn(len(batch.mask), *batch.tokens.shape[1:])).requires_grad_()
    abar = signal_level(base.config.diffusion)
    found = losses(Answer(guess), base, batch, abar)["function_loss"]
    (gradient,) = torch.autograd.grad(found, guess)

    def reference(tokens):
        body, rows = base.codec.decode(tokens)
        total = 0.0
        for j, (images, labels) in enumerate(zip(batch.images, batch.labels, strict=True)):
            k = int(batch.mask[z + j].sum())
            layout = base.family.layout(k)
            theta = layout.join(batch.body + body[j], (batch.rows + rows)[j, :k])
            module = base.family.module(k).double()
            module.load_state_dict(layout.unflatten(theta.detach()))
            total += F.cross_entropy(module(images.double()), labels).item()
        return total / len(batch.images)

    tokens = guess.detach()[z:].double()
    assert found.item() == pytest.approx(reference(tokens), rel=1e-5)
    strongest = gradient[z:].abs().flatten().topk(400).indices
    for place in [*strongest[:6].tolist(), *strongest[100::100].tolist()]:
        bump = torch.zeros(tokens.numel(), dtype=torch.float64)
        bump[place] = 1e-4
        bump = bump.view_as(tokens)
        slope = (reference(tokens + bump) - reference(tokens - bump)) / 2e-4
        assert gradient[z:].flatten()[place].item() == pytest.approx(slope, rel=2e-3, abs=1e-7)
    assert (gradient[:z] == 0).all()
    # rows of padding reach no classifier
    assert (gradient[z:, base.codec.body_tokens :][~batch.mask[z:]] == 0).all()


def test_weight_loss_is_the_mean_square_over_what_is_there(tiny_run, base, short):
    config = replace(short, function_loss=0.0)
    batch = tiny_run.source(base, config).batch(2)
    guess = torch.randn(batch.tokens.shape)
    abar = signal_level(base.config.diffusion)
    found = losses(Answer(guess), base, batch, abar)
    assert found.keys() == {"weight_loss"}
    layout, s = base.codec.layout, base.codec.body_tokens
    means = []
    for error, mask in zip((guess - batch.tokens).square(), batch.mask, strict=True):
        of_body = error[:s][base.codec.body_index >= 0]
        of_rows = error[s:][mask][:, : layout.row_size]
        assert of_body.numel() == layout.body_size
        means.append(torch.cat([of_body, of_rows.flatten()]).mean().item())
    assert found["weight_loss"].item() == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_a_perfect_velocity_has_no_weight_loss(tiny_run, base, short):
    diffusion = replace(base.config.diffusion, prediction="v")
    generator = replace(base, config=replace(base.config, diffusion=diffusion))
    batch = tiny_run.source(generator, replace(short, function_loss=0.0)).batch(2)
    abar = signal_level(diffusion)
    a = abar[batch.t].view(-1, 1, 1)
    velocity = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.tokens
    assert losses(Answer(velocity), generator, batch, abar)["weight_loss"] < 1e-6


def test_below_min_snr_the_weight_loss_is_that_of_the_noise(tiny_run, base, short):
    """eps - eps_hat = sqrt(SNR) (x0_hat - x0), so SNR times the error of x0 is the error of eps."""
    batch = tiny_run.source(base, replace(short, function_loss=0.0)).batch(2)
    abar = signal_level(base.config.diffusion)
    a, most = abar[batch.t].view(-1, 1, 1), 1e6
    assert (a / (1 - a) < most).all()
    answer = Answer(torch.randn(batch.tokens.shape))
    found = losses(answer, base, batch, abar, min_snr=most)["weight_loss"]
    (call,) = answer.calls
    noise = (call["x"] - a.sqrt() * answer.answer) / (1 - a).sqrt()
    valid = base.codec.valid(batch.mask)
    error = (noise - batch.noise).square() * valid
    wanted = (error.sum((1, 2)) / valid.sum((1, 2))).mean()
    assert (found * most).item() == pytest.approx(wanted.item(), rel=1e-3)


def test_from_min_snr_on_a_p_model_counts_in_full():
    snr = torch.tensor([0.0, 1e-3, 1.0, 2.5, 5.0, 80.0])
    abar = snr / (1 + snr)
    assert shown(abar, 5.0).tolist() == pytest.approx([0.0, 2e-4, 0.2, 0.5, 1.0, 1.0])
    assert shown(abar, 0.0).tolist() == [1.0] * 6


def test_a_p_model_counts_by_its_own_noise_and_not_a_fresh_tasks(tiny_run, base, short):
    batch = tiny_run.source(base, replace(short, zoo_batch=4, fresh_tasks=4)).batch(2)
    z, abar = len(batch.tokens), signal_level(base.config.diffusion)
    answer = torch.randn(len(batch.mask), *batch.tokens.shape[1:])
    found = losses(Answer(answer), base, batch, abar, min_snr=5.0)["weight_loss"]
    valid = base.codec.valid(batch.mask[:z])
    error = ((answer[:z] - batch.tokens).square() * valid).sum((1, 2)) / valid.sum((1, 2))
    a = abar[batch.t[:z]]
    want = ((a / (1 - a) / 5).clamp(max=1) * error).mean()
    assert found.item() == pytest.approx(want.item(), rel=1e-5)


def test_without_noise_min_snr_says_nothing(tiny_run, base, short):
    diffusion = DiffusionConfig(schedule="none", timesteps=1, sampling_steps=1)
    noiseless = replace(base, config=replace(base.config, diffusion=diffusion))
    batch = tiny_run.source(noiseless, replace(short, function_loss=0.0)).batch(2)
    answer = Answer(torch.randn(batch.tokens.shape))
    abar = signal_level(diffusion)
    found = [losses(answer, noiseless, batch, abar, min_snr=most) for most in (0.0, 0.1)]
    assert found[0]["weight_loss"] > 0
    assert found[0] == found[1]


def test_weight_loss_does_not_see_padding(tiny_run, tiny_generator, short):
    config = replace(short, function_loss=0.0, zoo_batch=8)
    abar = signal_level(tiny_generator.config.diffusion)
    s, r = tiny_generator.codec.body_tokens, tiny_generator.codec.layout.row_size

    def loss(change):
        batch = tiny_run.source(tiny_generator, config).batch(2)
        assert not batch.mask.all(), "needs a task with fewer classes than the most"
        tokens = batch.tokens.clone()
        change(tokens, batch)
        changed = replace(batch, tokens=tokens)
        return losses(tiny_generator.denoiser, tiny_generator, changed, abar)["weight_loss"]

    def absent_rows(tokens, batch):
        tokens[:, s:][~batch.mask] = 50.0

    def beyond_a_row(tokens, batch):
        tokens[:, s:, r:] = 50.0

    def one_row(tokens, batch):
        tokens[0, s, 0] += 1.0

    untouched = loss(lambda tokens, batch: None)
    assert torch.equal(loss(absent_rows), untouched)
    assert torch.equal(loss(beyond_a_row), untouched)
    assert not torch.equal(loss(one_row), untouched)


def test_conditions_of_padding_do_not_count(tiny_run, tiny_generator, short):
    abar = signal_level(tiny_generator.config.diffusion)

    def found(value):
        batch = tiny_run.source(tiny_generator, short).batch(1)
        cond = torch.where(batch.mask.unsqueeze(-1), batch.cond, value)
        return losses(tiny_generator.denoiser, tiny_generator, replace(batch, cond=cond), abar)

    one, other = found(torch.tensor(0.0)), found(torch.tensor(9.0))
    assert_equal(one, other)


def test_condition_dropout_spares_fresh_tasks(tiny_run, base, short):
    config = replace(short, condition_dropout=1.0, fresh_tasks=8, images_per_task=1)
    batch = tiny_run.source(base, config).batch(0)
    engine = Answer(torch.zeros(len(batch.mask), *batch.tokens.shape[1:]))
    losses(engine, base, batch, signal_level(base.config.diffusion))
    own, both = engine.calls
    assert own["drop"] is None
    z = len(batch.tokens)
    assert both["drop"].tolist() == [True] * z + [False] * (len(batch.mask) - z)


def test_condition_dropout_is_a_share_of_the_samples(tiny_run, base, short):
    config = replace(short, condition_dropout=0.25, function_loss=0.0, zoo_batch=64)
    source = tiny_run.source(base, config)
    engine = Answer(torch.zeros(64, *source.batch(0).tokens.shape[1:]))
    abar = signal_level(base.config.diffusion)
    for step in range(20):
        losses(engine, base, source.batch(step), abar)
    share = torch.cat([call["drop"] for call in engine.calls]).float().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1280)  # four standard errors


def test_fresh_tasks_start_from_pure_noise_or_the_own_prediction(tiny_run, base, short):
    """At the top level x_t holds nothing of a prediction; below it holds the denoiser's own."""
    config = replace(short, zoo_batch=1, fresh_tasks=32, images_per_task=1)
    batch = tiny_run.source(base, config).batch(0)
    answer = torch.full((len(batch.mask), *batch.tokens.shape[1:]), 100.0)
    engine, abar = Answer(answer), signal_level(base.config.diffusion)
    losses(engine, base, batch, abar)
    own, both = engine.calls
    top = len(abar) - 1
    assert (own["t"] == top).all()
    assert abs(own["x"].mean()) < 0.1
    assert abs(own["x"].std() - 1) < 0.1
    t, x = both["t"][1:], both["x"][1:]
    assert 8 <= int((t == top).sum()) <= 24
    centre = (x.mean((1, 2)) - 100 * abar[t].sqrt()).abs()
    assert (centre < 0.2).all()


def test_the_own_prediction_is_not_trained_through_and_pure_noise_holds_none_of_it(
    tiny_run, base, short
):
    batch = tiny_run.source(base, replace(short, fresh_tasks=8)).batch(0)
    calls, z, abar = [], len(batch.tokens), signal_level(base.config.diffusion)

    def engine(x, t, cond, mask, drop=None):
        calls.append((x, torch.is_grad_enabled()))
        return torch.full_like(x, 1e4)

    losses(engine, base, batch, abar)
    assert [graded for _, graded in calls] == [False, True]
    assert 0 < batch.pure.sum() < 8
    want = (1 - abar[-1]).sqrt() * batch.noise[z:][batch.pure]
    assert torch.equal(calls[1][0][z:][batch.pure], want)


def test_a_regressor_is_taught_the_same_without_noise(tiny_run, base, tiny_regressor, short):
    one = tiny_run.source(base, short).batch(3)
    other = tiny_run.source(tiny_regressor, short).batch(3)
    for noise in (other.noise, other.first, other.t):
        assert not noise.any()
    for key in ("tokens", "cond", "mask", "rows"):
        assert torch.equal(getattr(one, key), getattr(other, key))


def test_both_losses_carry_their_factors(tiny_run, fresh, short):
    """Doubling both factors doubles the gradient."""
    taken = []

    class Recording(LocalEngine):
        def step(self):
            taken.append([p.grad.clone() for p in self.module.parameters() if p.grad is not None])
            raise Stop

    for factor in (1.0, 2.0):
        config = replace(short, weight_loss=0.5 * factor, function_loss=3.0 * factor)
        generator = fresh()
        with pytest.raises(Stop):
            go(tiny_run, generator, config, engine=Recording(generator.denoiser, config))
    assert any(bool(gradient.any()) for gradient in taken[0])
    for one, two in zip(*taken, strict=True):
        torch.testing.assert_close(2 * one, two, rtol=1e-4, atol=1e-6)


# --- the loop -------------------------------------------------------------------------------------


class Spoilt(BatchSource):
    """Batches with a NaN at one step."""

    def batch(self, step, *, part=0, parts=1) -> Batch:
        batch = super().batch(step, part=part, parts=parts)
        if step == 3:
            batch.tokens[0, 0, 0] = torch.nan
        return batch


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_run, fresh, short):
    generator = fresh()
    engine = LocalEngine(generator.denoiser, short)
    source = Spoilt(**vars(tiny_run.source(generator, short)))
    kept, reports = {}, []

    def keep(step, figures):
        kept[step] = weights(generator.denoiser)

    with pytest.raises(NonFiniteError, match="the loss is nan at step 3; it was not taken"):
        go(
            tiny_run,
            generator,
            short,
            engine=engine,
            source=source,
            report=lambda progress, figures: reports.append(progress),
            on_step=keep,
        )
    assert sorted(kept) == [1, 2, 3]
    assert_equal(weights(generator.denoiser), kept[3])
    assert {int(slot["step"]) for slot in engine.optimizer.state.values()} == {3}
    assert reports == []


def test_weights_gone_wrong_are_never_a_state(tiny_run, fresh, short):
    """DeepSpeed's plain optimiser steps with whatever gradient there is."""

    class Careless(LocalEngine):
        def step(self):
            super().step()
            if self._parts_done == 5:  # after a loss that was finite, in the step of a state
                next(self.module.parameters()).data.fill_(math.nan)

    generator, reports = fresh(), []
    with pytest.raises(NonFiniteError, match="after step 4"):
        go(
            tiny_run,
            generator,
            short,
            engine=Careless(generator.denoiser, short),
            report=lambda progress, figures: reports.append(progress.step),
            judge=lambda ema: [0.5],
        )
    assert reports == []


def test_learning_rate_warms_up_and_falls_to_nothing(tiny_run, fresh, short):
    config = replace(short, warmup=0.25, steps=12, lr=0.01)
    generator, rates = fresh(), []
    engine = LocalEngine(generator.denoiser, config)
    go(
        tiny_run,
        generator,
        config,
        engine=engine,
        judge=lambda ema: [0.5],
        on_step=lambda step, figures: rates.append(engine.optimizer.param_groups[0]["lr"]),
    )
    warm = [0.01 / 3, 0.02 / 3, 0.01]
    cosine = [0.005 * (1 + math.cos(math.pi * i / 9)) for i in range(9)]
    assert rates == pytest.approx(warm + cosine)


@pytest.mark.parametrize(("share", "last"), [(0.5, 1 - 1 / 6), (1 / 6, 0.5), (0.01, 0.0)])
def test_ema_has_the_horizon_that_is_asked_for(tiny_run, fresh, short, share, last):
    """Never more than (1 + step) / (10 + step), and in the end a share of the run."""
    config = replace(short, ema=share)
    generator = fresh()
    mean = weights(generator.denoiser)["position"].double()
    passed = []

    def follow(step, figures):
        passed.append(weights(generator.denoiser)["position"].double())

    found = go(tiny_run, generator, config, judge=lambda ema: [0.5], on_step=follow)
    for step, value in enumerate(passed):
        decay = min((1 + step) / (10 + step), last)
        mean = decay * mean + (1 - decay) * value
    torch.testing.assert_close(found.ema["position"].double(), mean, rtol=0, atol=1e-6)
    assert not torch.equal(passed[0], passed[-1])


def test_the_loop_weighs_by_min_snr(tiny_run, fresh, short):
    config, generator, taken = replace(short, steps=1, min_snr=5.0), fresh(), []
    source = tiny_run.source(generator, config)
    abar = signal_level(generator.config.diffusion)
    with torch.no_grad():
        want = losses(generator.denoiser, generator, source.batch(0), abar, min_snr=5.0)
    go(
        tiny_run,
        generator,
        config,
        source=source,
        judge=lambda ema: [0.5],
        on_step=lambda step, figures: taken.append(figures["weight_loss"]),
    )
    assert taken == [pytest.approx(want["weight_loss"].item(), rel=1e-5)]


@pytest.mark.parametrize(("kind", "lr", "share"), [("weight", 3e-3, 0.5), ("function", 1e-2, 0.96)])
def test_training_reduces_its_loss(tiny_run, fresh, short, kind, lr, share):
    """On steps and tasks that it was not trained on."""
    alone = {"weight_loss": 0.0, "function_loss": 0.0} | {f"{kind}_loss": 1.0}
    config = replace(short, steps=60, lr=lr, zoo_batch=6, fresh_tasks=4, **alone)
    generator = fresh()
    abar = signal_level(generator.config.diffusion)
    both = replace(config, weight_loss=1.0, function_loss=1.0, fresh_tasks=6, images_per_task=64)
    judged = tiny_run.source(generator, both)

    @torch.no_grad()
    def level():
        found = [
            losses(generator.denoiser, generator, judged.batch(i), abar).get(f"{kind}_loss")
            for i in range(1000, 1006)
        ]
        return torch.stack(found).mean().item()

    before = level()
    progress = go(tiny_run, generator, config, judge=lambda ema: [0.5])
    generator.denoiser.load_state_dict(dict(progress.ema))
    assert level() < share * before


def test_padding_of_body_tokens_is_never_predicted(tiny_run, tiny_generator):
    """Nothing trains those outputs, so a sampler shows the denoiser what training showed it."""
    index = tiny_generator.codec.body_index
    assert (index < 0).any()
    out = tiny_generator.denoiser.body_out  # (S, D, P)
    assert (out.transpose(1, 2)[index < 0] == 0).all()
    assert (out.transpose(1, 2)[index >= 0] != 0).any()


def test_a_gradient_that_is_not_finite_is_not_taken(fresh, short):
    module = fresh().denoiser
    before = weights(module)
    engine = LocalEngine(module, short)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(NonFiniteError, match="not taken"):
        engine.step()
    assert_equal(weights(module), before)


def test_a_step_clips_the_gradient_and_decays_the_weights(fresh, short):
    config, module, norms = replace(short, clip=0.5, weight_decay=0.25), fresh().denoiser, []
    engine = LocalEngine(module, config)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)

    def note():
        norms.append(torch.stack([p.grad.norm() for p in module.parameters()]).norm().item())

    engine.optimizer.step = note
    engine.step()
    assert norms == [pytest.approx(0.5, rel=1e-3)]
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loop_computes_in_the_precision_that_is_asked_for(tiny_run, fresh, short, precision):
    seen = set()

    class Noting(LocalEngine):
        def __call__(self, *args, **options):
            seen.add(torch.is_autocast_enabled("cpu"))
            return super().__call__(*args, **options)

    generator, config = fresh(), replace(short, steps=1, precision=precision)
    engine = Noting(generator.denoiser, config)
    go(tiny_run, generator, config, engine=engine, judge=lambda ema: [0.5])
    assert seen == {precision == "bf16"}
    assert {p.dtype for p in generator.denoiser.parameters()} == {torch.float32}
