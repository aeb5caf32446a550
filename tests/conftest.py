import os
from zlib import crc32

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

pytest_plugins = ["pytester"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``table(n)`` one case in n runs each time, spread evenly; the others are exhaustive."""
    for item in items:
        mark = item.get_closest_marker("table")
        if mark is not None and crc32(item.nodeid.encode()) % mark.args[0]:
            item.add_marker("exhaustive")
