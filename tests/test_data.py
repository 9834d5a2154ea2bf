import errno
import gzip
import json
import lzma
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretraining import data as data_module
from pretraining import sources as sources_module
from pretraining.data import Manifest, batch_at, blocks_per_epoch, open_tokens, prepare, sequential_batches
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers import Tokenizer, get_tokenizer

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
    monkeypatch.setattr(data_module, "_CHUNK_CHARACTERS", 100)
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


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left"), ReflowlensError)],
)
def test_an_interrupted_run_changes_nothing(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
) -> None:
    first = prepare(corpus, tmp_path / "out", val_fraction=0.2)

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Tokenizer, "encode_to_numpy", fail)
    with pytest.raises(expected, match="disk is full" if expected is ReflowlensError else None):
        prepare(corpus, tmp_path / "out", "bytes", val_fraction=0.2, overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train.bin", "val.bin"]
    assert open_tokens(tmp_path / "out", "train").manifest == first
    with pytest.raises(expected):
        prepare(corpus, tmp_path / "new", val_fraction=0.2)
    assert os.listdir(tmp_path / "new") == []


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


# ----------------------------------------------------------------------------------------------------------- data sets


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> datasets.Dataset:
        assert (name, split) == ("someone/stories", "train")
        return datasets.Dataset.from_dict({"text": DOCUMENTS, "n": list(range(200))})

    monkeypatch.setattr(sources_module, "_hub_answers", lambda name: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    manifest = prepare("someone/stories", tmp_path / "out", val_fraction=0.2)
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(DOCUMENTS)
    assert (manifest.sources[0].name, manifest.sources[0].documents) == ("someone/stories [train]", 200)
    assert prepare("someone/stories", tmp_path / "out", val_fraction=0.2) == manifest
    with pytest.raises(ReflowlensError, match=r"record 1 has no text in field 'body'; fields with text: text"):
        prepare("someone/stories", tmp_path / "other", text_field="body")


def test_no_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        raise ConnectionError("no route")

    monkeypatch.setattr(sources_module, "_hub_answers", lambda name: False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ReflowlensError, match=r"'openwebtext'.* hub is unreachable .* or give text files"):
        prepare("openwebtext", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- batches


@given(n_tokens=st.integers(2, 400), context=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_visits_every_block_once(n_tokens: int, context: int, batch_size: int, seed: int) -> None:
    tokens = np.arange(n_tokens, dtype=np.uint16)
    if n_tokens <= context:
        with pytest.raises(ReflowlensError, match="too few for a context"):
            batch_at(tokens, 0, batch_size, context, seed)
        return
    n_blocks = blocks_per_epoch(n_tokens, context)
    steps = -(-2 * n_blocks // batch_size)
    batches = [batch_at(tokens, step, batch_size, context, seed) for step in range(steps)]
    x, y = (torch.cat(side) for side in zip(*batches, strict=True))
    assert torch.equal(y, x + 1)
    assert x.shape == (steps * batch_size, context)
    for epoch in range(2):
        seen = x[epoch * n_blocks : (epoch + 1) * n_blocks].flatten().sort().values
        assert torch.equal(seen, torch.arange(int(seen[0]), int(seen[0]) + n_blocks * context))
        assert seen[0] < context
    # Only what an offset may cost is left out: fewer than two blocks.
    assert n_tokens - n_blocks * context <= 2 * context


@given(step=st.integers(0, 50), world_size=st.sampled_from([1, 2, 3, 6]))
def test_processes_share_the_rows_of_one_batch(step: int, world_size: int) -> None:
    tokens = np.arange(500, dtype=np.uint16)
    x, y = batch_at(tokens, step, 6, 8, seed=0)
    for rank in range(world_size):
        x_rank, y_rank = batch_at(tokens, step, 6, 8, seed=0, rank=rank, world_size=world_size)
        assert torch.equal(x_rank, x[rank::world_size])
        assert torch.equal(y_rank, y[rank::world_size])


def test_the_order_is_a_function_of_seed_and_step() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    late = batch_at(tokens, 700, 4, 16, seed=0)[0]
    assert late.dtype == torch.int64
    assert torch.equal(late, batch_at(tokens.copy(), 700, 4, 16, seed=0)[0])
    assert not torch.equal(late, batch_at(tokens, 700, 4, 16, seed=1)[0])
    first, second = (batch_at(tokens, step, 311, 16, seed=0)[0] for step in (0, 1))  # an epoch each
    assert not torch.equal(first, second)


def test_batches_that_cannot_be_made_are_refused() -> None:
    tokens = np.arange(100)
    with pytest.raises(ReflowlensError, match="batch_size 4 does not divide among 3 processes"):
        batch_at(tokens, 0, 4, 8, seed=0, world_size=3)
    with pytest.raises(ReflowlensError, match="must not be negative"):
        batch_at(tokens, 0, 4, 8, seed=-1)
    with pytest.raises(ReflowlensError, match="1 tokens are too few"):
        next(sequential_batches(tokens[:1], 4, 8))


@given(n_tokens=st.integers(2, 300), context=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_sequential_batches_predict_every_token_once(n_tokens: int, context: int, batch_size: int) -> None:
    batches = list(sequential_batches(np.arange(n_tokens, dtype=np.uint16), batch_size, context))
    assert torch.equal(torch.cat([y.flatten() for _, y in batches]), torch.arange(1, n_tokens))
    assert all(torch.equal(y, x + 1) and len(x) <= batch_size for x, y in batches)
    assert all(x.shape[1] == context for x, _ in batches[:-1])


def test_manifests_of_other_texts_are_other_inputs(corpus: Path, tmp_path: Path) -> None:
    manifest: Manifest = prepare(corpus, tmp_path / "out", val_fraction=0.2)
    assert manifest.same_inputs(replace(manifest, splits={}))
    (source,) = manifest.sources
    assert not manifest.same_inputs(replace(manifest, sources=(replace(source, sha256="0"),)))
    assert manifest.same_inputs(replace(manifest, sources=(replace(source, name="moved.txt"),)))
