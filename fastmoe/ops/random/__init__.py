"""Random: draws from a counter, the same whatever the device, the order of work or the number of ranks."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


def random_uniform(key: torch.Tensor, layer: int, num_tokens: int, num_draws: int) -> torch.Tensor:
    """[T, N] float32 in [0, 1), on the key's device: N draws for each of T tokens.

    key: int64 [3], the seed and step (both modulo 2^32) and the index of the first token among all of the step. layer:
    0 to 2^32 - 1, draws of different layers are independent. Draw n of token t is word n % 4 of Philox-4x32-10 with
    counter (t modulo 2^32, t / 2^32, n / 4, layer), t being the global index, and key (seed, step), as (word >> 8) *
    2^-24. Not differentiable.

    Errors: ValueError for a key of another shape and negative sizes. Source: Salmon et al., SC 2011.
    """
    check.tensor("random_uniform", "key", key, (3,), (torch.int64,), legend="seed, step, first token")
    for name, size in (("layer", layer), ("num_tokens", num_tokens), ("num_draws", num_draws)):
        if not 0 <= size < 1 << 32:
            check.fail("random_uniform", name, "in 0..2^32-1", size)
    return _random_uniform(key, layer, num_tokens, num_draws)


_random_uniform = define(
    "random",
    "random_uniform(Tensor key, int layer, int num_tokens, int num_draws) -> Tensor",
    fake=lambda key, layer, num_tokens, num_draws: key.new_empty((num_tokens, num_draws), dtype=torch.float32),
)
