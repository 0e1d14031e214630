"""C++ on the CPU: csrc/cpu/attention.cpp."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, strided_ptr, workspace
from fastmoe.ops.attention import BLOCK
from fastmoe.ops.attention.reference import angles


def attention(q_BNSH, k_BMSH, v_BMSH, mask, left, right, scale):
    q_BNSH, k_BMSH, v_BMSH = map(_rows, (q_BNSH, k_BMSH, v_BMSH))
    (B, N, Sq, H) = q_BNSH.shape
    layer, _layout = _layer(q_BNSH, k_BMSH, mask, left, right, scale)
    out_BSNH, lse_BNS = empty(B, Sq, N, H, dtype=q_BNSH.dtype), torch.empty(B, N, Sq)
    memory = workspace(_C.attention_workspace(layer))
    _C.attention(layer, *map(_heads, (q_BNSH, k_BMSH, v_BMSH)), ptr(out_BSNH), ptr(lse_BNS), ptr(memory))
    return out_BSNH.transpose(1, 2), lse_BNS


def attention_backward(dout_BNSH, dlse_BNS, q_BNSH, k_BMSH, v_BMSH, out_BNSH, lse_BNS, mask, left, right, scale):
    q_BNSH, k_BMSH, v_BMSH, dout_BNSH = map(_rows, (q_BNSH, k_BMSH, v_BMSH, dout_BNSH))
    out_BSNH, lse_BNS = out_BNSH.transpose(1, 2).contiguous(), lse_BNS.contiguous()
    dlse_BNS = None if dlse_BNS is None else dlse_BNS.contiguous()
    layer, _layout = _layer(q_BNSH, k_BMSH, mask, left, right, scale)
    grads = [empty(*x.transpose(1, 2).shape, dtype=x.dtype) for x in (q_BNSH, k_BMSH, v_BMSH)]
    memory = workspace(_C.attention_backward_workspace(layer))
    heads = map(_heads, (q_BNSH, k_BMSH, v_BMSH))
    saved = ptr(out_BSNH), ptr(lse_BNS)
    _C.attention_backward(layer, _heads(dout_BNSH), ptr(dlse_BNS), *heads, *saved, *map(ptr, grads), ptr(memory))
    return tuple(grad.transpose(1, 2) for grad in grads)


def rope(qkv_BSAH, N, M, start, theta):
    qkv_BSAH = qkv_BSAH.contiguous()
    B, S, _, H = qkv_BSAH.shape
    outputs = [empty(B, S, heads, H, dtype=qkv_BSAH.dtype) for heads in (N, M, M)]
    table_SH = _table(start + S, H, theta)[start:]
    sizes = B, S, N, M, H, dtype_code(qkv_BSAH), num_threads()
    _C.rope(*sizes, ptr(qkv_BSAH), ptr(table_SH), *map(ptr, outputs))
    return tuple(x.transpose(1, 2) for x in outputs)


def rope_backward(dq_BNSH, dk_BMSH, dv_BMSH, start, theta):
    grads = [_rows(x) for x in (dq_BNSH, dk_BMSH, dv_BMSH)]
    (B, N, S, H), M = dq_BNSH.shape, dk_BMSH.shape[1]
    dqkv_BSAH = empty(B, S, N + 2 * M, H, dtype=dq_BNSH.dtype)
    table_SH = _table(start + S, H, theta)[start:]
    sizes = B, S, N, M, H, dtype_code(dq_BNSH), num_threads()
    _C.rope_backward(*sizes, *map(_heads, grads), ptr(table_SH), ptr(dqkv_BSAH))
    return dqkv_BSAH


def _table(rows, H, theta):
    """Cosines and sines of at least so many positions."""
    return _cached_table(1 << max(rows - 1, 0).bit_length(), H, theta)


@lru_cache(maxsize=8)
def _cached_table(rows, H, theta):
    return torch.cat(angles(0, rows, H, theta, torch.empty(0)), 1)


def _rows(x_BNSH):
    """With a dense last dimension; the others as they are."""
    return x_BNSH if x_BNSH.stride(-1) == 1 else x_BNSH.contiguous()


def _heads(x_BNSH):
    return strided_ptr(x_BNSH), *x_BNSH.stride()[:3]


def _layer(q_BNSH, k_BMSH, mask, left, right, scale):
    """fm_attention as the binding takes it, and the tensors that it points into."""
    (B, N, Sq, H), (M, Sk) = q_BNSH.shape, k_BMSH.shape[1:3]
    low, high = max(Sk - Sq - left, -Sq - Sk), min(Sk - Sq + right, Sq + Sk)
    layout = _cached_layout(Sq, Sk, low, high) if mask is None else _layout_of(Sq, Sk, low, high, mask)
    sizes = B, N, M, Sq, Sk, H
    return (sizes, low, high, scale, dtype_code(q_BNSH), num_threads(), tuple(map(ptr, layout))), layout


def _layout_of(Sq, Sk, low, high, mask=None):
    """The block lists of fm_attention: by query block and by key block."""
    q0, k0 = torch.arange(0, Sq, BLOCK)[:, None], torch.arange(0, Sk, BLOCK)
    q1, k1 = (q0 + BLOCK - 1).clamp(max=Sq - 1), (k0 + BLOCK - 1).clamp(max=Sk - 1)
    visited = (k1 - q0 >= low) & (k0 - q1 <= high)
    full = (k0 - q1 >= low) & (k1 - q0 <= high)
    if mask is not None:
        visited &= mask
    lengths, place = visited.sum(1), visited.int().cumsum(1) - 1
    q_blocks, k_blocks = visited.nonzero().unbind(1)
    k_blocks_t, q_blocks_t = visited.t().nonzero().unbind(1)
    return tuple(
        x.to(torch.int32)
        for x in (
            _first(lengths),
            2 * k_blocks + full[q_blocks, k_blocks],
            lengths.argsort(descending=True, stable=True),
            _first(visited.sum(0)),
            2 * q_blocks_t + full[q_blocks_t, k_blocks_t],
            place[q_blocks_t, k_blocks_t],
        )
    )


_cached_layout = lru_cache(maxsize=64)(_layout_of)


def _first(lengths):
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
