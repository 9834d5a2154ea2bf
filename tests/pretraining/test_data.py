"""Preparing: what is written, how it is split and limited, and that no interruption changes a byte."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretraining import data as data_module
from pretraining import encoding, staging
from pretraining.data import Manifest, batch_at, open_tokens, prepare
from pretraining.token_files import FORMAT_VERSION, TokenShards
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import sole_writer
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.support import ROOT

DOCUMENTS = [f"Document {i}\n\nIts text has {i * i} words, naïve or not: {'tea ' * (i % 7)}" for i in range(200)]
SEPARATOR = "\n<|endoftext|>\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(SEPARATOR.join(DOCUMENTS), encoding="utf-8")
    return path


def decoded(folder: Path, split: str) -> list[str]:
    opened = open_tokens(folder, split)
    end = opened.manifest.end_id
    ends = np.flatnonzero(opened.tokens == end)
    tokenizer = get_tokenizer(opened.manifest.tokenizer)
    assert ends[-1] == len(opened.tokens) - 1
    return [tokenizer.decode(part[part != end]) for part in np.split(opened.tokens, ends + 1)[:-1]]


# ------------------------------------------------------------------------------------------------------------ preparing


@pytest.mark.parametrize(("tokenizer", "end"), [("gpt2", 50256), ("gpt2_16k", 16640), ("bytes", 0)])
def test_every_document_is_on_one_side_in_order_and_decodes(
    corpus: Path, tmp_path: Path, tokenizer: str, end: int
) -> None:
    manifest = prepare(corpus, tmp_path / "out", tokenizer, val_fraction=0.2)
    train, val = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    assert [text for text in DOCUMENTS if text in set(train)] == train
    assert [text for text in DOCUMENTS if text in set(val)] == val
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert 20 <= len(val) <= 60
    assert manifest.end_id == end
    assert open_tokens(tmp_path / "out", "train").tokens.dtype == np.uint16


def test_manifest_says_what_the_files_hold(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(corpus, tmp_path / "out", val_fraction=0.2, seed=3)
    assert open_tokens(tmp_path / "out", "val").manifest == manifest
    for split in ("train", "val"):
        texts, record = decoded(tmp_path / "out", split), manifest.splits[split]
        assert record.documents == len(texts)
        assert record.text_bytes == sum(len(text.encode()) for text in texts)
        assert record.tokens == len(open_tokens(tmp_path / "out", split).tokens)
    (source,) = manifest.sources
    assert (source.name, source.documents, source.bytes) == ("corpus.txt", 200, corpus.stat().st_size)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train.bin", "val.bin"]


def test_output_depends_on_neither_workers_nor_chunks(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(corpus, tmp_path / "one", val_fraction=0.2, workers=1)
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 100)
    assert prepare(corpus, tmp_path / "two", val_fraction=0.2, workers=2) == one
    for name in ("train.bin", "val.bin", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_split_depends_on_seed_and_text_alone(corpus: Path, tmp_path: Path) -> None:
    backwards = tmp_path / "backwards.txt"
    backwards.write_text(SEPARATOR.join(reversed(DOCUMENTS)), encoding="utf-8")
    prepare(corpus, tmp_path / "a", val_fraction=0.2, seed=1)
    prepare(backwards, tmp_path / "b", val_fraction=0.2, seed=1)
    prepare(corpus, tmp_path / "c", val_fraction=0.2, seed=2)
    assert decoded(tmp_path / "a", "val") == decoded(tmp_path / "b", "val")[::-1]
    assert decoded(tmp_path / "a", "val") != decoded(tmp_path / "c", "val")


def test_validation_sources(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("held out", encoding="utf-8")
    manifest = prepare([corpus], tmp_path / "out", val_sources=[tmp_path / "val.txt"])
    assert decoded(tmp_path / "out", "train") == DOCUMENTS
    assert decoded(tmp_path / "out", "val") == ["held out"]
    assert manifest.val_fraction is None
    assert [source.role for source in manifest.sources] == ["train", "val"]
    with pytest.raises(ReflowlensError, match=r"'corpus.txt' is given both to train on"):
        prepare([corpus], tmp_path / "other", val_sources=[corpus])


def test_kinds_of_files_hold_the_same_documents(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    (folder / "deeper").mkdir(parents=True)
    text = corpus.read_bytes()
    records = "".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(DOCUMENTS)).encode()
    (folder / "a.txt.xz").write_bytes(lzma.compress(text))
    (folder / "b.txt.gz").write_bytes(gzip.compress(text))
    (folder / "c.jsonl").write_bytes(records)
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(records))
    (folder / "deeper" / "e.txt").write_bytes(text.replace(b"\n", b"\r\n"))
    (folder / "notes.md").write_bytes(b"not a source")
    manifest = prepare(folder, tmp_path / "out", val_sources=corpus.with_name("corpus.txt"), text_field="body")
    assert [source.name for source in manifest.sources[:-1]] == [
        "a.txt.xz",
        "b.txt.gz",
        "c.jsonl",
        "d.jsonl.xz",
        "deeper/e.txt",
    ]
    assert decoded(tmp_path / "out", "train") == DOCUMENTS * 5


def test_separators_at_the_ends_and_blank_documents_make_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "odd.txt"
    path.write_text(f"=\n=\none <|endoftext|> =\n\ntwo\n\n=\n \n=\n{'three'}\n=\n", encoding="utf-8")
    (tmp_path / "val.txt").write_text("x", encoding="utf-8")
    prepare(path, tmp_path / "out", "bytes", separator="=", val_sources=tmp_path / "val.txt")
    assert decoded(tmp_path / "out", "train") == ["one <|endoftext|> =\n\ntwo\n", "three"]


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}', encoding="utf-8")
    (tmp_path / "val.txt").write_text("x", encoding="utf-8")
    prepare(path, tmp_path / "out", val_sources=tmp_path / "val.txt")
    assert decoded(tmp_path / "out", "train") == ["a\ufffdb \U0001f642"]


# -------------------------------------------------------------------------------------------------- running it again


def test_a_finished_folder_is_left_alone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepare(corpus, tmp_path / "out", val_fraction=0.2, progress=False)
    before = (tmp_path / "out" / "train.bin").stat()
    assert prepare(corpus, tmp_path / "out", val_fraction=0.2) == first
    assert "left as it is" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == before.st_mtime_ns


def test_other_data_is_replaced_only_when_asked(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out", val_fraction=0.2)
    with pytest.raises(ReflowlensError, match="holds other data already"):
        prepare(corpus, tmp_path / "out", "bytes", val_fraction=0.2)
    assert prepare(corpus, tmp_path / "out", "bytes", val_fraction=0.2, overwrite=True).tokenizer == "bytes"
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ReflowlensError, match="without a manifest"):
        prepare(corpus, tmp_path / "out", "bytes", val_fraction=0.2)


# ------------------------------------------------------------------------------------------------------- interruptions


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, and progress saved after each."""
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(data_module, "_SAVE_SECONDS", 0.0)


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> None:
    """Have a function raise at one of its calls."""
    original, calls = getattr(owner, name), 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    "options",
    [
        {"val_fraction": 0.2},
        {"val_fraction": 0.2, "shard_bytes": 3000},
        {"val_fraction": 0.2, "max_documents": 170},
        {"val_fraction": 0.2, "max_tokens": 7000, "shard_bytes": 1000},
        {"val_sources": "val.txt"},
        {"val_sources": "val.txt", "max_tokens": 7000},
    ],
)
@pytest.mark.usefixtures("small_steps")
def test_a_run_interrupted_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The interruption comes at the worst time: tokens are written and not yet counted."""
    for name, documents in [("a.txt", DOCUMENTS[:90]), ("b.txt", DOCUMENTS[90:]), ("val.txt", ["other", *DOCUMENTS])]:
        (tmp_path / name).write_text(SEPARATOR.join(documents), encoding="utf-8")
    options = options | {"val_sources": tmp_path / options["val_sources"]} if "val_sources" in options else options
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    prepare(sources, tmp_path / "whole", "bytes", workers=1, progress=False, **options)
    interruptions = 0
    for call in (1, 2, 5, 2, 4, 1, 3, 4, 3):
        with monkeypatch.context() as patch:
            fail_at(patch, data_module, "_counted", call, KeyboardInterrupt())
            try:
                prepare(sources, tmp_path / "out", "bytes", workers=1, progress=False, **options)
            except KeyboardInterrupt:
                interruptions += 1
                with pytest.raises(ReflowlensError, match="no prepared data"):
                    open_tokens(tmp_path / "out", "train")
    assert interruptions >= 4
    prepare(sources, tmp_path / "out", "bytes", workers=1, progress=False, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import multiprocessing, os, signal, sys
from pretraining import data, encoding

encoding._CHUNK_CHARACTERS, data._SAVE_SECONDS = 500, 0.0
counted, left = data._counted, int(sys.argv[3])

def kill_at_last(*arguments):
    global left
    left -= 1
    if not left:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return counted(*arguments)

data._counted = kill_at_last
data.prepare(sys.argv[1], sys.argv[2], "bytes", val_fraction=0.2, shard_bytes=3000, workers=2)
"""


def runs(pid: str) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: has ended, and nobody has asked how
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_a_killed_run_goes_on_and_leaves_no_process(corpus: Path, tmp_path: Path) -> None:
    whole = prepare(corpus, tmp_path / "whole", "bytes", val_fraction=0.2, shard_bytes=3000)
    counts = []
    for chunks in (7, 5):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "out"), str(chunks)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -9, killed.stderr
        workers = killed.stdout.split()
        assert len(workers) == 2
        deadline = time.monotonic() + 20
        while any(map(runs, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(runs, workers))
        assert not (tmp_path / "out" / "manifest.json").exists()
        progress = json.loads((tmp_path / "out" / ".partial" / "progress.json").read_text())
        counts.append(progress["sources"][0]["documents"])
    assert 0 < counts[0] < counts[1] < 200
    assert prepare(corpus, tmp_path / "out", "bytes", val_fraction=0.2, shard_bytes=3000) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_steps")
def test_a_full_disk_is_one_clear_error_and_can_be_continued(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(corpus, tmp_path / "whole", val_fraction=0.2, workers=1)
    for call in (3, 9):
        with monkeypatch.context() as patch:
            fail_at(patch, staging.SplitWriter, "write", call, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(ReflowlensError, match=r"the disk is full; the same command goes on from what was done"):
                prepare(corpus, tmp_path / "out", val_fraction=0.2, workers=1)
        assert os.listdir(tmp_path / "out") == [".partial"]
    prepare(corpus, tmp_path / "out", val_fraction=0.2, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_that_are_being_moved_are_not_a_finished_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever move fails, what is there does not open, and the next run completes it."""
    options: dict[str, Any] = {"val_fraction": 0.2, "shard_bytes": 6000}
    prepare(corpus, tmp_path / "whole", "bytes", **options)
    moves = 0
    for call in range(1, 12):
        out = tmp_path / f"out{call}"
        prepare(corpus, out, val_fraction=0.3)  # one file a split, which is to go
        with monkeypatch.context() as patch:
            fail_at(patch, Path, "replace", call, OSError(errno.EIO, "Input/output error"))
            try:
                prepare(corpus, out, "bytes", overwrite=True, **options)
            except ReflowlensError:
                moves += 1
                if (out / "manifest.json").exists():  # still the earlier one: nothing has moved
                    assert open_tokens(out, "train").manifest.tokenizer == "gpt2_16k"
                else:
                    with pytest.raises(ReflowlensError, match="no prepared data"):
                        open_tokens(out, "train")
        prepare(corpus, out, "bytes", overwrite=True, **options)
        assert contents(out) == contents(tmp_path / "whole")
    assert moves == len(contents(tmp_path / "whole")) + 2  # and progress and manifest as they are written


@pytest.mark.usefixtures("small_steps")
def test_an_unfinished_run_is_not_continued_with_other_inputs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, data_module, "_counted", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out", val_fraction=0.2, workers=1)
    with pytest.raises(ReflowlensError, match=r"unfinished run with other inputs \(seed is 0 there and 1 here\)"):
        prepare(corpus, tmp_path / "out", val_fraction=0.2, workers=1, seed=1)
    prepare(corpus, tmp_path / "out", val_fraction=0.2, workers=1, seed=1, overwrite=True)
    prepare(corpus, tmp_path / "anew", val_fraction=0.2, workers=1, seed=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_two_processes_do_not_write_one_folder(corpus: Path, tmp_path: Path) -> None:
    with (
        sole_writer(tmp_path / "out", "preparing"),
        pytest.raises(ReflowlensError, match="another process is preparing"),
    ):
        prepare(corpus, tmp_path / "out", val_fraction=0.2)
    prepare(corpus, tmp_path / "out", val_fraction=0.2)


@pytest.mark.usefixtures("small_steps")
def test_a_source_that_turns_out_bad_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(SEPARATOR.join(DOCUMENTS).encode())[:-40])
    with pytest.raises(ReflowlensError, match=r"'cut.txt.xz' cannot be unpacked, it is damaged or cut short"):
        prepare([corpus, tmp_path / "cut.txt.xz"], tmp_path / "out", val_fraction=0.2, workers=1)
    assert contents(tmp_path / "out") == {}


def test_a_worker_that_dies_is_one_clear_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "_begin_worker", os.abort)
    with pytest.raises(ReflowlensError, match=r"a worker process died .* perhaps with fewer workers"):
        prepare(corpus, tmp_path / "out", val_fraction=0.2, workers=2)


# ------------------------------------------------------------------------------------------------------ shards, limits


@pytest.mark.parametrize("shard_bytes", [4, 500, 1001, 4096])
def test_shards_are_one_stream(corpus: Path, tmp_path: Path, shard_bytes: int) -> None:
    prepare(corpus, tmp_path / "one", val_fraction=0.2)
    # A few documents are enough for shards of two tokens.
    limits = {"max_documents": 12} if shard_bytes == 4 else {}
    whole = prepare(corpus, tmp_path / "whole", val_fraction=0.2, **limits)
    cut = prepare(corpus, tmp_path / "cut", val_fraction=0.2, shard_bytes=shard_bytes, **limits)
    for split in ("train", "val"):
        one, several = (open_tokens(tmp_path / folder, split).tokens for folder in ("whole", "cut"))
        assert np.array_equal(one, np.asarray(several))
        shards = cut.splits[split].shards
        assert len(shards) == -(-2 * len(one) // (shard_bytes // 2 * 2))
        assert {shard.tokens for shard in shards[:-1]} <= {shard_bytes // 2}
        for number, shard in enumerate(shards):
            name = f"{split}-{number:05}-of-{len(shards):05}.bin" if len(shards) > 1 else f"{split}.bin"
            assert shard.file == name
            assert hashlib.sha256((tmp_path / "cut" / name).read_bytes()).hexdigest() == shard.sha256
        assert dataclasses.replace(cut.splits[split], shards=()) == dataclasses.replace(whole.splits[split], shards=())
    several = open_tokens(tmp_path / "cut", "train").tokens
    assert isinstance(several, TokenShards)
    x, y = (batch_at(open_tokens(tmp_path / folder, "train").tokens, 3, 4, 8, seed=0) for folder in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    (tmp_path / "cut" / cut.splits["train"].shards[1].file).unlink()
    with pytest.raises(ReflowlensError, match=r"train-00001-of-\d+.bin is damaged: 0 bytes, and the manifest says"):
        open_tokens(tmp_path / "cut", "train")


def test_replacing_shards_by_one_file_leaves_no_shard(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out", val_fraction=0.2, shard_bytes=500)
    with pytest.raises(ReflowlensError, match=r"other data already \(shard_bytes is 500 there and \d+ here\)"):
        prepare(corpus, tmp_path / "out", val_fraction=0.2)
    prepare(corpus, tmp_path / "out", val_fraction=0.2, overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train.bin", "val.bin"]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w69999 w5")
    (tmp_path / "v.txt").write_text("w65536")
    out = tmp_path / "out"
    manifest = prepare(tmp_path / "a.txt", out, str(tmp_path / "tokenizer.json"), val_sources=tmp_path / "v.txt")
    assert manifest.dtype == "<u4"
    assert open_tokens(out, "train").tokens.tolist() == [69_999, 5, 70_000]
    assert open_tokens(out, "val").tokens.tolist() == [65_536, 70_000]


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_limits_take_whole_documents_from_the_front(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", chunk)
    (tmp_path / "val.txt").write_text("held out" + SEPARATOR + "more", encoding="utf-8")
    fifty = prepare(corpus, tmp_path / "fifty", "bytes", val_fraction=0.2, max_documents=50, workers=1)
    assert sorted(decoded(tmp_path / "fifty", "train") + decoded(tmp_path / "fifty", "val")) == sorted(DOCUMENTS[:50])
    assert fifty.sources[0].documents == 50
    ends = np.cumsum([len(text.encode()) + 1 for text in DOCUMENTS])
    for max_tokens, expected in [(ends[9], 10), (ends[9] + 1, 10), (ends[9] - 1, 9), (ends[-1] + 5, 200)]:
        out = tmp_path / f"tokens{max_tokens}"
        limit = int(max_tokens)
        prepare(corpus, out, "bytes", val_sources=tmp_path / "val.txt", max_tokens=limit, workers=1)
        assert decoded(out, "train") == DOCUMENTS[:expected]
        assert decoded(out, "val") == ["held out", "more"]
    mixed = prepare(corpus, tmp_path / "mixed", "bytes", val_fraction=0.2, max_tokens=int(ends[99]), workers=1)
    assert sum(split.tokens for split in mixed.splits.values()) == ends[99]


def test_limits_that_leave_nothing_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=r"none of 0 documents fell to 'train' .* max_tokens 5"):
        prepare(corpus, tmp_path / "out", max_tokens=5)
    with pytest.raises(ReflowlensError, match="max_documents must be positive, and is 0"):
        prepare(corpus, tmp_path / "out", max_documents=0)
    with pytest.raises(ReflowlensError, match="shard_bytes must be at least"):
        prepare(corpus, tmp_path / "out", shard_bytes=1)


def test_a_folder_of_the_first_format_is_read_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(corpus, out, val_fraction=0.2)
    now = open_tokens(out, "train")
    stored = json.loads((out / "manifest.json").read_text()) | {"format_version": 1}
    for name in ("max_documents", "max_tokens", "shard_bytes"):
        del stored[name]
    for source in stored["sources"]:
        del source["revision"]
    for split in stored["splits"].values():
        del split["shards"]
    (out / "manifest.json").write_text(json.dumps(stored))
    earlier = open_tokens(out, "train")
    assert np.array_equal(earlier.tokens, now.tokens)
    assert earlier.manifest.sources == now.manifest.sources
    assert (earlier.manifest.format_version, now.manifest.format_version) == (1, FORMAT_VERSION)
    assert prepare(corpus, out, val_fraction=0.2) == earlier.manifest


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "'empty.txt' holds no text"),
        ("blank.txt", b"\n \n<|endoftext|>\n", "'blank.txt' holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "'latin.txt' is not valid UTF-8"),
        ("cut.txt.xz", lzma.compress(bytes(range(97, 123)) * 99)[:60], "'cut.txt.xz' cannot be unpacked"),
        ("not.txt.xz", b"plain text", "'not.txt.xz' cannot be unpacked"),
        ("not.txt.gz", b"plain text", "'not.txt.gz' cannot be unpacked"),
        ("table.csv", b"a,b", r"cannot read 'table.csv': expected a file named .txt"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "'broken.jsonl', line 2 is not JSON"),
        ("list.jsonl", b"[1]", "'list.jsonl', line 1 is not a JSON object"),
        ("field.jsonl", b'{"body": "a", "n": 1}', "line 1 has no text in field 'text'; fields with text: body"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReflowlensError, match=message):
        prepare(tmp_path / name, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=r"cannot prepare '.*corpus.txt': File exists$"):
        prepare(corpus, corpus)
    with pytest.raises(ReflowlensError, match="workers must be positive, and is -1"):
        prepare(corpus, tmp_path / "out", workers=-1)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReflowlensError, match=r"no file or folder 'corpus/missing.txt'"):
        prepare("corpus/missing.txt", tmp_path / "out")
    with pytest.raises(ReflowlensError, match="no text in folder"):
        prepare(tmp_path / "folder", tmp_path / "out")
    with pytest.raises(ReflowlensError, match="no sources"):
        prepare([], tmp_path / "out")
    with pytest.raises(ReflowlensError, match="no tokenizer"):
        prepare("corpus/missing.txt", tmp_path / "out", "gpt5")


def test_both_splits_need_a_document(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single document", encoding="utf-8")
    with pytest.raises(ReflowlensError, match=r"none of 1 documents fell to 'val' with val_fraction 0\.01"):
        prepare(tmp_path / "one.txt", tmp_path / "out")
    with pytest.raises(ReflowlensError, match="val_fraction must lie between 0 and 1, and is 1"):
        prepare(tmp_path / "one.txt", tmp_path / "out", val_fraction=1)


def test_damaged_folders_are_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ReflowlensError, match="no prepared data in"):
        open_tokens(out, "train")
    prepare(corpus, out, val_fraction=0.2)
    with pytest.raises(ReflowlensError, match="no split 'test': there are train and val"):
        open_tokens(out, "test")
    (out / "val.bin").write_bytes((out / "val.bin").read_bytes()[:-1])
    with pytest.raises(ReflowlensError, match=r"val.bin is damaged: .* bytes, and the manifest says"):
        open_tokens(out, "val")
    with pytest.raises(ReflowlensError, match=r"val.bin is damaged"):
        prepare(corpus, out, val_fraction=0.2)
    stored = json.loads((out / "manifest.json").read_text())
    for damaged, message in [
        (stored | {"format_version": 99}, "format version 99"),
        ({**stored, "splits": {}}, "damaged: KeyError"),
        (stored | {"surprise": 1}, "damaged: TypeError"),
    ]:
        (out / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(ReflowlensError, match=message):
            open_tokens(out, "train")


def test_manifests_of_other_texts_are_other_inputs(corpus: Path, tmp_path: Path) -> None:
    manifest: Manifest = prepare(corpus, tmp_path / "out", val_fraction=0.2)
    assert manifest.same_inputs(dataclasses.replace(manifest, splits={}))
    (source,) = manifest.sources
    assert not manifest.same_inputs(dataclasses.replace(manifest, sources=(dataclasses.replace(source, sha256="0"),)))
    assert manifest.same_inputs(dataclasses.replace(manifest, sources=(dataclasses.replace(source, name="moved.txt"),)))
