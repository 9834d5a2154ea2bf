"""Writing a file so that nobody ever sees half of it, and a folder so that nobody else does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reflowlens.errors import ReflowlensError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix: moved onto it when the block ends, removed if the block fails.

    The folder is made if need be.

    Example: ``with replacing("out/results.json") as temporary: temporary.write_text(text)``
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: str | Path, doing: str) -> Iterator[None]:
    """Make the folder, if need be, and hold it until the block ends or the process does, however that comes.

    Where the file system or the operating system has no locks, nobody is kept out. Folders that were made and in which
    nothing was written are removed, those above it too.

    Args:
        doing: what an error says of the process that holds it, e.g. "writing into".

    Raises:
        ReflowlensError: somebody else holds it.
        OSError: it cannot be made.

    Example: ``with sole_writer("out/run", "training in"): ...``
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None  # the lock goes with it, also when the process is killed
    try:
        if handle is not None and not _locked(handle):
            raise ReflowlensError(
                f"another process is {doing} {str(folder)!r} right now: wait until it ends, or choose another folder"
            )
        yield
    finally:
        with suppress(OSError):  # something was written
            for each in made:
                each.rmdir()
        if handle is not None:
            os.close(handle)


def _locked(handle: int) -> bool:
    """Whether the lock could be had; True as well where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
