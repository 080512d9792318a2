"""Scores and intervals: the statistics do what their names say."""

import math

import numpy as np
import pytest
import torch

from tina.metrics import Score, calibration_error, interval, overlap, resample


def score(hit, confidence=None):
    hit = np.atleast_2d(np.asarray(hit, dtype=bool))
    if confidence is None:
        confidence = np.ones(hit.shape)
    return Score(hit=hit, confidence=np.broadcast_to(confidence, hit.shape).astype(float))


def hits(scores):
    return [one.hit for one in scores]


def apart(scores):
    """Images of their own for each task."""
    ends = np.cumsum([one.hit.shape[1] for one in scores])
    return np.split(np.arange(ends[-1]), ends[:-1])


def test_score_of_logits():
    logits = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0.0, 3, 0], [0, 0, 1]]])
    found = Score.of(logits, torch.tensor([0, 1]))
    assert found.hit.tolist() == [[True, True], [False, False]]
    assert found.accuracy == 0.5
    top = [[2.0, 1.0], [3.0, 1.0]]
    want = [[math.exp(x) / (math.exp(x) + 2) for x in row] for row in top]
    assert found.confidence == pytest.approx(np.array(want), rel=1e-6)


def test_a_class_that_the_classifier_lacks_is_never_hit():
    logits = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    found = Score.of(logits, torch.full((50,), -1))
    assert found.accuracy == 0
    assert (found.confidence >= 0.25).all()


# --- calibration ----------------------------------------------------------------------------------


def test_calibration_error_of_a_calibrated_predictor_is_small():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, (1, 200_000))
    found = calibration_error([score(rng.random(confidence.shape) < confidence, confidence)])
    assert found < 0.01


def test_calibration_error_of_an_overconfident_predictor_is_its_excess():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, (1, 200_000))
    found = calibration_error([score(rng.random(confidence.shape) < confidence - 0.2, confidence)])
    assert found == pytest.approx(0.2, abs=0.01)


def test_calibration_error_by_hand():
    """Two bins: in one 2 of 4 are right at 0.9, in the other 1 of 2 at 0.5."""
    one = score([1, 1, 0, 0], 0.9)
    other = score([[1], [0]], 0.5)
    assert calibration_error([one, other]) == pytest.approx((4 * 0.4 + 2 * 0.0) / 6)


def test_calibration_error_does_not_cancel_between_bins():
    found = calibration_error([score([0] * 5, 0.8), score([1] * 5, 0.2)])
    assert found == pytest.approx(0.8)


def test_full_confidence_has_a_bin():
    assert calibration_error([score([1, 1, 1, 0], 1.0)]) == pytest.approx(0.25)
    assert calibration_error([score([1, 1], 1.0)]) == 0


# --- bootstrap ------------------------------------------------------------------------------------


def test_interval_is_the_central_95_percent():
    low, high = interval(np.arange(1001) / 1000)
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_resampling_repeats_with_its_seed():
    rng = np.random.default_rng(1)
    scores = [[score(rng.random((2, 9)) < 0.5) for _ in range(5)] for _ in range(2)]
    one, again, other = (
        resample([hits(s) for s in scores], apart(scores[0]), count=40, seed=seed)
        for seed in (3, 3, 4)
    )
    assert one.shape == (40, 2)
    assert (one == again).all()
    assert (one != other).any()


def test_resamples_centre_on_the_mean():
    rng = np.random.default_rng(1)
    scores = [score(rng.random((3, 40)) < rng.beta(2, 2)) for _ in range(30)]
    found = resample([hits(scores)], apart(scores), count=1000, seed=0)[:, 0]
    want = np.mean([s.accuracy for s in scores])
    assert abs(found.mean() - want) < 5 * found.std() / math.sqrt(1000)


def test_coverage_of_the_interval():
    """Of tasks that differ, with few images each: about 95 of 100 intervals hold the truth.

    Resampling tasks and, within them, images counts the images' noise twice, so rather more.
    """
    rng = np.random.default_rng(0)
    trials, tasks, images = 250, 20, 12
    covered, widths = 0, []
    for _ in range(trials):
        levels = rng.beta(6, 2, size=tasks)  # mean .75
        scores = [score(rng.random((1, images)) < level) for level in levels]
        low, high = interval(
            resample([hits(scores)], apart(scores), count=100, seed=int(rng.integers(2**31)))[:, 0]
        )
        covered += low <= 0.75 <= high
        widths.append(high - low)
    assert 0.92 <= covered / trials <= 1
    # the truth: variance between tasks and of the images within
    between = 6 * 2 / (8**2 * 9)
    within = (0.75 * 0.25 - between) / images
    ideal = 2 * 1.96 * math.sqrt((between + within) / tasks)
    assert 0.9 * ideal < np.mean(widths) < 1.5 * ideal


def test_tasks_are_resampled_and_not_images_alone():
    """Tasks that are all right or all wrong: only the draw of tasks varies."""
    scores = [score(np.full((1, 50), t % 2)) for t in range(40)]
    found = resample([hits(scores)], apart(scores), count=2000, seed=0)[:, 0]
    assert found.std() == pytest.approx(math.sqrt(0.25 / 40), rel=0.1)


def test_images_are_resampled_within_a_task():
    rng = np.random.default_rng(0)
    scores = [score(rng.permutation(np.arange(64) % 2)) for _ in range(10)]
    found = resample([hits(scores)], apart(scores), count=2000, seed=0)[:, 0]
    # a task drawn twice brings the same draw of images twice: up to sqrt(2) more than 640 images
    assert 0.9 < found.std() / math.sqrt(0.25 / 640) < 1.5


def test_an_image_is_drawn_once_for_all_its_tasks():
    """Tasks on the same images: more of them say no more about those images."""
    hit = np.arange(64) % 2
    scores = [score(hit) for _ in range(10)]
    numbers = np.random.default_rng(0).permutation(1000)[:64]
    found = resample([hits(scores)], [numbers] * 10, count=4000, seed=0)[:, 0]
    assert found.std() == pytest.approx(math.sqrt(0.25 / 64), rel=0.06)
    # in each task's own order
    order = np.random.default_rng(1).permutation(64)
    mixed = [scores[0], score(hit[order])]
    again = resample([hits(mixed)], [numbers, numbers[order]], count=4000, seed=0)[:, 0]
    assert again == pytest.approx(resample([hits(scores[:1])], [numbers], count=4000, seed=0)[:, 0])


def test_coverage_where_tasks_share_images():
    """Tasks of a few classes each over common images, of which some are hard in every task."""
    rng = np.random.default_rng(0)
    trials, tasks, classes, images = 200, 40, 8, 10
    covered = {"shared": 0, "apart": 0}
    for _ in range(trials):
        ease = rng.beta(1, 0.5, size=(classes, images))  # mean 2/3
        scores, numbers = [], []
        for _ in range(tasks):
            of = rng.choice(classes, 4, replace=False)
            scores.append(score(rng.random((1, 4 * images)) < ease[of].ravel()))
            numbers.append((of[:, None] * images + np.arange(images)).ravel())
        for name, places in (("shared", numbers), ("apart", apart(scores))):
            low, high = interval(resample([hits(scores)], places, count=200, seed=1)[:, 0])
            covered[name] += low <= 2 / 3 <= high
    assert covered["shared"] / trials >= 0.9
    assert covered["apart"] / trials < 0.8  # what it was


def test_seeds_are_resampled():
    scores = [score(np.repeat([[1], [0]], 30, axis=1))]
    found = resample([hits(scores)], apart(scores), count=4000, seed=0)[:, 0]
    # two draws of two seeds: both right, one, none
    assert [np.isclose(found, value).mean() for value in (0, 0.5, 1)] == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.03
    )


def test_a_seed_that_is_bad_for_all_tasks_does_not_average_away():
    scores = [score(np.repeat([[1], [0]], 30, axis=1)) for _ in range(50)]
    found = resample([hits(scores)] * 2, apart(scores), count=4000, seed=0)
    assert [np.isclose(found[:, 0], value).mean() for value in (0, 0.5, 1)] == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.03
    )
    assert (found[:, 0] == found[:, 1]).all()  # of as many seeds: the same noise


def test_a_method_differs_from_itself_by_exactly_nothing():
    rng = np.random.default_rng(0)
    scores = [score(rng.random((1, 20)) < 0.7) for _ in range(12)]
    found = resample([hits(scores)] * 2, apart(scores), count=200, seed=0)
    assert interval(found[:, 0] - found[:, 1]) == [0, 0]
    assert interval(found[:, 0])[1] > interval(found[:, 0])[0]


def test_differences_are_paired():
    """One method is right on one image more in each task: hard tasks do not blur that."""
    rng = np.random.default_rng(0)
    one, other = [], []
    for _ in range(30):
        hit = rng.random((1, 40)) < rng.uniform(0.1, 0.9)
        hit[0, 0] = False
        better = hit.copy()
        better[0, 0] = True
        one.append(score(better))
        other.append(score(hit))
    found = resample([hits(one), hits(other)], apart(one), count=1000, seed=0)
    low, high = interval(found[:, 0] - found[:, 1])
    assert 0 < low < 1 / 40 < high
    assert high - low < 0.2 * (interval(found[:, 0])[1] - interval(found[:, 0])[0])


def test_methods_may_have_other_numbers_of_seeds():
    rng = np.random.default_rng(0)
    one = [score(rng.random((3, 10)) < 0.5) for _ in range(4)]
    other = [score(rng.random((1, 10)) < 0.5) for _ in range(4)]
    assert resample([hits(one), hits(other)], apart(one), count=10, seed=0).shape == (10, 2)


# --- overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 0.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], 1 / 3),
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),  # no errors, none shared
    ],
)
def test_overlap_of_errors(one, other, want):
    assert overlap(score(one), score(other)) == pytest.approx(want)


def test_overlap_reads_the_first_seed():
    assert overlap(score([[0, 1], [1, 0]]), score([[0, 1], [1, 1]])) == 1
