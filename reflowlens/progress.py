"""How far long work is: a bar on a terminal, and elsewhere (a log, a batch job) one line per unit of work."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

_SECONDS = 10.0  # at least, between two lines of the same work


class _Lines(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    """A bar that writes whole lines: a log keeps every redrawn bar."""

    written = ""

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()  # tqdm's own loop counts only when it draws
        finally:
            self.close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write one line; nothing where tqdm means to wipe its bar."""
        line = self._line()
        if msg is None and line != self.written:
            self.written = line
            self.fp.write(f"{line}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """There is no bar to wipe before another line."""

    def close(self) -> None:
        """Write how long it took, once; of work that leaves no bar only if it was long."""
        if not self.disable and (self.leave or self.written):
            self.display()
        self.leave = False  # tqdm would write its own last line
        super().close()

    def _line(self) -> str:
        elapsed = self.format_dict["elapsed"]
        units = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        parts = [f"{self.n}/{'?' if self.total is None else self.total} {units}", self.desc.rstrip(": ")]
        parts.append(str(self.postfix or ""))
        parts.append(f"{self.format_interval(elapsed)} elapsed")
        done = self.n - self.initial
        if done and self.total and self.n < self.total:
            parts.append(f"about {self.format_interval(elapsed * (self.total - self.n) / done)} left")
        return ", ".join(part for part in parts if part)


def bar(items: Iterable[Any] | None = None, *, show: bool, named: bool = False, **options: Any) -> tqdm[Any]:
    """A progress bar on a terminal; elsewhere lines "3/12 experiments, Signal Flow, 01:20 elapsed, about 04:00 left".

    The time left takes the units that remain to be as long as those that are done.

    Args:
        items: to iterate over.
        show: False shows nothing.
        named: the work calls `set_description` as each unit begins, and every such call is a line. Otherwise a line
            is written at most every 10 seconds, and one at the end.
        options: of `tqdm.tqdm`, such as `total`, `unit` (in the singular), `desc` and `leave`.

    Example: `for rows in bar(batches, show=True, unit="batch", desc="counting"): model(rows)`
    """
    if not show or sys.stderr.isatty():
        return tqdm(items, disable=not show, **options)
    # delay: no line before the first unit has been named or is done
    return _Lines(items, delay=1e-9, miniters=1, mininterval=math.inf if named else _SECONDS, **options)
