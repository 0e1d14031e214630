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


def rotate(x_BNSH: torch.Tensor, cos_SH: torch.Tensor, sin_SH: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves paired as in Hugging Face transformers. Source: Su et al., arXiv 2104.09864."""
    left, right = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_SH + torch.cat([-right, left], dim=-1) * sin_SH


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
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = ops.linear(x_BSD, self.qkv_proj).view(B, S, -1, self.head_dim).transpose(1, 2)
        q_BNSH, k_BNSH, v_BNSH = qkv.split(sizes, dim=1)
        start = cache.length if cache else 0
        cos_SH, sin_SH = self._angles(start, S, x_BSD.device, qkv.dtype)
        q_BNSH, k_BNSH = rotate(q_BNSH, cos_SH, sin_SH), rotate(k_BNSH, cos_SH, sin_SH)
        mask = None
        if cache is not None:
            cache.k[layer][:, :, start : start + S] = k_BNSH
            cache.v[layer][:, :, start : start + S] = v_BNSH
            k_BNSH, v_BNSH = cache.k[layer][:, :, : start + S], cache.v[layer][:, :, : start + S]
            mask = torch.ones(S, start + S, dtype=torch.bool, device=x_BSD.device).tril(start) if start else None
        o_BNSH = scaled_dot_product_attention(
            q_BNSH, k_BNSH, v_BNSH, mask, is_causal=mask is None, enable_gqa=self.num_kv_heads != self.num_heads
        )
        return ops.linear(o_BNSH.transpose(1, 2).reshape(B, S, D), self.out_proj)

    def _angles(
        self, start: int, S: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angle_SH = torch.outer(torch.arange(start, start + S, device=device).float(), self.rope_theta**-half).repeat(
            1, 2
        )
        return angle_SH.cos().to(dtype), angle_SH.sin().to(dtype)
