"""Where pytest-xdist runs tests in several processes, those that share something costly stay together in one."""

import pytest

COSTLY = frozenset({"ceph", "moto", "outcomes", "places", "saved", "truth", "truths", "undisturbed"})
"""Fixtures that are made once for many tests: servers, real runs, thousands of simulated ones."""


def pytest_itemcollected(item: pytest.Item) -> None:
    for name in COSTLY.intersection(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.xdist_group(name))
