"""Text to memory-mapped token shards, and batches from them whose position is one counter.

A data folder holds `meta.json` (format, tokenizer, vocab_size, dtype, separator, domains, and per split the shards with
their tokens and SHA-256), `<split>-<n>.bin` files of little-endian ids, and `tokenizer.json` unless tokens are bytes.
Splits are `train` and `heldout`. Every document ends with the separator: the byte 0, or the tokenizer's end-of-text
token (a newline where it has none). `<split>-<n>.domains` has an int64 for every run of documents of one domain: the
index of its first token in the shard << 16 | the index of its name in `domains`. Format 1 has no domains.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

FORMAT = 2
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 28
HELDOUT_SHARE = 20  # one document in so many
MAX_DOMAINS = 65_535
CORPUS_DOMAINS = 8
_DOMAIN = (1 << 16) - 1  # the bits of a run that are its domain
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class ByteTokenizer:
    """Token = byte; documents end with byte 0."""

    name, vocab_size, separator = "byte", 256, [0]

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(text.encode(errors="replace") if isinstance(text, str) else text, np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of Hugging Face tokenizers."""

    name = "tokenizer.json"

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                "fastmoe.data: a tokenizer file needs the tokenizers package: pip install tokenizers"
            ) from None
        if not Path(path).is_file():
            raise ValueError(
                f"fastmoe.data: --tokenizer must be byte or a tokenizer.json file, got {str(path)!r}, which is not "
                "there"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ValueError(
                f"fastmoe.data: --tokenizer must be byte or a tokenizer.json file, cannot read {path}: {error}"
            ) from None
        self.path = Path(path)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        ends = [i for i in map(self._tokenizer.token_to_id, _END_OF_TEXT) if i is not None]
        self.separator = ends[:1] or self._tokenizer.encode("\n", add_special_tokens=False).ids

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode()
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))


Tokenizer = ByteTokenizer | FileTokenizer


def load_tokenizer(name: str | Path, folder: Path = Path()) -> Tokenizer:
    """`byte`, or a tokenizers file (a path, relative to folder)."""
    return ByteTokenizer() if str(name) == "byte" else FileTokenizer(Path(folder) / name)


def prepare(inputs: Iterable[str | Path], tokenizer: str | Path, out: str | Path) -> dict:
    """Writes a new data folder `out` from files and folders of text, and returns its meta.

    inputs: `.jsonl` (a document a line, field "text"), `.parquet` (a document a row, column "text"), anything else is
    UTF-8 text, a document a file; folders are read whole, without hidden and binary files. A document is held out when
    the hash of its path (relative to the folder given; with `#row` in JSONL and parquet) falls in one part of twenty;
    where that leaves a split empty, the last twentieth of all tokens is held out instead. A document's domain is the
    field or column "domain" (a string or integer) where a row has one, else the first folder of its path, else the
    file's suffix; past 65,534 domains the others share one, "other". `out` appears by one rename, or not at all.
    ValueError for whatever cannot be read.
    """
    inputs = [Path(p) for p in inputs]
    for path in inputs:
        if not path.exists():
            raise ValueError(f"fastmoe.data: --input must be files or folders, got {str(path)!r}, which is not there")
    return _write(_documents(inputs), load_tokenizer(tokenizer), Path(out), ", ".join(map(str, inputs)))


def _documents(inputs: list[Path]) -> Iterator[tuple[str, str | bytes, str]]:
    """(key, text, domain) of each."""
    for root in inputs:
        files = _walk(root) if root.is_dir() else [root]
        for path in files:
            key = path.relative_to(root).as_posix() if root.is_dir() else path.name
            domain = key.split("/")[0] if "/" in key else path.suffix
            try:
                if path.suffix in (".jsonl", ".ndjson"):
                    yield from _jsonl(path, key, domain)
                elif path.suffix == ".parquet":
                    yield from _parquet(path, key, domain)
                else:
                    text = path.read_bytes()
                    if b"\0" not in text[:8192]:
                        yield key, text, domain
                    elif path == root:
                        raise ValueError(
                            f"fastmoe.data: --input must be text, JSONL or parquet, got the binary file {path}"
                        )
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"fastmoe.data: cannot read {path}: {error}") from None


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error):
        raise ValueError(f"fastmoe.data: cannot read {error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _jsonl(path: Path, key: str, domain: str) -> Iterator[tuple[str, str, str]]:
    with open(path, encoding="utf-8") as file:
        for row, line in enumerate(file):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                text, own = found["text"], found.get("domain")
            except (ValueError, KeyError, TypeError):
                text = own = None
            if not isinstance(text, str) or not isinstance(own, str | int | None):
                raise ValueError(
                    f'fastmoe.data: {path}:{row + 1} must be a JSON object with a string "text", and if any a string '
                    f'or integer "domain", got {line.strip()[:60]!r}'
                )
            yield f"{key}#{row}", text, domain if own is None else str(own)


def _parquet(path: Path, key: str, domain: str) -> Iterator[tuple[str, str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"fastmoe.data: reading {path} needs the pyarrow package: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            raise ValueError(f'fastmoe.data: {path} must have a column "text", got {table.schema_arrow.names}')
        row, columns = 0, [name for name in ("text", "domain") if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=columns):
            for found in batch.to_pylist():
                text, own = found["text"], found.get("domain")
                for name, value, kinds in (("text", text, str | None), ("domain", own, str | int | None)):
                    if not isinstance(value, kinds):
                        raise ValueError(
                            f'fastmoe.data: {path}: column "{name}" must hold strings, got {type(value).__name__} in '
                            f"row {row}"
                        )
                if text:
                    yield f"{key}#{row}", text, domain if own is None else str(own)
                row += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"fastmoe.data: {path} is not a parquet file: {error}") from None


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


class _Shards:
    def __init__(self, folder: Path, split: str, dtype: str):
        self.folder, self.split, self.dtype, self.counts, self.file = folder, split, dtype, [], None
        self.runs = array("q")  # of the open shard

    def path(self, n: int, kind: str = "bin") -> Path:
        return self.folder / f"{self.split}-{n:05d}.{kind}"

    def add(self, ids: np.ndarray, domain: int) -> None:
        if self.file is None or self.counts[-1] >= SHARD_TOKENS:
            self.close()
            self.file = open(self.path(len(self.counts)), "wb")  # noqa: SIM115
            self.counts.append(0)
        if not self.runs or self.runs[-1] & _DOMAIN != domain:
            self.runs.append(self.counts[-1] << 16 | domain)
        self.file.write(ids.astype(self.dtype).tobytes())
        self.counts[-1] += len(ids)

    def close(self) -> None:
        if self.file:
            self.file.close()
            np.array(self.runs, "<i8").tofile(self.path(len(self.counts) - 1, "domains"))
            self.file, self.runs = None, array("q")

    def finish(self) -> None:
        """Joins a short last shard to the one before it."""
        self.close()
        last = len(self.counts) - 1
        if last > 0 and self.counts[last] < SHARD_TOKENS // 16:
            runs = np.fromfile(self.path(last, "domains"), "<i8") + (self.counts[last - 1] << 16)
            for kind, content in (("bin", self.path(last).read_bytes()), ("domains", runs.tobytes())):
                with open(self.path(last - 1, kind), "ab") as file:
                    file.write(content)
                self.path(last, kind).unlink()
            self.counts[-2:] = [sum(self.counts[-2:])]

    def move_to(self, other: _Shards) -> None:
        for n in range(len(self.counts)):
            for kind in ("bin", "domains"):
                self.path(n, kind).rename(other.path(n, kind))
        other.counts, self.counts = self.counts, []

    def take_tail(self, share: int) -> Iterator[tuple[np.ndarray, int]]:
        """Cuts one part in `share` of all tokens off the end of the last shard; yields it as ids of one domain each."""
        take = min(-(-sum(self.counts) // share), self.counts[-1] // 2)
        last, end = len(self.counts) - 1, self.counts[-1]
        ids, runs = np.fromfile(self.path(last), self.dtype), np.fromfile(self.path(last, "domains"), "<i8")
        self.counts[-1] = cut = end - take
        os.truncate(self.path(last), cut * ids.itemsize)
        os.truncate(self.path(last, "domains"), int((runs >> 16 < cut).sum()) * runs.itemsize)
        first = cut
        for domain, after in zip(*_cut(runs, cut, end)):
            yield ids[first : first + after], int(domain)
            first += after

    def describe(self) -> list[dict]:
        return [
            {
                "file": self.path(n).name,
                "tokens": count,
                "sha256": _sha256(self.path(n)),
                "domains": {
                    "file": self.path(n, "domains").name,
                    "runs": self.path(n, "domains").stat().st_size // 8,
                    "sha256": _sha256(self.path(n, "domains")),
                },
            }
            for n, count in enumerate(self.counts)
        ]


def _cut(runs: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Domains and lengths of the runs that cover start..end-1."""
    first = int(np.searchsorted(runs, start << 16 | _DOMAIN, "right")) - 1
    found = np.asarray(runs[first : int(np.searchsorted(runs, end << 16))])
    return found & _DOMAIN, np.diff(np.maximum(found >> 16, start), append=end)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write(documents: Iterable[tuple[str, str | bytes, str]], tokenizer: Tokenizer, out: Path, source: str) -> dict:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"fastmoe.data: --out must be a new or empty folder, got {str(out)!r}, which is in use")
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    dtype = "uint8" if tokenizer.vocab_size <= 1 << 8 else "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    try:
        temporary.mkdir(parents=True)
        train, heldout = (_Shards(temporary, split, dtype) for split in SPLITS)
        separator, domains = np.array(tokenizer.separator, dtype), {}
        for key, text, domain in documents:
            try:
                ids = tokenizer.encode(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"fastmoe.data: {key} must be UTF-8 text for this tokenizer, got {error}") from None
            if len(ids):
                if domain not in domains and len(domains) >= MAX_DOMAINS - 1:
                    domain = "other"
                split = heldout if _number(key) % HELDOUT_SHARE == 0 else train
                split.add(np.concatenate([ids, separator]), domains.setdefault(domain, len(domains)))
        train.finish()
        heldout.finish()
        if not train.counts and not heldout.counts:
            raise ValueError(f"fastmoe.data: there is no text in {source}")
        if not train.counts:
            heldout.move_to(train)
        if not heldout.counts:
            for ids, domain in train.take_tail(HELDOUT_SHARE):
                heldout.add(ids, domain)
            heldout.finish()
        meta = {
            "format": FORMAT,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "separator": tokenizer.separator,
            "dtype": dtype,
            "domains": list(domains),
            "splits": {split: shards.describe() for split, shards in zip(SPLITS, (train, heldout))},
        }
        if isinstance(tokenizer, FileTokenizer):
            shutil.copyfile(tokenizer.path, temporary / tokenizer.name)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(temporary, out)
    except OSError as error:
        raise ValueError(f"fastmoe.data: cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def load_meta(folder: str | Path) -> dict:
    """meta.json of a data folder, checked; ValueError says what is wrong with the folder."""
    folder = Path(folder)
    hint = "a folder made by `fastmoe data prepare`"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"fastmoe.data: --data.path must be {hint}, got {str(folder)!r}, which has no meta.json"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"fastmoe.data: --data.path must be {hint}, cannot read {folder / 'meta.json'}: {error}"
        ) from None
    try:
        if meta["format"] not in (1, FORMAT):
            raise ValueError(
                f"fastmoe.data: {folder} has format {meta['format']}, this version reads 1 and {FORMAT}; prepare it "
                "again"
            )
        itemsize = np.dtype(meta["dtype"]).itemsize
        _ = meta["tokenizer"], int(meta["vocab_size"]), list(meta["separator"])
        if meta["format"] > 1:
            _ = list(meta["domains"])
        for split in SPLITS:
            for shard in meta["splits"][split]:
                sizes = {shard["file"]: shard["tokens"] * itemsize}
                if meta["format"] > 1:
                    sizes[shard["domains"]["file"]] = shard["domains"]["runs"] * 8
                for name, size in sizes.items():
                    path = folder / name
                    if not path.is_file() or path.stat().st_size != size:
                        got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
                        raise ValueError(f"fastmoe.data: {path} must have {size} bytes, got {got}; prepare it again")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"fastmoe.data: --data.path must be {hint}, {folder / 'meta.json'} lacks or garbles {error}"
        ) from None
    return meta


def verify(folder: str | Path) -> None:
    """ValueError where a shard's contents are not those that were written."""
    for shards in load_meta(folder)["splits"].values():
        for shard in shards:
            for file in (shard, shard["domains"]) if "domains" in shard else (shard,):
                path = Path(folder) / file["file"]
                if _sha256(path) != file["sha256"]:
                    raise ValueError(f"fastmoe.data: {path} is damaged (its SHA-256 differs); prepare it again")


def default_corpus() -> Path:
    """The Python standard library's own source and documentation text as byte tokens, cached for this user.

    Tests and installed packages are left out. The folder's name carries the Python version and a hash of the contents.
    There are 8 domains of about equal size, each some of the library's packages, named after the largest of them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    documents, digest = [], hashlib.blake2b(f"format {FORMAT}".encode(), digest_size=8)
    for path in _walk(root) if root.is_dir() else ():
        name = path.relative_to(root)
        if (
            path.suffix in (".py", ".txt", ".rst")
            and skipped.isdisjoint(name.parts)
            and not path.name.startswith("_sysconfigdata")
        ):
            documents.append((name.as_posix(), path.read_bytes()))
            digest.update(f"{name.as_posix()} {len(documents[-1][1])} ".encode() + documents[-1][1])
    if not documents:
        raise ValueError(
            f"fastmoe.data: the Python library has no source files in {root}; give a data folder with --data.path"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoe"
    folder = cache / f"python-{sys.version_info.major}.{sys.version_info.minor}-{digest.hexdigest()}"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"fastmoe.data: cannot write the cache {cache}: {error.strerror}; set XDG_CACHE_HOME or give --data.path"
        ) from None
    if folder.exists():
        try:
            verify(folder)
            return folder
        except ValueError:
            shutil.rmtree(folder)
    try:
        _write(_grouped(documents), ByteTokenizer(), folder, str(root))
    except ValueError:
        if not folder.exists():  # else another process was faster
            raise
    return folder


def _grouped(documents: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes, str]]:
    """With domains: every package, from the largest on, into the domain with the least text so far."""
    package = lambda key: key.split("/")[0].partition(".")[0]
    sizes, domains, bins = Counter(), {}, []
    for key, text in documents:
        sizes[package(key)] += len(text)
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if len(bins) < CORPUS_DOMAINS:
            bins.append([0, name])
        emptiest = min(bins)
        emptiest[0] += size
        domains[name] = emptiest[1]
    return ((key, text, domains[package(key)]) for key, text in documents)


class Batches:
    """Sequences of `seq_len` tokens from one split of a data folder.

    A sequence is a window of a shard; windows do not overlap, but for the target of the last token. Epoch e takes every
    window once, in an order that depends on (seed, e) alone, so that `at(position)` is a function of its arguments:
    resuming needs the counter, no history.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        seq_len: int,
        seed: int = 0,
        vocab_size: int | None = None,
        domains: bool = False,
    ):
        """vocab_size: of the model; ids must be below it. domains: batches end in domains_BS, int64, the index in
        meta["domains"] of each input token's document. ValueError for a folder or shard that cannot serve.
        """
        self.folder, self.split, self.seq_len, self.seed = Path(folder), split, seq_len, seed
        self.meta = load_meta(folder)
        if vocab_size is not None and self.meta["vocab_size"] > vocab_size:
            raise ValueError(
                f"fastmoe.data: --model.vocab-size must be at least {self.meta['vocab_size']} for the tokens of "
                f"{folder}, got {vocab_size}"
            )
        if domains and "domains" not in self.meta:
            raise ValueError(
                f"fastmoe.data: {folder} must have domains, got format {self.meta['format']}, which has none; write it "
                "anew with `fastmoe data prepare`"
            )
        self.shards, self.runs = [], [] if domains else None
        for shard in self.meta["splits"][split]:
            if shard["tokens"] <= seq_len:
                raise ValueError(
                    f"fastmoe.data: a shard must be longer than one sequence of {seq_len} tokens, got "
                    f"{shard['tokens']} in {self.folder / shard['file']}; give more text or a shorter --train.seq-len"
                )
            self.shards.append(np.memmap(self.folder / shard["file"], self.meta["dtype"], "r"))
            if domains:
                self.runs.append(np.memmap(self.folder / shard["domains"]["file"], "<i8", "r"))
        if not self.shards:
            raise ValueError(f"fastmoe.data: {folder} has no {split} shards; prepare it again")
        self.ends = np.cumsum([(len(shard) - 1) // seq_len for shard in self.shards])

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""
        return int(self.ends[-1])

    def at(self, position: int, count: int) -> tuple[torch.Tensor, ...]:
        """Sequences position..position+count-1: ids_BS and targets_BS, int64, targets one token ahead, and domains_BS
        where asked for.
        """
        n, S = self.num_sequences, self.seq_len
        places = [self._place(_permute(i % n, n, f"{self.seed} {i // n}")) for i in range(position, position + count)]
        ids = torch.from_numpy(np.stack([self._read(*place) for place in places]))
        if self.runs is None:
            return ids[:, :-1], ids[:, 1:]
        return ids[:, :-1], ids[:, 1:], torch.from_numpy(np.stack([self._domains(*place, S) for place in places]))

    def token_counts(self, vocab_size: int, limit: int = 1 << 24) -> torch.Tensor:
        """[vocab_size] int64, how often each id is among the split's first `limit` tokens."""
        counts_V = np.zeros(vocab_size, np.int64)
        for shard in self.shards:
            for start in range(0, min(len(shard), limit), 1 << 22):
                counts_V += np.bincount(shard[start : min(start + (1 << 22), limit)], minlength=vocab_size)
            limit -= min(len(shard), limit)
        return torch.from_numpy(counts_V)

    def sweep(self, batch_size: int, max_tokens: int | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """In order, every token that has a predecessor once; or, of that, about max_tokens in evenly spaced windows.

        Yields tensors as `at`; a shard's last window may be short: its targets end in -100, its ids and domains in 0.
        The last batch may be smaller.
        """
        S = self.seq_len
        windows = [
            (shard, start) for shard in range(len(self.shards)) for start in range(0, len(self.shards[shard]) - 1, S)
        ]
        if max_tokens is not None and max_tokens < len(windows) * S:
            count = max(1, max_tokens // S)
            windows = [windows[i * len(windows) // count] for i in range(count)]
        for first in range(0, len(windows), batch_size):
            chosen = windows[first : first + batch_size]
            ids_BS, targets_BS, *domains_BS = (
                np.full((len(chosen), S), fill, np.int64) for fill in ((0, -100) if self.runs is None else (0, -100, 0))
            )
            for b, place in enumerate(chosen):
                tokens = self._read(*place)
                n = len(tokens) - 1
                ids_BS[b, :n], targets_BS[b, :n] = tokens[:-1], tokens[1:]
                if domains_BS:
                    domains_BS[0][b, :n] = self._domains(*place, n)
            yield tuple(map(torch.from_numpy, (ids_BS, targets_BS, *domains_BS)))

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and first token of a window."""
        shard = int(np.searchsorted(self.ends, index, "right"))
        return shard, (index - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len

    def _domains(self, shard: int, start: int, count: int) -> np.ndarray:
        return np.repeat(*_cut(self.runs[shard], start, start + count))

    def _read(self, shard: int, start: int) -> np.ndarray:
        tokens = self.shards[shard][start : start + self.seq_len + 1].astype(np.int64)
        if tokens.max() >= self.meta["vocab_size"]:
            path = self.folder / self.meta["splits"][self.split][shard]["file"]
            raise ValueError(
                f"fastmoe.data: token ids must be below {self.meta['vocab_size']} (vocab_size in meta.json), "
                f"got {tokens.max()} in {path} near token {start}"
            )
        return tokens


def _permute(index: int, n: int, key: str) -> int:
    """A bijection on 0..n-1 picked by key: a four-round Feistel network on the next power of four, walked until below
    n.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for i in range(4):
            left, right = right, left ^ (_number(f"{key} {i} {right}") & mask)
        index = left << bits | right
        if index < n:
            return index


def order2_bits(folder: str | Path, smoothing: float = 0.02) -> float | None:
    """Bits per byte on the held-out split of the model that counts bytes after each two bytes of the training split.

    p(c | ab) = (count(abc) + s) / (count(ab) + 256 s). Predicts every byte that has a predecessor, as Batches.sweep;
    before a shard's first byte it sees a 0. None where tokens are not bytes.
    """
    meta = load_meta(folder)
    if meta["tokenizer"] != "byte":
        return None

    def contexts(split: str) -> Iterator[np.ndarray]:
        for shard in meta["splits"][split]:
            tokens = np.memmap(Path(folder) / shard["file"], "uint8", "r")
            for start in range(1, len(tokens), 1 << 22):
                end = min(start + (1 << 22), len(tokens))
                ids = np.zeros(end - start + 2, np.int64)
                ids[1 if start == 1 else 0 :] = tokens[max(0, start - 2) : end]
                yield ids[:-2] << 16 | ids[1:-1] << 8 | ids[2:]

    counts = np.zeros(1 << 24, np.int64)
    for index in contexts("train"):
        counts += np.bincount(index, minlength=1 << 24)
    totals = counts.reshape(-1, 256).sum(1)
    bits = tokens = 0
    for index in contexts("heldout"):
        bits -= np.log2((counts[index] + smoothing) / (totals[index >> 8] + 256 * smoothing)).sum()
        tokens += len(index)
    return float(bits / tokens)
