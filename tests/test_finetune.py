"""Fine-tuning on the digits: many models at once equal one after another."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tina.config import RecipeConfig
from tina.datasets import load_dataset
from tina.errors import NonFiniteError
from tina.families import ClipImageTrunk, build_family
from tina.finetune import (
    Lesson,
    _AdamW,
    accuracy,
    annealed,
    batch_order,
    finetune,
    initial_theta,
    train_trunk,
)
from tina.inputs import InputStore
from tina.jobconfig import DataConfig
from tina.zoo import build_rows

TASKS = [(3, 1), (7, 2, 5), (0, 9, 4, 8, 6)]
SHORT = RecipeConfig(steps=6, batch_size=16, lr=3e-3)
WAYS = pytest.mark.parametrize("stacked", [False, True], ids=["loop", "stacked"])


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def cnn(digits):
    family = build_family("cnn5k", channels=1, image_size=8)
    return family, InputStore(family, digits.views)


@pytest.fixture(scope="module")
def head(digits):
    """Heads on features that are frozen: here a random projection."""
    family = build_family("vitb32_head", channels=1, image_size=8)
    matrix = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    family.attach_trunk(ClipImageTrunk(lambda x: x.flatten(1) @ matrix))
    return family, InputStore(family, digits.views)


def start(family, tasks):
    return [initial_theta(family, len(task), seed=i) for i, task in enumerate(tasks)]


def lessons_of(digits, tasks, *, seed=0):
    return [Lesson.of(digits, task, seed=seed + i) for i, task in enumerate(tasks)]


def train_one(cnn, digits, task, recipe, *, seed=0, stacked=False):
    family, store = cnn
    lesson = Lesson.of(digits, task, seed=seed)
    theta = initial_theta(family, len(task), seed=0)
    return finetune(family, [theta], [lesson], store, recipe, stacked=stacked)[0]


def assert_close(found, expected, *, tolerance):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


class InDouble:
    """A store whose inputs are float64: Adam scales the rounding of a small gradient up to lr."""

    def __init__(self, store):
        self.store = store

    def __getitem__(self, index):
        return self.store[index].double()


# --- recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 0), (400, 0), (400, 20)])
def test_the_learning_rate_goes_from_its_peak_to_zero(steps, warmup):
    rates = [annealed(step, steps, warmup=warmup) for step in range(steps + 1)]
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert rates[warmup] == 1
    assert rates[steps] == pytest.approx(0, abs=1e-12)
    falling = rates[warmup:]
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert falling == pytest.approx([1 - rate for rate in reversed(falling)])


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_batches_are_whole_permutations_one_after_another(n, batch_size, steps, seed):
    order = batch_order(n, batch_size, steps, seed=seed)
    assert order.shape == (steps, batch_size)
    *passes, rest = order.flatten().split(n)
    for whole in passes:
        assert sorted(whole.tolist()) == list(range(n))
    assert len(set(rest.tolist())) == len(rest)
    assert torch.equal(batch_order(n, batch_size, steps, seed=seed), order)
    # a longer run begins with the same batches
    assert torch.equal(batch_order(n, batch_size, steps + 3, seed=seed)[:steps], order)


def test_another_seed_is_another_order():
    assert not torch.equal(batch_order(50, 10, 5, seed=0), batch_order(50, 10, 5, seed=1))
    passes = batch_order(50, 10, 10, seed=0).flatten().split(50)
    assert not torch.equal(*passes)


@pytest.mark.parametrize("partition", ["fit", "select", "report"])
def test_a_lesson_holds_its_classes_images_under_their_rows(digits, partition):
    lesson = Lesson.of(digits, (7, 2, 5), seed=3, partition=partition)
    assert set(lesson.index.tolist()) <= set(digits.partitions[partition].tolist())
    ids = torch.tensor(lesson.class_ids)
    assert torch.equal(ids[lesson.labels], digits.labels[lesson.index])
    wanted = torch.isin(digits.labels[digits.partitions[partition]], ids)
    assert len(lesson.index) == wanted.sum()


# --- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("which", ["cnn", "head"])
def test_stacked_equals_the_loop(request, digits, which, weight_decay):
    family, store = request.getfixturevalue(which)
    recipe = dataclasses.replace(SHORT, weight_decay=weight_decay)
    thetas = [theta.double() for theta in start(family, TASKS)]
    lessons = lessons_of(digits, TASKS)
    before = [theta.clone() for theta in thetas]
    loop, stacked = (
        finetune(family, thetas, lessons, InDouble(store), recipe, stacked=way)
        for way in (False, True)
    )
    for task, first, one, many in zip(TASKS, before, loop, stacked, strict=True):
        assert one.shape == many.shape == (family.layout(len(task)).size,)
        assert (one - first).abs().max() > SHORT.lr
        assert_close(many, one, tolerance=1e-12)
    assert all(torch.equal(theta, copy) for theta, copy in zip(thetas, before, strict=True))


@pytest.mark.parametrize("which", ["cnn", "head"])
def test_half_precision_takes_nearly_the_same_way_and_keeps_full_weights(request, digits, which):
    family, store = request.getfixturevalue(which)
    half = dataclasses.replace(SHORT, precision="bf16")
    thetas, lessons = start(family, TASKS), lessons_of(digits, TASKS)
    full, loop, stacked = (
        finetune(family, thetas, lessons, store, recipe, stacked=way)
        for recipe, way in ((SHORT, False), (half, False), (half, True))
    )
    for theta, *ends in zip(thetas, full, loop, stacked, strict=True):
        assert {end.dtype for end in ends} == {torch.float32}
        assert not torch.equal(ends[1], ends[0])
        ways = torch.nn.functional.normalize(torch.stack(ends) - theta, dim=1)
        assert (ways @ ways.T).min() > 0.99  # the three directions agree


@WAYS
def test_the_order_of_the_models_is_kept(cnn, digits, stacked):
    family, store = cnn
    thetas, lessons = start(family, TASKS), lessons_of(digits, TASKS)
    forth = finetune(family, thetas, lessons, store, SHORT, stacked=stacked)
    back = finetune(family, thetas[::-1], lessons[::-1], store, SHORT, stacked=stacked)
    for one, other in zip(forth, back[::-1], strict=True):
        assert_close(other, one, tolerance=1e-6)


@WAYS
def test_progress_counts_every_step_of_every_model(cnn, digits, stacked):
    family, store = cnn
    done = []
    lessons = lessons_of(digits, TASKS)
    finetune(
        family, start(family, TASKS), lessons, store, SHORT, stacked=stacked, progress=done.append
    )
    assert sum(done) == len(TASKS) * SHORT.steps


@WAYS
def test_to_name_the_classes_in_another_order_permutes_the_rows(cnn, digits, stacked):
    family, store = cnn
    layout, order = family.layout(3), torch.tensor([2, 0, 1])
    theta = initial_theta(family, 3, seed=0)
    body, rows = layout.split(theta)
    task = (7, 2, 5)
    swapped = tuple(task[i] for i in order)
    lessons = [Lesson.of(digits, ids, seed=0) for ids in (task, swapped)]
    thetas = [theta, layout.join(body, rows[order])]
    one, two = finetune(family, thetas, lessons, store, SHORT, stacked=stacked)
    assert_close(layout.split(two)[0], layout.split(one)[0], tolerance=1e-5)
    assert_close(layout.split(two)[1], layout.split(one)[1][order], tolerance=1e-5)


# --- learning -------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("which", ["cnn", "head"])
def test_training_teaches(request, digits, which, stacked):
    family, store = request.getfixturevalue(which)
    recipe = RecipeConfig(steps=120, batch_size=32, lr=1e-2)
    tasks = [(3, 1), (7, 2, 5)]
    thetas = start(family, tasks)
    trained = finetune(family, thetas, lessons_of(digits, tasks), store, recipe, stacked=stacked)
    for task, before, after in zip(tasks, thetas, trained, strict=True):
        select = Lesson.of(digits, task, seed=0, partition="select")
        untrained = accuracy(family, before, store, select)
        assert accuracy(family, after, store, select) > max(0.9, untrained + 0.1)


def test_accuracy_is_the_share_of_hits(cnn, digits):
    family, store = cnn
    lesson = Lesson.of(digits, (7, 2, 5), seed=0, partition="select")
    layout = family.layout(3)
    rows = torch.zeros(3, layout.row_size)
    rows[1, -1] = 1  # only a bias: always says the second class
    theta = layout.join(torch.zeros(layout.body_size), rows)
    share = (lesson.labels == 1).float().mean()
    assert accuracy(family, theta, store, lesson) == pytest.approx(float(share))


@WAYS
def test_the_seed_decides_the_batches(cnn, digits, stacked):
    one, again, other = (
        train_one(cnn, digits, (7, 2, 5), SHORT, seed=seed, stacked=stacked) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-4


def test_weight_decay_shrinks(cnn, digits):
    plain, decayed = (
        train_one(cnn, digits, (7, 2, 5), dataclasses.replace(SHORT, weight_decay=w))
        for w in (0.0, 10.0)
    )
    assert decayed.norm() < 0.95 * plain.norm()


@WAYS
def test_the_learning_rate_is_annealed(cnn, digits, stacked):
    # Adam moves a weight whose gradient stays by the learning rate: here 1 and then 1/2 of the peak
    before = initial_theta(cnn[0], 3, seed=0)
    recipe = RecipeConfig(steps=2, batch_size=64, lr=1e-3)
    after = train_one(cnn, digits, (7, 2, 5), recipe, stacked=stacked)
    assert float((after - before).abs().max()) == pytest.approx(1.5e-3, rel=1e-2)


@WAYS
def test_the_learning_rate_is_warmed_up(cnn, digits, stacked):
    # 1/2 and 1 of the peak, and down again: 1 and 1/2
    before = initial_theta(cnn[0], 3, seed=0)
    recipe = RecipeConfig(steps=4, batch_size=64, lr=1e-4, warmup=0.5)
    after = train_one(cnn, digits, (7, 2, 5), recipe, stacked=stacked)
    assert float((after - before).abs().max()) == pytest.approx(3e-4, rel=1e-2)


@WAYS
def test_divergence_is_an_error(cnn, digits, stacked):
    recipe = dataclasses.replace(SHORT, lr=1e20)
    with pytest.raises(NonFiniteError, match=r"diverged on classes \(7, 2, 5\)"):
        train_one(cnn, digits, (7, 2, 5), recipe, stacked=stacked)


def test_initial_weights_are_the_seeds_and_leave_the_global_stream_alone(cnn):
    family, _ = cnn
    before = torch.random.get_rng_state()
    one, again, other = (initial_theta(family, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    body, rows = family.layout(3).split(one)
    assert body[: 9 * 16].abs().max() <= 1 / 3  # torch's bound of a 3x3 convolution of one channel
    assert rows.abs().max() <= 1 / 32**0.5


def test_a_trunk_is_trained_from_its_seed(digits):
    family = build_family("resnet20_head", channels=1, image_size=8)
    recipe = RecipeConfig(steps=3, batch_size=16, lr=1e-2)
    done = []
    one, again = (
        train_trunk(family, digits, range(10), recipe, seed=0, progress=done.append)
        for _ in range(2)
    )
    assert sum(done) == 6
    fresh = family.new_trunk().state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        if name.endswith("running_mean"):
            assert not torch.equal(value, fresh[name]), name
    with pytest.raises(NonFiniteError, match="not finite at step"):
        train_trunk(family, digits, range(10), dataclasses.replace(recipe, lr=1e30), seed=0)


def test_a_trunk_is_trained_as_plain_torch_would_train_it(digits, monkeypatch):
    """In double precision: Adam makes whole steps of what rounding leaves of a gradient of zero."""
    family = build_family("resnet20_head", channels=1, image_size=8)
    monkeypatch.setattr(family, "scale", lambda images: images.double() / 127.5 - 1)
    for part in ("new_trunk", "module"):
        make = getattr(family, part)
        monkeypatch.setattr(family, part, lambda *args, make=make: make(*args).double())
    recipe = RecipeConfig(steps=3, batch_size=64, lr=1e-3, warmup=0.0, weight_decay=0.1)
    trained = train_trunk(family, digits, range(10), recipe, seed=5)
    torch.manual_seed(5)
    network = nn.Sequential(family.new_trunk(), family.module(10))
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.1)
    index = digits.indices("fit", range(10))
    for step, batch in enumerate(batch_order(len(index), 64, 3, seed=5)):
        optimiser.param_groups[0]["lr"] = recipe.lr * annealed(step, recipe.steps)
        logits = network(family.scale(digits.views[index[batch]]))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits.float(), digits.labels[index[batch]]).backward()
        optimiser.step()
    plain = network[0].state_dict()
    for name, value in trained.state_dict().items():
        assert value.is_contiguous(), name
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-5)


def test_a_trunk_is_taught_its_images_own_labels(digits, monkeypatch):
    family = build_family("resnet20_head", channels=1, image_size=8)
    shown, taught, plain = [], [], torch.nn.functional.cross_entropy

    class Noting(nn.Flatten):
        def forward(self, x):
            shown.append(x.detach())
            return super().forward(x)

    def noting(logits, labels):
        taught.append(labels)
        return plain(logits, labels)

    monkeypatch.setattr(family, "new_trunk", Noting)
    monkeypatch.setattr("tina.finetune.F.cross_entropy", noting)
    train_trunk(family, digits, (7, 2, 5), RecipeConfig(steps=3, batch_size=16), seed=0)
    known = {
        (family.scale(digits.views[i[None]]).numpy().tobytes(), int(digits.labels[i]))
        for i in digits.indices("fit", (7, 2, 5))
    }
    for images, labels in zip(shown, taught, strict=True):
        for image, label in zip(images, labels.tolist(), strict=True):
            assert (image[None].numpy().tobytes(), (7, 2, 5)[label]) in known
    assert len(shown) == 3


def test_a_step_is_adamws_however_a_gradient_lies_in_memory():
    recipe = RecipeConfig(steps=4, lr=1e-2, warmup=0.0, weight_decay=0.1)
    layer = nn.Conv2d(3, 8, 3)
    found = [p.detach().clone() for p in layer.parameters()]
    ours, theirs = _AdamW(found, recipe), torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    images = torch.randn(4, 3, 8, 8)
    for step in range(recipe.steps):
        gradients = torch.autograd.grad(layer(images).square().sum(), [*layer.parameters()])
        kernel = gradients[0].contiguous(memory_format=torch.channels_last)
        ours.step(step, [kernel, gradients[1]])
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient.contiguous()
        theirs.param_groups[0]["lr"] = recipe.lr * annealed(step, recipe.steps)
        theirs.step()
    for one, other in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-6, rtol=1e-5)


# --- the zoo's rows -------------------------------------------------------------------------------


@WAYS
def test_a_p_model_does_not_depend_on_its_neighbours(tiny_run, stacked):
    run, most = tiny_run, tiny_run.config.tasks.max_classes
    tasks = sorted(run.space.train, key=lambda task: task.num_classes)
    pair = [tasks[0], tasks[-1]]
    assert pair[0].num_classes < pair[1].num_classes
    recipe = dataclasses.replace(SHORT, weight_decay=0.1)

    def build(block):
        return build_rows(
            block,
            family=run.family,
            dataset=run.dataset,
            store=run.store,
            generic=run.generic,
            recipe=recipe,
            max_classes=most,
            stacked=stacked,
        )

    together, alone = build(pair), build(pair[:1]) + build(pair[1:])
    for task, one, other in zip(pair, together, alone, strict=True):
        theta, other_theta = torch.tensor(one.pop("theta")), torch.tensor(other.pop("theta"))
        assert one == other
        assert one["task_id"] == task.task_id
        assert theta.shape == (run.family.layout(most).size,)
        # stacks of other heights round otherwise, which AdamW magnifies where a gradient is near
        # zero: 2.4e-6 on Zen 5; a neighbour's gradient would show as the learning rate, 3e-3
        assert_close(theta, other_theta, tolerance=1e-5 if stacked else 0)
        body, rows = run.family.layout(most).split(theta)
        assert not rows[task.num_classes :].any()
        # one step of AdamW moves a weight by its learning rate at most, and the decay
        drift = (body - run.generic.body).abs().max()
        assert 0 < drift < recipe.steps * recipe.lr * 2
