"""Data sets by name: streamed from the hub at one revision, or read from what an earlier `load_dataset` left here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pretraining.local_files import Selection, Source, builder_files, chosen_split, documents_of, file_source
from pretraining.readers import HUB_SCHEME, READABLE, one_line, quiet_libraries
from reflowlens.errors import ReflowlensError, nearest

_TIMEOUT_SECONDS = 10
_PARQUET_EXPORT = "refs/convert/parquet"  # where the hub keeps what it converted itself


@dataclass(frozen=True)
class HubDataset:
    """A data set with a short name: where it is, the field with its text (`pretraining.readers`), who may read it, and
    whether it is published as a program, of which only the hub's conversion can be read."""

    hub_id: str
    text_field: str = "text"
    is_gated: bool = False
    is_program: bool = False


HUB_DATASETS = {
    "openwebtext": HubDataset("Skylion007/openwebtext", is_program=True),
    "lima": HubDataset("GAIR/lima", text_field="conversations", is_gated=True),
    "tinystories": HubDataset("roneneldan/TinyStories"),
}


def hub_sources(name: str, selection: Selection) -> list[Source]:
    """The files of a data set's split, at the commit that its revision (default: the newest) has now.

    name: "openwebtext", "lima" or "tinystories", or any name on the hub. Data sets that are published as a program,
        which `datasets` no longer runs, are read from the hub's conversion to parquet.

    Raises ReflowlensError, within seconds and without a network too, if the data set cannot be had: it says why and
    what to do.
    """
    known = HUB_DATASETS.get(name, HubDataset(name))
    selection = replace(selection, text_field=selection.text_field or known.text_field)
    try:
        commit = _commit(known.hub_id, selection.revision)
    except _Unreachable:
        return _downloaded_earlier(name, known, selection)
    try:
        files = _hub_files(known, selection, commit)
    except _IsAProgram:
        if selection.revision is not None:
            raise ReflowlensError(f"{known.hub_id!r} at {selection.revision!r} is a program, not files") from None
        return hub_sources(name, replace(selection, revision=_PARQUET_EXPORT))
    if any("/partial-" in file for file in files):
        print(f"note: the hub has converted only a part of {known.hub_id!r}, and this part is read", file=sys.stderr)
    return _remote_sources(known.hub_id, commit, files, selection)


class _Unreachable(Exception):
    pass


class _IsAProgram(Exception):
    pass


def _commit(hub_id: str, revision: str | None) -> str:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if datasets.config.HF_HUB_OFFLINE:
        raise _Unreachable
    try:
        return str(HfApi().dataset_info(hub_id, revision=revision, timeout=_TIMEOUT_SECONDS).sha)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            raise _Unreachable from error
        raise _refused(hub_id, revision, error) from error
    except Exception as error:  # which errors of connection there are depends on the HTTP library beneath
        raise _Unreachable from error


def _hub_files(known: HubDataset, selection: Selection, commit: str) -> list[str]:
    import datasets

    try:
        with quiet_libraries():
            builder = datasets.load_dataset_builder(known.hub_id, selection.config, revision=commit)
    except RuntimeError as error:
        if "scripts are no longer supported" in str(error):
            raise _IsAProgram from error
        raise _refused(known.hub_id, selection.revision, error) from error
    except Exception as error:  # which there are depends on the libraries
        raise _refused(known.hub_id, selection.revision, error) from error
    kind, splits = builder_files(builder)
    files = chosen_split(splits, known.hub_id, selection)
    if kind not in ("parquet", "arrow", "json", "text"):
        raise ReflowlensError(f"{known.hub_id!r} holds {kind} files: expected {', '.join(READABLE)}")
    return files


def _refused(hub_id: str, revision: str | None, error: Exception) -> ReflowlensError:
    """What the hub's answer means: gated, unknown, or as it says."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
        return ReflowlensError(
            f"the data set {hub_id!r} is gated: accept its terms at {constants.ENDPOINT}/datasets/{hub_id}, "
            "then log in with `hf auth login` (or set HF_TOKEN) and run the same command again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ReflowlensError(
            f"there is no file or folder {hub_id!r}, and no data set of this name on the hub (a private one needs "
            f"`hf auth login`){_nearest(hub_id)}"
        )
    at = "" if revision is None else f" at {revision!r}"
    return ReflowlensError(f"the data set {hub_id!r}{at} could not be loaded: {one_line(error)}")


def _remote_sources(hub_id: str, commit: str, files: Sequence[str], selection: Selection) -> list[Source]:
    prefix = f"{HUB_SCHEME}datasets/{hub_id}@{commit}/"
    paths = [file.removeprefix(prefix) for file in files]
    facts = _hub_facts(hub_id, commit, paths)
    sources = []
    for file, path in zip(files, paths, strict=True):
        size, sha256 = facts.get(path, (0, None))
        name = f"{hub_id}/{path}"
        sources.append(Source(name, sha256, size, documents_of(file, name, selection), commit))
    return sources


def _hub_facts(hub_id: str, commit: str, paths: list[str]) -> dict[str, tuple[int, str | None]]:
    """Size and, of files in large-file storage, sha256, as the hub tells them."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    facts: dict[str, tuple[int, str | None]] = {}
    for first in range(0, len(paths), 500):
        some = paths[first : first + 500]
        try:
            infos = HfApi().get_paths_info(hub_id, some, repo_type="dataset", revision=commit)
        except Exception as error:  # which there are depends on the HTTP library beneath
            raise _refused(hub_id, commit, error) from error
        facts |= {
            info.path: (info.size, info.lfs.sha256 if info.lfs else None)
            for info in infos
            if isinstance(info, RepoFile)
        }
    return facts


def _downloaded_earlier(name: str, known: HubDataset, selection: Selection) -> list[Source]:
    """The arrow files that `load_dataset` left in its cache."""
    import datasets

    try:
        with quiet_libraries(), _offline():
            dataset = datasets.load_dataset(
                known.hub_id, selection.config, split=selection.split, revision=selection.revision
            )
        files = [file["filename"] for file in dataset.cache_files]
    except Exception as error:  # which there are depends on the library
        raise ReflowlensError(_how_without_a_network(name, known, selection)) from error
    return [file_source(file, f"{known.hub_id}/{file.rsplit('/', 1)[-1]}", selection) for file in files]


@contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` look in its cache at once: it would first try to connect for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _how_without_a_network(name: str, known: HubDataset, selection: Selection) -> str:
    import datasets

    tried = "HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set"
    if not datasets.config.HF_HUB_OFFLINE:
        tried = "the hub does not answer; HF_DATASETS_OFFLINE=1 spares the attempt"
    path = "" if name in HUB_DATASETS else f"there is no file or folder {name!r}, and "
    folder = known.hub_id.split("/")[-1].lower()
    revision = selection.revision or (_PARQUET_EXPORT if known.is_program else None)
    at = "" if revision is None else f" --revision {revision}"
    terms = " (once its terms are accepted on its page there)" if known.is_gated else ""
    field = "" if selection.text_field == "text" else f" --text-field {selection.text_field}"
    return (
        f"{path}the data set {known.hub_id!r} was not downloaded earlier and cannot be reached ({tried}). "
        f"Where there is a network, run `hf download {known.hub_id} --repo-type dataset{at} --local-dir {folder}`"
        f"{terms}, copy the folder here, and run `reflowlens prepare ./{folder}{field} --out ...`{_nearest(name)}"
    )


def _nearest(name: str) -> str:
    return "" if "/" in name or name in HUB_DATASETS else nearest(name, list(HUB_DATASETS))
