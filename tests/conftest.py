"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.pop("COLUMNS", None)  # processes of pytest-xdist get a width of 80, in which tables wrap

PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _own_processors() -> None:
    """Give each process of pytest-xdist its share of the processors: threads that wait for one another spin."""
    name, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if name is not None and len(PROCESSORS) > 1:
        number = int(name.removeprefix("gw")) % len(PROCESSORS)
        os.sched_setaffinity(0, PROCESSORS[number::count])


_own_processors()


@pytest.fixture
def all_processors() -> Iterator[None]:
    """Lift the limit for a test of what happens on several processors."""
    if not PROCESSORS:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, PROCESSORS)
    yield
    os.sched_setaffinity(0, before)
