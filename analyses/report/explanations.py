"""What a report says for people: a plain sentence a metric and figure, what decides each verdict, and a glossary.

`templates/explanations.json` holds the English texts, the catalogue (`analyses.report.messages`) their translations;
what a verdict asks for is what `analyses.claims` says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from analyses.claims import Claim, claim_of
from analyses.report.messages import NAMES, recognise, translate
from analyses.result.result import Result


@dataclass(frozen=True)
class Explanation:
    """`says`: what the metric would mean if its claim were true. `claim`: what its verdict asks for."""

    says: str
    claim: Claim | None = None


def explanation(experiment: str, metric: str) -> Explanation | None:
    """Of a metric, in the language of now; None for one that nobody has explained, such as your own.

    >>> explanation("semantic_algebra", "accuracy_at_1").claim.beats
    ('c_alone', 'a_plus_c', 'shuffled_recipe', 'untrained')
    """
    known = _texts()["experiments"].get(experiment, {}).get("metrics", {})
    pattern = max((name for name in known if fnmatchcase(metric, name)), key=len, default=None)
    if metric not in known and pattern is None:
        return None
    says = (known.get(metric) or known[pattern])["says"]
    return Explanation(translate(says), claim_of(experiment, metric))


def figure_explanation(experiment: str, figure: str) -> str:
    """How a figure is to be read; "" for one that nobody has explained."""
    says = _texts()["experiments"].get(experiment, {}).get("figures", {}).get(figure, "")
    return translate(says) if says else ""


def reading(result: Result, metric: str) -> list[str]:
    """The sentences about a metric: what it would mean, which controls decide its verdict and by how much they must be
    beaten, and which do not."""
    explained = explanation(result.name, metric)
    if explained is None:
        return []
    sentences, finding = [explained.says], result.findings.get(metric)
    if finding is None or finding.verdict is None:
        return sentences
    controls, beats = finding.controls, explained.claim.beats if explained.claim else ()
    deciding = [name for name in controls if name in beats]
    others = [name for name in controls if name not in beats]
    if deciding:
        sentences.append(translate("The controls that decide: {controls}.", controls=_listed(deciding)))
        sentences += _smallest_effect(explained.claim)
    else:
        sentences.append(translate("No control decides; the sentence above says what does."))
    if others:
        text = "Shown beside it, without a part in the verdict: {controls}."
        sentences.append(translate(text, controls=_listed(others)))
    low, high = finding.interval or (1.0, 0.0)
    covered = [name for name in others if low <= controls[name] <= high]
    if covered and finding.verdict == "supported":
        text = (
            "The interval covers {controls}; that takes nothing from “supported”, for the claim is about the controls "
            "that decide."
        )
        sentences.append(translate(text, controls=_listed(covered)))
    return sentences


def deciding(result: Result, metric: str) -> frozenset[str]:
    """The controls that the verdict of a metric reads; none where there is no verdict."""
    claim = claim_of(result.name, metric)
    return frozenset(claim.beats if claim and metric in result.verdicts else ())


def _smallest_effect(claim: Claim | None) -> list[str]:
    """By how much the controls that decide must be beaten, as a sentence."""
    if claim is None or not claim.smallest:
        return []
    text = "The whole interval must lie beyond each of them by {amount}, the smallest effect that matters."
    if claim.relative:
        text = "The whole interval must lie beyond each of them by {amount} of it, the smallest effect that matters."
    return [translate(text, amount=claim.amount)]


def glossary() -> dict[str, str]:
    """Term -> what it means, in the language of now."""
    return {translate(term): translate(meaning) for term, meaning in _texts()["glossary"].items()}


def glossed(text: str) -> str:
    """A text as HTML in which the first mention of every term of the glossary tells its meaning when pointed at.

    >>> glossed("A recipe < 3")
    'A <abbr tabindex="0" title="A token&#x27;s row of R: how much of each signal it is made of. Recipe times basis is \
its embedding.">recipe</abbr> &lt; 3'
    """
    for term, meaning in glossary().items():
        if term.endswith(f" ({text})"):  # the sign alone, as a control is named
            return _told(text, meaning)
    meanings = {_bare(term).lower(): meaning for term, meaning in glossary().items()}
    told: set[str] = set()

    def tell(match: re.Match[str]) -> str:
        term = match[1].lower()
        if term in told:
            return match[0]
        told.add(term)
        return _told(match[0], meanings[term])

    terms = "|".join(re.escape(escape(term)) for term in sorted(meanings, key=len, reverse=True))
    return re.sub(rf"(?<![a-z_])({terms})s?(?![a-z_])", tell, escape(text), flags=re.IGNORECASE)


def _told(shown: str, meaning: str) -> str:
    """A term that tells its meaning when pointed at; with the keyboard or a finger, report.css shows it."""
    return f'<abbr tabindex="0" title="{escape(meaning)}">{shown}</abbr>'


def _listed(controls: list[str]) -> str:
    return translate(", ").join(recognise(name.replace("_", " "), *NAMES) for name in controls)


def _bare(term: str) -> str:
    """A term without the sign or remark behind it."""
    return term.partition(" (")[0]


@cache
def _texts() -> dict[str, Any]:
    file = resources.files("analyses.report") / "templates" / "explanations.json"
    return json.loads(file.read_text(encoding="utf-8"))
