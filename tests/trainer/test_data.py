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
    domains = [("a", None, "b")[i % 3] for i in range(80)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": row, "domain": d}) for row, d in zip(rows, domains)) + "\n\n")
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pa.table({"domain": domains, "id": list(range(80)), "text": rows}), path
        )
    data.prepare([path], "byte", tmp_path / "out")
    pieces = [
        piece.decode() for split in data.SPLITS for piece in bytes(tokens_of(tmp_path / "out", split)).split(b"\0")[:-1]
    ]
    assert Counter(pieces) == Counter(rows)
    bytes_of = Counter()
    for row, domain in zip(rows, domains):
        bytes_of[domain or path.suffix] += len(row.encode()) + 1
    assert (
        Counter(domains_by_token(tmp_path / "out", "train") + domains_by_token(tmp_path / "out", "heldout")) == bytes_of
    )


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


def write_domains(folder):
    """Documents in folders, at the top and in rows; returns {text: domain}."""
    wanted = {}
    for i in range(40):
        path = folder / ("law", "code/deep", "")[i % 3] / f"{i}{('.txt', '.py')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text := f"document {i} " * (1 + i % 7))
        wanted[text] = ("law", "code", path.suffix)[i % 3]
    rows = [{"text": f"row {i}", **({"domain": "med"}, {"domain": 7}, {"domain": None}, {})[i % 4]} for i in range(20)]
    (folder / "law" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return wanted | {f"row {i}": ("med", "7", "law", "law")[i % 4] for i in range(20)}


def domains_by_token(folder, split):
    """The domain's name of every token of a split, read from the files by hand."""
    meta, names = data.load_meta(folder), []
    for shard in meta["splits"][split]:
        runs = np.fromfile(folder / shard["domains"]["file"], "<i8").tolist()
        starts = [run >> 16 for run in runs] + [shard["tokens"]]
        assert starts[0] == 0 and starts == sorted(set(starts))
        for run, start, end in zip(runs, starts, starts[1:]):
            names += [meta["domains"][run & 0xFFFF]] * (end - start)
    return names


@pytest.mark.parametrize("shard_tokens", [1 << 28, 300])
def test_every_token_has_the_domain_of_its_document(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(data, "SHARD_TOKENS", shard_tokens)
    wanted = write_domains(tmp_path / "src")
    meta = data.prepare([tmp_path / "src"], "byte", tmp_path / "out")
    assert meta["domains"] == [".py", ".txt", "code", "law", "med", "7"]
    assert (len(meta["splits"]["train"]) > 3) == (shard_tokens == 300)
    for split in data.SPLITS:
        ids, names = tokens_of(tmp_path / "out", split), domains_by_token(tmp_path / "out", split)
        expected = []
        for piece in bytes(ids).split(b"\0")[:-1]:
            expected += [wanted[piece.decode()]] * (len(piece) + 1)
        assert names == expected
        if shard_tokens > 300:  # neighbours of one domain share a run
            changes = sum(a != b for a, b in zip(names, names[1:]))
            assert [shard["domains"]["runs"] for shard in meta["splits"][split]] == [1 + changes]
    data.verify(tmp_path / "out")
    with open(tmp_path / "out" / "train-00000.domains", "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(ValueError, match="train-00000.domains is damaged"):
        data.verify(tmp_path / "out")


def test_batches_with_domains(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 1000)
    write_domains(tmp_path / "src")
    names = data.prepare([tmp_path / "src"], "byte", tmp_path / "out")["domains"]
    plain, batches = (data.Batches(tmp_path / "out", "train", 16, domains=on) for on in (False, True))
    n, starts = batches.num_sequences, np.cumsum([0, *map(len, batches.shards)])
    by_token = domains_by_token(tmp_path / "out", "train")
    text = [window for i, s in enumerate(starts[1:]) for window in range(starts[i], s - 16, 16)]
    wanted = Counter(
        (tuple(tokens_of(tmp_path / "out", "train")[i : i + 16].tolist()), tuple(by_token[i : i + 16])) for i in text
    )
    ids, targets, domains = batches.at(n, n)
    assert all(map(torch.equal, (ids, targets), plain.at(n, n))) and domains.dtype == torch.int64
    named = [tuple(names[d] for d in row) for row in domains.tolist()]
    assert Counter(zip(map(tuple, ids.tolist()), named)) == wanted
    swept = [names[d] for _, targets, domains in batches.sweep(3) for d in domains[targets != -100].tolist()]
    ends = {int(end) - 1 for end in starts[1:]}  # a shard's last token predicts nothing
    assert swept == [name for i, name in enumerate(by_token) if i not in ends]
    assert all(domains[targets == -100].eq(0).all() for _, targets, domains in batches.sweep(3))


def test_too_many_domains_share_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_DOMAINS", 3)
    rows = [{"text": f"{i % 5}", "domain": f"d{i % 5}"} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert data.prepare([tmp_path / "rows.jsonl"], "byte", tmp_path / "out")["domains"] == ["d0", "d1", "other"]
    text = bytes(tokens_of(tmp_path / "out", "train")).split(b"\0")[:-1]
    named = domains_by_token(tmp_path / "out", "train")[::2]
    assert named == [("d0", "d1", "other", "other", "other")[int(piece)] for piece in text]


def test_a_held_out_tail_keeps_its_domains(tmp_path):
    rows = [{"text": "x" * (30, 2)[i > 4], "domain": f"d{i}"} for i in range(9)]
    for n in range(100):  # until no row's key says that it is held out
        path = tmp_path / f"rows{n}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        data.prepare([path], "byte", tmp_path / path.stem)
        parts = [domains_by_token(tmp_path / path.stem, split) for split in data.SPLITS]
        if len(parts[1]) == 9:  # a twentieth of 167, which no rows make up
            break
    assert parts[0] + parts[1] == [f"d{i}" for i in range(9) for _ in range((31, 3)[i > 4])]
    assert len(set(parts[1])) == 3


def test_a_joined_shard_keeps_its_domains(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    rows = [{"text": f"{i % 10}", "domain": f"d{i % 7}"} for i in range(109)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    meta = data.prepare([tmp_path / "rows.jsonl"], "byte", tmp_path / "out")
    sizes = [shard["tokens"] for shard in meta["splits"]["train"]]
    assert len(sizes) > 1 and max(sizes) > 101  # of 100 but for the last two, joined
    texts = {row["text"]: set() for row in rows}
    for row in rows:
        texts[row["text"]].add(row["domain"])
    named, ids = domains_by_token(tmp_path / "out", "train"), bytes(tokens_of(tmp_path / "out", "train"))
    assert all(name in texts[chr(i)] for i, name in zip(ids[::2], named[::2])) and named[::2] == named[1::2]
    order = [int(name[1:]) for name in named[::2]]
    assert all(0 < (b - a) % 7 < 5 for a, b in zip(order, order[1:]))  # as in the rows, a few of which are held out


def test_a_folder_of_format_1_has_no_domains(tmp_path, texts):
    meta = data.prepare([texts], "byte", tmp_path / "d")
    new = data.Batches(tmp_path / "d", "train", 32).at(0, 8)
    for shards in meta["splits"].values():
        for shard in shards:
            (tmp_path / "d" / shard.pop("domains")["file"]).unlink()
    del meta["domains"]
    (tmp_path / "d" / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    data.verify(tmp_path / "d")
    assert all(map(torch.equal, data.Batches(tmp_path / "d", "train", 32).at(0, 8), new))
    with pytest.raises(ValueError, match="must have domains, got format 1, .*`fastmoe data prepare`"):
        data.Batches(tmp_path / "d", "train", 32, domains=True)


def test_token_counts(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 1000)
    data.prepare([texts], "byte", tmp_path / "out")
    batches, ids = data.Batches(tmp_path / "out", "train", 16), tokens_of(tmp_path / "out", "train")
    for limit in (1, 999, 2500, 1 << 24):
        counted = batches.token_counts(300, limit)
        assert counted.tolist() == np.bincount(ids[:limit], minlength=300).tolist()


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
    meta = data.load_meta(folder)
    sizes = Counter(domains_by_token(folder, "train") + domains_by_token(folder, "heldout"))
    assert len(meta["domains"]) == 8 and set(sizes) == set(meta["domains"])
    assert max(sizes.values()) < 1.02 * min(sizes.values())


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
        (lambda d: (d / "heldout-00000.domains").unlink(), "heldout-00000.domains must have 8 bytes, got no such file"),
        (lambda d: spoil(d, domains=None), "lacks or garbles"),
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
    (tmp_path / "bad_domain.jsonl").write_text('{"text": "a", "domain": ["b"]}')
    refused("got .*nowhere", "nowhere")
    refused("there is no text", "empty", "empty.txt")
    refused("binary file", "binary.bin")
    refused(r"bad.jsonl:2 must be a JSON object", "bad.jsonl")
    refused("not a parquet file", "bad.parquet")
    refused('string or integer "domain"', "bad_domain.jsonl")
    refused("tokenizer.json file, got", "full", tokenizer=tmp_path / "none.json")
    refused("cannot read", "full", tokenizer=tmp_path / "bad.jsonl")
    refused("in use", "full", out="full")
    refused("cannot write", "full", out="empty.txt/out")
    with pytest.raises(ValueError, match="--model.vocab-size must be at least 256 .* got 100"):
        data.Batches(corpus, "train", 32, vocab_size=100)
    with pytest.raises(ValueError, match="longer than one sequence of 100000 tokens"):
        data.Batches(corpus, "train", 100000)
