"""A function shown by examples: pairs of an input and its output, in front of another input, and that input alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from analyses.statistics.draws import derive_rng
from analyses.tasks.answered import Answered, Scores
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.prompts import Prompts
from reflowlens.sweeps.injections import Injections

TEMPLATE = "{input}:{answer}\n"
_PLACES = ("{input}", "{answer}")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Inputs and outputs of a function, how a pair is written, and which rows of the prompts these are."""

    model: HookedModel
    inputs: list[str]
    outputs: list[str]
    template: str
    rows: list[int]

    @classmethod
    def of(cls, model: HookedModel, prompts: Prompts, template: str) -> Pairs:
        """Check the pairs and the template."""
        Answered.of(model, prompts, least=8)
        places = [template.count(place) for place in _PLACES] if isinstance(template, str) else []
        if places != [1, 1] or template.index(_PLACES[0]) > template.index(_PLACES[1]):
            raise ReflowlensError(f"the template must have {{input}} and behind it {{answer}}, once, got {template!r}")
        outputs = [
            answer if isinstance(answer, str) else model.to_single_str_token(int(answer)) for answer in prompts.answers
        ]
        if len(set(outputs)) < 2:
            raise ReflowlensError(f"every answer is {outputs[0]!r}: there is no function to show")
        return cls(model, prompts.clean, outputs, template, list(range(len(outputs))))

    def __len__(self) -> int:
        return len(self.inputs)

    def halves(self, seed: int) -> tuple[Pairs, Pairs]:
        """Two halves drawn at random: to find heads on, and held out."""
        order = derive_rng(seed, "function_vectors", "halves").permutation(len(self)).tolist()
        return self._part(order[: len(order) // 2]), self._part(order[len(order) // 2 :])

    def _part(self, rows: list[int]) -> Pairs:
        inputs, outputs = ([each[row] for row in rows] for each in (self.inputs, self.outputs))
        return Pairs(self.model, inputs, outputs, self.template, rows)

    def alone(self) -> Answered:
        """Inputs without any example."""
        return self._answered([self._asked(text) for text in self.inputs], range(len(self)))

    def in_context(self, rows: Sequence[int], shown_from: Pairs, n: int, seed: int, shuffled: bool = False) -> Answered:
        """Some inputs, each behind examples.

        Args:
            rows: of the inputs that are asked for.
            shown_from: pairs that examples are drawn from, never the one that is asked for.
            n: examples.
            seed: the same draws the same examples, shuffled or not.
            shuffled: each example has the output of another pair, one that is not its own.
        """
        rng, labels = (derive_rng(seed, "function_vectors", part) for part in ("examples", "labels"))
        texts = []
        for row in rows:
            free = [i for i, text in enumerate(shown_from.inputs) if text != self.inputs[row]]
            examples = []
            for i in rng.permutation(free)[:n]:
                output = shown_from.outputs[i]
                if shuffled:
                    output = str(labels.choice([other for other in shown_from.outputs if other != output]))
                examples.append(self._written(shown_from.inputs[i], output))
            texts.append("".join(examples) + self._asked(self.inputs[row]))
        return self._answered(texts, rows)

    def _answered(self, texts: Sequence[str], rows: Sequence[int]) -> Answered:
        frame = [{"clean": text, "answer": self.outputs[row]} for text, row in zip(texts, rows, strict=True)]
        return Answered.of(self.model, Prompts.of(frame))

    def _written(self, text: str, output: str) -> str:
        before, behind = self.template.split(_PLACES[1])
        return before.replace(_PLACES[0], text) + output + behind

    def _asked(self, text: str) -> str:
        return self.template.split(_PLACES[1])[0].replace(_PLACES[0], text)


@dataclass(frozen=True, eq=False)
class Alone:
    """Inputs without any example, read once, to add vectors to at their last tokens."""

    answered: Answered
    runs: Injections
    before: Scores

    @classmethod
    def of(cls, pairs: Pairs) -> Alone:
        answered = pairs.alone()
        runs = Injections(answered.model, answered.texts, "last")
        return cls(answered, runs, answered.scores(runs.unsteered(runs.layers[-1])))

    def with_vectors(self, layer: int, vectors: Float[Tensor, "vector d_model"]) -> Scores:
        """With each vector added to the stream that a layer reads, [vector * input]."""
        prompt = self.answered.each.repeat(len(vectors))
        end = self.runs.final(layer, prompt, vectors.repeat_interleave(len(self.answered), dim=0))
        return self.answered.scores(end, prompt)
