"""The training loop."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastmoe import config as configs
from fastmoe import native, offload
from fastmoe.comm import Ranks, launched, reduce_gradients
from fastmoe.config import Config
from fastmoe.nn import RouterInputs, Transformer
from fastmoe.nn.router import HashRouter
from fastmoe.optim import Adafactor, AdamW, LossScaler
from fastmoe.optim.clip import grad_norm
from fastmoe.optim.schedule import cosine
from fastmoe.trainer import alarms, checkpoint, data, metrics, routing
from fastmoe.trainer.generate import generate, printable
from fastmoe.trainer.report import report
from fastmoe.version import __version__

# Model settings that a resumed run may change; all others define the function that the weights belong to.
_FREE = {
    f"model.{name}"
    for name in (
        "aux_loss_weight",
        "z_loss_weight",
        "capacity_factor",
        "eval_capacity_factor",
        "max_seq_len",
        "init_std",
    )
}
_OF_STATES = {"optim.name", "optim.state_dtype", "optim.master", "train.param_dtype"}  # what is kept, and in what
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Result:
    """How a run ended. After a signal only the first four are set."""

    step: int
    seconds: float  # of training, over all resumes, evaluations while training included
    checkpoint: Path | None  # the newest; None when a signal came before the first step
    signal: int | None = None  # that ended the run
    heldout: float | None = None  # bits per token (per byte for byte tokens) held out, all or eval.final_tokens of them
    order2: float | None = None  # the same of the order-2 model; None unless tokens are bytes
    sample: str = ""
    report: Path | None = None


def train(config: Config) -> Result:
    """Trains as configured; writes metrics.jsonl, checkpoints, summary.json and report.html into config.run.dir.

    SIGTERM and SIGINT end the run after the step at hand with a checkpoint (a second SIGINT at once, without). Raises
    ValueError for settings or data that cannot serve, FloatingPointError for a loss, router logit or gradient that is
    not finite (before it reaches the weights; in fp16 the step is left out for such a gradient, while the loss scale
    can still be lowered), CheckpointError where a checkpoint cannot be written or none can be read.
    """
    configs.check(config)
    device = _device(config.train.device)
    with launched(config.mesh.dp, config.mesh.ep, device.type) as ranks:
        if ranks.world.size == 1:
            return _train(config, device, ranks)
        _check_ranks(config, ranks)
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        with open(os.devnull, "w") as nowhere, nullcontext() if ranks.first else redirect_stdout(nowhere):
            return _train(config, device, ranks)


def _check_ranks(config: Config, ranks: Ranks) -> None:
    """ValueError, on all ranks alike, for what several cannot do."""
    train, share = config.train, ranks.mesh.dp * config.train.grad_accumulation
    own = hashlib.sha256(json.dumps([__version__, asdict(config)], sort_keys=True).encode()).digest()[:7]
    digests = ranks.gather(int.from_bytes(own, "big"))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    rules = [
        ("all ranks", f"have the settings and version of rank 0, ranks {others} have others", not others),
        (
            f"--train.batch-size = {train.batch_size}",
            f"be a multiple of {share} (dp x --train.grad-accumulation)",
            train.batch_size % share == 0,
        ),
        ("--memory", "be left out with several ranks", not config.memory.budgets()),
        ("--routing", "be left out with several ranks", not (config.routing.record or config.routing.replay)),
    ]
    for name, wanted, good in rules:
        if not good:
            raise ValueError(f"fastmoe.train: {name} must {wanted}")


def _train(config: Config, device: torch.device, ranks: Ranks) -> Result:
    run_dir = Path(config.run.dir)
    with _Signals() as signals, _run_dir(run_dir) if ranks.first else nullcontext():
        folder = Path(config.data.path) if config.data.path else data.default_corpus()
        settings = config.train.seq_len, config.train.seed, config.model.vocab_size
        domains = config.model.router == "domain"
        batches, heldout = (data.Batches(folder, split, *settings, domains) for split in data.SPLITS)
        if domains and len(batches.meta["domains"]) > config.model.num_experts:
            raise ValueError(
                f"fastmoe.train: --model.num-experts must be at least {len(batches.meta['domains'])}, the domains of "
                f"{folder}, got {config.model.num_experts}"
            )
        return _Run(config, device, run_dir, batches, heldout, signals, ranks).train()


class _Run:
    def __init__(
        self,
        config: Config,
        device: torch.device,
        run_dir: Path,
        batches: data.Batches,
        heldout: data.Batches,
        signals: _Signals,
        ranks: Ranks,
    ):
        self.ranks = ranks
        self.config, self.device, self.run_dir, self.signals = config, device, run_dir, signals
        self.batches, self.heldout = batches, heldout
        self.byte_tokens = batches.meta["tokenizer"] == "byte"
        self.data_digest = hashlib.sha256(json.dumps(batches.meta["splits"], sort_keys=True).encode()).hexdigest()
        self.checkpoints = run_dir / "checkpoints"
        torch.manual_seed(config.train.seed)
        self.engine = self._make_engine()
        self.model = self.engine.model if self.engine else self._make_model().to(device)
        self.model.checkpointed = config.train.activation_checkpointing
        self.forward = torch.compile(self.model) if config.train.compile else self.model
        parts = self.model.expert_parts()
        self.parts = list(parts.values())
        self.parameters = [param for name, param in self.model.named_parameters() if name not in parts]
        self.optimizer = self.engine.optimizer if self.engine else self._make_optimizer(self.model)
        self.scaler = LossScaler() if config.train.dtype == "fp16" else None
        self.step, self.position, self.seconds, self.saved = 0, 0, 0.0, None
        self._resume()
        tables = [module for module in self.model.modules() if isinstance(module, HashRouter) and module.balanced]
        if tables and not self.step:
            tables[0].balance_tables(batches.token_counts(config.model.vocab_size), config.train.seed)
            for router in tables[1:]:
                router.table_VK.copy_(tables[0].table_VK)
        self._open_routing()
        if ranks.first:
            self._describe()
        self.peak = metrics.measured_peak(device.type, _DTYPES[config.train.dtype]) * ranks.world.size
        self.flops_per_token = self.model.flops_per_token(config.train.seq_len)
        logged = run_dir, config.log, config.train.steps, self.step, metrics.memory_gib(device)[1]
        self.metrics = metrics.Metrics(*logged) if ranks.first else metrics.Quiet()

    def _make_model(self) -> Transformer:
        return Transformer(self.config.model, self.ranks.expert).to(_DTYPES[self.config.train.param_dtype])

    def _make_optimizer(self, model: Transformer) -> Adafactor | AdamW:
        optim, seed, matrices = self.config.optim, self.config.train.seed, model.matrices()
        decayed, kept = list(matrices.values()), [p for n, p in model.named_parameters() if n not in matrices]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        if optim.name == "adafactor":
            return Adafactor(groups, optim.lr, master=optim.master, seed=seed)
        betas = optim.beta1, optim.beta2
        kinds = {"state_dtype": optim.state_dtype, "master": optim.master}
        return AdamW(groups, optim.lr, betas, optim.eps, seed=seed, **kinds)

    def _make_engine(self) -> offload.Engine | None:
        """Where --memory gives budgets."""
        config, budgets = self.config, self.config.memory.budgets()
        if not budgets:
            return None
        directory = Path(config.memory.dir or self.run_dir / "offload")
        offload.clear(directory)  # checkpoints are what a run goes on from
        return offload.Engine(
            self._make_model,
            self._make_optimizer,
            budgets,
            directory,
            device=self.device,
            accumulation=config.train.grad_accumulation,
            clip_norm=config.optim.clip_norm,
        )

    def train(self) -> Result:
        config = self.config
        try:
            first, start, before = self.step, time.perf_counter(), self.seconds
            while self.step < config.train.steps and not self._stopping():
                record = self._train_step()
                last = self.step == config.train.steps
                if config.eval.every and self.step % config.eval.every == 0 and not last:
                    record["heldout"] = self._evaluate(config.eval.tokens)
                self.metrics.record(record)
                self.seconds = before + time.perf_counter() - start
                if last or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
                    self._save()
            if self._stopping():
                return self._stopped()
            seconds = time.perf_counter() - start
            if self.step > first:
                tokens = (self.step - first) * config.train.batch_size * config.train.seq_len
                self.metrics.note(
                    f"trained {self.step - first} steps in {seconds:.0f} s ({tokens:,} tokens, "
                    f"{tokens / seconds:,.0f}/s)"
                )
            return self._finish()
        finally:
            self.metrics.close()
            for file in (self.recorder, self.replay):
                if file:
                    file.close()

    def _train_step(self) -> dict:
        """One optimizer step; returns its record. The host waits for the device once, before the weights change."""
        start = time.perf_counter()
        train, optim = self.config.train, self.config.optim
        lr = cosine(self.step + 1, optim, train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = self.scaler.value if self.scaler else 1.0
        micro = train.batch_size // train.grad_accumulation
        data_ranks, data_rank = self.ranks.data.size, self.ranks.data.rank
        share = micro // data_ranks
        self.optimizer.zero_grad()
        sums, chosen = None, []
        for i in range(train.grad_accumulation):
            first = i * micro + data_rank * share
            ids_BS, targets_BS, *domains_BS = self._to_device(self.batches.at(self.position + first, share))
            key = torch.tensor([train.seed, self.step, first * train.seq_len], device=self.device)
            options = {"inputs": _inputs(domains_BS, key)._replace(group=self.ranks.data)}
            if self.replay:
                options["replay"] = self.replay.at(self.step + 1, i, self.device)
            with self._naming_the_step(ids_BS, options), self._autocast():
                out = self.forward(ids_BS, targets_BS, **options)
            if self.recorder:
                chosen.append(routing.pack(out.routed, self.config.model.num_experts))
            whole = (out.loss + out.aux_loss) / train.grad_accumulation
            whole = self.scaler.scale(whole) if self.scaler else whole
            self.engine.backward(whole) if self.engine else whole.backward()
            parts = [
                torch.stack([out.loss.detach(), out.aux_loss.detach()]),
                out.nan_tokens_L,
                out.dropped_L,
                out.load_LE.flatten(),
                out.logit_norm_L,
                *out.losses.values(),
            ]
            row = torch.cat([part.double() for part in parts])
            sums = row if sums is None else sums + row
        if self.engine:
            norm, bad = self.engine.gradients()
        else:
            reduce_gradients(self.parameters, self.parts, self.ranks)
            norm, bad = grad_norm(self.parameters, self.parts, self.ranks.expert), None
        sums = self.ranks.data.all_reduce(sums) if data_ranks > 1 else sums
        sums = torch.cat([torch.as_tensor(norm, dtype=torch.float64, device=self.device).view(1), sums]).cpu()
        total, nan_L, dropped_L, load, *means = sums[1:].split([part.numel() for part in parts])
        times = train.grad_accumulation * data_ranks
        norm, loss, aux_loss = sums[0].item() / scale, *(total / times).tolist()
        load_LE = load.view(out.load_LE.shape)
        logit_norm_L, *losses = [value_L / times for value_L in means]
        skipped = self.scaler is not None and not math.isfinite(norm) and scale > self.scaler.minimum
        self._check_finite(loss, aux_loss, 0.0 if skipped else norm, nan_L, bad)
        if skipped:
            self.metrics.note(f"step {self.step + 1} left out at loss scale {scale:g}{self._bad('gradient')}")
        elif self.engine:
            self.engine.step()
        else:
            clip = min(1.0, optim.clip_norm / norm) if optim.clip_norm and norm else 1.0
            self.optimizer.step(grad_scale=clip / scale)
        for i, load_E in zip(self.model.moe_layers, load_LE) if not skipped else ():
            self.model.layers[i].feed_forward.router.update(load_E.to(self.device))
        scaling = {}
        if self.scaler:
            self.scaler.update(not skipped)
            scaling = {"scale": scale, "skipped": self.scaler.skipped}
        self.step += 1
        if self.recorder:
            self.recorder.write(self.step, chosen)
        self.position += train.batch_size
        seconds = time.perf_counter() - start
        rate = train.batch_size * train.seq_len / seconds
        return {
            "step": self.step,
            "loss": loss,
            "aux_loss": aux_loss,
            "lr": lr,
            "grad_norm": None if skipped else norm,
            **scaling,
            "tokens": self.position * train.seq_len,
            **metrics.describe_routing(load_LE, dropped_L, logit_norm_L, dict(zip(out.losses, losses))),
            "perf": {
                "tokens_per_second": rate,
                "step_seconds": seconds,
                "tflops": rate * self.flops_per_token / 1e12,
                "mfu": rate * self.flops_per_token / self.peak,
                "memory_gib": metrics.memory_gib(self.device)[0],
            },
        }

    def _check_finite(self, loss: float, aux_loss: float, norm: float, nan_L: torch.Tensor, bad: str | None) -> None:
        if nan_L.any():
            layer = self.config.model.num_dense_layers + int(nan_L.nonzero()[0])
            raise self._not_finite(f"the router of layer {layer} got NaN logits for {int(nan_L.sum())} tokens")
        if not (math.isfinite(loss) and math.isfinite(aux_loss)):
            raise self._not_finite(f"loss = {loss}, aux_loss = {aux_loss}{self._bad('weight')}")
        if not math.isfinite(norm):
            first = f" (first gradient that is not finite: {bad})" if bad else self._bad("gradient")
            raise self._not_finite(f"grad_norm = {norm}{first}")

    def _bad(self, kind: str) -> str:
        tensors = ((name, p if kind == "weight" else p.grad) for name, p in self.model.named_parameters())
        name = next((name for name, tensor in tensors if tensor is not None and not tensor.isfinite().all()), None)
        return f" (first {kind} that is not finite: {name})" if name else ""

    def _not_finite(self, what: str) -> FloatingPointError:
        kept = f"the last checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
        return FloatingPointError(
            f"fastmoe.train: step {self.step + 1}: {what}; the weights of step {self.step} are as they were, {kept}"
        )

    @contextmanager
    def _naming_the_step(self, ids_BS: torch.Tensor, options: dict) -> Iterator[None]:
        """On a CPU the gating op refuses NaN logits: says at which step and layer."""
        try:
            yield
        except ValueError as error:
            if "topk_gate" not in str(error) or self.ranks.world.size > 1:  # the others would not come along
                raise
            entered = []
            hooks = [
                layer.register_forward_pre_hook(lambda *_, i=i: entered.append(i))
                for i, layer in enumerate(self.model.layers)
            ]
            try:
                with torch.no_grad(), self._autocast():
                    self.model(ids_BS, ids_BS, **options)
            except ValueError:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
            raise self._not_finite(f"in layer {entered[-1]}: {error}{self._bad('weight')}") from error

    @torch.no_grad()
    def _evaluate(self, max_tokens: int | None = None, stop: Callable[[], bool] = lambda: False) -> float:
        """Mean bits per held-out token; NaN when stop() became true on the way."""
        self.model.eval()
        nats, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        train = self.config.train
        rows = max(train.batch_size // train.grad_accumulation, 4096 // train.seq_len)
        for batch in self.heldout.sweep(rows, max_tokens):
            if stop():
                return math.nan
            count = int((batch[1] != -100).sum())
            ids_BS, targets_BS, *domains_BS = self._to_device(batch)
            with self._autocast():
                nats += self.model(ids_BS, targets_BS, inputs=_inputs(domains_BS)).loss.double() * count
            tokens += count
        self.model.train()
        return nats.item() / tokens / math.log(2)

    def _finish(self) -> Result:
        note = self.metrics.note
        whole, some = sum(map(len, self.heldout.shards)), self.config.eval.final_tokens
        note(f"evaluating on {f'{some:,} of' if some else 'all'} {whole:,} held-out tokens")
        heldout = self._evaluate(some, self._stopping)
        if self._stopping():
            return self._stopped()
        self.metrics.amend(self.step, heldout=heldout)
        order2 = data.order2_bits(self.batches.folder)
        tokenizer = data.load_tokenizer(self.batches.meta["tokenizer"], self.batches.folder)
        prompt = list(tokenizer.encode("def ")) if self.byte_tokens else tokenizer.separator
        room = max(0, min(_SAMPLE_TOKENS, self.config.model.max_seq_len - len(prompt)))
        ids = generate(self.model, prompt[: self.config.model.max_seq_len], room, seed=self.config.train.seed)
        sample = printable(tokenizer.decode(ids))
        if not self.ranks.first:
            return Result(self.step, self.seconds, self.saved, None, heldout, order2, sample)
        summary = {"step": self.step, "seconds": self.seconds, "heldout": heldout, "order2": order2, "sample": sample}
        _write_json(self.run_dir / "summary.json", summary)
        page = report(self.run_dir)
        note(
            f"held-out {heldout:.3f} bits/{'byte' if self.byte_tokens else 'token'}"
            + (f"; order-2 model {order2:.3f} bits/byte" if order2 is not None else "")
        )
        for alarm in alarms.find(metrics.read(self.metrics.path), self.config.model):
            note(f"ALARM: {alarm}")
        note("sample:\n" + "\n".join(f"  | {line}" for line in sample.split("\n")))
        note(f"checkpoint: {self.saved}")
        note(f"report: {page}")
        return Result(self.step, self.seconds, self.saved, None, heldout, order2, sample, page)

    def _stopping(self) -> bool:
        """Whether a rank got a signal, of which then all know; every rank must ask."""
        self.stopped_by = self.ranks.agree(self.signals.received or 0)
        return self.stopped_by > 0

    def _stopped(self) -> Result:
        if self.step and (self.saved is None or checkpoint.step_of(self.saved) < self.step):
            self._save()
        name = signal.Signals(self.stopped_by).name
        kept = f"checkpoint: {self.saved}; go on with --resume" if self.saved else "no step was done, nothing to save"
        self.metrics.note(f"stopped by {name} after step {self.step}; {kept}")
        return Result(self.step, self.seconds, self.saved, self.stopped_by)

    def _save(self) -> None:
        self.metrics.sync()
        if self.recorder:
            self.recorder.sync()
        state = {
            "position": self.position,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "tokenizer": self.batches.meta["tokenizer"],
            "data": self.data_digest,
            **({"scaler": self.scaler.state_dict()} if self.scaler else {}),
        }
        kept = self.config.checkpoint.keep, self.engine, self.ranks
        self.saved = checkpoint.save(self.checkpoints, self.step, self.model, self.optimizer, state, *kept)

    def _resume(self) -> None:
        config = self.config
        if self.ranks.first:
            checkpoint.clean(self.checkpoints)
        if not config.run.resume:
            if self.ranks.agree(bool(self.ranks.first and checkpoint.steps(self.checkpoints))):
                raise ValueError(
                    f"fastmoe.train: {self.checkpoints} holds checkpoints of an earlier run; go on with it (--resume) "
                    f"or start in another folder (--run.dir)"
                )
            return
        path = self._agree_on(checkpoint.newest_intact)
        if path is None:
            print(f"no checkpoint in {self.checkpoints}: starting at step 0", flush=True)
            return
        state = checkpoint.read_state(path)
        given, was = configs.flat(config), configs.flat(configs.from_dict(state["config"]))
        for name, value in given.items():
            fixed = name.startswith("model.") and name not in _FREE or name in _OF_STATES
            if fixed and value != was[name]:
                raise ValueError(
                    f"fastmoe.train: --{name.replace('_', '-')} must be {was[name]} as in {path}, got {value}"
                )
        if config.train.steps < state["step"]:
            raise ValueError(
                f"fastmoe.train: --train.steps must be at least {state['step']}, the step of {path}, got "
                f"{config.train.steps}"
            )
        if self.ranks.first:
            checkpoint.set_aside(self.checkpoints, state["step"])
        checkpoint.load_training(path, self.model, self.optimizer, self.engine, self.ranks.expert)
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.position, self.seconds, self.saved = state["step"], state["position"], state["seconds"], path
        print(f"resuming after step {self.step} from {path}", flush=True)
        for name, value in given.items():
            if value != was[name] and not name.startswith("run."):
                print(f"note: --{name.replace('_', '-')} is {value}, was {was[name]}", flush=True)
        if state["data"] != self.data_digest:
            print("note: the data are not those of the checkpoint; position counts on in the new ones", flush=True)

    def _agree_on(self, newest: Callable[[Path], Path | None]) -> Path | None:
        """The checkpoint that the first rank finds."""
        path, failed = None, None
        try:
            path = newest(self.checkpoints) if self.ranks.first else None
        except checkpoint.CheckpointError as error:
            failed = error
        broken = 1 << 62
        found = self.ranks.agree(broken if failed else checkpoint.step_of(path) + 1 if path else 0)
        if found == broken:
            raise failed or checkpoint.CheckpointError("fastmoe.checkpoint: the first rank found damaged ones only")
        if self.ranks.first:
            return path
        return self.checkpoints / f"step-{found - 1:08d}" if found > 0 else None

    def _open_routing(self) -> None:
        train, model, given = self.config.train, self.config.model, self.config.routing
        self.recorder = self.replay = None
        tokens = train.batch_size // train.grad_accumulation * train.seq_len
        sizes = (len(self.model.moe_layers), model.num_dense_layers, tokens, self.model.top_k, model.num_experts)
        shape = routing.Shape(*sizes, train.grad_accumulation)
        if (given.record or given.replay) and not shape.layers:
            raise ValueError("fastmoe.train: --routing.record and --routing.replay need a layer with experts, got none")
        if given.replay:
            self.replay = routing.Replay(given.replay, shape, self.step + 1, train.steps)
        if given.record:
            self.recorder = routing.Recorder(given.record, shape, self.step, self.config.run.resume)

    def _describe(self) -> None:
        """Prints what is about to run and keeps it in run.json for the report."""
        times = self.model.expert_ranks
        experts = [times * p.numel() for name, p in self.model.named_parameters() if ".experts." in name]
        total, model = self.model.num_parameters(), self.config.model
        active = total - round(sum(experts) * (1 - self.model.top_k / model.num_experts))
        about = {
            "config": asdict(self.config),
            "machine": metrics.machine(self.device),
            "parameters": total,
            "active_parameters": active,
            "unit": "byte" if self.byte_tokens else "token",
            "data": str(self.batches.folder),
            "train_tokens": sum(map(len, self.batches.shards)),
        }
        _write_json(self.run_dir / "run.json", about)
        if not self.byte_tokens:
            shutil.copyfile(self.batches.folder / "tokenizer.json", self.run_dir / "tokenizer.json")
        print(about["machine"])
        print(
            f"{total:,} parameters, {active:,} active a token; data {about['data']} ({about['train_tokens']:,} tokens)"
        )
        print(f"run {self.run_dir}", flush=True)
        if self.device.type == "cpu" and native.missing():
            print(f"note: this run will be slow: {native.missing()}", flush=True)

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.config.train.dtype]  # with an engine the cache would keep the weights of all layers
        return torch.autocast(self.device.type, dtype, dtype != torch.float32, cache_enabled=self.engine is None)

    def _to_device(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in tensors)


def _inputs(domains_BS: list[torch.Tensor], key: torch.Tensor | None = None) -> RouterInputs:
    """domains_BS: of the batch, one or none."""
    return RouterInputs(domains_T=domains_BS[0].flatten() if domains_BS else None, key=key)


class _Signals:
    """Notes SIGTERM and SIGINT instead of dying at once; a second SIGINT interrupts. Does nothing outside the main
    thread.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> _Signals:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint\n".encode())


@contextmanager
def _run_dir(path: Path) -> Iterator[None]:
    """Makes the folder and holds its lock: one run at a time. The lock goes with the process, however that ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"fastmoe.train: --run.dir must be a folder to write to, got {str(path)!r}: {error.strerror}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"fastmoe.train: another process is training in {path}; wait for it or choose another --run.dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"fastmoe.train: --train.device must be auto or a device of this machine, got {name!r}: {error}"
        ) from None
    return device


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
