import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: idle threads spinning on a busy machine cost minutes

import pytest

pytest.register_assert_rewrite("tests.ops.battery", "fastmoe.testing")
