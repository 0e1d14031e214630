import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.ops.random.reference import philox
from tests.ops.battery import Battery, Case


def key(seed=3, step=7, first=11):
    return torch.tensor([seed, step, first])


def random_case(T, N, layer=2, first=11, thorough=False, parallel=False):
    return Case(
        f"T{T}-N{N}-layer{layer}-first{first}",
        lambda x: ops.random_uniform(x["key"], layer, T, N),
        lambda dtype: {"key": key(first=first)},
        moves_data=True,
        thorough=thorough,
        parallel=parallel,
    )


class TestRandom(Battery):
    family = "random"
    cases = [
        *(random_case(T, N) for T, N in ((0, 4), (5, 0), (1, 1), (1, 4), (3, 2), (19, 7), (33, 12), (7, 61), (2, 64))),
        random_case(37, 19, thorough=True),
        random_case(5000, 1, parallel=True),
        random_case(3000, 27, parallel=True),
        random_case(700, 32, parallel=True),
        *(random_case(9, 5, layer, first) for layer in (0, 2**32 - 1) for first in (2**32 - 4, 2**63 - 4, -4)),
    ]

    def test_words_of_a_zero_counter(self, backend):
        """Random123's kat_vectors, through the public door where a counter can be reached."""
        with self.on(backend):
            drawn_TN = ops.random_uniform(key(0, 0, 0), 0, 1, 4)
        words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        assert drawn_TN.tolist() == [[(word >> 8) * 2.0**-24 for word in words]]

    def test_tokens_of_other_ranks_join(self, backend):
        for first in (0, 2**32 - 3):
            with self.on(backend):
                whole_TN = ops.random_uniform(key(first=first), 1, 10, 6)
                parts = [ops.random_uniform(key(first=first + at), 1, T, 6) for at, T in ((0, 4), (4, 1), (5, 5))]
            testing.assert_bit_equal(torch.cat(parts), whole_TN)

    def test_more_draws_go_on_where_fewer_end(self, backend):
        with self.on(backend):
            many_TN, few_TN = (ops.random_uniform(key(), 1, 50, N) for N in (41, 10))
        testing.assert_bit_equal(few_TN, many_TN[:, :10].contiguous())

    def test_seed_and_step_are_words(self, backend):
        with self.on(backend):
            got, want = (ops.random_uniform(k, 1, 4, 4) for k in (key(-1, 2**32 + 5), key(2**32 - 1, 5)))
        testing.assert_bit_equal(got, want)

    def test_moments(self, backend):
        with self.on(backend):
            drawn = ops.random_uniform(key(), 0, 4096, 64).double()
        assert 0 <= drawn.min() < 1e-4 and 1 - 1e-4 < drawn.max() < 1
        assert bool((drawn * 2**24 == (drawn * 2**24).round()).all())
        for power in (1, 2, 3, 4):  # the standard error is below 0.3 / 512
            assert abs(drawn.pow(power).mean() - 1 / (power + 1)) < 2e-3
        expected = drawn.numel() / 256
        chi_squared = (torch.histc(drawn, 256, 0, 1) - expected).square().sum() / expected
        assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5

    def test_streams_are_independent(self, backend):
        with self.on(backend):
            drawn = [
                ops.random_uniform(k, layer, 2048, 32)
                for k, layer in (
                    (key(), 0),
                    (key(), 1),
                    (key(), 1 << 31),
                    (key(seed=4), 0),
                    (key(step=8), 0),
                    (key(seed=7, step=3), 0),
                    (key(first=11 + 2048), 0),
                    (key(first=11 + 2**32), 0),
                )
            ]
        streams = torch.stack([tensor.flatten() for tensor in drawn])
        assert (torch.corrcoef(streams) - torch.eye(len(drawn))).abs().max() < 5 / streams.shape[1] ** 0.5
        first_TN = drawn[0]
        neighbours = torch.stack([first_TN[1:], first_TN[:-1], first_TN[1:].roll(1, 1), first_TN[1:].roll(4, 1)])
        assert (torch.corrcoef(neighbours.flatten(1)) - torch.eye(4)).abs().max() < 5 / first_TN.numel() ** 0.5


@pytest.mark.parametrize(
    ("counter", "words_of_key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, words_of_key, words):
    """Random123's kat_vectors. Most counters are too far for a test of the public door."""
    counter, words_of_key = (list(torch.tensor(numbers)) for numbers in (counter, words_of_key))
    assert [int(word) for word in philox(counter, words_of_key)] == words


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "key must be of shape [seed, step, first token] = [3], got [2]", (torch.tensor([1, 2]), 0, 4, 4)),
        (TypeError, "key must be int64, got torch.int32", (key().int(), 0, 4, 4)),
        (TypeError, "key must be a torch.Tensor, got list", ([1, 2, 3], 0, 4, 4)),
        (ValueError, "layer must be in 0..2^32-1, got -1", (key(), -1, 4, 4)),
        (ValueError, "layer must be in 0..2^32-1, got 4294967296", (key(), 2**32, 4, 4)),
        (ValueError, "num_tokens must be in 0..2^32-1, got -1", (key(), 0, -1, 4)),
        (ValueError, "num_draws must be in 0..2^32-1, got -4", (key(), 0, 4, -4)),
    ],
)
def test_bad_input(error, message, arguments):
    with pytest.raises(error, match=re.escape("fastmoe.random_uniform: " + message)):
        ops.random_uniform(*arguments)
