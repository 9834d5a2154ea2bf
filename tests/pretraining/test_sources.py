"""Which files of a folder or data set are read: the hub's layouts on this disk, and a hub on the loopback."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from datasets.utils.logging import disable_progress_bar

from pretraining.data import prepare
from pretraining.hub import HUB_DATASETS
from pretraining.sources import Selection, find_sources
from reflowlens.errors import ReflowlensError
from tests.pretraining.test_data import DOCUMENTS, decoded
from tests.support import ROOT
from tests.support.loopback_hub import commit_of, loopback_hub

TRAIN, HELD_OUT = DOCUMENTS[:60], DOCUMENTS[60:80]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TRAIN)
TALK = {"conversations": ["What is two and two?", "Four.", "And three?"], "source": "someone"}
SPOKEN = "User: What is two and two?\n\nAssistant: Four.\n\nUser: And three?"

disable_progress_bar()


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "length": [len(text) for text in texts]}), file)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def texts(*names: str | Path, **selection: Any) -> list[str]:
    sources = find_sources(names, Selection(**selection))
    return [text for source in sources for text, _ in source.documents()]


# -------------------------------------------------------------------------------------------------------------- layouts

HUB_FILES: dict[str, bytes | str] = {
    "README.md": "# Stories",
    "notes.txt": "not a document",
    "data/train-00000-of-00002.parquet": parquet(TRAIN[:25]),
    "data/train-00001-of-00002.parquet": parquet(TRAIN[25:]),
    "data/validation-00000-of-00001.parquet": parquet(HELD_OUT),
}


def test_a_folder_in_shards_and_splits(tmp_path: Path) -> None:
    folder = write(tmp_path / "stories", HUB_FILES)
    assert texts(folder) == TRAIN
    assert texts(folder, split="validation") == HELD_OUT
    with pytest.raises(
        ReflowlensError, match=r"no split 'test' in .*: choose one of train, validation \(--split, --val-split\)"
    ):
        texts(folder, split="test")
    (tmp_path / "train.txt").write_text("alone")
    prepare(tmp_path / "train.txt", tmp_path / "apart", "bytes", val_sources=folder, val_split="validation")
    assert decoded(tmp_path / "apart", "val") == HELD_OUT
    manifest = prepare(folder, tmp_path / "out", "bytes", val_split="validation")
    assert decoded(tmp_path / "out", "train") == TRAIN
    assert decoded(tmp_path / "out", "val") == HELD_OUT
    assert [(source.name, source.documents, source.role) for source in manifest.sources] == [
        ("data/train-00000-of-00002.parquet", 25, "train"),
        ("data/train-00001-of-00002.parquet", 35, "train"),
        ("data/validation-00000-of-00001.parquet", 20, "val"),
    ]


@pytest.mark.parametrize(
    "files",
    [
        {"a.parquet": parquet(TRAIN)},
        {"train/a.parquet": parquet(TRAIN), "test/a.parquet": parquet(HELD_OUT)},
        {"en/train.jsonl": LINES, "en/test.jsonl": '{"text": "other"}'},
        {"part.json": json.dumps([{"text": text} for text in TRAIN])},
        {"mix_0.txt": "\n<|endoftext|>\n".join(TRAIN), "val.txt": "other", "MANIFEST.json": "{}", ".hidden.txt": "x"},
        {"train.txt.xz": lzma.compress("\n<|endoftext|>\n".join(TRAIN).encode()), "dev.txt": "other"},
        {"a.jsonl": LINES, "meta.json": '{"license": "none"}'},
        {"UP.TXT": "\n<|endoftext|>\n".join(TRAIN), "VAL.TXT": "other"},
        {"A.JSONL.XZ": lzma.compress(LINES.encode()), "TEST.TXT.GZ": gzip.compress(b"other")},
        {"train.txt": "\n<|endoftext|>\n".join(TRAIN), "test.jsonl": '{"text": "other"}'},
        {"train-1.parquet": parquet(TRAIN[:9]), "train-2.PARQUET": parquet(TRAIN[9:]), "test.PARQUET": parquet([" x"])},
        {"A.PARQUET": parquet(TRAIN)},
        {"PART.JSON": json.dumps([{"text": text} for text in TRAIN])},
        {
            "part10.txt": TRAIN[59],
            **{f"part{i + 1}.txt": "\n<|endoftext|>\n".join(TRAIN[5 * i : 5 * i + 5]) for i in range(9)},
            "part9b.txt": "\n<|endoftext|>\n".join(TRAIN[45:59]),
        },
        {"part10.parquet": parquet(TRAIN[30:]), "part9.parquet": parquet(TRAIN[:30])},
    ],
)
def test_layouts_of_one_training_split(tmp_path: Path, files: dict[str, bytes | str]) -> None:
    assert texts(write(tmp_path, files)) == TRAIN


def test_the_kind_of_a_file_is_its_last_ending_in_any_case(tmp_path: Path) -> None:
    for name, content in {"A.TXT": "one", "b.jsonl.txt": "{one", "C.Jsonl.Gz": gzip.compress(LINES.encode())}.items():
        write(tmp_path, {name: content})
    assert texts(tmp_path / "A.TXT", tmp_path / "b.jsonl.txt", tmp_path / "C.Jsonl.Gz") == ["one", "{one", *TRAIN]


def test_a_file_that_is_meant_twice_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "corpus", {"deeper/a.txt": "one", "b.txt": "two", "copy.txt": "one"})
    (folder / "link.txt").symlink_to(folder / "b.txt")
    assert texts(folder / "b.txt", folder, folder / "deeper" / "a.txt") == ["two", "one", "one"]
    assert capsys.readouterr().err.splitlines() == [
        f"note: {name!r} is given twice, and read once" for name in ("b.txt", "link.txt", "a.txt")
    ]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    train, held_out = (datasets.Dataset.from_dict({"text": documents}) for documents in (TRAIN, HELD_OUT))
    train.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict(train=train, test=held_out).save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "one") == TRAIN
    assert texts(tmp_path / "one" / "data-00002-of-00003.arrow") == TRAIN[40:]
    assert texts(tmp_path / "both") == TRAIN
    assert texts(tmp_path / "both", split="test") == HELD_OUT
    with pytest.raises(ReflowlensError, match=r"no split 'validation' in .* choose one of test, train"):
        texts(tmp_path / "both", split="validation")
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(ReflowlensError, match="cannot read folder"):
        texts(tmp_path / "one")


def test_configurations_of_the_readme(tmp_path: Path) -> None:
    card = "configs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*\n"
    files: dict[str, bytes | str] = {"README.md": f"---\n{card}---\n"}
    files |= {"en/a.parquet": parquet(TRAIN), "de/a.parquet": parquet(HELD_OUT)}
    folder = write(tmp_path, files)
    assert texts(folder, config="en") == TRAIN
    assert texts(folder, config="de") == HELD_OUT
    lines = {"en/a.jsonl": LINES, "de/a.jsonl": '{"text": "other"}', "notes.txt": "not a document"}
    assert texts(write(tmp_path / "lines", lines | {"README.md": files["README.md"]}), config="en") == TRAIN
    with pytest.raises(ReflowlensError, match=r"Config name is missing\. .* available configs: \['en', 'de'\]"):
        texts(folder)
    with pytest.raises(ReflowlensError, match=r"'fr' not found\. Available: \['en', 'de'\]"):
        texts(folder, config="fr")


def test_conversations_are_texts_with_speakers(tmp_path: Path) -> None:
    folder = write(tmp_path / "lima", {"train.jsonl": json.dumps(TALK), "test.jsonl": '{"conversations": ["Hello"]}'})
    assert texts(folder, text_field="conversations") == [SPOKEN]
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TALK]), table)
    assert texts(write(tmp_path, {"lima.parquet": table.getvalue()}) / "lima.parquet", text_field="conversations") == [
        SPOKEN
    ]
    with pytest.raises(ReflowlensError, match="no text in field 'text'; fields with text: conversations, source"):
        texts(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "cut.parquet",
            parquet(TRAIN)[:-50],
            "'cut.parquet' cannot be read, it is damaged or cut short: Parquet magic",
        ),
        ("cut.arrow", b"ARROW", "'cut.arrow' cannot be read, it is damaged or cut short"),
        ("cut.json", b'[{"text": "a"}, {"te', "'cut.json' cannot be read, it is damaged or cut short"),
        ("blank.parquet", parquet([" ", "\n"]), "'blank.parquet' holds no text"),
        ("field.parquet", parquet(TRAIN), r"record 1 has no text in field 'body'; fields with text: text$"),
        ("table.csv", b"text\na", r"cannot read 'table.csv': expected a file named .*\.parquet, \.arrow, \.json"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(tmp_path, {name: content})
    with pytest.raises(ReflowlensError, match=message):
        texts(tmp_path / name, text_field="body" if name.startswith("field") else None)


# ------------------------------------------------------------------------------------------------------------------ hub

DRIVER = """
import json, sys
from dataclasses import asdict
from pretraining.data import prepare

for number, (name, options) in enumerate(json.loads(sys.argv[1])):
    try:
        done = asdict(prepare(name, f"{sys.argv[2]}/{number}", "bytes", progress=False, val_fraction=0.2, **options))
    except ValueError as error:
        done = f"{type(error).__name__}: {error}"
    print(json.dumps(done))
"""
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("someone/stories", {}),
    "earlier": ("someone/stories", {"revision": "v1", "max_documents": 40}),
    "lines": ("someone/lines", {}),
    "lima": ("lima", {}),
    "gated": ("someone/gated", {}),
    "program": ("openwebtext", {}),
    "unknown": ("someone/nothing", {}),
    "split": ("someone/stories", {"split": "test"}),
}


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What `prepare` gives for each request, asked in another process of a hub on the loopback."""
    files = {path: content if isinstance(content, bytes) else content.encode() for path, content in HUB_FILES.items()}
    repositories = {
        ("someone/stories", "main"): files,
        ("someone/stories", "v1"): {"train.parquet": parquet(DOCUMENTS)},
        ("someone/lines", "main"): {"train.jsonl": LINES.encode(), "valid.jsonl": b'{"text": "other"}'},
        ("GAIR/lima", "main"): {
            "train.jsonl": "\n".join(json.dumps({"conversations": [text, "Yes."]}) for text in TRAIN).encode()
        },
        ("someone/gated", "main"): {},
        ("Skylion007/openwebtext", "main"): {"openwebtext.py": b"raise SystemExit"},
        ("Skylion007/openwebtext", "refs/convert/parquet"): {"text/partial-train/0000.parquet": parquet(DOCUMENTS)},
    }
    out = tmp_path_factory.mktemp("hub")
    with loopback_hub(repositories) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(out / "home"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(list(REQUESTS.values())), str(out)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    answers = dict(zip(REQUESTS, map(json.loads, done.stdout.splitlines()), strict=True))
    folders = {name: out / str(number) for number, name in enumerate(REQUESTS)}
    return SimpleNamespace(answers=answers, folders=folders, address=address, stderr=done.stderr, files=files)


def both_splits(folder: Path) -> list[str]:
    return sorted(decoded(folder, "train") + decoded(folder, "val"))


def test_files_of_the_hub_are_streamed_at_one_revision(hub_answers: SimpleNamespace) -> None:
    assert both_splits(hub_answers.folders["parquet"]) == sorted(TRAIN)
    first, second = hub_answers.answers["parquet"]["sources"]
    assert first["name"] == "someone/stories/data/train-00000-of-00002.parquet"
    assert (first["documents"], second["documents"]) == (25, 35)
    assert first["revision"] == second["revision"] == commit_of("main")
    local = find_sources([write(hub_answers.folders["parquet"] / "copy", HUB_FILES)], Selection())
    assert [(source.sha256, source.bytes) for source in local] == [
        (one["sha256"], one["bytes"]) for one in (first, second)
    ]
    assert both_splits(hub_answers.folders["earlier"]) == sorted(DOCUMENTS[:40])
    assert hub_answers.answers["earlier"]["sources"][0]["revision"] == commit_of("v1")
    assert both_splits(hub_answers.folders["lines"]) == sorted(TRAIN)


def test_short_names(hub_answers: SimpleNamespace) -> None:
    assert both_splits(hub_answers.folders["lima"]) == sorted(f"User: {text}\n\nAssistant: Yes." for text in TRAIN)
    assert both_splits(hub_answers.folders["program"]) == sorted(DOCUMENTS)
    assert hub_answers.answers["program"]["sources"][0]["revision"] == commit_of("refs/convert/parquet")
    assert "the hub has converted only a part of 'Skylion007/openwebtext'" in hub_answers.stderr
    assert {name: known.hub_id for name, known in HUB_DATASETS.items()} == {
        "openwebtext": "Skylion007/openwebtext",
        "lima": "GAIR/lima",
        "tinystories": "roneneldan/TinyStories",
    }


def test_what_the_hub_refuses_is_one_clear_error(hub_answers: SimpleNamespace) -> None:
    gated = f"accept its terms at {hub_answers.address}/datasets/someone/gated, then log in with `hf auth login`"
    assert gated in hub_answers.answers["gated"]
    assert "no data set of this name on the hub" in hub_answers.answers["unknown"]
    assert "no split 'test' in 'someone/stories': choose one of train, validation" in hub_answers.answers["split"]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tinystories",
            r"hf download roneneldan/TinyStories --repo-type dataset --local-dir tinystories`, copy the folder",
        ),
        ("openwebtext", r"dataset --revision refs/convert/parquet --local-dir openwebtext`"),
        ("lima", r"its terms are accepted .* `reflowlens prepare ./lima --text-field conversations --out"),
        ("someone/stories", r"no file or folder 'someone/stories', and the data set .* cannot be reached"),
        ("tinystory", r"did you mean 'tinystories'\?"),
    ],
)
def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message) as caught:
        prepare(name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_offline_by_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the hub at all."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ReflowlensError, match="HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set"):
        prepare("tinystories", tmp_path / "out")


@pytest.mark.usefixtures("no_hub")
def test_an_earlier_download_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"text": TRAIN}).save_to_disk(str(tmp_path / "cache"), num_shards=2)

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        assert (name, config, split, revision) == ("roneneldan/TinyStories", None, "train", None)
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.load_from_disk(str(tmp_path / "cache"))

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *args, **more: (load if "/" in name else load_dataset)(name, *args, **more),
    )
    manifest = prepare("tinystories", tmp_path / "out", "bytes", val_fraction=0.2)
    assert both_splits(tmp_path / "out") == sorted(TRAIN)
    assert manifest.sources[0].name == "roneneldan/TinyStories/data-00000-of-00002.arrow"
    assert not datasets.config.HF_HUB_OFFLINE
