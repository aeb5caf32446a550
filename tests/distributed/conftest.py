from collections.abc import Iterator

import pytest
from several import Processes


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def three() -> Iterator[Processes]:
    processes = Processes(3)
    yield processes
    processes.stop()
