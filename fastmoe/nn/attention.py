"""Causal multi-head attention with rotary positions; grouped keys and values; a cache for generation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fastmoe import ops


class KVCache:
    """Keys and values of the positions seen so far: k, v [B, N_kv, max_len, H] per layer."""

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)] for _ in range(2))
        self.length, self.max_len = 0, shape[2]


class Attention(nn.Module):
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope_theta: float = 10000.0,
        init_std: float = 0.02,
        out_std: float | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if d_model % num_heads or (d_model // num_heads) % 2 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"fastmoe.Attention: num_heads must divide d_model into even heads and be a multiple of num_kv_heads, "
                f"got d_model={d_model}, num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        self.head_dim = d_model // num_heads
        rows = (num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Parameter(torch.empty(rows, d_model).normal_(std=init_std))
        self.out_proj = nn.Parameter(torch.empty(d_model, d_model).normal_(std=out_std or init_std))
        self.rope_theta = rope_theta

    def forward(self, x_BSD: torch.Tensor, cache: KVCache | None = None, layer: int = 0) -> torch.Tensor:
        B, S, D = x_BSD.shape
        qkv_BSAH = ops.linear(x_BSD, self.qkv_proj).view(B, S, -1, self.head_dim)
        start = cache.length if cache else 0
        q_BNSH, k_BNSH, v_BNSH = ops.rope(qkv_BSAH, self.num_heads, self.num_kv_heads, start, self.rope_theta)
        if cache is not None:
            cache.k[layer][:, :, start : start + S] = k_BNSH
            cache.v[layer][:, :, start : start + S] = v_BNSH
            k_BNSH, v_BNSH = cache.k[layer][:, :, : start + S], cache.v[layer][:, :, : start + S]
        if x_BSD.is_cpu and S > 1:
            o_BNSH = ops.attention(q_BNSH, k_BNSH, v_BNSH, causal=True)
        else:  # the op has no kernel elsewhere yet, and packing the keys for one query costs more than reading them
            mask = torch.ones(S, start + S, dtype=torch.bool, device=x_BSD.device).tril(start) if start else None
            o_BNSH = scaled_dot_product_attention(
                q_BNSH, k_BNSH, v_BNSH, mask, is_causal=mask is None, enable_gqa=self.num_kv_heads != self.num_heads
            )
        return ops.linear(o_BNSH.transpose(1, 2).reshape(B, S, D), self.out_proj)
