"""``reflowlens features``: pages of a model's units and of a dictionary's features, of text and of prepared data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import reflowlens as rl
from reflowlens.cli import main
from reflowlens.dictionaries.files import save_dictionary
from reflowlens.notebook.feature_pages import open_feature_pages
from tests.reflowlens.dictionaries.test_files import PLT, random_dictionary
from tests.support.tiny import random_model

TEXT = "The cat <script>sat</script> on the mat.\n<|endoftext|>\nA dog did not, and a bird was not asked.\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    model = random_model("reflow")
    rl.save_model(tmp_path / "model", model)
    cfg = dataclasses.replace(PLT, model_name=model.cfg.model_name, model_hash=rl.model_hash(model))
    save_dictionary(tmp_path / "plt", random_dictionary(cfg))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps({'text': part})}\n" for part in TEXT.split("\n")[::2]))
    return tmp_path


def features(files: Path, *more: str) -> int:
    return main(
        ["features", str(files / "model"), "--data", str(files / "text.txt"), "--out", str(files / "out"), *more]
    )


def test_units_of_a_text(files, capsys):
    assert features(files, "--removed", "2", "--layers", "1", "recipe") == 0
    assert capsys.readouterr().out.strip() == str(files / "out" / "index.html")
    pages = open_feature_pages(files / "out")
    assert [layer.key for layer in pages.layers] == ["1-mlp_post", "recipe"]
    assert pages.facts["documents"] == "2"
    assert not (files / "out" / "features").exists()


def test_features_of_a_dictionary_with_json_and_the_same_from_json_lines(files, capsys):
    arguments = ["--dictionary", str(files / "plt"), "--json", "--removed", "0", "--features", "5"]
    assert features(files, *arguments) == 0
    assert len(list((files / "out" / "features").iterdir())) == 10
    first = (files / "out" / "data" / "0-0.js").read_text()
    assert features(files, *arguments, "--data", str(files / "text.jsonl")) == 0
    assert (files / "out" / "data" / "0-0.js").read_text() == first


def test_validation_documents_of_prepared_data(files, capsys):
    source = files / "many.txt"
    source.write_text("\n<|endoftext|>\n".join(f"the cat {i} sat on the mat" for i in range(60)))
    data = files / "data"
    assert main(["prepare", str(source), "--out", str(data), "--tokenizer", "bytes", "--val-fraction", "0.2"]) == 0
    documents = json.loads((data / "manifest.json").read_text())["splits"]["val"]["documents"]
    assert features(files, "--data", str(data), "--removed", "0", "--layers", "0") == 0
    assert open_feature_pages(files / "out").facts["documents"] == f"{documents}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing.txt"], "no file or folder 'nothing.txt'"),
        (["--layers", "9"], "no layer '9'; there are recipe, 0-mlp_post, 1-mlp_post, unembed_signal"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--hook", "mlp_pots"], "no kind of units 'mlp_pots'"),
        (["--dictionary", "nothing"], "no dictionary 'nothing'"),
        (["--out", "."], "holds other files and no feature pages to replace"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    assert features(files, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(files.rglob("*")) == before


def test_an_empty_text_and_a_dictionary_of_another_model_are_errors(files, capsys):
    (files / "text.txt").write_text("")
    assert features(files) == 2
    assert "holds no text" in capsys.readouterr().err
    rl.save_model(files / "model", random_model("reflow", seed=1))
    assert features(files, "--dictionary", str(files / "plt")) == 2
    assert "dictionary" in capsys.readouterr().err
    assert not (files / "out").exists()
