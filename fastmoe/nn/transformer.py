"""The reference model: a decoder-only transformer whose feed-forwards are MoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastmoe import ops
from fastmoe.comm import Group
from fastmoe.config import ModelConfig
from fastmoe.nn.attention import Attention, KVCache
from fastmoe.nn.experts import Experts, FeedForward
from fastmoe.nn.moe import MoE, MoEOutput
from fastmoe.nn.norm import RMSNorm
from fastmoe.nn.router import NO_INPUTS, RouterInputs, parse_options


class Output(NamedTuple):
    loss: torch.Tensor | None  # scalar, mean nats over the targets; None without targets
    aux_loss: torch.Tensor  # scalar, to be added to the loss
    logits_BSV: torch.Tensor | None  # without targets; [B, 1, V] with a cache
    load_LE: torch.Tensor  # [MoE layers, E] int64
    dropped_L: torch.Tensor  # [MoE layers] int64
    nan_tokens_L: torch.Tensor  # [MoE layers] int64
    logit_norm_L: torch.Tensor  # [MoE layers]
    losses: dict[str, torch.Tensor]  # the routers' losses by name, without weights: [MoE layers]
    routed: tuple[MoEOutput, ...]  # of each MoE layer, without its y


class Block(nn.Module):
    def __init__(self, config: ModelConfig, dense: bool, expert_group: Group | None = None):
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
                router=config.router,
                router_options=router_options(config),
                num_shared_experts=config.num_shared_experts,
                capacity_factor=config.capacity_factor,
                eval_capacity_factor=config.eval_capacity_factor,
                activation=config.activation,
                bias=config.bias,
                save=config.save_activations,
                aux_loss_weight=config.aux_loss_weight,
                z_loss_weight=config.z_loss_weight,
                init_std=config.init_std,
                out_std=out_std,
                expert_group=expert_group,
            )
        )

    def forward(
        self,
        x_BSD: torch.Tensor,
        last_BSD: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
        inputs: RouterInputs,
    ) -> tuple[torch.Tensor, torch.Tensor, MoEOutput | None]:
        """last_BSD is to be added to x_BSD first, with which the norm is one pass; None: nothing. Returns the sum
        before the feed-forward, what that gives and is to be added, and what an MoE layer says beside its y.
        """
        if last_BSD is None:
            h_BSD = self.attention_norm(x_BSD)
        else:
            h_BSD, x_BSD = self.attention_norm.add(last_BSD, x_BSD)
        h_BSD, x_BSD = self.feed_forward_norm.add(self.attention(h_BSD, cache, layer), x_BSD)
        if not isinstance(self.feed_forward, MoE):
            return x_BSD, self.feed_forward(h_BSD), None
        out = self.feed_forward(h_BSD, inputs)
        return x_BSD, out.y, out._replace(y=None)

    def whole(
        self, x_BSD: torch.Tensor, cache: KVCache | None, layer: int, inputs: RouterInputs
    ) -> tuple[torch.Tensor, MoEOutput | None]:
        """From sum to sum: one tensor to keep where the layer is recomputed."""
        x_BSD, last_BSD, out = self(x_BSD, None, cache, layer, inputs)
        return x_BSD + last_BSD, out


def router_options(config: ModelConfig) -> dict[str, object]:
    options = parse_options(config.router_options)
    return {"vocab_size": config.vocab_size, **options} if config.router == "hash" else options


def _save_routing(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ROUTING else CheckpointPolicy.PREFER_RECOMPUTE


_ROUTING = {
    getattr(torch.ops.fastmoe, name).default
    for name in ("topk_gate", "balanced_assignment", "swipe", "build_routing", "build_routing_from_experts")
}


class Transformer(nn.Module):
    """Token ids to loss or logits. Set `checkpointed` to recompute layers in backward, all but their routing.

    expert_group: ranks over which the experts of every MoE layer are split; every rank has its own batch.
    """

    def __init__(self, config: ModelConfig, expert_group: Group | None = None):
        super().__init__()
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "d_ff_dense", "num_experts"):
            if getattr(config, name) < 1:
                raise ValueError(f"fastmoe.Transformer: {name} must be at least 1, got {getattr(config, name)}")
        if not 0 <= config.num_dense_layers <= config.num_layers:
            raise ValueError(
                f"fastmoe.Transformer: num_dense_layers must be in 0..{config.num_layers} (num_layers), "
                f"got {config.num_dense_layers}"
            )
        self.config, self.checkpointed = config, False
        self.expert_ranks = expert_group.size if expert_group else 1
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model).normal_(std=config.init_std))
        self.layers = nn.ModuleList(
            Block(config, i < config.num_dense_layers, expert_group) for i in range(config.num_layers)
        )
        self.moe_layers = list(range(config.num_dense_layers, config.num_layers))
        for i in self.moe_layers:
            if not self.layers[i].feed_forward.router.causal:
                raise ValueError(
                    f"fastmoe.Transformer: router must choose without seeing later tokens, got {config.router!r} "
                    "(its option in_decoder=True trains all the same)"
                )
        self.top_k = self.layers[-1].feed_forward.router.top_k if self.moe_layers else 0
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            self.embedding
            if config.tie_embeddings
            else nn.Parameter(torch.empty(config.vocab_size, config.d_model).normal_(std=config.init_std))
        )

    def forward(
        self,
        ids_BS: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        inputs: RouterInputs = NO_INPUTS,
        replay: Sequence[torch.Tensor] | None = None,
    ) -> Output:
        """ids_BS: [B, S] integer in 0..V-1. targets_BS: [B, S], -100 is left out. cache: positions go on from
        cache.length. inputs: what routers need beside the ids, with T = B * S. replay: of each MoE layer the ids [T, K]
        to use in place of the router's choice.
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
        inputs = inputs._replace(token_ids_T=ids_BS.reshape(-1))
        routed, last_BSD = [], None
        recompute = self.checkpointed and torch.is_grad_enabled()
        context_fn = partial(create_selective_checkpoint_contexts, _save_routing)
        for i, block in enumerate(self.layers):
            given = inputs._replace(layer=i)
            if replay is not None and i in self.moe_layers:
                given = given._replace(replay_ids_TK=replay[len(routed)])
            if recompute:
                x_BSD, out = checkpoint(block.whole, x_BSD, cache, i, given, use_reentrant=False, context_fn=context_fn)
            else:
                x_BSD, last_BSD, out = block(x_BSD, last_BSD, cache, i, given)
            if out is not None:
                routed.append(out)
        x_BSD = self.norm(x_BSD) if recompute else self.norm.add(last_BSD, x_BSD)[0]
        loss = logits_BSV = None
        if targets_BS is not None:
            loss = ops.linear_cross_entropy(x_BSD.flatten(0, 1), self.head, targets_BS.flatten())
        elif cache is not None:
            cache.length += ids_BS.shape[1]
            logits_BSV = ops.linear(x_BSD[:, -1:], self.head)
        else:
            logits_BSV = ops.linear(x_BSD, self.head)
        none = torch.zeros(0, device=ids_BS.device)

        def stack(values: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
            return torch.stack(values) if values else empty

        return Output(
            loss,
            sum((out.aux_loss for out in routed), x_BSD.new_zeros((), dtype=torch.float32)),
            logits_BSV,
            stack([out.load_E for out in routed], none.long().view(0, config.num_experts)),
            stack([out.dropped for out in routed], none.long()),
            stack([out.nan_tokens for out in routed], none.long()),
            stack([out.logit_norm for out in routed], none),
            {name: torch.stack([out.losses[name] for out in routed]) for name in (routed[0].losses if routed else ())},
            tuple(routed),
        )

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        config = self.config
        shape = (batch_size, config.num_kv_heads or config.num_heads, max_len, config.d_model // config.num_heads)
        return KVCache(config.num_layers, shape, self.embedding.dtype, self.embedding.device)

    def num_parameters(self) -> int:
        """Of the whole model, the experts of other ranks included."""
        parts = self.expert_parts()
        return sum(p.numel() * (self.expert_ranks if name in parts else 1) for name, p in self.named_parameters())

    def expert_parts(self) -> dict[str, nn.Parameter]:
        """By name the parameters of which this rank has its part, the first dimension split over expert_group."""
        split = {f"{name}." for name, module in self.named_modules() if isinstance(module, Experts) and module.group}
        return {name: p for name, p in self.named_parameters() if name.startswith(tuple(split))}

    def matrices(self) -> dict[str, nn.Parameter]:
        """The weight matrices by name, all parameters but norms and biases: what weight decay and FLOPs count."""
        return {name: p for name, p in self.named_parameters() if p.ndim >= 2 and not name.endswith("_bias")}

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: 6 per active weight, 6 * S * D a layer for causal attention (backward twice the
        forward).
        """
        config, parts = self.config, self.expert_parts()
        sizes = {n: p.numel() * (self.expert_ranks if n in parts else 1) for n, p in self.matrices().items()}
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        read = 0 if config.tie_embeddings else self.embedding.numel()  # looked up, not multiplied by
        active = sum(sizes.values()) - read - routed + routed * self.top_k / config.num_experts
        return 6 * active + 6 * config.num_layers * seq_len * config.d_model
