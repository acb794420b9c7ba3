"""Files of the Hugging Face Hub: from the cache, else by one attempt; whole by their hash.

Offline is what ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` say at the moment of the call. The
Hub's own client asks again for half a minute where there is no network; here the first answer, or
its absence after ``HF_HUB_ETAG_TIMEOUT`` seconds (2), is the last. The client also waits for each
read by itself, so that one byte every few seconds would go on for ever: here a server that sends
next to nothing is given up, ``answered`` and ``watched``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from ..errors import CheckpointError, InputError, WeightsError, first_line
from ..paths import cache_folder
from ..progress import bar, note, waiting
from ..replacing import write_text
from .files import load_json

PREFIX = "hf-hub:"
# As open_clip names them, the better one first.
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
LEAST = 1 << 16  # bytes that a download has to bring within ...
WINDOW = 45.0  # ... so many seconds
QUESTION = 20.0  # seconds that a question without a body may take
_LOOK = 0.1  # seconds between two looks
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_LARGE = 1 << 28  # bytes: hashed in a second or more
_TOLD = 10**6  # bytes of a download that is announced
_YES = ("1", "on", "yes", "true")
_T = TypeVar("_T")


def offline() -> bool:
    """Return whether the Hub may not be asked."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in _YES for name in names)


def check_repo(repo: str) -> str:
    """Return ``repo`` itself.

    Raises:
        InputError: unless it is owner/name.
    """
    if not _REPO.fullmatch(repo):
        raise InputError(
            f"repository is {repo!r}; expected owner/name, as in {PREFIX}timm/ViT-B-16-SigLIP"
        )
    return repo


def client() -> Any:
    """Import the Hub's client, which comes with open_clip."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"weights of the Hub need huggingface_hub ({first_line(error)}): pip install "
            "'ovseg-kernels[models]'"
        ) from error
    return huggingface_hub


def hub_cache() -> Path:
    """Return the folder of the Hub's cache."""
    return Path(os.environ.get("HF_HUB_CACHE") or client().constants.HF_HUB_CACHE)


def cached(repo: str, files: Sequence[str]) -> Path | None:
    """Return the first of ``files`` that the cache holds, whole."""
    for file in files:
        found = client().try_to_load_from_cache(repo, file, cache_dir=hub_cache())
        if isinstance(found, str):
            check_hash(Path(found), f"{PREFIX}{repo}")
            return Path(found)
    return None


def fetch(
    repo: str, files: Sequence[str], *, ways: str = "", patience: float | None = None
) -> Path:
    """Return the first of ``files`` that the cache or the Hub's repository holds.

    Args:
        repo: owner/name.
        files: names in it, the best first; any will do.
        ways: what else the user may do, for the message where nothing can be had.
        patience: seconds in which the Hub must say that it has a file; ``QUESTION`` if None.

    Raises:
        WeightsError: where there is neither the file nor the network; CheckpointError: for a file
            that is cut or damaged.
    """
    check_repo(repo)
    found = cached(repo, files)
    if found is not None:
        return found
    missing = partial(_unavailable, repo, files, ways)
    if offline():
        raise missing(
            "the Hub may not be asked (--offline, HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
        )
    endpoint = os.environ.get("HF_ENDPOINT") or None
    for file in files:
        size = _size(repo, file, endpoint, missing, patience or QUESTION)
        if size is None:
            continue
        if size > _TOLD:
            note(
                f"{file} from https://huggingface.co/{repo}: {size / 1e6:.0f} MB, licence "
                f"{_licence(repo, endpoint)}"
            )
        try:
            with waiting(f"downloading {file}, {size / 1e6:.0f} MB"):
                path = _download(repo, file, endpoint)
        except Exception as error:  # of httpx, httpx2 or requests, as the client's version has it
            raise missing(f"the download of {file} broke off ({_line(error)})") from error
        check_hash(path, f"{PREFIX}{repo}")
        return path
    raise missing(f"{repo} holds none of {', '.join(files)}")


def _size(
    repo: str,
    file: str,
    endpoint: str | None,
    missing: Callable[[str], WeightsError],
    patience: float,
) -> int | None:
    """Ask the Hub for the bytes of a file; None where the repository has none of this name."""
    hub = client()
    options: dict[str, Any] = {"timeout": asking_seconds()}
    if "retry_on_errors" in signature(hub.get_hf_file_metadata).parameters:
        options["retry_on_errors"] = False
    try:
        address = hub.hf_hub_url(repo, file, endpoint=endpoint)
        ask = partial(hub.get_hf_file_metadata, address, **options)
        return answered(ask, patience).size or 0
    except hub.errors.EntryNotFoundError:
        return None
    except hub.errors.GatedRepoError as error:
        raise missing(
            f"{repo} asks for a licence to be accepted first, on https://huggingface.co/{repo}; "
            "then hf auth login"
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise missing(f"the Hub knows no {repo}, or it is private (hf auth login)") from error
    except Exception as error:  # as of downloads; most are no OSError
        raise missing(f"the Hub does not answer ({_line(error)})") from error


def _download(repo: str, file: str, endpoint: str | None) -> Path:
    """Download a file into the cache.

    Where too little comes it is ended, if the client has a session that says what comes: versions
    from 1.0 on.
    """
    hub = client()
    received = Received()
    session = hub.get_session() if hasattr(hub, "get_session") else None
    download = partial(hub.hf_hub_download, repo, file, cache_dir=hub_cache(), endpoint=endpoint)
    if not hasattr(session, "event_hooks"):
        return Path(download())

    tqdm: Any = hub.utils.tqdm

    class Bar(tqdm):
        """The client's own bar, which also hears of files of Xet's store.

        Those do not come through the session.
        """

        def update(self, n: float | None = 1) -> bool | None:
            received.add(n)
            return super().update(n)

    with counted(session, received):
        return Path(watched(partial(download, tqdm_class=Bar), received))


def check_hash(path: Path, source: str) -> None:
    """Compare a file of the Hub's cache with its name there, once for each state of it.

    The name is SHA-256 of large files, git's SHA-1 of others.

    Args:
        path: of the file.
        source: where it comes from, for messages.

    Raises:
        CheckpointError: if it is not what the Hub has; the file may be cut.
    """
    # One step along the links: a store that caches share may lie behind the blob, under hashes of
    # another kind.
    blob = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
    expected = blob.name
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return  # a file system without links: only its reader can tell
    status = blob.stat()
    state = [status.st_size, status.st_mtime_ns]
    folder = cache_folder()
    seen = folder / "hashes" / f"{expected}.json" if folder else None
    with contextlib.suppress(OSError, ValueError):
        if seen is not None and load_json(seen) == state:
            return
    found = _hub_hash(blob, status.st_size, path.name, git=len(expected) == 40)
    if found != expected:
        raise CheckpointError(
            f"{path} ({status.st_size} bytes, from {source}) is cut or damaged: its hash is "
            f"{found[:12]}... and the Hub's is {expected[:12]}...; remove {blob} and fetch it again"
        )
    if seen is not None:
        with contextlib.suppress(OSError):  # it is hashed again next time
            write_text(seen, json.dumps(state))


def _hub_hash(blob: Path, size: int, title: str, *, git: bool) -> str:
    """Hash a file as git or as the Hub does it, with a bar where that takes a while."""
    digest = hashlib.sha1(b"blob %d\0" % size) if git else hashlib.sha256()
    desc = f"checking {title}"
    shown = bar(show=size > _LARGE, total=size, unit="B", unit_scale=True, desc=desc, leave=False)
    with open(blob, "rb") as file, shown:
        while part := file.read(1 << 22):
            digest.update(part)
            shown.update(len(part))
    return digest.hexdigest()


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    message: str = "Upload model",
    token: str | None = None,
) -> str:
    """Upload a folder as a repository of the Hub, made if there is none; return its address."""
    api = client().HfApi(token=token)
    api.create_repo(check_repo(repo), private=private, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message=message)
    return f"https://huggingface.co/{repo}"


def asking_seconds() -> float:
    """Return how long each read of an answer to a question may take."""
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 2)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _licence(repo: str, endpoint: str | None) -> str:
    page = f"see https://huggingface.co/{repo}"
    try:
        ask = partial(client().HfApi(endpoint=endpoint).model_info, repo, timeout=asking_seconds())
        card = answered(ask).card_data
    except Exception:  # the file is what was asked for
        return page
    return str(card["license"]) if card and card.get("license") else f"not stated, {page}"


def _unavailable(repo: str, files: Sequence[str], ways: str, why: str) -> WeightsError:
    error = WeightsError(
        f"{repo} is not in the cache ({hub_cache()}) and cannot be fetched: {why}. Ways on: with "
        "a network, the same command; from elsewhere, "
        f"https://huggingface.co/{repo}/resolve/main/{files[0]}{ways}"
    )
    error.why = why
    return error


class Stalled(OSError):
    """A server that sends too little."""


class Received:
    """Bytes that have come so far.

    Attributes:
        bytes: as counted by whoever sees them come.
        ended: whether nobody waits any more.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.ended = False

    def add(self, count: float | None = 1) -> None:
        """Count bytes.

        A download that nobody waits for any more lets go of its lock and its unfinished file.

        Raises:
            Stalled: into such a download.
        """
        self.bytes += int(count or 0)
        if self.ended:
            raise Stalled("the download was given up")


def answered(ask: Callable[[], _T], patience: float | None = None) -> _T:
    """Return ``ask()``, a question with a short answer.

    Stalled after ``patience`` seconds, ``QUESTION`` if None.
    """
    return _awaited(ask, Received(), patience or QUESTION, 1, tidy=0.0)


def watched(download: Callable[[], _T], received: Received) -> _T:
    """Return ``download()``; Stalled if ``WINDOW`` seconds bring less than ``LEAST`` bytes."""
    return _awaited(download, received, WINDOW, LEAST)


def _awaited(
    work: Callable[[], _T], received: Received, window: float, least: int, tidy: float = 1.0
) -> _T:
    """Return what ``work`` gives, or raise what it raises.

    It runs in a thread of its own, which is left behind where it is too slow: its reads cannot be
    broken off.

    Args:
        work: asks or downloads.
        received: counts what comes.
        window: seconds that bring at least ...
        least: ... so many bytes.
        tidy: seconds in which work that is given up may take its unfinished file away.
    """
    found: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised again below
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    began = time.monotonic()
    before = 0
    try:
        while thread.is_alive():
            thread.join(_LOOK)
            now = time.monotonic()
            count = received.bytes
            if count - before >= least:
                began = now
                before = count
            elif now - began > window and thread.is_alive():
                raise Stalled(
                    f"the server sent {count - before} bytes in {window:.0f} seconds; expected at "
                    f"least {least}"
                )
    except BaseException:  # Ctrl-C too
        received.ended = True
        thread.join(tidy)  # until its next byte
        raise
    if failed:
        raise failed[0]
    return found[0]


@contextmanager
def counted(session: Any, received: Received) -> Iterator[None]:
    """Count the bytes of all answers to ``session``, a client of httpx, as they come."""

    def count(response: Any) -> None:
        stream = response.stream
        # httpx asks for a stream of a class of its own.
        kinds = type(stream).__mro__
        base = next(kind for kind in kinds if kind.__name__ == "SyncByteStream")

        class Counted(base):  # type: ignore[misc, valid-type]
            def __iter__(self) -> Iterator[bytes]:
                for part in stream:
                    received.add(len(part))
                    yield part

            def close(self) -> None:
                stream.close()

        response.stream = Counted()

    hooks = session.event_hooks["response"]
    hooks.append(count)
    try:
        yield
    finally:
        hooks.remove(count)
