"""C++ on the CPU: csrc/cpu/random.cpp."""

from fastmoe.native import _C, empty, num_threads, ptr


def random_uniform(key, layer, num_tokens, num_draws):
    out_TN = empty(num_tokens, num_draws)
    _C.random_uniform(ptr(key.contiguous()), layer, num_tokens, num_draws, ptr(out_TN), num_threads())
    return out_TN
