"""Supervised fine-tuning: what counts, what shares a row, what is learned and what is left on disk."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import lzma
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pretraining.finetune
from pretraining.chat import ChatTemplate, Message, chat, recorded_template, tokenise
from pretraining.finetune import FinetuneConfig, completion_loss, evaluate, finetune
from pretraining.packing import pack, shuffled_rows, to_batch
from pretraining.sft import Example, is_held_out, load_data, read_examples
from reflowlens.checkpoints import load_model, model_hash, read_manifest, save_model
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.reference import sft as reference
from tests.reflowlens.models.test_bdh import CONFIG as BDH
from tests.support.tiny import random_model, tiny_config

BYTES, GPT2 = get_tokenizer("bytes"), get_tokenizer("gpt2_16k")
TEMPLATE = ChatTemplate()
RECORDS: list[dict[str, Any]] = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "", "completion": "Once upon a time"},
    {"prompt": "Translate: naïve\n", "completion": "naïf 🙂", "task": "other fields do not matter"},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada Lovelace."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why?\nWhy not?"},
            {"role": "assistant", "content": "Because."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "This teaches nothing."},
        ]
    },
    {"conversations": ["How are stars made?", "Gas collapses.", "And planets?", "From what is left."], "source": "x"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


def prompts(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}:", "completion": "ok"} for i in range(n)]


# -------------------------------------------------------------------------------------------------- what counts towards


def expected_pairs(record: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """What is read and what is to be predicted (-100: nothing) at each position, with bytes for tokens."""
    tokens = [(0 if unit == reference.END else unit, learned) for unit, learned in reference.units(record)]
    return tuple((a, b if learned else -100) for (a, _), (b, learned) in pairwise(tokens))


def test_the_mask_of_every_token_in_packed_rows(tmp_path: Path) -> None:
    """Every position of every row against the plain transcripts, for records of every form."""
    examples = read_examples(write(tmp_path / "a.jsonl", RECORDS), BYTES, TEMPLATE)
    batch = to_batch(shuffled_rows(examples, 150, [3, 1]), 150)
    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    for tokens, targets, segments in zip(*(part.tolist() for part in batch), strict=True):
        for segment in set(segments):
            places = [i for i, own in enumerate(segments) if own == segment]
            assert places == list(range(places[0], places[-1] + 1))
            pairs = tuple((tokens[i], targets[i]) for i in places)
            if segment >= 0:
                found[pairs] += 1
            else:
                assert {target for _, target in pairs} == {-100}
                assert places[-1] == 149
    assert found == Counter(map(expected_pairs, RECORDS))


@pytest.mark.parametrize("record", [record for record in RECORDS if json.dumps(record, ensure_ascii=False).isascii()])
def test_the_mask_of_every_token_with_words_for_tokens(record: dict[str, Any], tmp_path: Path) -> None:
    """A token belongs wholly to what is read or wholly to what is learned."""
    (example,) = read_examples(write(tmp_path / "a.jsonl", [record]), GPT2, TEMPLATE)
    spelled: list[reference.Unit] = []
    for token, counted in zip(example.tokens.tolist(), example.counted.tolist(), strict=True):
        pieces = [reference.END] if token == GPT2.eot_token else list(GPT2.token_str(token).encode())
        spelled += [(piece, counted) for piece in pieces]
    assert spelled == reference.units(record)


words = st.text(alphabet="ab é\n?", max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), max_size=6), words, words)
def test_any_chat_has_its_transcripts_mask(turns: list[tuple[str, str]], question: str, answer: str) -> None:
    messages = [*(Message(*turn) for turn in turns), Message("user", question), Message("assistant", answer)]
    tokens, counted, _ = tokenise(TEMPLATE.parts(messages), BYTES)
    record = {"messages": [message._asdict() for message in messages]}
    plain = [(0 if unit == reference.END else unit, learned) for unit, learned in reference.units(record)]
    assert list(zip(tokens.tolist(), counted.tolist(), strict=True)) == plain


def test_sampling_starts_from_the_tokens_of_training(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", RECORDS[3:4]), GPT2, TEMPLATE)
    prompt = GPT2.encode(TEMPLATE.prompt("Who?"))
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.counted.tolist() == [False] * len(prompt) + [True] * (len(example.tokens) - len(prompt))


def test_a_token_that_begins_texts_comes_first_and_one_that_ends_them_must_be_there() -> None:
    begun, endless = copy.copy(GPT2), copy.copy(GPT2)
    begun.bos_token, endless.eot_token = 7, None
    parts = TEMPLATE.parts([Message("user", "Who?"), Message("assistant", "Ada.")])
    (tokens, counted, _), (plain, plain_counted, _) = tokenise(parts, begun), tokenise(parts, GPT2)
    assert tokens.tolist() == [7, *plain.tolist()]
    assert counted.tolist() == [False, *plain_counted.tolist()]
    with pytest.raises(ReflowlensError, match="names no token that ends a document"):
        tokenise(parts, endless)


# ------------------------------------------------------------------------------------------------ splitting and packing


def examples_of(lengths: list[int]) -> list[Example]:
    return [
        Example(torch.arange(n + 1).numpy(), torch.ones(n + 1, dtype=torch.bool).numpy(), str(i), False)
        for i, n in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_packing_is_first_fit(lengths: list[int]) -> None:
    rows = pack(examples_of(lengths), 12)
    assert [[example.positions for example in row] for row in rows] == reference.first_fit(lengths, 12)


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    examples = examples_of([3, 5, 2, 7, 4, 6, 1, 8, 2, 3])
    epochs = [
        [[example.prompt for example in row] for row in shuffled_rows(examples, 10, [0, epoch])] for epoch in (0, 0, 1)
    ]
    assert epochs[0] == epochs[1] != epochs[2]
    for rows in epochs:
        assert sorted(prompt for row in rows for prompt in row) == sorted(map(str, range(10)))


def test_a_prompt_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    records = [{"prompt": f"{i % 1000}?", "completion": f"{i}"} for i in range(2000)]
    examples = read_examples(write(tmp_path / "a.jsonl", records), BYTES, TEMPLATE)
    held_out = [example.prompt for example in examples if is_held_out(example, 0.2, seed=1)]
    assert set(Counter(held_out).values()) == {2}
    assert 340 < len(held_out) < 460  # 400 ± 3 standard deviations
    assert held_out != [example.prompt for example in examples if is_held_out(example, 0.2, seed=2)]


def test_a_file_given_twice_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "A.JSONL", prompts(40))
    data = load_data([path, path], [], BYTES, TEMPLATE, context=64, val_fraction=0.3, seed=0)
    assert len(data.train) + len(data.val) == 40
    assert [file["examples"] for file in data.files] == [40]


def test_examples_longer_than_the_context_are_left_out_and_counted(tmp_path: Path) -> None:
    """With bytes an example of n bytes, end included, takes n - 1 positions."""
    records = [{"prompt": "p" * n, "completion": "cc"} for n in (5, 10, 11, 30)]
    data = write(tmp_path / "a.jsonl", records)
    val = write(tmp_path / "b.jsonl", [{"prompt": "x", "completion": "y"}])
    loaded = load_data([data], [val], BYTES, TEMPLATE, context=12, val_fraction=0.1, seed=0)
    assert [example.positions for example in loaded.train] == [7, 12]
    assert loaded.left_out == 2
    assert [(file["name"], file["role"], file["examples"]) for file in loaded.files] == [
        ("a.jsonl", "train", 4),
        ("b.jsonl", "val", 1),
    ]


# ---------------------------------------------------------------------------------------------------------- the loss


def batch_for(model: HookedModel) -> Any:
    lengths = [5, 9, 3, 14, 8, 2]
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in lengths:
        tokens = torch.randint(1, 200, (n + 1,), generator=generator).numpy()
        counted = torch.rand(n + 1, generator=generator) < 0.5
        counted[-1] = True
        examples.append(Example(tokens, counted.numpy(), "", False))
    rows = pack(examples, 24)
    assert any(len(row) > 1 for row in rows)
    return examples, to_batch(rows, 24)


def test_loss_and_gradients_of_packed_rows_are_those_of_examples_alone(model: HookedModel) -> None:
    examples, batch = batch_for(model)
    losses = []
    for example in examples:
        tokens = torch.from_numpy(example.tokens)
        each = F.cross_entropy(model(tokens[:-1])[0], tokens[1:], reduction="none")
        losses += [loss for loss, counts in zip(each, example.counted[1:], strict=True) if counts]
    expected = torch.stack(losses).mean()
    parameters = dict(model.named_parameters())
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    through_model = model(batch.tokens, "loss", targets=batch.targets, segments=batch.segments)
    for loss in (completion_loss(model, batch), through_model):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        ours = torch.autograd.grad(loss, list(parameters.values()))
        for name, a, b in zip(parameters, ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(b.abs().max().item(), 1e-2), name


def test_evaluation_weighs_every_completion_token_alike() -> None:
    model = random_model("reflow")
    examples, batch = batch_for(model)
    assert len({int(example.counted[1:].sum()) for example in examples}) > 2
    alone = [[[example]] for example in examples]
    assert evaluate(model, alone, FinetuneConfig(), 24) == pytest.approx(completion_loss(model, batch).item(), rel=1e-5)


def test_evaluation_drops_nothing_and_leaves_the_model_training() -> None:
    model = random_model(dataclasses.replace(BDH, dropout=0.5)).train()
    examples, batch = batch_for(model)
    alone = [[[example]] for example in examples]
    first, second = (evaluate(model, alone, FinetuneConfig(), 24) for _ in range(2))
    assert model.training
    assert first == second == pytest.approx(completion_loss(model.eval(), batch).item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = random_model(tiny_config("reflow", n_ctx=48))
    with torch.no_grad():
        model.ln_final.w.mul_(0.1)  # not yet sure of anything
    return save_model(tmp_path / "base", model, {"tokens_seen": 1000})


CFG = FinetuneConfig(epochs=2, learning_rate=0.02, batch_size=2, val_fraction=0.3)


def test_a_run_learns_and_leaves_a_checkpoint_with_its_history(base: Path, tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ok"}]} for i in range(60)
    ]
    data = write(tmp_path / "chats.jsonl", records)
    result = finetune(base, [data], tmp_path / "out", CFG)
    before, _, after = result.val_losses
    assert after < before / 4
    assert result.last.step == result.last.steps

    tuned, manifest = load_model(tmp_path / "out"), read_manifest(tmp_path / "out")
    record = manifest["finetuning"]
    assert record["base"] == {"name": "base", "model_hash": model_hash(load_model(base))}
    assert record["template"] == dataclasses.asdict(TEMPLATE)
    assert record["settings"]["context"] == 48
    adamw = {"name": "adamw", "learning_rate": 0.02, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_clip": 1.0}
    assert adamw.items() <= record["optimizer"].items()
    assert record["optimizer"]["warmup_steps"] == -(-result.last.steps // 20)
    assert record["files"][0]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert record["examples"]["train"] + record["examples"]["val"] == 60
    assert record["val_losses"] == result.val_losses
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(result.last.steps + 1))
    assert [line["val_loss"] for line in lines if "val_loss" in line] == result.val_losses
    read = 2 * sum(len(reference.units(r)) - 1 for r in records) * record["examples"]["train"] / 60
    assert lines[-1]["tokens"] == pytest.approx(read, rel=0.02)  # questions have one digit or two
    assert manifest["tokens_seen"] == 1000 + lines[-1]["tokens"]
    assert chat(tuned, recorded_template(tmp_path / "out"), ["7", "30"], 5, temperature=0) == ["ok", "ok"]


def test_a_run_is_a_function_of_its_seed(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", prompts(30))
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune(base, [data], tmp_path / name, dataclasses.replace(CFG, epochs=1, seed=seed))
        weights[name] = load_model(tmp_path / name).state_dict()
    assert all(torch.equal(weights["a"][key], weights["b"][key]) for key in weights["a"])
    assert any(not torch.equal(weights["a"][key], weights["c"][key]) for key in weights["a"])


def test_ctrl_c_leaves_a_usable_checkpoint_and_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "data.jsonl", prompts(60)), tmp_path / "out"
    calls = 0

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        if torch.is_grad_enabled():
            calls += 1
            if calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return completion_loss(*arguments)

    monkeypatch.setattr(pretraining.finetune, "completion_loss", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    asked = ["finetune", str(base), str(data), "--out", str(out), "--batch-size", "2", "--val-fraction", "0.3"]
    assert main(asked) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("stopped at step 3 of ")
    assert read_manifest(out)["step"] == 3
    difference = load_model(out).state_dict()["embed.W_basis"] - load_model(base).state_dict()["embed.W_basis"]
    assert difference.abs().max() > 0


def test_the_command_line_from_data_to_an_answer(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(json.dumps({"conversations": [f"{i}", "ok"]}) + "\n" for i in range(40))
    data, val = tmp_path / "data.jsonl.xz", write(tmp_path / "val.jsonl", [{"conversations": ["50", "ok"]}])
    data.write_bytes(lzma.compress(text.encode()))
    options = ["--epochs", "2", "--lr", "0.02", "--batch-size", "2", "--context", "40", "--dtype", "bfloat16"]
    assert main(["finetune", str(base), str(data), "--val", str(val), "--out", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr()
    assert "40 examples (120 completion tokens... " not in printed.err
    assert printed.err.startswith("40 examples (160 completion tokens) to learn from, 1 examples (4 completion tokens)")
    before, after = map(float, printed.out.split("loss ")[1].split(" nats")[0].split(" -> "))
    assert after < before
    assert main(["sample", str(tmp_path / "out"), "--chat", "9", "--tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "ok\n"
    assert main(["sample", str(base), "--chat", "9"]) == 2
    assert "records no chat template" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl, line 3 is not JSON"),
        ("[1]", "line 3 is not a JSON object"),
        ('{"prompt": "p"}', "line 3 has the fields prompt: expected prompt and completion"),
        ('{"text": "t"}', "line 3 has the fields text: expected"),
        ('{"prompt": "p", "completion": 3}', "line 3: completion must be text, got 3"),
        ('{"prompt": "p", "completion": " "}', "line 3 has no completion"),
        ('{"messages": []}', "line 3 has no completion"),
        ('{"conversations": ["only a question"]}', "line 3 has no completion"),
        ('{"messages": [{"role": "asistant", "content": "c"}]}', "role 'asistant'; did you mean 'assistant'"),
        ('{"messages": [{"role": "user", "content": null}]}', "the content of turn 1 must be text, got None"),
        ('{"messages": [7]}', "turn 1 must be text or a role with its content, got 7"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n\n" + line + "\n")
    with pytest.raises(ReflowlensError) as error:
        read_examples(path, BYTES, TEMPLATE)
    assert message in str(error.value)
    assert "bad.jsonl, line 3" in str(error.value)


def damaged(path: Path) -> Path:
    path.write_bytes(lzma.compress(b'{"prompt": "p", "completion": "c"}\n' * 99)[:60])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.jsonl", "no file"),
        (lambda folder: folder, "cannot read"),
        (lambda folder: write(folder / "empty.jsonl", []), "empty.jsonl holds no examples"),
        (lambda folder: damaged(folder / "cut.jsonl.xz"), "cut.jsonl.xz cannot be unpacked"),
    ],
)
def test_a_bad_file_is_named(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=message):
        read_examples(make(tmp_path), BYTES, TEMPLATE)


def test_what_a_run_refuses(base: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.jsonl", prompts(20)), tmp_path / "out"
    small = save_model(tmp_path / "small", random_model(tiny_config("reflow", d_vocab=100)))
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("context=49 exceeds the model's n_ctx=48", lambda: finetune(base, [data], out, FinetuneConfig(context=49))),
        ("the examples hold token 111 of the tokenizer 'bytes'", lambda: finetune(small, [data], out, CFG)),
        ("data.jsonl is given both", lambda: finetune(base, [data], out, CFG, val=[data])),
        ("20 are longer than the context of 2", lambda: finetune(base, [data], out, FinetuneConfig(context=2))),
        ("none of 20 examples fell to 'val'", lambda: finetune(base, [data], out, FinetuneConfig(val_fraction=1e-9))),
        ("is not empty: choose a new folder", lambda: finetune(base, [data], base, CFG)),
        ("epochs must be positive", lambda: FinetuneConfig(epochs=0)),
        ("val_fraction must lie between 0 and 1", lambda: FinetuneConfig(val_fraction=1.0)),
        ("dtype must be", lambda: FinetuneConfig(dtype="float16")),
    ]
    for message, call in cases:
        with pytest.raises(ReflowlensError) as error:
            call()
        assert message in str(error.value)
    assert not out.exists()


def test_a_loss_that_is_not_finite_stops_the_run(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", prompts(20))
    with pytest.raises(ReflowlensError, match="stopped being finite at step"):
        finetune(base, [data], tmp_path / "out", dataclasses.replace(CFG, learning_rate=1e30))


def test_a_full_disk_names_what_was_being_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data, out = write(tmp_path / "data.jsonl", prompts(20)), tmp_path / "out"
    monkeypatch.setattr("reflowlens.checkpoints.write_tensors", full)
    with pytest.raises(
        ReflowlensError, match=rf"^cannot write {re.escape(str(out))}/step_\d+: No space left on device$"
    ):
        finetune(base, [data], out, CFG)
