"""Every setting, as frozen dataclasses. A recipe (trainer/recipes.py) is a function that returns a Config."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with MoE layers."""

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    max_seq_len: int = 1024
    num_dense_layers: int = 0  # leading layers with a dense feed-forward
    d_ff_dense: int = 512
    num_experts: int = 8
    top_k: int = 2
    d_ff: int = 256  # of one expert
    num_shared_experts: int = 0
    capacity_factor: float | None = None  # None: dropless; else an expert keeps ceil(factor * T * K / E) rows
    router_score: str = "softmax"
    renormalize: bool = True
    aux_loss_weight: float = 0.01
    z_loss_weight: float = 1e-3
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # 0: no clipping
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1  # cosine ends at lr * this


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 300
    batch_size: int = 16  # sequences per optimizer step, over all accumulation steps
    seq_len: int = 256
    grad_accumulation: int = 1
    dtype: str = "fp32"  # or "bf16": compute in bfloat16, weights and moments in float32
    activation_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"  # cuda where there is one, else cpu
    compile: bool = False


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # folder made by `fastmoe data prepare`; None: the Python library's own text, prepared on first use


@dataclass(frozen=True)
class EvalConfig:
    every: int = 100  # steps between evaluations while training; 0: only at the end
    tokens: int = 65536  # held-out tokens of one such evaluation; the end takes the full split


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps; the last step is always saved
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between printed lines; metrics.jsonl gets every step
    tensorboard: bool = False


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/tiny"
    resume: bool = False


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
