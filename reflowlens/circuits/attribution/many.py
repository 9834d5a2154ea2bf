"""Attribution graphs of many prompts: what they have in common, and how far graphs of such prompts can be trusted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from reflowlens.circuits.attribution.attribute import attribute, one_prompt
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.scores.intervals import mean_intervals
from reflowlens.circuits.attribution.targets import split_targets, token_ids
from reflowlens.circuits.task import TaskPerformance, has_answers, performance_on, warn_unless_done
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.text import read_once
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.processes import of_all_processes, processes
from reflowlens.progress import bar
from reflowlens.prompts import Prompts

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.merged import MergedGraph

SCORES = ("replacement", "completeness", "error_influence", "rest_influence")
USABLE = 0.5  # the replacement score from which on a graph is counted as usable


@dataclass(frozen=True, repr=False, eq=False)
class AttributionGraphs(Sequence[AttributionGraph]):
    """The pruned graphs of several prompts; :func:`attribute_each` makes them.

    Args:
        graphs: one a prompt.
        faithfulness: what :meth:`AttributionGraph.faithfulness` says of each before pruning; empty if it was not asked.
        performance: whether the model does the task, where the prompts came with right and wrong answers.
    """

    graphs: tuple[AttributionGraph, ...]
    faithfulness: tuple[dict[str, Any], ...] = ()
    performance: TaskPerformance | None = None

    @overload
    def __getitem__(self, place: int) -> AttributionGraph: ...
    @overload
    def __getitem__(self, place: slice) -> AttributionGraphs: ...
    def __getitem__(self, place: int | slice) -> AttributionGraph | AttributionGraphs:
        if isinstance(place, slice):
            performance = None if self.performance is None else self.performance[place]
            return AttributionGraphs(self.graphs[place], self.faithfulness[place], performance)
        return self.graphs[place]

    def __len__(self) -> int:
        return len(self.graphs)

    def __iter__(self) -> Iterator[AttributionGraph]:
        return iter(self.graphs)

    def scores(self) -> pd.DataFrame:
        """A row a prompt: its text, the scores of :meth:`AttributionGraph.scores`, which are those before pruning, and
        ``usable``: whether the replacement score is at least 0.5, so that what comes in at the ends of all paths comes
        from the prompt more than from errors. If the graphs were validated, also ``correlation`` and ``trustworthy``
        of :meth:`AttributionGraph.faithfulness`, by what the model does."""
        frame = pd.DataFrame([graph.scores() for graph in self], columns=list(SCORES))
        frame.insert(0, "prompt", [graph.prompt for graph in self])
        frame["usable"] = frame["replacement"] >= USABLE
        for name in ("correlation", "trustworthy") if self.faithfulness else ():
            frame[name] = [found[name] for found in self.faithfulness]
        return frame

    def summary(self, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The scores over prompts, a row each: ``mean``, and ``low`` and ``high``, the middle 95% of the means of
        ``resamples`` resamples of the prompts (percentile bootstrap); ``usable`` and ``trustworthy`` are shares of the
        prompts.

        Example: ``rl.attribute_each(model, prompts, dictionary).summary()``
        """
        scores = self.scores().drop(columns="prompt").astype(float)
        low, high = mean_intervals(scores.to_numpy(), resamples, seed)
        return pd.DataFrame({"mean": scores.mean(), "low": low, "high": high})

    def merged(self, share: float = 0.0, *, resamples: int = 1000, seed: int = 0) -> MergedGraph:
        """One graph of all prompts, as :class:`~reflowlens.circuits.attribution.merged.MergedGraph` defines it.

        Args:
            share: of the prompts, in which a node or edge has to survive pruning to be in it: what is left at 0.5, say,
                is the circuit of a task and not of one sentence.
            resamples, seed: of the prompts, for the intervals.

        Where the model does not do the task that the prompts ask for, a warning says so: the graph is of its failure.

        Raises:
            ReflowlensError: ``share`` is not between 0 and 1.

        Example: ``rl.attribute_each(model, prompts, dictionary, " is", against=" are").merged(0.5).edges``
        """
        from reflowlens.circuits.attribution.merged import merge

        warn_unless_done(self.performance, "what its graphs have in common", stacklevel=3)
        return dataclasses.replace(merge(self, share, resamples, seed), performance=self.performance)

    def __repr__(self) -> str:
        summary = self.summary()
        scores = ", ".join(
            f"{name} {row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]"
            for name, row in zip(summary.index, summary.itertuples(index=False), strict=True)
        )
        return f"AttributionGraphs({len(self)} prompts, {scores})"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        summary = self.summary().rename_axis("score").reset_index()
        rows = summary.astype(object).itertuples(index=False)
        return titled("AttributionGraphs", f"{len(self)} prompts", table(list(summary.columns), rows))


@guarded(changing, lower="the length of the prompts, neurons=, or memory= of the edges that are kept")
def attribute_each(
    model: Any,
    prompts: Any,
    dictionary: Dictionary | None = None,
    targets: Any = None,
    *,
    against: Any = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    validate: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> AttributionGraphs:
    """The attribution graph of every prompt, as :func:`reflowlens.attribute` makes it of one, pruned.

    One graph is whole at a time: kept are the pruned ones with their scores from before, without what they were made of
    (``traced``), so that memory grows by what is left of a prompt. Under torchrun the prompts are shared by the
    processes, and every one returns them all.

    Args:
        model: a hooked decoder, compiled or not.
        prompts: texts, or tokens, of any lengths; two tokens at least. Of :class:`reflowlens.Prompts` the clean texts;
            what is explained is then each one's answer, against its wrong answer, unless ``targets`` says otherwise.
        dictionary: as for one.
        targets: what is explained: one token or feature, the same of every prompt, or a list with an entry a prompt,
            each whatever :func:`reflowlens.attribute` takes. None: the likeliest tokens of each.
        against: a token, or a list with one a prompt.
        node_threshold, edge_threshold: of :meth:`AttributionGraph.prune`; with 1 and 1 nothing is lost but constants
            and what leads nowhere.
        validate: also ask :meth:`AttributionGraph.faithfulness` of each graph, which performs it in the model and takes
            longer than to make it.
        progress: show a bar over the prompts; by default on a terminal.
        options: further ones of :func:`reflowlens.attribute`: ``neurons``, ``signals``, ``memory``, ...

    Raises:
        ReflowlensError: there is no prompt, there are not as many targets as prompts, or one of the errors of
            :func:`reflowlens.attribute`, with the prompt that it is about; prompts and targets are looked at
            before anything is run.

    Example: ``rl.attribute_each(model, prompts, dictionary, [" is", " are"], against=[" are", " is"]).scores()``
    """
    table = prompts if isinstance(prompts, Prompts) else None
    if table is not None:
        prompts = table.clean
        if targets is None and "answer" in table.frame:
            targets = table.answers
            against = table.wrong_answers if against is None and "wrong_answer" in table.frame else against
    listed = _listed(prompts)
    each_target, each_against = _one_each(targets, len(listed), "targets"), _one_each(against, len(listed), "against")
    hooked = hooked_model(model)
    for number, prompt in enumerate(listed):
        with_prompt(number, prompt, _check_asked, hooked, prompt, each_target[number], each_against[number])
    rank, n_processes = processes()
    found: dict[int, tuple[AttributionGraph, dict[str, Any]] | ReflowlensError] = {}
    shown = (sys.stderr.isatty() if progress is None else progress) and rank == 0
    for number in bar(range(rank, len(listed), n_processes), show=shown, unit="prompt", desc="attribution"):
        arguments = hooked, listed[number], dictionary, each_target[number]
        options_of_one = {"against": each_against[number], "progress": False, **options}
        try:
            graph = with_prompt(number, listed[number], attribute, *arguments, **options_of_one)
            judged = with_prompt(number, listed[number], graph.faithfulness) if validate else {}
            found[number] = dataclasses.replace(graph.prune(node_threshold, edge_threshold), traced=None), judged
        except ReflowlensError as error:  # told by every process, lest the others wait for this one
            found[number] = error
            break
    everything = {number: one for part in of_all_processes(found) for number, one in part.items()}
    finished = []
    for number in sorted(everything):
        one = everything[number]
        if isinstance(one, ReflowlensError):
            raise one
        finished.append(one)
    graphs, faithfulness = zip(*finished, strict=True)
    performance = performance_on(hooked, table) if table is not None and has_answers(table) else None
    return AttributionGraphs(graphs, faithfulness if validate else (), performance)


def with_prompt(number: int, prompt: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    """What a function gives for a prompt; an error says which one it was."""
    try:
        return function(*arguments, **options)
    except ReflowlensError as error:
        shown = f" ({prompt!r})" if isinstance(prompt, str) else ""
        raise ReflowlensError(f"prompt {number}{shown}: {error}") from error


def _check_asked(model: Any, prompt: Any, targets: Any, against: Any) -> None:
    """What can be told without running the model."""
    asked, _ = split_targets(targets, model.cfg.n_layers, one_prompt(model, prompt).shape[1])
    for tokens in (asked, None if against is None else [against]):
        if tokens is not None:
            token_ids(model, tokens)


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or getattr(prompts, "ndim", 2) < 2:
        raise ReflowlensError("graphs of several prompts are asked for: give a list of them, also of one")
    listed = list(read_once(prompts))
    if not listed:
        raise ReflowlensError("there is no prompt to make a graph of")
    return listed


def _one_each(value: Any, n_prompts: int, name: str) -> list[Any]:
    if not getattr(value, "ndim", isinstance(value, list | tuple)):
        return [value] * n_prompts
    if len(value) != n_prompts:
        raise ReflowlensError(
            f"{name} has {len(value)} entries for {n_prompts} prompts: give one for all, or a list with one a prompt"
        )
    return list(value)
