"""Small files that the commands of the README and the manual read: texts, chats, analogies and a configuration."""

from __future__ import annotations

import lzma
from pathlib import Path

from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import replacing

ASSETS = Path(__file__).parent / "assets" / "examples"
TRAIN_BYTES = 1_003_854  # of the text; the rest validates, as for the packaged models of bytes


def write_examples(folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write the example files into a folder, which is made if need be; its README.md says what each is.

    Returns:
        The files, in the order of their names. One that is there already, as it would be written, stays.

    Raises:
        ReflowlensError: a file of such a name holds something else, and may not be replaced; then nothing is written.

    Example: ``write_examples("examples")``
    """
    plays = lzma.decompress((ASSETS / "shakespeare.txt.xz").read_bytes())
    contents = {path.name: path.read_bytes() for path in ASSETS.iterdir() if path.suffix != ".xz"}
    contents |= {"train.txt": plays[:TRAIN_BYTES], "val.txt": plays[TRAIN_BYTES:]}
    files = {Path(folder) / name: contents[name] for name in sorted(contents)}
    new = [path for path, content in files.items() if not (path.is_file() and path.read_bytes() == content)]
    if not overwrite and (taken := [path for path in new if path.exists()]):
        raise ReflowlensError(f"{taken[0]} holds something else: choose another folder, or replace it with --overwrite")
    for path in new:
        with replacing(path) as temporary:
            temporary.write_bytes(files[path])
    return list(files)
