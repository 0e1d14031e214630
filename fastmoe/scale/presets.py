"""Published models as data. Expert parameters are exact; totals follow from the shapes, norms and biases left out."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fastmoe.config import ModelConfig
from fastmoe.nn.router import own_top_k
from fastmoe.ops.experts import GATED


@dataclass(frozen=True)
class Heads:
    """Grouped-query attention: queries, keys, values, output; 2*D*heads*dim + 2*D*kv_heads*dim parameters a layer."""

    heads: int
    kv_heads: int
    dim: int

    def params(self, d_model: int) -> int:
        return 2 * d_model * self.dim * (self.heads + self.kv_heads)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek). q_rank 0: queries come straight from the model dimension."""

    heads: int
    q_rank: int = 0
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128

    def params(self, d_model: int) -> int:
        query = self.heads * (self.nope + self.rope)
        queries = d_model * self.q_rank + self.q_rank * query if self.q_rank else d_model * query
        keys_values = d_model * (self.kv_rank + self.rope) + self.kv_rank * self.heads * (self.nope + self.value)
        return queries + keys_values + self.heads * self.value * d_model


@dataclass(frozen=True)
class Stacks:
    """Encoder and decoder with inner attention width: 4*D*inner an encoder layer, 8*D*inner a decoder layer."""

    encoder: int
    decoder: int
    inner: int


@dataclass(frozen=True)
class Preset:
    """The shape of one model. Layers of both stacks are counted; a dense model has no MoE layers and no experts.

    d_ff: of one expert, or of a dense model's feed-forward. matrices: 2 for a plain feed-forward, 3 for a gated one.
    top_k: None where the model has no single K. embeddings: 1 when input and output share a table, 2 when not, 0 where
    the vocabulary is not known. attention: None where it is not known.
    """

    name: str
    num_layers: int
    num_moe_layers: int
    d_model: int
    d_ff: int
    matrices: int = 2
    num_experts: int = 0
    top_k: int | None = None
    num_shared_experts: int = 0
    d_ff_dense: int | None = None  # None: d_ff
    vocab_size: int = 0
    embeddings: int = 0
    attention: Heads | Latent | Stacks | None = None
    has_router: bool = True
    published: float | None = None  # total parameters that the authors state
    note: str = ""

    @property
    def expert_params(self) -> int:
        """Parameters of all experts, shared ones too, exactly."""
        experts = self.num_experts + self.num_shared_experts
        return self.num_moe_layers * experts * self.matrices * self.d_model * self.d_ff

    @property
    def dense_params(self) -> int:
        """Everything else that the row tells: attention, dense feed-forwards, routers, embeddings."""
        D, dense_layers = self.d_model, self.num_layers - self.num_moe_layers
        if self.attention is None:
            return 0
        if isinstance(self.attention, Stacks):
            attention = (4 * self.attention.encoder + 8 * self.attention.decoder) * D * self.attention.inner
        else:
            attention = self.num_layers * self.attention.params(D)
        feed_forward = dense_layers * self.matrices * D * (self.d_ff_dense or self.d_ff)
        router = self.num_moe_layers * D * self.num_experts if self.has_router else 0
        return attention + feed_forward + router + self.embeddings * self.vocab_size * D

    @property
    def total_params(self) -> int:
        """expert_params + dense_params; the experts alone where attention and vocabulary are not known."""
        return self.expert_params + self.dense_params

    @property
    def active_params(self) -> int | None:
        """Parameters that one token meets; None where the row has no single K."""
        if not self.num_experts:
            return self.total_params
        if self.top_k is None:
            return None
        active, experts = self.top_k + self.num_shared_experts, self.num_experts + self.num_shared_experts
        return self.dense_params + self.expert_params * active // experts


def _full(d_model: int) -> Heads:
    return Heads(heads=1, kv_heads=1, dim=d_model)  # 4*D^2 whatever the number of heads


_OPEN = dict(matrices=3, embeddings=2)
_LATENT = Latent(heads=128, q_rank=1536)
_ROWS = (
    Preset("fmoe-bench", 1, 1, 1024, 4096, num_experts=64, top_k=2),
    Preset("shazeer-137b", 1, 1, 512, 1024, num_experts=131072, published=137e9, note="hierarchical gate"),
    Preset("gshard-600b", 36, 18, 1024, 8192, num_experts=2048, top_k=2, note="published 600B"),
    Preset(
        "switch-base-128",
        24,
        12,
        768,
        3072,
        num_experts=128,
        top_k=1,
        vocab_size=32128,
        embeddings=1,
        attention=Stacks(12, 12, 768),
        published=7.4e9,
    ),
    Preset(
        "switch-c",
        30,
        30,
        2080,
        6144,
        num_experts=2048,
        top_k=1,
        vocab_size=32128,
        embeddings=1,
        attention=Stacks(15, 15, 2048),
        published=1571e9,
    ),
    Preset(
        "switch-xxl-128",
        48,
        24,
        4096,
        10240,
        3,
        128,
        1,
        vocab_size=32128,
        embeddings=2,
        attention=Stacks(24, 24, 4096),
        published=395e9,
    ),
    Preset(
        "st-moe-32b",
        54,
        12,
        5120,
        20480,
        3,
        64,
        2,
        vocab_size=256000,
        embeddings=1,
        attention=Stacks(27, 27, 8192),
        published=269e9,
        note="vocabulary assumed tied",
    ),
    Preset(
        "ec-8b-64e",
        32,
        16,
        4096,
        16384,
        num_experts=64,
        top_k=2,
        vocab_size=256000,
        embeddings=1,
        attention=_full(4096),
        published=143e9,
        note="expert choice, 2 experts a token on average",
    ),
    *(
        Preset(
            f"demix-{size}",
            L,
            L,
            D,
            4 * D,
            num_experts=8,
            top_k=1,
            vocab_size=50264,
            embeddings=1,
            attention=_full(D),
            has_router=False,
            published=total,
            note="routed by document domain",
        )
        for size, L, D, total in (
            ("s", 12, 768, 0.52e9),
            ("m", 24, 1024, 1.76e9),
            ("l", 24, 1536, 3.93e9),
            ("xl", 24, 2048, 6.95e9),
        )
    ),
    Preset("m6t-base", 5, 5, 1024, 4096, num_experts=32, note="prototypes, nominally 1.4B"),
    Preset("m6t-10b", 10, 10, 1024, 4096, num_experts=128, note="prototypes, nominally 10B"),
    Preset("m6t-100b", 24, 24, 1024, 4096, num_experts=512, note="prototypes, nominally 100B"),
    Preset("m6t-1t", 24, 24, 1024, 21248, num_experts=960, published=1e12, note="prototypes; 480 V100-32GB"),
    Preset(
        "m6-10t",
        48,
        48,
        1024,
        9984,
        num_experts=10240,
        top_k=80,
        published=10e12,
        note="80 prototypes of 128; 512 V100-32GB",
    ),
    Preset("megablocks-760m", 24, 24, 1536, 6144, num_experts=64, top_k=1),
    Preset(
        "mixtral-8x7b",
        32,
        32,
        4096,
        14336,
        num_experts=8,
        top_k=2,
        vocab_size=32000,
        attention=Heads(32, 8, 128),
        published=46.7e9,
        **_OPEN,
    ),
    Preset(
        "olmoe",
        16,
        16,
        2048,
        1024,
        num_experts=64,
        top_k=8,
        vocab_size=50304,
        attention=Heads(16, 16, 128),
        published=6.9e9,
        **_OPEN,
    ),
    Preset(
        "qwen3-30b-a3b",
        48,
        48,
        2048,
        768,
        num_experts=128,
        top_k=8,
        vocab_size=151936,
        attention=Heads(32, 4, 128),
        published=30.5e9,
        **_OPEN,
    ),
    Preset(
        "qwen3-235b-a22b",
        94,
        94,
        4096,
        1536,
        num_experts=128,
        top_k=8,
        vocab_size=151936,
        attention=Heads(64, 4, 128),
        published=235e9,
        **_OPEN,
    ),
    Preset(
        "dsv2-lite",
        27,
        26,
        2048,
        1408,
        num_experts=64,
        top_k=6,
        num_shared_experts=2,
        d_ff_dense=10944,
        vocab_size=102400,
        attention=Latent(16),
        published=15.7e9,
        **_OPEN,
    ),
    Preset(
        "dsv2",
        60,
        59,
        5120,
        1536,
        num_experts=160,
        top_k=6,
        num_shared_experts=2,
        d_ff_dense=12288,
        vocab_size=102400,
        attention=_LATENT,
        published=236e9,
        **_OPEN,
    ),
    Preset(
        "dsv3",
        61,
        58,
        7168,
        2048,
        num_experts=256,
        top_k=8,
        num_shared_experts=1,
        d_ff_dense=18432,
        vocab_size=129280,
        attention=_LATENT,
        published=671e9,
        **_OPEN,
    ),
    *(
        Preset(name, L, 0, D, 4 * D, attention=Heads(heads, heads, D // heads), note=note)
        for name, L, D, heads, note in (
            ("glm-10b", 48, 4096, 64, ""),
            ("cogview-4b", 48, 2560, 40, "512 V100"),
            ("pangu-2.6b", 32, 2560, 32, "heads as in the released code; the report's table prints 40"),
            ("pangu-13b", 40, 5120, 40, ""),
            ("pangu-200b", 64, 16384, 128, "2048 Ascend 910"),
            ("gpt3-175b", 96, 12288, 96, "offload example"),
            ("mtnlg-530b", 105, 20480, 128, ""),
        )
    ),
)
PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset(name: str) -> Preset:
    """The preset of this name. ValueError suggests the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"fastmoe.preset: name must be one of {', '.join(PRESETS)}, got {name!r}{hint}")
    return PRESETS[name]


def from_config(config: ModelConfig, name: str = "config") -> Preset:
    """The fastmoe.nn.Transformer of this config as a Preset, without biases and norms (D*(2*layers + 1) parameters)."""
    heads = config.num_heads
    return Preset(
        name,
        config.num_layers,
        config.num_layers - config.num_dense_layers,
        config.d_model,
        config.d_ff,
        3 if config.activation in GATED else 2,
        config.num_experts,
        config.top_k or own_top_k(config.router),
        config.num_shared_experts,
        config.d_ff_dense,
        config.vocab_size,
        embeddings=1 if config.tie_embeddings else 2,
        attention=Heads(heads, config.num_kv_heads or heads, config.d_model // heads),
    )
