"""Trains a model of experts at a size given by budgets, most of it on disk; says where its bytes are and what moved.

python benchmarks/offload.py --layers 24 --host 2GiB --disk 40GiB --dir /tmp/offload   (JSON on stdout)

Bandwidth is compared with a plain O_DIRECT copy: the same number of bytes in files of a unit's size, written and read
with as many requests in flight, by nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fastmoe.config import ModelConfig, parse_bytes
from fastmoe.nn import Transformer
from fastmoe.offload import Engine, clear, disk
from fastmoe.optim import AdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def copy_bandwidth(directory: Path, size: int, requests: int = 4, request: int = 4 << 20) -> dict[str, float]:
    """Bytes a second of reading and of writing a file of `size` bytes, alone, and of both at once, one file each."""
    paths, found = [directory / name for name in ("copy-a", "copy-b")], {}
    buffers = [disk.buffer(request).fill_(1) for _ in range(2 * requests)]

    def run(kind: str, path: Path, first: int) -> None:
        handle = os.open(path, os.O_RDWR | os.O_DIRECT)

        def lane(i: int) -> None:
            view = memoryview(buffers[first + i].numpy())
            for at in range(i * request, size, requests * request):
                (os.preadv if kind == "read" else os.pwritev)(handle, [view[: min(request, size - at)]], at)

        with ThreadPoolExecutor(requests) as pool:
            list(pool.map(lane, range(requests)))
        os.close(handle)

    try:
        for path in paths:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        for kinds in (("write",), ("write",), ("read",), ("read", "write")):  # the first write finds new blocks
            start = time.perf_counter()
            with ThreadPoolExecutor(2) as both:
                list(both.map(run, kinds, paths, (0, requests)))
            found["+".join(kinds)] = len(kinds) * size / (time.perf_counter() - start)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-ff", type=int, default=1024, help="of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step, in sequences of 256")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--state-dtype", default="int8", help="of the moments: fp32, bf16, fp16, int8")
    parser.add_argument("--master", choices=("residual8", "fp32"), help="what weights of 16 bits have beside them")
    parser.add_argument("--clip", choices=("none", "previous", "exact"), default="none")
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--device", help="a budget, as 20GiB, on a GPU")
    parser.add_argument("--host", default="2GiB")
    parser.add_argument("--disk", default="40GiB")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="a folder for the files (default: a temporary one)")
    args = parser.parse_args()
    config = ModelConfig(
        vocab_size=4096,
        d_model=args.d_model,
        num_layers=args.layers,
        num_heads=args.d_model // 64,
        num_experts=args.experts,
        top_k=2,
        d_ff=args.d_ff,
        save_activations="x",
    )

    def make_model() -> Transformer:
        model = Transformer(config).to(DTYPES[args.dtype])
        model.checkpointed = True
        return model

    def make_optimizer(model: Transformer) -> AdamW:
        return AdamW(model.parameters(), lr=1e-3, state_dtype=args.state_dtype, master=args.master)

    given = {"device": args.device, "host": args.host, "disk": args.disk}
    budgets = {tier: int(parse_bytes(size)) for tier, size in given.items() if size}
    device = torch.device("cuda" if args.device and torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, redirect_stdout(sys.stderr):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        clip = {"clip_norm": 0.0 if args.clip == "none" else 1.0, "clip": args.clip.replace("none", "exact")}
        engine = Engine(make_model, make_optimizer, budgets, folder, device=device, durable=args.durable, **clip)
        made, steps = time.perf_counter() - start, []
        ids_BS = torch.randint(0, 4096, (args.tokens // 256, 257), device=device)
        for _ in range(args.steps):
            was, start = engine.report(), time.perf_counter()
            out = engine.model(ids_BS[:, :-1], ids_BS[:, 1:])
            engine.backward(out.loss + out.aux_loss)
            engine.step()
            now, seconds = engine.report(), time.perf_counter() - start
            busy = sum(now["seconds"].values()) - sum(was["seconds"].values())
            waited = now["waited"] - was["waited"]
            moved = {kind: now["moved"][kind] - was["moved"][kind] for kind in now["moved"]}
            rate = {kind: moved[kind] / max(1e-9, now["seconds"][kind] - was["seconds"][kind]) for kind in moved}
            hidden = 1 - min(1.0, waited / busy) if busy else 1.0
            steps.append(
                {"loss": out.loss.item(), "seconds": seconds, "moved": moved, "bytes_per_second": rate}
                | {"total_bytes_per_second": sum(moved.values()) / seconds, "io_hidden": hidden}
            )
            print(json.dumps(steps[-1]), file=sys.stderr, flush=True)
        size = max((unit.file_size for unit in engine.units if unit.tier == "disk"), default=0)
        report = engine.report()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        engine.close()
        clear(folder)
        copies = copy_bandwidth(Path(folder), min(4 * size, 4 << 30)) if size else {}
    json.dump(
        {
            **{key: report[key] for key in ("parameters", "bytes", "bytes_per_parameter", "buffers", "offloaded")},
            "budgets": budgets,
            "peak_rss": peak,
            "rss_before": before,
            "seconds_to_make": made,
            "steps": steps,
            "plain_copy_bytes_per_second": copies,
        },
        sys.stdout,
        indent=1,
    )
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
