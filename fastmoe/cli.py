"""The `fastmoe` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_STATUS = """exit status: 0 done; 2 an error in what was given, named on stderr; 130 after Ctrl-C and 143 after SIGTERM
(the step at hand is finished and a checkpoint saved; go on with --resume); 1 anything else"""

_TRAIN_HELP = """usage: fastmoe train RECIPE [--resume] [--GROUP.FIELD VALUE ...]

The recipe gives every setting a value, options override them: fastmoe train tiny --optim.lr 1e-3 --run.dir runs/a
`fastmoe train tiny --help` lists all. --resume (or --run.resume) goes on from the newest intact checkpoint in run.dir.

recipes:
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit status. What a user can cause ends in one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:
            return _train(argv[1:])
        if argv[:1] == ["plan"]:
            from fastmoe.scale.planner import main as plan

            return plan(argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = str(error)
        if type(error).__name__ == "OutOfMemoryError":
            message = f"fastmoe: out of memory: {message.splitlines()[0]} Try a larger --train.grad-accumulation"
        elif isinstance(error, OSError):
            message = f"fastmoe: {message}"
        elif not message.startswith("fastmoe"):
            raise
        print(message, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    about = "Train and use Mixture-of-Experts models."
    parser = argparse.ArgumentParser("fastmoe", description=about, epilog=_STATUS, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, summary: str, into=commands) -> argparse.ArgumentParser:
        about = f"{summary[0].upper()}{summary[1:]}."
        command = into.add_parser(name, help=summary, description=about, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    commands.add_parser("train", help="train a model: fastmoe train RECIPE [--resume] [--GROUP.FIELD VALUE ...]")

    plan_help = "say whether a published model fits a machine: fastmoe plan PRESET --devices N --device-memory 32GB"
    commands.add_parser("plan", help=plan_help)

    generate = add("generate", _generate, "continue a prompt with a trained model")
    generate.add_argument(
        "--run.dir", dest="run_dir", default="runs/tiny", metavar="DIR", help="of `fastmoe train` (default: runs/tiny)"
    )
    generate.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    generate.add_argument("--tokens", type=int, default=200, help="how many to add (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--domain", type=int, default=0, metavar="N", help="of a model with router domain: its index in the data's list"
    )

    data = commands.add_parser("data", help="prepare text for training").add_subparsers(
        required=True, metavar="COMMAND"
    )
    prepare = add("prepare", _prepare, "write text, JSONL and parquet files as token shards for --data.path", data)
    prepare.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help='files or folders; JSONL and parquet rows have a "text", and a "domain" if they like',
    )
    prepare.add_argument(
        "--tokenizer", default="byte", metavar="byte|FILE", help="FILE: a Hugging Face tokenizer.json (default: byte)"
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="a new folder")

    bench = commands.add_parser("bench", help="compare").add_subparsers(required=True, metavar="WHAT")
    routers = add("routers", _bench_routers, "train a recipe with every router, at equal FLOPs, data and seeds", bench)
    routers.add_argument("--recipe", default="tiny", help="default: tiny")
    routers.add_argument("--seeds", type=int, default=3, help="default: 3")
    routers.add_argument("--routers", nargs="+", metavar="NAME", help="default: all")
    routers.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    routers.add_argument("--out", type=Path, default=Path("runs/routers"), metavar="DIR", help="default: runs/routers")
    routers.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="last: options of `fastmoe train` for every run"
    )

    report = add("report", _report, "write a run's report, one HTML page that needs no network")
    report.add_argument("run_dir", metavar="DIR")

    routing = add("routing", _routing, "say what a run's recorded choices would drop, and how they would load ranks")
    routing.add_argument("file", metavar="FILE", help="of `fastmoe train --routing.record FILE`")
    routing.add_argument(
        "--capacity-factor", nargs="+", type=float, default=[1.0, 1.25, 1.5, 2.0], help="default: 1 1.25 1.5 2"
    )
    routing.add_argument("--ep", nargs="+", type=int, default=[], metavar="RANKS", help="ranks that share the experts")
    routing.add_argument(
        "--placement", nargs="+", default=["contiguous", "balanced"], metavar="NAME", help="contiguous, balanced"
    )

    checkpoint = commands.add_parser("checkpoint", help="look after checkpoints").add_subparsers(
        required=True, metavar="COMMAND"
    )
    verify = add(
        "verify",
        _verify,
        "check every file of checkpoints against its SHA-256; status 1 where one is damaged",
        checkpoint,
    )
    verify.add_argument("path", metavar="DIR", help="a run, its checkpoints folder or one checkpoint")

    cache = commands.add_parser(
        "cache", help="look after the block sizes that GPU kernels were tuned to"
    ).add_subparsers(required=True, metavar="COMMAND")
    warm = add("warm", _cache_warm, "tune the expert layer's kernels for shapes ahead of their use; needs a GPU", cache)
    warm.add_argument(
        "--shape",
        nargs="+",
        default=["32768,2048,768,128,8"],
        metavar="T,D,F,E,K",
        help="tokens, width, width of an expert, experts, experts of a token (default: 32768,2048,768,128,8)",
    )
    warm.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("list", _cache_list, "show every choice, with the device and versions it was measured on", cache)
    add("clear", _cache_clear, "forget every choice", cache)

    add("explain", _explain, "show which backend each op takes on this machine, and why")
    return parser


def _train(words: list[str]) -> int:
    from fastmoe.trainer.recipes import RECIPES, recipe

    if not words or words[0].startswith("-"):
        print(
            _TRAIN_HELP + "".join(f"  {name}: {make.__doc__}\n" for name, make in RECIPES.items()) + "\n" + _STATUS,
            file=sys.stdout if words[:1] in (["-h"], ["--help"]) else sys.stderr,
        )
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    default = recipe(words[0])
    import tyro

    from fastmoe.trainer.train import train

    options = ["--run.resume" if word == "--resume" else word for word in words[1:]]
    config = tyro.cli(
        type(default), default=default, args=options, prog=f"fastmoe train {words[0]}", description=_STATUS
    )
    result = train(config)
    return 128 + result.signal if result.signal else 0


def _generate(args: argparse.Namespace) -> None:
    from fastmoe.trainer.generate import generate, load_run, printable

    model, tokenizer = load_run(args.run_dir)
    prompt = [int(i) for i in tokenizer.encode(args.prompt)]
    start = prompt or tokenizer.separator
    ids = generate(model, start, args.tokens, args.temperature, args.seed, domain=args.domain)
    print(printable(tokenizer.decode(ids[0 if prompt else len(start) :])))


def _prepare(args: argparse.Namespace) -> None:
    from fastmoe.trainer.data import prepare

    meta = prepare(args.input, args.tokenizer, args.out)
    counts = {split: sum(shard["tokens"] for shard in shards) for split, shards in meta["splits"].items()}
    print(
        f"{args.out}: {counts['train']:,} training and {counts['heldout']:,} held-out tokens, vocabulary "
        f"{meta['vocab_size']}, {len(meta['domains']):,} domains"
    )
    print(f"train on it with: fastmoe train tiny --data.path {args.out} --model.vocab-size {meta['vocab_size']}")


def _bench_routers(args: argparse.Namespace) -> None:
    import tyro

    from fastmoe.trainer import compare
    from fastmoe.trainer.recipes import recipe

    default = recipe(args.recipe)
    base = tyro.cli(type(default), default=default, args=args.options, prog="fastmoe bench routers --options")
    names = args.routers or list(compare.VARIANTS)
    rows = compare.compare(base, args.recipe, names, args.seeds, args.out, args.jobs, args.options)
    print(compare.table(rows))
    print(f"written: {args.out / 'routers.json'}, routers.md and routers.svg")


def _report(args: argparse.Namespace) -> None:
    from fastmoe.trainer.report import report

    print(report(args.run_dir))


def _routing(args: argparse.Namespace) -> None:
    from fastmoe.trainer.routing import simulate, table

    print(table(simulate(args.file, args.capacity_factor, args.ep, args.placement)))


def _verify(args: argparse.Namespace) -> int:
    from fastmoe.trainer import checkpoint

    root = Path(args.path)
    found = (
        [root]
        if (root / "manifest.json").exists()
        else checkpoint.steps(root) or checkpoint.steps(root / "checkpoints")
    )
    if not found:
        raise ValueError(
            f"fastmoe.checkpoint: DIR must be a run, its checkpoints folder or a checkpoint, got {args.path!r}"
        )
    damaged = 0
    for path in found:
        problems = checkpoint.verify(path)
        damaged += bool(problems)
        print(f"{path}: {'damaged: ' + '; '.join(problems) if problems else 'intact'}")
    return 1 if damaged else 0


def _cache_warm(args: argparse.Namespace) -> int:
    import torch

    from fastmoe import ops

    shapes = []
    for word in args.shape:
        sizes = word.split(",")
        if len(sizes) != 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"fastmoe.cache: --shape must be T,D,F,E,K, five sizes of at least 1, got {word!r}")
        shapes.append([int(size) for size in sizes])
    if not torch.cuda.is_available():
        print("fastmoe: `cache warm` times kernels on a GPU, and PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    for T, D, F, E, K in shapes:
        draw = lambda *shape: (
            torch.randn(shape, device="cuda").mul_(0.02).to(getattr(torch, args.dtype)).requires_grad_()
        )
        ids_TK = torch.rand(T, E, device="cuda").topk(K).indices
        y_TD = ops.moe_mlp(draw(T, D), ids_TK, draw(T, K), draw(E, 2 * F, D), draw(E, D, F))
        y_TD.sum().backward()
        print(f"{T},{D},{F},{E},{K} {args.dtype}: tuned")
    return 0


def _cache_list(args: argparse.Namespace) -> None:
    from fastmoe.ops import autotune

    for path in autotune.files():
        content = autotune.load(path)
        about = ", ".join(f"{name} {value}" for name, value in content.items() if name not in ("choices", "kernels"))
        print(f"{path}: {about}")
        for word, config in sorted(content["choices"].items()):
            print(f"  {word}: {' '.join(f'{name}={value}' for name, value in config.items())}")


def _cache_clear(args: argparse.Namespace) -> None:
    from fastmoe.ops import autotune

    print(f"{autotune.clear()} files removed from {autotune.folder()}")


def _explain(args: argparse.Namespace) -> None:
    import fastmoe

    print(fastmoe.explain())
