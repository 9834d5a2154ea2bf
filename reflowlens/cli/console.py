"""What the command line writes to, which may be unable to show a character, or be closed before everything is read."""

from __future__ import annotations

import io
import os
import sys

BROKEN_PIPE = 141  # what a shell reports of a tool that a closed pipe ended: 128 + SIGPIPE


def show_every_character() -> None:
    """Let a console that lacks a character (an emoji, on one of cp1252) show its escape, ``\\U0001f642``, instead.

    Standard error does so by itself, and so does what ``PYTHONIOENCODING=cp1252:replace`` asks for otherwise.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write what is in the buffer: little output meets a closed pipe or a full disk only here.

    Raises:
        OSError: standard output cannot be written.
    """
    if sys.stdout is not None:  # a process may be started without one
        sys.stdout.flush()


def drop_unwritten() -> None:
    """Leave nothing that the interpreter would fail to write as it ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
