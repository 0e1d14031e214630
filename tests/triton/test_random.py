from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import random_uniform
from fastmoe.ops.registry import OPS, select


def test_the_backend_is_triton():
    assert select(OPS["random_uniform"], "cpu")[0] == "triton"
    torch.library.opcheck(OPS["random_uniform"].overload, (torch.tensor([1, 2, 3]), 4, 5, 6))


@pytest.mark.parametrize("layer", [0, 1, 5, 2**32 - 1])
@pytest.mark.parametrize("T, N", [(0, 4), (5, 0), (1, 1), (19, 7), (300, 1), (70, 16), (3, 1030)])
def test_random_uniform(T, N, layer):
    for key in ((0, 0, 0), (3, 7, 2**32 - 4), (-1, 2**40 + 5, -3)):
        key = torch.tensor(key)
        with testing.poison():
            got = random_uniform(key, layer, T, N)
        with testing.backend("reference"):
            testing.assert_bit_equal(got, random_uniform(key, layer, T, N))
