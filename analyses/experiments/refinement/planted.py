"""Where the answer is known: texts that an inner learner must gain on, texts that it cannot, and a model that learns.

In a text of pairs, a random token and the one that a mapping drawn for this text gives it, the second of each pair can
be told once its first has occurred, and by nothing that is true of all texts. Where each second token is drawn anew
there is nothing to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from analyses.experiments.refinement.inner import NO_LEARNING, learning_losses
from analyses.experiments.refinement.texts import Texts, as_frame, mean_by_document, read_texts
from analyses.statistics.draws import derive_rng
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import Embed
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.ttt_linear import TTTLinear
from reflowlens.ttt_flow_config import TTTFlowConfig

SYMBOLS, _TEXTS = 16, 24
_SHORT, _LOUD = 0.02, 4.0  # the stream itself says little of the token to come, the inner learner much


def pair_texts(
    n: int, pairs: int, *, mapped: bool, symbols: int | Sequence[int] = SYMBOLS, seed: int = 0
) -> list[list[int]]:
    """`n` texts of so many pairs of tokens, the second of each pair that of the text's own random permutation
    (`mapped`) or drawn anew.

    `symbols`: which tokens, or how many: those below.

    >>> [len(text) for text in pair_texts(2, 5, mapped=True)]
    [10, 10]
    """
    rng, ids = (
        derive_rng(seed, "pair_texts", mapped),
        np.arange(symbols) if isinstance(symbols, int) else np.array(symbols),
    )
    texts = []
    for _ in range(n):
        firsts, mapping = rng.integers(len(ids), size=pairs), rng.permutation(len(ids))
        seconds = mapping[firsts] if mapped else rng.integers(len(ids), size=pairs)
        texts.append(ids[np.stack([firsts, seconds], axis=1).ravel()].tolist())
    return texts


@torch.no_grad()
def planted_frame(model: HookedModel, seed: int) -> pd.DataFrame:
    """What a model's inner learner gains on both kinds of texts, of tokens drawn from the model's vocabulary.

    A row a kind ("mapped", "random"), which tokens of it (`at`: "all", or "known", the second of a pair whose first has
    been a first before, which is all that a mapping can tell) and control (`learning_losses`): loss at an inner rate of
    0 − loss, `value`, `low`, `high` in nats a token, and `loss`.
    """
    end = model.tokenizer.eot_token
    allowed = [token for token in range(model.cfg.d_vocab) if token != end]
    symbols = derive_rng(seed, "symbols").permutation(allowed)[:SYMBOLS].tolist()
    parts = []
    for kind, mapped in (("mapped", True), ("random", False)):
        documents = pair_texts(_TEXTS, min(64, model.cfg.n_ctx // 2), mapped=mapped, symbols=symbols, seed=seed)
        texts = read_texts(model, documents)
        loss = learning_losses(model, texts)
        for at, chosen in (("all", texts.is_read), ("known", _known(texts))):
            sums = {name: np.where(chosen, loss[NO_LEARNING] - own, 0).sum(axis=1) for name, own in loss.items()}
            frame = as_frame(mean_by_document(sums, chosen.sum(axis=1), seed), "control", text=kind, at=at)
            parts.append(frame.assign(loss=[float(own[chosen].mean()) for own in loss.values()]))
    return pd.concat(parts, ignore_index=True)


def _known(texts: Texts) -> Bool[np.ndarray, "text pos"]:
    """Seconds of pairs whose first has been a first before; texts are pairs from their beginning."""
    firsts = texts.tokens[:, ::2].cpu().numpy()
    known = np.zeros(texts.tokens.shape, dtype=bool)
    for row, own in enumerate(firsts):
        known[row, ::2] = [token in own[:place] for place, token in enumerate(own)]
    return known & texts.is_read


@torch.no_grad()
def pair_learner(n_ctx: int = 128, *, symbols: int = SYMBOLS, rate: float = 1.0, seed: int = 0) -> TTTFlow:
    """A model with weights set by hand whose inner learner maps each token to the one behind it.

    A token is a code in both halves of the stream, orthogonal to all others. The smear leaves the first half alone and
    puts the token before into the second: there lie the keys, and the token itself is what must be added for the value.
    A query is the token in the place of a key, so that what the inner model answers, in the first half, is the code of
    the token to come. Blocks add nothing, and the flow, whose gate is nearly shut, next to nothing.
    """
    half = 2 * symbols
    own = TTTFlowConfig(
        ttt_heads=1, ttt_chunk=4, ttt_rate=rate, flow_width=4, flow_hidden=4, bigram_slots=2, bigram_width=2,
        value_layers=0, exclusive_layers=0, rotary_channels=2,
    )  # fmt: skip
    cfg = ModelConfig(
        architecture="ttt_flow", n_layers=1, d_model=2 * half, n_heads=1, n_key_value_heads=1, d_head=4, d_mlp=4,
        d_vocab=symbols, n_ctx=n_ctx, tokenizer_name="bytes", ttt_flow=own,
    )  # fmt: skip
    model = cast(TTTFlow, build_model(cfg, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    code = torch.randn(half, symbols, generator=generator)
    code = half**0.5 * torch.linalg.qr(code).Q.T  # orthogonal, of mean square 1
    cast(Embed, model.embed).W_E.copy_(_SHORT * torch.cat([code, code], dim=1))
    one, zero = torch.eye(half), torch.zeros(half, half)
    model.smear.gate[:half], model.smear.gate[half:] = -30.0, 30.0
    ttt = cast(TTTLinear, model.ttt)
    ttt.W_K.copy_(torch.block_diag(zero, one))
    ttt.W_V.copy_(torch.eye(2 * half))
    ttt.W_Q.copy_(torch.cat([torch.cat([zero, one], dim=1), torch.cat([zero, zero], dim=1)]))
    ttt.W_start.zero_()
    ttt.b_start.zero_()
    ttt.b_start[:, half:].normal_(generator=generator)
    ttt.W_O.copy_(torch.block_diag(_LOUD * one, zero))
    ttt.gate.fill_(4.0)
    return model
