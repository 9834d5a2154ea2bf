"""`rl.Prompts`: a table of prompts, what is wrong in it, and where its words stand among the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import reflowlens as rl
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model

ROWS: list[dict[str, Any]] = [
    {"clean": "The king of France is", "corrupted": "The queen of New Zealand is", "answer": " Paris",
     "wrong_answer": 5, "group": "a", "subject": "France", "corrupted_subject": "New Zealand", "article": 0},
    {"clean": "Old New Zealand was", "corrupted": "Old France was", "answer": " the", "wrong_answer": " a",
     "group": "b", "subject": "New Zealand", "corrupted_subject": "France", "article": -1},
]  # fmt: skip
PROMPTS = rl.Prompts.of(ROWS)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_head": 8, "d_mlp": 8, "n_ctx": 16}
    return rl.build_model(rl.ModelConfig(architecture="gpt2", d_vocab=50257, tokenizer_name="gpt2", **sizes))


def test_columns_and_rows() -> None:
    assert PROMPTS.clean == [row["clean"] for row in ROWS]
    assert PROMPTS.wrong_answers == [5, " a"]
    assert PROMPTS.of_group("b").answers == [" the"]
    assert PROMPTS.select([True, False]).groups == ["a"] == PROMPTS.select(np.array([0])).groups
    assert PROMPTS.select([1, 0]).groups == ["b", "a"]
    assert PROMPTS.select(PROMPTS.frame.subject == "France").frame.index.tolist() == [0]
    assert "New Zealand" in PROMPTS._repr_html_()


def test_a_split_is_a_partition_that_its_seed_decides() -> None:
    many = rl.Prompts.of([{"clean": str(i)} for i in range(10)])
    first, second = many.split(0.3, seed=1)
    assert len(first) == 3
    assert sorted(first.clean + second.clean) == many.clean
    assert first.clean == many.split(0.3, seed=1)[0].clean != many.split(0.3, seed=2)[0].clean


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_holds_what_was_written(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"clean": "In", "answer": " 1984", "group": "NA", "at": 0},
        {"clean": "é", "answer": "7", "group": "x", "at": 1},
    ]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert rl.Prompts.read(path).frame.to_dict("records") == rows


def test_the_token_that_a_role_ends_with(model: HookedModel) -> None:
    assert model.to_str_tokens(ROWS[1]["clean"]) == ["Old", " New", " Zealand", " was"]
    assert PROMPTS.positions(model, "subject") == [3, 2]
    assert PROMPTS.positions(model, "subject:first") == [3, 1]
    assert PROMPTS.positions(model, "subject", "corrupted") == [4, 1]
    assert PROMPTS.positions(model, "last") == [4, 3] == PROMPTS.positions(model, -1)
    assert PROMPTS.positions(model, 1) == [1, 1]
    assert PROMPTS.positions(model, [-2, 0]) == [3, 0]
    assert PROMPTS.positions(model, "article") == [0, 3]


def test_a_role_of_characters_that_are_split_over_tokens(model: HookedModel) -> None:
    one = rl.Prompts.of([{"clean": "Das 🦊 schläft", "animal": "🦊", "verb": "schläft"}])
    pieces = [model.tokenizer.token_bytes(int(i)) for i in model.to_tokens(one.clean)[0]]
    (first,), (last,) = one.positions(model, "animal:first"), one.positions(model, "animal")
    assert "🦊".encode() in b"".join(pieces[first : last + 1])
    assert "🦊".encode() not in b"".join(pieces[first:last])
    assert one.positions(model, "verb") == [len(pieces) - 1]


def test_answers_are_tokens(model: HookedModel) -> None:
    assert PROMPTS.answer_ids(model).tolist() == [model.to_single_token(" Paris"), model.to_single_token(" the")]
    assert PROMPTS.wrong_ids(model).tolist() == [5, model.to_single_token(" a")]


TEXT = {"clean": "a b"}
WRONG: dict[str, tuple[Any, str]] = {
    "no clean": (lambda m: rl.Prompts.of([{"claen": "x"}]), "need a column 'clean'.*mean 'claen'"),
    "an empty text": (lambda m: rl.Prompts.of([TEXT, {"clean": ""}]), "row 1, column 'clean'"),
    "a gap": (lambda m: rl.Prompts.of([TEXT, TEXT | {"corrupted": "x"}]), "row 0, column 'corrupted'"),
    "no token": (lambda m: rl.Prompts.of([TEXT | {"answer": 1.5}]), "row 0, column 'answer'.*1.5"),
    "no group": (lambda m: rl.Prompts.of([TEXT | {"group": None}]), "row 0, column 'group'"),
    "groups written alike": (
        lambda m: rl.Prompts.of([TEXT | {"group": 1}, TEXT | {"group": "1"}]),
        "groups 1 and '1' are written alike",
    ),
    "no row": (lambda m: rl.Prompts.of([]), "there are no prompts"),
    "a text as row": (lambda m: rl.Prompts.of(["x"]), "row 0: a prompt is a dict"),
    "an absent column": (lambda m: PROMPTS.select([0]).positions(m, "object"), "no column 'object'.*'subject'"),
    "an absent group": (lambda m: PROMPTS.of_group("c"), "group 'c'; groups: 'a', 'b'"),
    "an absent role": (
        lambda m: rl.Prompts.of([TEXT | {"corrupted": "c d", "role": "a"}]).positions(m, "role", "corrupted"),
        "row 0, column 'role': 'a' does not occur in the corrupted prompt 'c d'.*'corrupted_role'",
    ),
    "two of a role": (lambda m: rl.Prompts.of([{"clean": "a a", "role": "a"}]).positions(m, "role"), "several times"),
    "too far": (lambda m: PROMPTS.positions(m, 4), "row 1: there is no position 4, the prompt has 4 tokens"),
    "too few": (lambda m: PROMPTS.positions(m, [1]), "1 positions are given for 2 prompts"),
    "several tokens": (
        lambda m: rl.Prompts.of([TEXT | {"answer": " Paris France"}]).answer_ids(m),
        "row 0, column 'answer': ' Paris France' is not a single token",
    ),
    "an empty part": (lambda m: PROMPTS.split(0.1), "leaves a part empty"),
    "an absent row": (lambda m: PROMPTS.select([2]), "no row 2: rows are 0 to 1"),
    "an absent file": (lambda m: rl.Prompts.read("absent.jsonl"), "no file absent.jsonl"),
    "another file": (lambda m: rl.Prompts.read("absent.txt"), "neither .jsonl nor .csv"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(model: HookedModel, call: Any, message: str) -> None:
    with pytest.raises(rl.ReflowlensError, match=message):
        call(model)


def test_a_line_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"clean": "x"}\n{"clean"\n')
    with pytest.raises(rl.ReflowlensError, match=r"p\.jsonl: line 2 is not JSON"):
        rl.Prompts.read(tmp_path / "p.jsonl")


def test_a_data_set_of_the_datasets_package() -> None:
    datasets = pytest.importorskip("datasets")
    assert rl.Prompts.of(datasets.Dataset.from_dict({"clean": PROMPTS.clean})).clean == PROMPTS.clean


def test_ids_are_int64(model: HookedModel) -> None:
    assert PROMPTS.answer_ids(model).dtype == torch.int64


@pytest.mark.parametrize("at", [None, 1.5, {"a": 1}, torch.zeros(1, 1)])
def test_what_is_no_position(at):
    prompts = rl.Prompts.of([{"clean": "the king"}])
    with pytest.raises(rl.ReflowlensError, match="a position is"):
        prompts.positions(random_model("gpt2"), at)


def test_the_row_that_lacks_a_value_is_named_and_not_the_others_which_it_makes_floats():
    prompts = rl.Prompts.of([{"clean": "the king", "place": 1}, {"clean": "a king", "place": None}])
    with pytest.raises(rl.ReflowlensError, match="row 1, column 'place': a text or a position was expected, got nan"):
        prompts.positions(random_model("gpt2"), "place")
    with pytest.raises(rl.ReflowlensError, match="row 1, column 'answer'"):
        rl.Prompts.of([{"clean": "the king", "answer": 1}, {"clean": "a king", "answer": None}])


@pytest.mark.parametrize("group", [np.array([1, 2]), [1, 2], None, float("nan"), pd.NA, ""])
def test_what_is_no_group(group):
    with pytest.raises(rl.ReflowlensError, match="row 1, column 'group': the name of a group was expected"):
        rl.Prompts.of([{"clean": "a", "group": "x"}, {"clean": "b", "group": group}])
