"""Which numbers of a benchmark are doubted."""

import pytest

from jepax.bench import report

SOUND = {
    "machine": {"load_average": (0.4, 2.0, 2.0), "cores": 2},
    "utilization": {"utilization": 0.5},
    "parts": {"teacher": 0.4, "objective": -0.01, "backward": 0.6},
}


def test_an_idle_machine_is_not_doubted():
    assert report.sanity_warnings(SOUND) == []
    assert report.sanity_warnings({"machine": SOUND["machine"]}) == []  # of reading, which has no more


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"machine": {"load_average": (1.9, 0.0, 0.0), "cores": 2}}, "load average was 1.9 on 2 cores"),
        ({"utilization": {"utilization": 1.29}}, "utilization above 100%"),
        ({"parts": SOUND["parts"] | {"objective": -0.06}}, "objective below zero"),
    ],
)
def test_what_cannot_be_is_doubted(changed, said):
    (doubt,) = report.sanity_warnings(SOUND | changed)
    assert said in doubt
