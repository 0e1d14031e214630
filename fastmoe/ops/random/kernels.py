"""Random in Triton: one program draws from a run of counters."""

import torch
import triton
import triton.language as tl


@triton.jit
def _random_uniform_kernel(key_ptr, out_ptr, layer, N, blocks, counters, BLOCK: tl.constexpr):
    at_C = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_C, block_C = at_C // blocks, at_C % blocks
    token_C = tl.load(key_ptr + 2) + row_C
    seed = (tl.load(key_ptr) & 0xFFFFFFFF) | (tl.load(key_ptr + 1) << 32)
    layer_C = tl.zeros((BLOCK,), tl.int64) + layer
    w0, w1, w2, w3 = tl.philox(
        seed, token_C.to(tl.uint32), (token_C >> 32).to(tl.uint32), block_C.to(tl.uint32), layer_C.to(tl.uint32)
    )
    word_C4 = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, 4))
    draw_C4 = 4 * block_C[:, None] + tl.arange(0, 4)[None, :]
    mask_C4 = (at_C < counters)[:, None] & (draw_C4 < N)
    tl.store(out_ptr + row_C[:, None] * N + draw_C4, (word_C4 >> 8).to(tl.float32) * 5.9604644775390625e-08, mask_C4)


def random_uniform(key, layer, num_tokens, num_draws):
    out_TN = key.new_empty((num_tokens, num_draws), dtype=torch.float32)
    if out_TN.numel():
        blocks = triton.cdiv(num_draws, 4)
        counters = num_tokens * blocks
        with torch.cuda.device_of(key):
            _random_uniform_kernel[(triton.cdiv(counters, 256),)](
                key.contiguous(), out_TN, layer, num_draws, blocks, counters, BLOCK=256
            )
    return out_TN
