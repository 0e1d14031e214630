from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from fastmoe.trainer import data


def tokens_of(folder, split):
    meta = data.load_meta(folder)
    return np.concatenate([np.fromfile(folder / shard["file"], meta["dtype"]) for shard in meta["splits"][split]])


def test_text_files_are_split_whole_and_nothing_is_lost(corpus, texts):
    pieces = {split: bytes(tokens_of(corpus, split)).split(b"\0")[:-1] for split in data.SPLITS}
    wanted = sorted(path.read_bytes() for path in texts.iterdir())
    assert sorted(pieces["train"] + pieces["heldout"]) == wanted
    assert 0 < len(pieces["heldout"]) < len(wanted) / 4
    data.verify(corpus)


def test_the_split_of_a_document_does_not_depend_on_the_others(texts, tmp_path, corpus):
    held = {piece for piece in bytes(tokens_of(corpus, "heldout")).split(b"\0") if piece}
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(texts.iterdir())[20:]:
        (few / path.name).write_bytes(path.read_bytes())
    data.prepare([few], "byte", tmp_path / "out")
    again = {piece for piece in bytes(tokens_of(tmp_path / "out", "heldout")).split(b"\0") if piece}
    assert again == held & {path.read_bytes() for path in few.iterdir()}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_text(tmp_path, kind):
    rows = [f"row {i} \u00e9\n" * (1 + i % 3) for i in range(80)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": row, "id": i}) for i, row in enumerate(rows)) + "\n\n")
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"id": list(range(80)), "text": rows}), path)
    data.prepare([path], "byte", tmp_path / "out")
    pieces = [
        piece.decode() for split in data.SPLITS for piece in bytes(tokens_of(tmp_path / "out", split)).split(b"\0")[:-1]
    ]
    assert Counter(pieces) == Counter(rows)


def test_a_tokenizer_file(tmp_path, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train(
        [str(path) for path in texts.iterdir()],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(tmp_path / "tok.json"))
    meta = data.prepare([texts], tmp_path / "tok.json", tmp_path / "out")
    assert meta["dtype"] == "<u2" and meta["tokenizer"] == "tokenizer.json" and meta["separator"] == [0]
    ours = data.load_tokenizer("tokenizer.json", tmp_path / "out")
    ids = tokens_of(tmp_path / "out", "train")
    assert ours.decode(ids[: list(ids).index(0)].tolist()) in {path.read_text() for path in texts.iterdir()}
    assert data.order2_bits(tmp_path / "out") is None


def test_one_text_file_has_its_tail_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"{i} " for i in range(2000)))
    data.prepare([tmp_path / "one.txt"], "byte", tmp_path / "out")
    train, heldout = (bytes(tokens_of(tmp_path / "out", split)) for split in data.SPLITS)
    assert train + heldout == (tmp_path / "one.txt").read_bytes() + b"\0"
    assert len(heldout) == math.ceil(len(train + heldout) / 20)


def test_many_shards_and_a_short_last_one(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 1000)
    meta = data.prepare([texts], "byte", tmp_path / "out")
    assert len(meta["splits"]["train"]) > 3
    assert all(shard["tokens"] >= 1000 // 16 for shard in meta["splits"]["train"])
    batches = data.Batches(tmp_path / "out", "train", 16)
    seen = torch.cat(batches.at(0, batches.num_sequences), 1)
    assert batches.num_sequences == sum((shard["tokens"] - 1) // 16 for shard in meta["splits"]["train"])
    windows = {
        tuple(np.fromfile(tmp_path / "out" / shard["file"], "uint8")[i : i + 17].tolist())
        for shard in meta["splits"]["train"]
        for i in range(0, shard["tokens"] - 16, 16)
    }
    assert {tuple([*row[:16].tolist(), row[-1].item()]) for row in seen} == windows


def test_a_batch_is_a_function_of_the_counter(corpus):
    batches = data.Batches(corpus, "train", 32, seed=3)
    n = batches.num_sequences
    together, _ = batches.at(n - 3, 6)
    single = torch.cat([data.Batches(corpus, "train", 32, seed=3).at(i, 1)[0] for i in range(n - 3, n + 3)])
    assert torch.equal(together, single)
    ids, targets = batches.at(0, n)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    order = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
    epochs = [batches.at(e * n, n)[0] for e in range(2)]
    assert order(epochs[0]) == order(epochs[1]) and not torch.equal(*epochs)
    assert not torch.equal(ids, data.Batches(corpus, "train", 32, seed=4).at(0, n)[0])


def test_a_sweep_predicts_every_token_once(corpus):
    batches = data.Batches(corpus, "heldout", 32)
    got = torch.cat([targets[targets != -100] for _, targets in batches.sweep(3)])
    assert got.tolist() == tokens_of(corpus, "heldout")[1:].tolist()
    assert sum(len(ids) for ids, _ in batches.sweep(3, max_tokens=4 * 32)) == 4


def test_order2_equals_a_count_by_hand(corpus):
    counts = defaultdict(Counter)
    train, heldout = (bytes(1) + bytes(tokens_of(corpus, split)) for split in data.SPLITS)
    for i in range(2, len(train)):
        counts[train[i - 2 : i]][train[i]] += 1
    bits = []
    for i in range(2, len(heldout)):
        seen = counts[heldout[i - 2 : i]]
        bits.append(-math.log2((seen[heldout[i]] + 0.02) / (sum(seen.values()) + 0.02 * 256)))
    assert data.order2_bits(corpus) == pytest.approx(sum(bits) / len(bits), rel=1e-12)
    assert len(bits) == sum(int((t != -100).sum()) for _, t in data.Batches(corpus, "heldout", 32).sweep(8))


def test_the_default_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = data.default_corpus()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    train = bytes(tokens_of(folder, "train"))
    assert len(train) > 4e6 and b"class Counter(dict):" in train + bytes(tokens_of(folder, "heldout"))
    before = (folder / "meta.json").stat().st_mtime_ns
    assert data.default_corpus() == folder and (folder / "meta.json").stat().st_mtime_ns == before
    with open(folder / "train-00000.bin", "r+b") as file:
        file.write(b"damage")
    assert data.default_corpus() == folder
    assert bytes(tokens_of(folder, "train")) == train
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def spoil(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    meta.update(changes)
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "meta.json").unlink(), "has no meta.json"),
        (lambda d: (d / "meta.json").write_text("{"), "cannot read"),
        (lambda d: (d / "meta.json").write_text("[]"), "lacks or garbles"),
        (lambda d: spoil(d, format=9), "has format 9"),
        (lambda d: spoil(d, splits={"train": []}), "lacks or garbles 'heldout'"),
        (lambda d: spoil(d, splits={"train": [], "heldout": []}), "has no train shards"),
        (lambda d: (d / "train-00000.bin").unlink(), "no such file"),
        (lambda d: os.truncate(d / "train-00000.bin", 100), "got 100 bytes"),
        (lambda d: spoil(d, vocab_size=60), "token ids must be below 60"),
    ],
)
def test_a_wrong_folder_is_refused(tmp_path, texts, break_it, message):
    data.prepare([texts], "byte", tmp_path / "d")
    break_it(tmp_path / "d")
    with pytest.raises(ValueError, match=message) as error:
        data.Batches(tmp_path / "d", "train", 32).at(0, 1)
    assert str(error.value).startswith("fastmoe.data: ")


def test_other_bad_input(tmp_path, corpus):
    def refused(message, *inputs, tokenizer="byte", out="out"):
        with pytest.raises(ValueError, match=message):
            data.prepare([tmp_path / name for name in inputs], tokenizer, tmp_path / out)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("text")
    (tmp_path / "binary.bin").write_bytes(b"ab\0cd")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    (tmp_path / "bad.parquet").write_text("no parquet")
    refused("got .*nowhere", "nowhere")
    refused("there is no text", "empty", "empty.txt")
    refused("binary file", "binary.bin")
    refused(r"bad.jsonl:2 must be a JSON object", "bad.jsonl")
    refused("not a parquet file", "bad.parquet")
    refused("tokenizer.json file, got", "full", tokenizer=tmp_path / "none.json")
    refused("cannot read", "full", tokenizer=tmp_path / "bad.jsonl")
    refused("in use", "full", out="full")
    refused("cannot write", "full", out="empty.txt/out")
    with pytest.raises(ValueError, match="--model.vocab-size must be at least 256 .* got 100"):
        data.Batches(corpus, "train", 32, vocab_size=100)
    with pytest.raises(ValueError, match="longer than one sequence of 100000 tokens"):
        data.Batches(corpus, "train", 100000)
