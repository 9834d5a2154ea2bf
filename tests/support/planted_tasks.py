"""Decoders whose weights are written by hand, so that it is known which head or MLP does a task, and how.

Tokens are bytes; capitals A to H and their small letters are the words. The stream's axes have names, and every weight
is zero but for those that a model here sets, so that a component that is not named does nothing at all.
"""

from __future__ import annotations

from typing import Any

import torch

from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.prompts import Prompts

N_WORDS, N_CTX = 8, 32
CONSTANT, CAPITAL, SMALL, MATCHED, TASK, FEELING, VERDICT = range(7)
WORD, LETTER, COPIED, FACT, ANSWER = (slice(start, start + N_WORDS) for start in (8, 16, 24, 32, 40))
POSITION = slice(64, 64 + N_CTX)
CAPITALS, SMALLS = "ABCDEFGH", "abcdefgh"
CONFIG = ModelConfig(
    architecture="gpt2",
    normalization_type="RMS",
    act_fn="relu",
    mlp_bias=True,
    n_layers=4,
    d_model=96,
    n_heads=4,
    d_head=N_CTX,
    d_mlp=2 * N_WORDS,
    d_vocab=256,
    n_ctx=N_CTX,
    tie_word_embeddings=False,
    tokenizer_name="bytes",
)
_SHARP = 60.0


@torch.no_grad()
def blank(**changes: Any) -> HookedModel:
    """Embeddings that say what a token is and where, a readout of `ANSWER` and `VERDICT`, and idle blocks."""
    model = build_model(CONFIG if not changes else ModelConfig(**{**vars(CONFIG), **changes}))
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith(".w") else 0.0)
    embed: Any = model.embed
    embed.W_E[:, CONSTANT] = 1.0
    for i, (capital, small) in enumerate(zip(CAPITALS, SMALLS, strict=True)):
        embed.W_E[ord(capital), [CAPITAL, WORD.start + i]] = 1.0
        embed.W_E[ord(small), [SMALL, LETTER.start + i]] = 1.0
        model.unembed.W_U[ANSWER.start + i, ord(small)] = 4.0
    embed.W_E[[ord("+"), ord("-")], FEELING] = torch.tensor([1.0, -1.0])
    model.unembed.W_U[VERDICT, [ord("y"), ord("n")]] = torch.tensor([4.0, -4.0])
    model.unembed.W_U[CONSTANT, ord("z")] = 1.0
    model.pos_embed.W_pos[:, POSITION] = torch.eye(N_CTX)
    return model.eval()


@torch.no_grad()
def attend_to(model: HookedModel, layer: int, head: int, flag: int, read: slice, write: slice) -> None:
    """A head that looks at the tokens with a flag and copies some axes of theirs to others."""
    attn = model.blocks[layer].attn
    attn.W_Q[head, CONSTANT, 0] = attn.W_K[head, flag, 0] = _SHARP**0.5
    _copy(attn, head, read, write)


@torch.no_grad()
def look_back(model: HookedModel, layer: int, head: int, steps: int, read: slice, write: slice) -> None:
    """A head that looks at the token so many positions before."""
    attn = model.blocks[layer].attn
    attn.W_K[head, POSITION] = _SHARP**0.5 * torch.eye(N_CTX)
    attn.W_Q[head, POSITION] = _SHARP**0.5 * torch.eye(N_CTX).roll(-steps, dims=1)
    _copy(attn, head, read, write)


def _copy(attn: Any, head: int, read: slice, write: slice) -> None:
    n = read.stop - read.start
    attn.W_V[head, read, :n] = torch.eye(n)
    attn.W_O[head, :n, write] = torch.eye(n)


# -- one head writes the answer ---------------------------------------------------------------------------------------

ANSWERING = (1, 2)


def copying_model(works: bool = True, noise: float = 0.0) -> HookedModel:
    """Head L1H2 looks at the capital and writes its small letter; nothing else does anything, but for noise."""
    model = blank()
    if works:
        attend_to(model, *ANSWERING, CAPITAL, WORD, ANSWER)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            for weight in (block.attn.W_V, block.attn.W_O, block.mlp.W_out, block.mlp.b_in):
                weight += noise * torch.randn(weight.shape, generator=generator)
    return model


def copying_prompts(n: int = 24) -> Prompts:
    """Texts of unequal lengths with one capital; its small letter is the answer, the next one's the wrong one."""
    fillers = (".", "..", "....", "......")
    return Prompts.of(
        [
            {
                "clean": f"{fillers[i % 4]}{CAPITALS[i % N_WORDS]}{fillers[i // 4 % 4]}:",
                "answer": SMALLS[i % N_WORDS],
                "wrong_answer": SMALLS[(i + 1 + i // N_WORDS) % N_WORDS],
                "subject": CAPITALS[i % N_WORDS],
                "group": "early" if i % 2 else "late",
            }
            for i in range(n)
        ]
    )


# -- a fact is stored in one MLP --------------------------------------------------------------------------------------

STORING, READING = 1, (2, 3)


def remembering_model(works: bool = True) -> HookedModel:
    """The MLP of layer 1 writes, at a capital, what is known of it; head L2H3 takes that to the last token."""
    model = blank()
    if works:
        with torch.no_grad():
            mlp = model.blocks[STORING].mlp
            mlp.W_in[WORD, :N_WORDS] = torch.eye(N_WORDS)
            mlp.W_out[:N_WORDS, FACT] = torch.eye(N_WORDS)
        attend_to(model, *READING, CAPITAL, FACT, ANSWER)
    return model


def subject_prompts(n: int = 24) -> Prompts:
    """The subject is one to three tokens that end in a capital; texts of unequal lengths."""
    before, inside, after = (".", "..", ""), ("", "x", "xy"), (":", "!:", "!!!:")
    return Prompts.of(
        [
            {
                "clean": f"{before[i % 3]}{inside[i // 3 % 3]}{CAPITALS[i % N_WORDS]}{after[i // 2 % 3]}",
                "answer": SMALLS[i % N_WORDS],
                "wrong_answer": SMALLS[(i + 3) % N_WORDS],
                "subject": f"{inside[i // 3 % 3]}{CAPITALS[i % N_WORDS]}",
            }
            for i in range(n)
        ]
    )


# -- a feeling decides ------------------------------------------------------------------------------------------------

FELT = 2


def feeling_model(works: bool = True) -> HookedModel:
    """The MLP of layer 2 writes `VERDICT`, "y" against "n", in proportion to `FEELING`, which "+" and "-" have."""
    model = blank()
    if works:
        with torch.no_grad():
            mlp = model.blocks[FELT].mlp
            mlp.W_in[FEELING, :2] = torch.tensor([1.0, -1.0])
            mlp.W_out[:2, VERDICT] = torch.tensor([1.0, -1.0])
    return model


def feeling_texts() -> tuple[list[str], list[str], Prompts]:
    """Texts of either feeling, which differ in much else, and prompts of unequal lengths without any."""
    positive = [f"{CAPITALS[:i]}{'.' * (i % 3)}+" for i in range(1, 9)]
    negative = [f"{SMALLS[:i]}{'!' * (i % 4)}-" for i in range(1, 9)]
    rows = [
        {"clean": "." * (i % 5) + CAPITALS[i % 8] + SMALLS[i % 7], "answer": "y", "wrong_answer": "n"}
        for i in range(48)
    ]
    return positive, negative, Prompts.of(rows)


# -- one head carries a function that examples show -------------------------------------------------------------------

CARRYING, APPLYING = (1, 2), 2
SHOWN = slice(48, 48 + N_WORDS)


def learning_model(works: bool = True) -> HookedModel:
    """Behind examples such as "A:b" head L1H2 says at the last token that the next letter is asked for, and the MLP of
    layer 2 writes it. Without examples the answer is "z", whatever is asked.

    Head L0H0 takes the capital to the ":" behind it, L0H1 to the letter behind that, where the MLP of layer 0 sees
    whether the letter is the next one (`MATCHED`); L1H2 takes the mean of that over all small letters.
    """
    model = blank()
    look_back(model, 0, 0, 1, WORD, COPIED)
    look_back(model, 0, 1, 2, WORD, SHOWN)
    following = torch.eye(N_WORDS).roll(1, dims=1)  # row i: the next letter
    with torch.no_grad():
        sees, applies = model.blocks[0].mlp, model.blocks[APPLYING].mlp
        sees.W_in[SHOWN, :N_WORDS] = torch.eye(N_WORDS)
        sees.W_in[LETTER, :N_WORDS] = 4 * following.T
        sees.W_in[CONSTANT, :N_WORDS] = -5.0
        sees.W_out[:N_WORDS, MATCHED] = 0.5
        applies.W_in[COPIED, :N_WORDS] = torch.eye(N_WORDS)
        applies.W_in[TASK, :N_WORDS] = 1.0
        applies.W_in[CONSTANT, :N_WORDS] = -6.0
        applies.W_out[:N_WORDS, ANSWER] = following
    if works:
        attend_to(model, *CARRYING, SMALL, slice(MATCHED, MATCHED + 1), slice(TASK, TASK + 1))
    return model


def letter_pairs(n: int = 48) -> Prompts:
    """Inputs that end in a capital, of unequal lengths, and the small letter behind it in the alphabet."""
    before = ("", ".", "!", "?", "..", "!!")
    rows = [(before[i // N_WORDS % 6] + CAPITALS[i % N_WORDS], SMALLS[(i + 1) % N_WORDS]) for i in range(n)]
    return Prompts.of([{"clean": text, "answer": answer} for text, answer in rows])
