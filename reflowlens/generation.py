"""Sampling from a model, one token at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from tqdm import tqdm

from reflowlens.arguments import integer, is_one_of, random_seed, real, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.checked_pass import checked_mask
from reflowlens.models.hooking import NamesFilter
from reflowlens.models.pass_context import growing_text
from reflowlens.models.residual import Readout
from reflowlens.models.text import TextInput, read_once
from reflowlens.models.threads import reading
from reflowlens.models.unwrapping import guarded, hooked_model


@guarded(reading, "max_new_tokens, or the number or the length of the prompts that are given at once")
@torch.no_grad()
def generate(
    model: HookedModel,
    input: TextInput,
    max_new_tokens: int = 60,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = True,
    stop_at_eos: bool = True,
    eos_token_id: int | Iterable[int] | None = None,
    stop_token: str | int | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    use_past_kv_cache: bool = True,
    return_type: Literal["text", "tokens"] = "text",
    names_filter: NamesFilter = None,
    return_cache: bool = False,
    progress: bool | None = None,
    verbose: bool | None = None,
) -> Any:
    """Continue one prompt, or a batch of prompts of any lengths.

    Prompts are not padded on the left: all rows advance together from the end of the shortest prompt, and a row that is
    still inside its prompt reads its own next token instead of a sampled one. Each row therefore gets what it would get
    alone.

    Args:
        model: a hooked model, compiled or not.
        input: a text, a list of texts, a list of rows of token ids, or tokens [batch, pos], a tensor or an array.
        max_new_tokens: tokens to add to each prompt.
        temperature: divides the logits before the softmax; 0 takes the most probable token.
        top_k: sample among the k most probable tokens.
        top_p: sample among the smallest set of most probable tokens whose probabilities sum to at least p.
        do_sample: False takes the most probable token, whatever the temperature.
        stop_at_eos: end a row after the document-end token, or another that ends what an imported model writes.
        eos_token_id: end it after this token, or one of these, in place of the tokenizer's document end.
        stop_token: end a row after this token too.
        attention_mask: [batch, pos], 1 at the own tokens of rows of ids and 0 at padding, in front of them or behind:
            each row continues its own tokens, and the result is padded on the right.
        seed: row i draws from a generator seeded with ``seed + i``.
        use_past_kv_cache: keep keys and values, or the recurrent state, of the text that was read. False reads the
            whole text again at every step, for checking; an intervention at ``"last"`` then acts on the newest token
            alone, and no longer on those that were the newest at earlier steps.
        return_type: ``"text"`` or ``"tokens"``, see below.
        names_filter: hook points of the returned cache, as in ``run_with_cache``.
        return_cache: also return the activations over prompt and continuation, from one pass over the result; for an
            intervention in that pass ``"last"`` is the last position of the result.
        progress: show a bar; by default on a terminal.
        verbose: TransformerLens's name of ``progress``.

    Returns:
        Prompt and continuation: one string for a single text, otherwise a list of strings; or, with ``"tokens"``, ids
        [batch, pos], rows that ended early filled up with the document-end token. With ``return_cache`` a pair of that
        and an :class:`reflowlens.activations.cache.ActivationCache`.

    Raises:
        ReflowlensError: a prompt is empty, a setting is out of range, prompt and continuation exceed ``n_ctx``, or the
            logits are NaN or infinite.
        OutOfMemory: the batch does not fit; a ReflowlensError that says what to lower.

    Example: ``model.generate("The king", 20, temperature=0.8, top_k=50, seed=1)``
    """
    forward, model = model, hooked_model(model)  # a compiled model reads compiled
    _check_settings(temperature, top_k, top_p, max_new_tokens)
    seed = random_seed(seed)
    if not is_one_of(return_type, ("text", "tokens")):
        raise ReflowlensError(f"return_type must be 'text' or 'tokens', got {return_type!r}")
    input = read_once(input)
    if attention_mask is not None:
        input = _own_tokens(model, input, attention_mask)
    prompts, lengths = model.tokens_and_lengths(input)
    _check_room(lengths, max_new_tokens, model.cfg.n_ctx)
    stops = _stop_ids(model, stop_at_eos, eos_token_id, stop_token)
    temperature = temperature if do_sample else 0
    progress = verbose if progress is None else progress

    tokens = F.pad(prompts, (0, max_new_tokens), value=model.tokenizer.eot_token or 0)
    starts, n_vocab = torch.tensor(lengths, device=tokens.device), model.tokenizer.n_vocab
    # Of each row, one after its last token, earlier once it has drawn a stop token. Rows are kept count of in Python: a
    # tensor of them would be asked several times a step.
    ends = [length + max_new_tokens for length in lengths]
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(tokens))]
    past = model.make_cache(len(tokens), next(model.parameters()).dtype) if use_past_kv_cache else None
    read, end = 0, min(lengths)
    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=tokens.shape[1] - end, unit="token", disable=not shown)
    # Faster than passes without gradients, but no backward pass may ever read a tensor of it.
    unseen = torch.inference_mode() if forward is model and _passes_unseen(model) else contextlib.nullcontext()
    with bar, unseen:
        while max(ends) > end:
            with growing_text(ready=starts <= end):
                logits = forward(tokens[:, read:end], _newest, past_kv_cache=past)[:, :n_vocab]
            # Rows still inside their prompt draw nothing, so that they stay as if alone.
            drawing = [row for row, length in enumerate(lengths) if length <= end < ends[row]]
            every = len(drawing) == len(tokens)
            drawn = sample(
                logits if every else logits[drawing], temperature, top_k, top_p, [generators[row] for row in drawing]
            )
            tokens[slice(None) if every else drawing, end] = drawn.to(tokens.device)
            for row, token in zip(drawing, drawn.tolist(), strict=True):
                if token in stops:
                    ends[row] = end + 1
            read, end = (end if past is not None else 0), end + 1
            bar.update()

    tokens = tokens[:, : max(ends)]
    result = tokens if return_type == "tokens" else _texts(model, input, tokens, ends)
    if not return_cache:
        return result
    _, cache = model.run_with_cache(tokens, names_filter=names_filter)
    cache.lengths = ends
    return result, cache


def _passes_unseen(model: HookedModel) -> bool:
    """Whether nobody can keep a tensor of a pass: no hook is attached, and no module is somebody's own."""
    if _has_any_global_hook():
        return False
    for module in model.modules():
        is_own = type(module) is nn.ModuleList or type(module).__module__.startswith("reflowlens.")
        is_seen = module._forward_hooks or module._forward_pre_hooks or getattr(module, "keep", None) is not None
        if is_seen or not is_own or "forward" in vars(module):  # one put in place of the class's
            return False
    return True


def _newest(readout: Readout) -> Float[Tensor, "batch d_vocab"]:
    """The logits of a pass's last position."""
    return readout._replace(features=readout.features[:, -1:]).logits()[:, 0]


def _texts(model: HookedModel, input: TextInput, tokens: Int[Tensor, "batch pos"], ends: list[int]) -> str | list[str]:
    """Each row up to its end, without a ``bos_token`` that was prepended; one text if the input is one."""
    texts_given = not isinstance(input, Tensor | np.ndarray)
    given: list[Any] = [input] if isinstance(input, str) else list(input if texts_given else tokens)
    begin = model.text_start()
    spelled = tuple(map(model.tokenizer.token_str, begin))
    starts = [len(begin) if isinstance(row, str) and not row.startswith(spelled or " ") else 0 for row in given]
    rows = zip(tokens, starts, ends, strict=True)
    texts = [model.tokenizer.decode(row[start:end].tolist()) for row, start, end in rows]
    return texts[0] if isinstance(input, str) else texts


def sample(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generators: list[torch.Generator],
) -> Int[Tensor, " batch"]:
    """Draw a token for each row, from the row's own generator.

    Args:
        temperature, top_k, top_p: as for :func:`generate`, applied in this order.

    Raises:
        ReflowlensError: a logit is NaN, or a row's largest is infinite, before or after the division by temperature.
    """
    _check_finite(logits, "the weights, or an intervention, are not finite, or the logits overflow their type")
    if temperature == 0 or not generators:  # no row draws while all are in their prompts or have ended
        return logits.argmax(dim=-1)
    logits = logits.float() / float(temperature)
    _check_finite(logits, f"divided by temperature={temperature} they overflow; temperature=0 takes the likeliest")
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    # One uniform number per row against the cumulated probabilities: `torch.multinomial` would draw one per token.
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1).cpu()
    uniform = torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=own) for own in generators])
    total = cumulated[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulated, uniform * total, right=True)
    last_possible = torch.searchsorted(cumulated, total)  # where the product is rounded up to the total
    return torch.minimum(drawn, last_possible).squeeze(1)


def _check_finite(logits: Float[Tensor, "batch d_vocab"], why: str) -> None:
    # A largest logit of NaN or infinity leaves no distribution; -inf beside a finite one is a token of probability 0.
    highest = logits.amax(dim=-1)
    if not highest.isfinite().all():
        raise ReflowlensError(f"the logits are {'NaN' if highest.isnan().any() else 'infinite'}: {why}")


def _check_settings(temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int) -> None:
    if real(temperature) is None or not temperature >= 0:
        raise ReflowlensError(f"temperature must be 0 (greedy) or positive, got {temperature!r}")
    if top_k is not None:
        whole_number(top_k, "top_k", 1)
    if top_p is not None and (real(top_p) is None or not 0 < top_p <= 1):
        raise ReflowlensError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    whole_number(max_new_tokens, "max_new_tokens", 1)


def _check_room(lengths: list[int], max_new_tokens: int, n_ctx: int) -> None:
    if max(lengths) + max_new_tokens > n_ctx:
        raise ReflowlensError(
            f"{max(lengths)} prompt tokens and max_new_tokens={max_new_tokens} exceed n_ctx={n_ctx}: "
            f"ask for at most {n_ctx - max(lengths)} new tokens"
        )


def _own_tokens(model: HookedModel, input: TextInput, attention_mask: Tensor) -> list[list[int]]:
    """The rows of ids without their padding."""
    if not isinstance(input, Tensor | np.ndarray):
        raise ReflowlensError("attention_mask goes with tokens [batch, pos]: texts of any lengths need none")
    tokens = model.to_tokens(input)
    own = checked_mask(attention_mask, tokens.shape).to(tokens.device)
    return [row[kept].tolist() for row, kept in zip(tokens, own, strict=True)]


def _stop_ids(
    model: HookedModel, stop_at_eos: bool, eos: int | Iterable[int] | None, stop_token: str | int | None
) -> set[int]:
    one = eos is None or isinstance(eos, str) or integer(eos) is not None
    ends: list[Any] = [eos] if one else list(cast("Iterable[Any]", eos))
    given = {"stop_token": [stop_token], "eos_token_id": ends}
    ids: list[int | None] = [*model.tokenizer.end_tokens] if stop_at_eos and eos is None else []
    for name, tokens in given.items():
        for token in tokens:
            stop = model.to_single_token(token) if isinstance(token, str) else integer(token)
            if token is not None and (stop is None or not 0 <= stop < model.cfg.d_vocab):
                raise ReflowlensError(
                    f"{name} must be a token's text or its id, 0 to {model.cfg.d_vocab - 1}, got {token!r}"
                )
            ids.append(stop)
    return {i for i in ids if i is not None}
