"""A session has our settings, whatever was set elsewhere; or it is refused, by name."""

from pathlib import Path

import psycopg
import pytest

from pipeline.session_settings import BOUNDED, BY_SETTINGS_OF_OURS, HARMLESS, PINNED, is_sorted

OWN = """
SELECT name, vartype, setting, enumvals, min_val, max_val, context FROM pg_settings
WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') AND name !~ '[.]'
"""
NAMES = Path(__file__).with_name("session_settings")


# ------------------------------------------------------------------------------- the list is whole


@pytest.mark.both_postgres
def test_every_setting_that_a_session_may_have_is_sorted(postgres_server):
    with psycopg.connect(postgres_server.dsn()) as db:
        found = [row[0] for row in db.execute(OWN)]

    assert len(found) > 150
    assert [name for name in found if not is_sorted(name)] == []


@pytest.mark.parametrize("version", [16, 17])
def test_so_is_every_one_of_the_versions_between(version):
    """Their names were read from real servers of 16.2 and 17.10 by the statement above."""
    found = (NAMES / f"{version}.txt").read_text().split()

    assert len(found) > 150
    assert [name for name in found if not is_sorted(name)] == []


def test_no_setting_is_sorted_twice():
    kinds = [set(PINNED), set(BY_SETTINGS_OF_OURS), set(BOUNDED), set(HARMLESS)]

    assert sum(map(len, kinds)) == len(set().union(*kinds))
