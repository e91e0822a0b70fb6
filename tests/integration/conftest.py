"""What the integration tests start from."""

from collections.abc import Iterator

import pytest

from tests.given import Given
from tests.servers.databases import Database


@pytest.fixture
def given(database: Database) -> Iterator[Given]:
    """A migrated database whose log takes events: ``given(events).project(orders)``."""
    made = Given(database)
    yield made
    made.close()
