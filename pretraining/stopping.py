"""Ctrl-C as a request: a loop ends between two steps, with everything saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # exit status of a command that was asked to stop and did


class StopRequests:
    """Called, it says whether somebody asked to stop.

    Attributes:
        at_once: interrupt at the first request: as long as there is nothing to save.
    """

    def __init__(self, *, at_once: bool) -> None:
        self.at_once, self.requested = at_once, False

    def __call__(self) -> bool:
        return self.requested

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        interrupts = self.requested or self.at_once
        self.requested = True
        if interrupts:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_requests(*, at_once: bool = False) -> Iterator[StopRequests]:
    """Turn the first Ctrl-C or SIGTERM into a request that the loop reads between steps; a second one interrupts."""
    stop = StopRequests(at_once=at_once)
    try:
        previous = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody sends it signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
