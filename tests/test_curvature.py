"""Curvature: orthogonal directions, and along each what a step costs."""

from dataclasses import fields
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tina.curvature import IMAGES, _gradients, matrix, measure_curvature, rotate
from tina.families import build_family
from tina.generic import GenericModel
from tina.inputs import InputStore


@pytest.fixture(scope="module")
def asked(tiny_run):
    """What is measured: the tiny run's generic model on forty tasks."""
    tasks = tiny_run.space.sample_fresh(np.random.default_rng(0), 40)
    return tiny_run.family, tiny_run.generic, tiny_run.dataset, tiny_run.store, tasks


@pytest.fixture(scope="module")
def curvature(asked):
    return measure_curvature(*asked, seed=3)


def sides(curvature):
    return [*curvature.left, *curvature.right, curvature.row_right]


def test_directions_are_orthogonal(curvature):
    for m in sides(curvature):
        torch.testing.assert_close(m.T @ m, torch.eye(len(m)), atol=1e-5, rtol=0)


def test_turning_back_is_the_inverse(asked, curvature):
    layout = asked[0].layout(4)
    body = torch.randn(3, layout.body_size, generator=torch.Generator().manual_seed(0))
    there = rotate(layout, body, curvature.left, curvature.right)
    back = rotate(layout, there, [m.T for m in curvature.left], [m.T for m in curvature.right])
    torch.testing.assert_close(back, body, atol=1e-5, rtol=0)


def test_gradients_are_those_of_one_image_after_another(asked):
    family, generic, dataset, _, tasks = asked
    ((body, rows),) = _gradients(*asked[:4], tasks[:1], 3)
    k = len(tasks[0])
    assert rows.shape == (IMAGES, k, family.layout(k).row_size)
    # a row's gradient is (answer - label) times (features, one): its bias says which image it was
    layout = family.layout(k)
    own = layout.join(generic.body, generic.select(tasks[0])).requires_grad_()
    images = dataset.images[dataset.indices("fit", tasks[0])]
    found = 0
    for image in images:
        logits = family.logits(own, family.embed(image[None]), num_classes=k)
        answers = logits.softmax(1)[0].detach()
        for label in range(k):
            bias = answers - F.one_hot(torch.tensor(label), k)
            same = (rows[..., -1] - bias).abs().amax(1) < 1e-6
            if not same.any():
                continue
            loss = F.cross_entropy(logits, torch.tensor([label]))
            (gradient,) = torch.autograd.grad(loss, own, retain_graph=True)
            expected, _ = layout.split(gradient)
            for other in body[same]:
                torch.testing.assert_close(other.float(), expected, atol=1e-6, rtol=1e-4)
            found += int(same.sum())
    assert found >= IMAGES


def test_factors_are_diagonal_in_their_directions(asked, curvature):
    layout = asked[0].layout(2)
    slot = layout.body[1]
    g = torch.cat([matrix(body, slot) for body, _ in _gradients(*asked, 3)])
    outer = torch.einsum("noi,npi->op", g, g)
    turned = curvature.left[1].double().T @ outer @ curvature.left[1].double()
    values = turned.diagonal()
    assert (values.diff() <= 1e-5 * values[0]).all()  # the largest first
    assert (turned - values.diag()).abs().max() < 1e-5 * values[0]


def test_directions_of_rows_are_of_their_mean_over_a_tasks_rows(asked, curvature):
    moment = sum(
        torch.einsum("nkr,nkq->rq", rows, rows) / rows.shape[1] for _, rows in _gradients(*asked, 3)
    )
    turned = curvature.row_right.double().T @ moment @ curvature.row_right.double()
    values = turned.diagonal()
    assert (turned - values.diag()).abs().max() / values[0] < 1e-5


def test_turning_leaves_the_sum_as_it_is(asked, curvature):
    square, row_square, samples = 0.0, 0.0, 0
    for body, rows in _gradients(*asked, 3):
        square += body.square().sum().item()
        row_square += rows.square().sum(2).mean(1).sum().item()
        samples += len(body)
    assert curvature.body.sum().item() == pytest.approx(square / samples, rel=1e-4)
    assert curvature.row.sum().item() == pytest.approx(row_square / samples, rel=1e-4)


@torch.no_grad()
def test_a_step_costs_half_its_square_times_the_curvature(asked, curvature):
    """In nats of the changed answer (KL divergence), on other images of the same tasks."""
    family, generic, dataset, store, tasks = asked
    layout, step = family.layout(2), 0.02
    steepest = curvature.body.argsort(descending=True)[:8]
    costs = torch.zeros(len(steepest))
    for task in tasks:
        k = len(task)
        inputs = store[dataset.indices("fit", task)]
        rows = generic.select(task)

        def answers(body, rows=rows, inputs=inputs, k=k):
            theta = family.layout(k).join(body, rows)
            return family.logits(theta, inputs, num_classes=k).log_softmax(1)

        plain = answers(generic.body)
        for i, place in enumerate(steepest):
            along = F.one_hot(place, layout.body_size).float()[None] * step
            change = rotate(
                layout, along, [m.T for m in curvature.left], [m.T for m in curvature.right]
            )
            moved = answers(generic.body + change[0])
            kl = F.kl_div(moved, plain, log_target=True, reduction="batchmean")
            costs[i] += kl / len(tasks)
    expected = 0.5 * step**2 * curvature.body[steepest]
    torch.testing.assert_close(costs, expected, rtol=0.25, atol=0)


def test_a_head_alone_has_the_curvature_of_softmax_regression(tiny_run):
    """Of a row: answer (1 - answer) times the features' second moment."""
    family = build_family("resnet20_head", channels=1, image_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family.attach_trunk(family.new_trunk())
        rows = torch.randn(10, 65)
    generic = GenericModel(class_ids=tuple(range(10)), body=torch.zeros(0), rows=rows)
    dataset = tiny_run.dataset
    store = InputStore(family, dataset.views)
    three = [task for task in combinations(range(10), 3) if tiny_run.space.admits(task)]
    tasks = three[::2][:60]
    found = measure_curvature(family, generic, dataset, store, tasks, seed=0)
    assert found.left == found.right == ()
    assert found.body.shape == (0,)
    expected, samples = torch.zeros(65, 65), 0
    for task in tasks:
        features = store[dataset.indices("fit", task)]
        theta = family.layout(3).join(generic.body, generic.select(task))
        answers = family.logits(theta, features, num_classes=3).softmax(1)
        weight = (answers * (1 - answers)).mean(1)
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        expected += (features * weight[:, None]).T @ features / len(features)
        samples += 1
    along = found.row_right.T @ (expected / samples) @ found.row_right
    assert found.row.sum().item() == pytest.approx(along.trace().item(), rel=0.1)
    torch.testing.assert_close(found.row[:3], along.diagonal()[:3], rtol=0.2, atol=0)


def test_the_same_again(asked, curvature):
    again = measure_curvature(*asked, seed=3)
    for field in fields(again):
        one, other = getattr(again, field.name), getattr(curvature, field.name)
        if isinstance(one, torch.Tensor):
            one, other = (one,), (other,)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
