"""What draws from a counter mean, in plain torch: 32-bit words in int64."""

import torch

_WORD = 0xFFFFFFFF


def random_uniform(key, layer, num_tokens, num_draws):
    blocks = -(-num_draws // 4)
    token_T1 = key[2] + torch.arange(num_tokens, device=key.device)[:, None]
    block_1N = torch.arange(blocks, device=key.device)[None]
    shape = torch.broadcast_shapes(token_T1.shape, block_1N.shape)
    words = philox(
        [(token_T1 & _WORD).expand(shape), (token_T1 >> 32 & _WORD).expand(shape), block_1N.expand(shape), layer],
        [key[0] & _WORD, key[1] & _WORD],
    )
    drawn_TN4 = torch.stack(words, 2)
    return ((drawn_TN4.view(num_tokens, 4 * blocks)[:, :num_draws] >> 8) * 2.0**-24).float()


def philox(counter, key):
    """Ten rounds; four counter words and two key words, tensors or numbers below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(a, b):
    """The high and low words of a product of two words; int64 wraps but keeps the bits."""
    product = a * b
    return product >> 32 & _WORD, product & _WORD
