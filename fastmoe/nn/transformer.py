"""The reference model: a decoder-only transformer whose feed-forwards are MoE layers."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastmoe import ops
from fastmoe.config import ModelConfig
from fastmoe.nn.attention import Attention, KVCache
from fastmoe.nn.experts import FeedForward
from fastmoe.nn.moe import MoE
from fastmoe.nn.norm import RMSNorm


class Output(NamedTuple):
    loss: torch.Tensor | None  # scalar, mean nats over the targets; None without targets
    aux_loss: torch.Tensor  # scalar, to be added to the loss
    logits_BSV: torch.Tensor | None  # without targets; [B, 1, V] with a cache
    load_LE: torch.Tensor  # [MoE layers, E] int64
    dropped_L: torch.Tensor  # [MoE layers] int64
    nan_tokens_L: torch.Tensor  # [MoE layers] int64


class Block(nn.Module):
    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(
            config.d_model, config.num_heads, config.num_kv_heads, config.rope_theta, config.init_std, out_std
        )
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = (
            FeedForward(config.d_model, config.d_ff_dense, config.init_std, out_std, config.activation, config.bias)
            if dense
            else MoE(
                config.d_model,
                config.d_ff,
                config.num_experts,
                config.top_k,
                num_shared_experts=config.num_shared_experts,
                capacity_factor=config.capacity_factor,
                score=config.router_score,
                renormalize=config.renormalize,
                activation=config.activation,
                bias=config.bias,
                save=config.save_activations,
                aux_loss_weight=config.aux_loss_weight,
                z_loss_weight=config.z_loss_weight,
                init_std=config.init_std,
                out_std=out_std,
            )
        )

    def forward(self, x_BSD: torch.Tensor, cache: KVCache | None, layer: int) -> tuple[torch.Tensor, ...]:
        """The new x_BSD, then the MoEOutput fields past y; nothing more from a dense layer."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cache, layer)
        out = self.feed_forward(self.feed_forward_norm(x_BSD))
        return (x_BSD + out.y, *out[1:]) if isinstance(self.feed_forward, MoE) else (x_BSD + out,)


def _save_routing(context, op, *args, **kwargs) -> CheckpointPolicy:
    saved = (torch.ops.fastmoe.topk_gate.default, torch.ops.fastmoe.build_routing.default)
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """Token ids to loss or logits. Set `checkpointed` to recompute layers in backward, all but their routing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "d_ff_dense", "num_experts", "top_k"):
            if getattr(config, name) < 1:
                raise ValueError(f"fastmoe.Transformer: {name} must be at least 1, got {getattr(config, name)}")
        if not 0 <= config.num_dense_layers <= config.num_layers:
            raise ValueError(
                f"fastmoe.Transformer: num_dense_layers must be in 0..{config.num_layers} (num_layers), "
                f"got {config.num_dense_layers}"
            )
        self.config, self.checkpointed = config, False
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model).normal_(std=config.init_std))
        self.layers = nn.ModuleList(Block(config, dense=i < config.num_dense_layers) for i in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            self.embedding
            if config.tie_embeddings
            else nn.Parameter(torch.empty(config.vocab_size, config.d_model).normal_(std=config.init_std))
        )

    def forward(
        self, ids_BS: torch.Tensor, targets_BS: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> Output:
        """ids_BS: [B, S] integer in 0..V-1. targets_BS: [B, S], -100 is left out. cache: positions go on from
        cache.length.
        """
        config = self.config
        start = cache.length if cache else 0
        if start + ids_BS.shape[1] > config.max_seq_len:
            raise ValueError(
                f"fastmoe.Transformer: ids_BS must end within max_seq_len = {config.max_seq_len}, "
                f"got {start} + {ids_BS.shape[1]} positions"
            )
        if cache is not None and start + ids_BS.shape[1] > cache.max_len:
            raise ValueError(
                f"fastmoe.Transformer: ids_BS must fit the cache's max_len = {cache.max_len}, "
                f"got {start} + {ids_BS.shape[1]} positions"
            )
        x_BSD = nn.functional.embedding(ids_BS, self.embedding)
        routed = []
        recompute = self.checkpointed and torch.is_grad_enabled()
        context_fn = partial(create_selective_checkpoint_contexts, _save_routing)
        for i, block in enumerate(self.layers):
            if recompute:
                x_BSD, *rest = checkpoint(block, x_BSD, cache, i, use_reentrant=False, context_fn=context_fn)
            else:
                x_BSD, *rest = block(x_BSD, cache, i)
            if rest:
                routed.append(rest)
        x_BSD = self.norm(x_BSD)
        loss = logits_BSV = None
        if targets_BS is not None:
            loss = ops.linear_cross_entropy(x_BSD.flatten(0, 1), self.head, targets_BS.flatten())
        elif cache is not None:
            cache.length += ids_BS.shape[1]
            logits_BSV = ops.linear(x_BSD[:, -1:], self.head)
        else:
            logits_BSV = ops.linear(x_BSD, self.head)
        none = torch.zeros(0, dtype=torch.int64, device=ids_BS.device)
        aux, load, dropped, nan = ([row[i] for row in routed] for i in range(4))
        return Output(
            loss,
            sum(aux) if aux else x_BSD.new_zeros(()),
            logits_BSV,
            torch.stack(load) if load else none.view(0, config.num_experts),
            torch.stack(dropped) if dropped else none,
            torch.stack(nan) if nan else none,
        )

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        config = self.config
        shape = (batch_size, config.num_kv_heads or config.num_heads, max_len, config.d_model // config.num_heads)
        return KVCache(config.num_layers, shape, self.embedding.dtype, self.embedding.device)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def matrices(self) -> dict[str, nn.Parameter]:
        """The weight matrices by name, all parameters but norms and biases: what weight decay and FLOPs count."""
        return {name: p for name, p in self.named_parameters() if p.ndim >= 2 and not name.endswith("_bias")}

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: 6 per active weight, 6 * S * D a layer for causal attention (backward twice the
        forward).
        """
        config, sizes = self.config, {name: p.numel() for name, p in self.matrices().items()}
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        read = 0 if config.tie_embeddings else self.embedding.numel()  # looked up, not multiplied by
        active = sum(sizes.values()) - read - routed + routed * config.top_k / config.num_experts
        return 6 * active + 6 * config.num_layers * seq_len * config.d_model
