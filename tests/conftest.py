import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: idle threads spinning on a busy machine cost minutes

import pytest

pytest.register_assert_rewrite("tests.ops.battery", "fastmoe.testing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "tests/csrc" in item.nodeid)  # its compiler takes every core that others leave
