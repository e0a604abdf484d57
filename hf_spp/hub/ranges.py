"""Byte ranges of files of Hub repositories, read in parallel and cached like downloads.

Cached ranges lie in the Hugging Face cache, in the repository's folder: `spp_ranges/KEY/START-STOP` holds bytes of the
file whose ETag has that key, `spp_ranges/commits/COMMIT/NAME.json` says which ETag and size a file has at a commit.
"""

import hashlib
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, get_session, hf_raise_for_status
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm

from .. import checkpoint
from ..byte_ranges import Range, coalesced, divided, length_of, missing
from ..errors import CheckpointError, HubError
from .failures import explained
from .files import check_inside, resolve_file
from .retries import retried

# What a request costs, in bytes that a connection could have moved instead: about 50 ms until its first byte, at the
# 5 MB/s that each of eight connections has on a line of 300 Mbit/s. A gap that is smaller is read along.
REQUEST_BYTES = 1 << 18
_CONNECTIONS = 8
# One answer is held in memory for each connection, and is what a failure loses.
_LARGEST = 1 << 23
# What storage answers when a signed address is no longer valid.
_EXPIRED = (400, 401, 403, 404, 410)
_SEGMENT = re.compile(r"(\d{1,18})-(\d{1,18})")


class _Interrupted(ConnectionError):
    """An answer that is not what was asked for, and may be at the next attempt."""


@dataclass
class Transfer:
    """What went over the network.

    Attributes:
        bytes: Bytes of bodies, those of failed attempts too.
        requests: Requests for ranges, failed attempts too.
    """

    bytes: int = 0
    requests: int = 0


def resolve_commit(repo: str, revision: str | None = None, token: str | bool | None = None) -> str:
    """The commit that a revision of a model's repository names now; without network, when it was last seen.

    Raises:
        HubError: The repository or revision does not exist, has no config.json, or cannot be reached.
    """
    return resolve_file(repo, "config.json", revision=revision, token=token).parent.name


class RemoteFile:
    """One file of a repository at one commit, of which byte ranges are read.

    Args:
        repo: Id of the repository.
        name: The file's path in it.
        commit: Full id of the commit.
        token: As for `resolve_file`.

    Attributes:
        size: Bytes of the whole file.
        etag: What names its content: for large files their SHA-256.
        sha256: The SHA-256 of the whole file where the Hub knows it, else None.

    Raises:
        HubError: The file does not exist, needs access rights, or cannot be reached.
    """

    def __init__(self, repo: str, name: str, commit: str, token: str | bool | None = None) -> None:
        check_inside(repo, name)
        self.repo, self.name, self.commit, self._token = repo, name, commit, token
        self._location, self._lock = "", threading.Lock()
        folder = constants.REPO_ID_SEPARATOR.join(["models", *repo.split("/")])
        cache = Path(constants.HF_HUB_CACHE) / folder / "spp_ranges"
        note = cache / "commits" / commit / f"{name}.json"
        known = _noted(note)
        if known is None:
            etag, size, self._location = self._resolve()
            known = etag, size
            checkpoint.write_json(note, {"etag": etag, "size": size})
        self.etag, self.size = known
        self.sha256 = self.etag if re.fullmatch(r"[0-9a-f]{64}", self.etag) else None
        self._folder = cache / hashlib.sha256(self.etag.encode()).hexdigest()[:40]
        self.look_again()

    def look_again(self) -> None:
        """Look which ranges are in the cache now."""
        self._segments = self._scan()
        self._joined = coalesced((segment for segment, _ in self._segments), 0)

    def cached(self) -> list[Range]:
        """The ranges that are in the cache, joined."""
        return self._joined

    def covers(self, start: int, stop: int) -> bool:
        """Whether all bytes of a range are in the cache."""
        index = bisect_right(self._joined, start, key=lambda one: one[0]) - 1
        return index >= 0 and self._joined[index][1] >= stop

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill a buffer with cached bytes from `start` on.

        Raises:
            CheckpointError: They are not in the cache, or it cannot be read.
        """
        at, stop = start, start + len(out)
        index = bisect_right(self._segments, at, key=lambda segment: segment[0][0]) - 1
        for (first, last), path in self._segments[max(index, 0) :]:
            if not first <= at < min(last, stop):
                break
            end = min(last, stop)
            checkpoint.read_into(path, at - first, out[at - start : end - start])
            at = end
        if at < stop:
            raise CheckpointError(
                f"Bytes {at} to {stop} of {self.name} of {self.repo!r} are not in the cache. Accepted: ranges that "
                "were fetched. Fetch them before."
            )

    def _scan(self) -> list[tuple[Range, Path]]:
        """Cached ranges with their files, ascending; what others cover is left out."""
        found, end = [], 0
        for entry in os.scandir(self._folder) if self._folder.is_dir() else ():
            match = _SEGMENT.fullmatch(entry.name)
            if match and int(match[2]) <= self.size and entry.stat().st_size == int(match[2]) - int(match[1]):
                found.append(((int(match[1]), int(match[2])), Path(entry.path)))
        kept = []
        for (start, stop), path in sorted(found, key=lambda one: (one[0][0], -one[0][1])):
            if stop > end:
                kept.append(((start, stop), path))
                end = stop
        return kept

    def _resolve(self) -> tuple[str, int, str]:
        """ETag and size as the Hub says, and where the bytes lie."""
        url = huggingface_hub.hf_hub_url(self.repo, self.name, revision=self.commit)
        with explained(self.repo, self.commit, f"file {self.name!r}"):
            found = retried(lambda: huggingface_hub.get_hf_file_metadata(url, token=self._token))
            if found.etag is None or found.size is None:
                raise _Interrupted("the answer names no ETag or no size")
        return found.etag, found.size, found.location

    def _source(self) -> tuple[str, bool]:
        """Address of the bytes, and whether that is the Hub's own, where alone a token may go."""
        with self._lock:
            if not self._location:
                etag, size, self._location = self._resolve()
                if (etag, size) != (self.etag, self.size):
                    raise HubError(
                        f"{self.name} of {self.repo!r} at commit {self.commit} is another file than before. Accepted: "
                        "a commit whose files stay as they are. Clear this repository's cache (`hf cache rm`)."
                    )
            location = self._location
        own = huggingface_hub.hf_hub_url(self.repo, self.name, revision=self.commit)
        return location, _origin(location) == _origin(own)

    def _fetch(self, start: int, stop: int, count: Callable[[int, int], None]) -> None:
        with explained(self.repo, self.commit, f"bytes {start} to {stop} of {self.name!r}"):
            data = retried(lambda: self._ask(start, stop, count))
        checkpoint.write_bytes(self._folder / f"{start}-{stop}", bytes(data))

    def _ask(self, start: int, stop: int, count: Callable[[int, int], None]) -> bytearray:
        location, own = self._source()
        headers = build_hf_headers(token=self._token if own else False)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        count(0, 1)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", location, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code in _EXPIRED and not own:
                self._location = ""
                raise _Interrupted(f"the storage of the Hub answered {response.status_code}")
            hf_raise_for_status(response)
            self._check(response, start, stop)
            data = bytearray()
            for piece in response.iter_bytes():
                count(len(piece), 0)
                data += piece
                if len(data) > stop - start:
                    break
        if len(data) != stop - start:
            raise _Interrupted(f"the answer ended at {len(data):,} bytes of {stop - start:,}")
        return data

    def _check(self, response: Any, start: int, stop: int) -> None:
        """Refuse an answer that holds other bytes than were asked for, before its body is read."""
        if response.status_code == 200 and (start, stop) != (0, self.size):
            raise HubError(
                f"The server answers with the whole of {self.name} of {self.repo!r} ({self.size:,} bytes) where a part "
                "was asked for. Accepted: a server that knows HTTP ranges. Download the repository "
                f"(`hf download {self.repo}`), and load again."
            )
        wanted = f"bytes {start}-{stop - 1}/{self.size}"
        found = response.headers.get("Content-Range")
        if response.status_code == 206 and found != wanted:
            raise _Interrupted(f"the answer is {found!r} instead of {wanted!r}")
        encoding = response.headers.get("Content-Encoding", "identity")
        length = response.headers.get("Content-Length", str(stop - start))
        if encoding != "identity" or length != str(stop - start):
            raise _Interrupted(f"the answer has {length} bytes ({encoding}) instead of {stop - start}")


def open_file(repo: str, name: str, commit: str, token: str | bool | None = None) -> Path | RemoteFile:
    """A file of a repository at a commit: its path where all of it was downloaded before, else one to read ranges of.

    Raises:
        HubError: The file does not exist, needs access rights, or cannot be reached.
    """
    check_inside(repo, name)
    with explained(repo, commit, f"file {name!r}"):
        whole = huggingface_hub.try_to_load_from_cache(repo, name, revision=commit)
    return Path(whole) if isinstance(whole, str) else RemoteFile(repo, name, commit, token)


def open_files(
    repo: str, names: Sequence[str], commit: str, token: str | bool | None = None
) -> list[Path | RemoteFile]:
    """Several files of a repository, as `open_file` gives each."""
    with ThreadPoolExecutor(_CONNECTIONS, "hf_spp-files") as pool:
        return list(pool.map(lambda name: open_file(repo, name, commit, token), names))


def has_file(repo: str, name: str, commit: str, token: str | bool | None = None) -> bool:
    """Whether a repository has a file at a commit; without network, whether anything of it is in the cache.

    Raises:
        HubError: The repository cannot be reached.
    """
    try:
        open_file(repo, name, commit, token)
    except HubError as error:
        if isinstance(error.__cause__, (EntryNotFoundError, OfflineModeIsEnabled)):
            return False
        raise
    return True


def missing_ranges(file: RemoteFile, wanted: Sequence[Range], request_bytes: int = REQUEST_BYTES) -> list[Range]:
    """The ranges that would be asked for so that the cache holds all wanted bytes.

    Args:
        file: The file.
        wanted: Ranges of it.
        request_bytes: What a request costs; ranges with a smaller gap between them are read as one.
    """
    return coalesced(missing(coalesced(wanted, 0), file.cached()), request_bytes)


def fetch_ranges(wanted: Mapping[RemoteFile, Sequence[Range]], *, request_bytes: int = REQUEST_BYTES) -> Transfer:
    """Bring byte ranges of files into the cache, those that are not there.

    Neighbours are read as one where the gap between them costs less than another request, in parallel, at most eight
    at a time. Answers that break, and those of a busy or failing server, are asked for again with growing waits. What
    arrived stays in the cache when something fails.

    Args:
        wanted: Ranges by file.
        request_bytes: What a request costs, in bytes.

    Returns:
        What went over the network: nothing where all was cached.

    Raises:
        HubError: The Hub cannot be reached, refuses, or keeps on sending something else.
        CheckpointError: The cache cannot be written.
    """
    parts = [
        (file, start, stop)
        for file, ranges in wanted.items()
        for start, stop in divided(missing_ranges(file, ranges, request_bytes), _LARGEST)
    ]
    total, lock = Transfer(), threading.Lock()

    def count(size: int, requests: int) -> None:
        with lock:
            total.bytes += size
            total.requests += requests

    if not parts:
        return total
    repo, size = parts[0][0].repo, length_of((start, stop) for _, start, stop in parts)
    pool = ThreadPoolExecutor(_CONNECTIONS, "hf_spp-ranges")
    try:
        bar: Any = tqdm(total=size, unit="B", unit_scale=True, desc=f"Parts of {repo}")  # type: ignore[no-untyped-call]
        with closing(bar):
            futures = {pool.submit(file._fetch, start, stop, count): stop - start for file, start, stop in parts}
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for file in wanted:
        file.look_again()
    return total


def _noted(path: Path) -> tuple[str, int] | None:
    """ETag and size that were noted before, None if they were not."""
    if not path.is_file():
        return None
    try:
        found = checkpoint.read_json(path)
        etag, size = found["etag"], found["size"]
    except (CheckpointError, KeyError, TypeError):
        return None
    return (etag, size) if isinstance(etag, str) and type(size) is int and size >= 0 else None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
