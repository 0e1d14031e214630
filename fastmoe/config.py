"""Every setting, as frozen dataclasses. A recipe (trainer/recipes.py) is a function that returns a Config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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
    top_k: int | None = None  # experts of a token; None: the router's own number
    d_ff: int = 256  # of one expert
    num_shared_experts: int = 0
    router: str = "topk"  # a name in fastmoe.nn.ROUTERS
    router_options: str = ""  # of that router, as "noise=0.5, cv=True"
    capacity_factor: float | None = None  # of T * K / E slots an expert; None: the router's own; 0: drop nothing
    eval_capacity_factor: float | None = None  # in evaluation; None: as in training, or the router's own
    activation: str = "swiglu"  # of every feed-forward, routed, shared and dense; fastmoe.ops.moe_mlp lists them
    bias: bool = False  # in every feed-forward
    save_activations: str = "z"  # of the experts, for backward: "z", "z8" in 8 bits, "x" none but their input
    aux_loss_weight: float | None = None  # of the router's balancing losses; None: its own
    z_loss_weight: float | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # or "adafactor": second moments of matrices as a row and a column, no first moments
    lr: float = 3e-3
    beta1: float = 0.9  # betas and eps are adamw's
    beta2: float = 0.95
    eps: float = 1e-8
    state_dtype: str = "fp32"  # of adamw's moments of matrices: "fp32", "bf16", "fp16" or "int8" in 8 bits
    master: str | None = None  # of bf16 weights: None rounds by chance, "residual8" keeps a third byte, "fp32" a copy
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
    dtype: str = "fp32"  # of computing: "fp32", "bf16", or "fp16" with a scaled loss
    param_dtype: str = "fp32"  # of the weights themselves; or "bf16", which needs dtype bf16
    activation_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"  # cuda where there is one, else cpu
    compile: bool = False


@dataclass(frozen=True)
class DataConfig:
    path: str | None = (
        None  # folder made by `fastmoe data prepare`; None: the Python library's own text, prepared on first use
    )


@dataclass(frozen=True)
class EvalConfig:
    every: int = 100  # steps between evaluations while training; 0: only at the end
    tokens: int = 65536  # held-out tokens of one such evaluation
    final_tokens: int | None = None  # of the one at the end; None: the full split


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps between checkpoints; 0: only at the end. The last step is always saved
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between printed lines; metrics.jsonl gets every step
    tensorboard: bool = False


@dataclass(frozen=True)
class RoutingConfig:
    record: str | None = None  # file to write the experts to that every step chose; a resumed run goes on in it
    replay: str | None = None  # file of such a run: its choices in place of the router's, in training


@dataclass(frozen=True)
class MemoryConfig:
    """Budgets for weights, gradients and optimizer states, as 20GiB; what does not fit one goes to the slower ones."""

    device: str | None = None
    host: str | None = None
    disk: str | None = None
    dir: str | None = None  # folder for the files; None: offload in run.dir. What an earlier run left there is removed

    def budgets(self) -> dict[str, int]:
        given = {"device": self.device, "host": self.host, "disk": self.disk}
        return {tier: int(parse_bytes(size)) for tier, size in given.items() if size is not None}


@dataclass(frozen=True)
class MeshConfig:
    """Ranks, as torchrun, mpirun or srun start them. Each takes its share of every batch."""

    dp: int | None = None  # data-parallel ranks; None: all
    ep: int = 1  # of these, ranks that the experts of a layer are split over


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/tiny"  # metrics, checkpoints and the report go here
    resume: bool = False  # go on from the newest intact checkpoint in dir; with none there, start at step 0


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)


def flat(config: Config) -> dict[str, object]:
    """Every field by its command-line name: {"model.d_model": 128, ...}."""
    return {f"{group}.{name}": value for group, values in asdict(config).items() for name, value in values.items()}


def from_dict(groups: dict[str, dict[str, object]]) -> Config:
    """The inverse of dataclasses.asdict; absent fields take their defaults. ValueError names an unknown field."""
    parts = {}
    for part in fields(Config):
        kind, given = part.default_factory, groups.get(part.name, {})
        for name in given.keys() - {f.name for f in fields(kind)}:
            raise ValueError(
                f"fastmoe.config: {part.name} has no field {name!r}; it has {sorted(f.name for f in fields(kind))}"
            )
        parts[part.name] = kind(**given)
    for name in groups.keys() - parts.keys():
        raise ValueError(f"fastmoe.config: there is no group {name!r}; there are {sorted(parts)}")
    return Config(**parts)


def check(config: Config) -> None:
    """ValueError where a value outside the model is out of range (the model checks its own sizes)."""
    train, optim, eval_, checkpoint = config.train, config.optim, config.eval, config.checkpoint
    record, replay = (path and Path(path).resolve() for path in (config.routing.record, config.routing.replay))
    memory = config.memory.budgets()
    rules = [
        ("train.steps", train.steps, "at least 1", train.steps >= 1),
        ("train.batch-size", train.batch_size, "at least 1", train.batch_size >= 1),
        (
            "train.grad-accumulation",
            train.grad_accumulation,
            f"a divisor of --train.batch-size = {train.batch_size}",
            train.grad_accumulation >= 1 and train.batch_size % train.grad_accumulation == 0,
        ),
        (
            "train.seq-len",
            train.seq_len,
            f"in 1..{config.model.max_seq_len} (--model.max-seq-len)",
            1 <= train.seq_len <= config.model.max_seq_len,
        ),
        ("train.dtype", train.dtype, "fp32, bf16 or fp16", train.dtype in ("fp32", "bf16", "fp16")),
        (
            "train.param-dtype",
            train.param_dtype,
            "fp32, or bf16 with --train.dtype bf16",
            train.param_dtype == "fp32" or train.param_dtype == train.dtype == "bf16",
        ),
        ("optim.name", optim.name, "adamw or adafactor", optim.name in ("adamw", "adafactor")),
        (
            "optim.state-dtype",
            optim.state_dtype,
            "fp32, bf16, fp16 or int8" if optim.name == "adamw" else f"fp32 for {optim.name}",
            optim.state_dtype in (("fp32", "bf16", "fp16", "int8") if optim.name == "adamw" else ("fp32",)),
        ),
        (
            "optim.master",
            optim.master,
            "None, or residual8 or fp32 with --train.param-dtype bf16",
            optim.master is None or (optim.master in ("residual8", "fp32") and train.param_dtype == "bf16"),
        ),
        ("optim.lr", optim.lr, "positive", optim.lr > 0),
        ("optim.clip-norm", optim.clip_norm, "0 (off) or positive", optim.clip_norm >= 0),
        ("optim.warmup-steps", optim.warmup_steps, "at least 0", optim.warmup_steps >= 0),
        ("eval.every", eval_.every, "at least 0", eval_.every >= 0),
        ("eval.tokens", eval_.tokens, "at least 1", eval_.tokens >= 1),
        ("eval.final-tokens", eval_.final_tokens, "at least 1", eval_.final_tokens is None or eval_.final_tokens >= 1),
        ("checkpoint.every", checkpoint.every, "at least 0", checkpoint.every >= 0),
        ("checkpoint.keep", checkpoint.keep, "at least 1", checkpoint.keep >= 1),
        ("log.every", config.log.every, "at least 1", config.log.every >= 1),
        (
            "train.activation-checkpointing",
            train.activation_checkpointing,
            "on with --memory budgets (and --train.compile off)",
            not memory or (train.activation_checkpointing and not train.compile),
        ),
        ("train.dtype", train.dtype, "fp32 or bf16 with --memory budgets", not memory or train.dtype != "fp16"),
        (
            "model.num-experts",
            config.model.num_experts,
            f"a multiple of --mesh.ep = {config.mesh.ep}",
            config.mesh.ep < 1 or config.model.num_experts % config.mesh.ep == 0,
        ),
        ("routing.record", record, "another file than --routing.replay", not record or record != replay),
    ]
    for name, value, wanted, good in rules:
        if not good:
            raise ValueError(f"fastmoe.train: --{name} must be {wanted}, got {value}")


def parse_bytes(text: str) -> float:
    """Reads 32GB as 32e9, 24GiB as 24 * 2**30, 1000 as 1000. ValueError for anything else."""
    number = text.strip().rstrip("BbGgIiKkMmTt")
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        return float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"fastmoe.config: memory must be like 32GB or 24GiB, got {text!r}") from None
