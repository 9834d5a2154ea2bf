"""Losses of several models on the same documents: those of evaluate, with the intervals of whole documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretraining.data import open_tokens, prepare
from pretraining.estimate import parameters_outside_embedding
from pretraining.evaluate import evaluate_model
from pretraining.loss_comparison import compare_losses, document_of_targets
from reflowlens.checkpoints import save_model
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from tests.support.tiny import random_model


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    lines = [f"Document {i} says {'again ' * (1 + i % 5)}and ends.\n<|endoftext|>\n" for i in range(30)]
    (folder / "text.txt").write_text("".join(lines))
    prepare([folder / "text.txt"], folder / "data", tokenizer="bytes", val_fraction=0.5)
    return folder / "data"


@pytest.fixture(scope="module")
def models():
    return {"one": random_model("reflow", seed=1), "two": random_model("gpt2_new", seed=2)}


def test_losses_are_those_of_evaluate(models, documents):
    frame = compare_losses(models, documents, resamples=50).set_index("model")
    for name, model in models.items():
        alone = evaluate_model(model, documents)
        assert frame.loc[name, "loss"] == pytest.approx(alone.loss, rel=1e-5)
        assert frame.loc[name, "tokens"] == alone.tokens
        assert frame.loc[name, "low"] < frame.loc[name, "loss"] < frame.loc[name, "high"]
    assert frame.loc["two", "difference"] == pytest.approx(frame.loc["two", "loss"] - frame.loc["one", "loss"])
    assert frame.loc["one", ["difference", "difference_low", "difference_high"]].isna().all()


def test_a_model_does_not_differ_from_itself(models, documents):
    row = compare_losses({"one": models["one"], "again": models["one"]}, documents, resamples=20).iloc[1]
    assert row[["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]


def test_the_interval_of_a_difference_is_that_of_whole_documents(models, documents):
    """Against sums over documents taken one token at a time and a bootstrap written out."""
    data = open_tokens(documents, "val")
    stream, end = np.asarray(data.tokens[:]), data.manifest.end_id
    losses = {}
    for name, model in models.items():
        rows = []
        for start in range(0, len(stream) - 1, model.cfg.n_ctx):
            block = torch.tensor(stream[start : start + model.cfg.n_ctx + 1].astype(int))
            with torch.no_grad():
                log_p = model(block[None, :-1]).double().log_softmax(-1)[0]
            rows += (-log_p[range(len(block) - 1), block[1:]]).tolist()
        losses[name] = rows
    document, per_document = 0, {}
    for i in range(len(stream) - 1):
        document += stream[i] == end
        total, count = per_document.get(document, (0.0, 0))
        per_document[document] = (total + losses["two"][i] - losses["one"][i], count + 1)
    sums, counts = map(np.array, zip(*per_document.values(), strict=True))
    rng = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    row = compare_losses(models, documents, resamples=4000).iloc[1]
    assert (row["units"], row["unit"]) == (len(sums), "document")
    spread = np.std(means)
    assert row["difference_low"] == pytest.approx(np.quantile(means, 0.025), abs=0.15 * spread)
    assert row["difference_high"] == pytest.approx(np.quantile(means, 0.975), abs=0.15 * spread)
    assert row["difference"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)


def test_a_single_text_is_resampled_in_the_blocks_it_is_read_in(models, tmp_path):
    book, other = tmp_path / "book.txt", tmp_path / "other.txt"
    book.write_text("It was the best of times, it was the worst of times. " * 4, encoding="utf8")
    other.write_text("Call me Ishmael.", encoding="utf8")
    prepare(other, tmp_path / "data", tokenizer="bytes", val_sources=book)
    row = compare_losses(models, tmp_path / "data", resamples=200).iloc[1]
    context = models["one"].cfg.n_ctx
    assert (row["units"], row["unit"]) == (-(-row["tokens"] // context), "block")
    assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_an_end_belongs_to_its_document():
    assert document_of_targets(np.array([9, 5, 9, 9, 6]), 9).tolist() == [1, 1, 2, 3]


def test_parameters_outside_the_embedding_are_those_of_blocks_and_norms(models):
    model = models["one"]
    inside = model.cfg.d_vocab * model.cfg.n_signals + model.cfg.n_signals * model.cfg.d_model
    assert parameters_outside_embedding(model) == model.n_parameters - inside


@pytest.mark.parametrize(
    ("names", "message"), [([], "no model is given"), (["foreign"], "prepared with 'bytes', but foreign reads")]
)
def test_errors(names, message, documents):
    foreign = random_model("reflow")
    object.__setattr__(foreign, "cfg", type("Cfg", (), {"tokenizer_name": "gpt2", "n_ctx": 8})())
    with pytest.raises(ReflowlensError, match=message):
        compare_losses(dict.fromkeys(names, foreign), documents)


def test_the_command_prints_the_table(models, documents, tmp_path, capsys):
    for name, model in models.items():
        save_model(tmp_path / name, model)
    assert main(["evaluate", str(tmp_path / "one"), str(documents), "--against", str(tmp_path / "two")]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["model", "parameters", "outside_embedding"]
    assert first.split()[-1] == "-"
    assert len(second.split()) == len(header.split())
