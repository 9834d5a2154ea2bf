"""Prompts of tasks with a right and a wrong next token: what a circuit of a task, and not of one sentence, is found on.

Every prompt belongs to an item (a noun, a country, a pair of names), and :func:`split` puts whole items into one half:
what is found on one half is judged on words that it has not seen.

``agreement``  a verb agrees in number with its subject: "The old kings of the land" → " were", not " was".
``capitals``   "The capital of Spain is the city of" → " Madrid", not another capital.
``ioi``        indirect objects, like those of Wang et al. (2022): "When Anna and John went home, John gave the book to"
               → " Anna", not " John".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from analyses.statistics.draws import derive_rng
from reflowlens.errors import ReflowlensError


@dataclass(frozen=True)
class TaskPrompt:
    """A text, the token that continues it, one that does not, and what the prompt is about."""

    text: str
    correct: str
    wrong: str
    item: str


_NOUNS = {
    "animal": "animals", "boy": "boys", "building": "buildings", "child": "children", "doctor": "doctors",
    "game": "games", "girl": "girls", "house": "houses", "island": "islands", "king": "kings", "law": "laws",
    "man": "men", "player": "players", "river": "rivers", "school": "schools", "soldier": "soldiers", "song": "songs",
    "student": "students", "teacher": "teachers", "team": "teams",
}  # fmt: skip
_SUBJECTS = (
    ("The old {} of the land", " was", " were"),
    ("In the first year, the {}", " is", " are"),
)
_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Japan": "Tokyo", "Italy": "Rome", "Russia": "Moscow", "China": "Beijing",
    "Spain": "Madrid", "England": "London", "Israel": "Jerusalem", "India": "Delhi", "Canada": "Ottawa",
}  # fmt: skip
_COUNTRIES = (
    "The capital city of {} is called",
    "The capital of {} is the city of",
    "He lived in {}, in the city of",
    "The government of {} is in the city of",
)
_NAMES = ("John", "Mary", "James", "Robert", "Michael", "William", "David", "Richard", "Charles", "Thomas", "George")
_GIVING = (
    "When {other} and {giver} went home, {giver} gave the book to",
    "{other} and {giver} had a long argument, and {giver} said to",
)


def _agreement() -> list[TaskPrompt]:
    found = []
    for (one, many), (text, singular, plural) in product(_NOUNS.items(), _SUBJECTS):
        found.append(TaskPrompt(text.format(one), singular, plural, one))
        found.append(TaskPrompt(text.format(many), plural, singular, one))
    return found


def _capitals() -> list[TaskPrompt]:
    """The wrong capital is that of the next country."""
    cities = list(_CAPITALS.values())
    others = dict(zip(_CAPITALS, cities[1:] + cities[:1], strict=True))
    return [
        TaskPrompt(text.format(country), f" {city}", f" {others[country]}", country)
        for (country, city), text in product(_CAPITALS.items(), _COUNTRIES)
    ]


def _ioi() -> list[TaskPrompt]:
    """Every name with the next two as the one who gives."""
    pairs = [(_NAMES[i], _NAMES[(i + step) % len(_NAMES)]) for i in range(len(_NAMES)) for step in (1, 2)]
    return [
        TaskPrompt(text.format(other=other, giver=giver), f" {other}", f" {giver}", f"{other} and {giver}")
        for (other, giver), text in product(pairs, _GIVING)
    ]


_TASKS = {"agreement": _agreement, "capitals": _capitals, "ioi": _ioi}
TASKS = tuple(_TASKS)


def task_prompts(task: str) -> list[TaskPrompt]:
    """The prompts of a task, 40 or more.

    >>> task_prompts("capitals")[0]
    TaskPrompt(text='The capital city of France is called', correct=' Paris', wrong=' Berlin', item='France')
    """
    if task not in _TASKS:
        raise ReflowlensError(f"no task {task!r}; there are {', '.join(TASKS)}")
    return _TASKS[task]()


def split(prompts: Sequence[TaskPrompt], seed: int = 0) -> tuple[list[TaskPrompt], list[TaskPrompt]]:
    """Two halves, by items, in a random order: those to find a circuit on, and those held out.

    >>> halves = split(task_prompts("capitals"))
    >>> [len(half) for half in halves], {one.item for one in halves[0]} & {one.item for one in halves[1]}
    ([24, 20], set())
    """
    items = list(dict.fromkeys(prompt.item for prompt in prompts))
    order = derive_rng(seed, "task_prompts").permutation(len(items))
    found_on = {items[i] for i in order[: (len(items) + 1) // 2]}
    return [one for one in prompts if one.item in found_on], [one for one in prompts if one.item not in found_on]
