"""Minutes of the soak in every run of the tests; ``make soak MINUTES=60`` is an hour of it."""

import random

import pytest

from tests.soak.run import soak

MINUTES = 5


@pytest.mark.kafka(own=True)
@pytest.mark.postgres
@pytest.mark.faults
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_no_record_is_lost_or_doubled_under_random_faults(tmp_path):
    seed = random.randrange(10**6)

    report = soak(seed, MINUTES, tmp_path)

    print(report)
    assert report.has_passed
    assert min(report.faults.total(), report.looks) > 3 * MINUTES, "the soak has tested too little"
