"""``model.hooks``: the names of hook points as attributes, for completion, and what attaches hooks when called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from reflowlens.errors import ReflowlensError, nearest

_BEFORE_ATTENTION = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


def point_name(name: str) -> str:
    """A point's own name, of the one that TransformerLens's short names stand for too.

    >>> point_name("blocks.3.hook_q_input"), point_name("blocks.3.hook_mlp_in")
    ('blocks.3.attn.hook_q_input', 'blocks.3.hook_mlp_in')
    """
    block, _, point = name.rpartition(".")
    return f"{block}.attn.{point}" if point in _BEFORE_ATTENTION and block and not block.endswith("attn") else name


class HookNames:
    """Part of a model's tree of hook points: an attribute or an index goes down, and ends at a name.

    >>> names = HookNames(["hook_embed", "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"])
    >>> names.blocks[-1].attn.hook_z, dir(names), len(names.blocks)
    ('blocks.1.attn.hook_z', ['blocks', 'hook_embed'], 2)
    """

    def __init__(self, names: Sequence[str], prefix: str = "") -> None:
        self._names, self._prefix = names, prefix
        self._parts = dict.fromkeys(name[len(prefix) :].partition(".")[0] for name in names)

    def __getattr__(self, part: str) -> Any:
        if part.startswith("__") or part not in self._parts:
            where = self._prefix.rstrip(".") or "the model"
            raise AttributeError(f"no hook point {part!r} in {where}{nearest(part, list(self._parts))}")
        return self._below(part)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self) or not all(map(str.isdigit, self._parts)):
            raise ReflowlensError(
                f"no hook point {self._prefix.rstrip('.')}[{index}]: there are {', '.join(dir(self))}"
            )
        return self._below(list(self._parts)[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._below, self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __dir__(self) -> list[str]:
        return list(self._parts)

    def __repr__(self) -> str:
        return f"hook points of {self._prefix.rstrip('.') or 'the model'}: {', '.join(self._parts)}"

    def _below(self, part: str) -> Any:
        name = self._prefix + part
        below = [other for other in self._names if other.startswith(f"{name}.")]
        return HookNames(below, f"{name}.") if below else name


class ModelHooks(HookNames):
    """``model.hooks``: called, it attaches hooks for a ``with`` block; its attributes are the names of hook points.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> model.hooks.blocks[3].attn.hook_z
        'blocks.3.attn.hook_z'
        >>> with model.hooks([(model.hooks.hook_embed, lambda x, hook: 2 * x)]):
        ...     logits = model("The capital of France is")
    """

    def __init__(self, names: Sequence[str], attach: Callable[..., AbstractContextManager[Any]]) -> None:
        super().__init__(names)
        self._attach = attach

    def __call__(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> AbstractContextManager[Any]:
        """Attach hooks, pairs of a point's name (or a predicate of names) and a function, for a ``with`` block.

        They are always removed, and no others, also after an exception and where blocks overlap.

        Raises:
            ReflowlensError: a hook point does not exist, a forward hook had not run by the end of the block, or another
                thread is using the model.
        """
        return self._attach(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)
