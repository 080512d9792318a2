"""Growth: what is fitted to the points is what they were made of."""

import numpy as np
import pytest

from benchmarks import growth


def test_a_power_law_is_found_and_prolonged():
    points = [{"size": n, "seconds": 2e-3 * n**1.5, "peak_mib": 100 + 3 * n} for n in (10, 20, 80)]
    found = growth.grown(points, 100, 160)
    assert found["exponents"] == {"seconds": 1.5, "mib": 1.0}
    assert found["fitted"]["seconds"]["exponent"] == 1.5
    assert found["extrapolated"]["seconds"] == pytest.approx(2e-3 * 160**1.5, rel=1e-2)
    assert found["extrapolated"]["mib"] == 480


@pytest.mark.parametrize("sizes", [(5, 10, 20, 50, 100), (13_000_000, 45_000_000, 171_000_000)])
@pytest.mark.parametrize(("constant", "c"), [(0.0, 1.22), (0.02, 1.0), (3.0, 0.6), (0.5, 1.9)])
def test_a_constant_beside_a_power_law_is_told_from_it(sizes, constant, c):
    b = 1 / sizes[-1] ** c
    found = growth.fit(list(sizes), [constant + b * n**c for n in sizes])
    assert found == pytest.approx((constant, b, c), rel=1e-2, abs=b * 1e-2)


def test_a_constant_does_not_hide_what_larger_sizes_cost():
    points = [
        {"size": n, "seconds": 0.015 + 7e-4 * n, "peak_mib": 70 + 0.1 * n}
        for n in (5, 10, 20, 50, 100)
    ]
    found = growth.grown(points, 0, 1000)
    assert found["exponents"]["seconds"] < 0.6  # by which it would be 0.3 s
    assert found["extrapolated"]["seconds"] == pytest.approx(0.715, rel=1e-2)
    assert found["extrapolated"]["mib"] == 170


def test_no_constant_is_below_zero():
    draw = np.random.default_rng(0)
    sizes = [100.0, 300.0, 1000.0, 3000.0]
    for _ in range(20):
        noise = draw.normal(1, 0.1, len(sizes))
        a, b, _ = growth.fit(sizes, list(1e-3 * np.array(sizes) * noise))
        assert a >= 0
        assert b > 0


@pytest.mark.parametrize("curve", growth.POINTS)
def test_the_smallest_point_of_each_curve(curve, monkeypatch):
    monkeypatch.setattr(growth, "settle_in", lambda **_: None)  # other tests keep their threads
    found = growth.point(curve, 0)
    assert found["size"] > 0
    assert found["seconds"] > 0
    assert found["peak_mib"] > 0
