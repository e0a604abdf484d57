"""A Hub on this machine, with the protocol of the real client and switches for faults.

The client reads HF_ENDPOINT when it is imported, so it runs in a process of its own:

    with serving(tmp_path) as server:
        server.add_repository("google/tiny-vit", folder)
        server.faults.add("503", path="/resolve/", times=2)
        subprocess.run([sys.executable, "-c", script], env=server.environment("read"))
        assert server.requests[-1].status == 200

From a shell, `python tests/hub_server.py [--user ME] [--repo ME/NAME=FOLDER ...] -- COMMAND ...` runs a command with
the environment of a Hub that holds these folders as models, or nothing. The command writes there as that user, and the
Hub ends with it.

A server has two origins. `endpoint` is the Hub. `storage` is another port, where large files live: no token of the Hub
may arrive there, and one that does is in `violations`. Large files go by LFS (basic and multipart), or by Xet when
`environment(xet=True)`. All state is in files, and every commit is one file, so that a commit is there or is not.

Tokens: `write` and `read` belong to the user `tester`, or who is named, `foreign` (may write) to the user `stranger`.
"""

import argparse
import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

KINDS = ("model", "dataset", "space")
FAULTS = ("429", "500", "503", "drop_before", "drop_after", "truncate", "corrupt", "slow")
_USER = "tester"
# Whether a token may write.
_ROLES = {"write": "write", "read": "read", "foreign": "write"}
# This server has no LZ4, so the client may not compress. It would wait 3 s before its first retry.
_XET = {"HF_XET_XORB_COMPRESSION_POLICY": "none", "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms"}
_INHERITED_OUT = re.compile(r"HF_(?!SPP_)|HUGGING|TRANSFORMERS_OFFLINE|.*_PROXY$", re.IGNORECASE)
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
_ATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What a client sent: `token` is a name (`xet` for those of Xet, `unknown` for a wrong one), None without one."""

    origin: str
    method: str
    target: str
    headers: Message
    body: bytes
    token: str | None

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: The Hub's words.
        code: The Hub's name of the error, which decides the client's exception.
        headers: More headers; values.
        content: More entries of the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **content: Any,
    ) -> None:
        super().__init__(message)
        errors = {"X-Error-Message": ascii(message)[1:-1], **({"X-Error-Code": code} if code else {})}
        self.answer = _json({"error": message, **content}, status, **errors, **(headers or {}))


@dataclass(frozen=True)
class Exchange:
    """One line of the log; `status` is None if the client got no answer, `token` is as in `Request`."""

    origin: str
    method: str
    path: str
    status: int | None
    token: str | None
    range: str | None
    fault: str | None


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str


@dataclass
class Fault:
    """A switch; `seen` counts the requests that matched, `struck` those that failed."""

    kind: str
    method: str
    path: str
    origin: str
    nth: int
    times: int
    seconds: float
    reset: bool
    seen: int = 0
    struck: int = 0


class Faults:
    """The faults that a server still has to commit."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        kind: str,
        *,
        method: str = "",
        path: str = "",
        origin: str = "",
        nth: int = 1,
        times: int = 1,
        seconds: float = 0,
        reset: bool = False,
    ) -> Fault:
        """Let some of the requests fail that match all three patterns.

        Args:
            kind: `429`, `500` or `503`: nothing happens but this answer. `drop_before` closes the connection before
                the request takes effect, `drop_after` when it has. `truncate` ends after half of the body, `corrupt`
                turns every bit of the byte in the middle of the body. `slow` takes effect at once, and answers later.
            method: Regular expression for the start of the method.
            path: Regular expression that is searched for in the path with its query.
            origin: `hub`, `storage`, or both if empty.
            nth: Which matching request is the first that fails.
            times: How many fail in a row.
            seconds: What a 429 asks the client to wait, whole seconds; how late a `slow` answer is.
            reset: Break a connection (`drop_before`, `drop_after`, `truncate`) with an RST, as routers do.

        Returns:
            The fault, whose `struck` says how often it was committed.
        """
        assert kind in FAULTS, f"unknown fault {kind!r}; known are {FAULTS}"
        fault = Fault(kind, method, path, origin, nth, times, seconds, reset)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, request: Request) -> Fault | None:
        """The fault of a request, if it has one; the earliest added wins."""
        chosen = None
        with self._lock:
            for fault in self._faults:
                fits = re.match(fault.method, request.method) and re.search(fault.path, request.target)
                if fits and fault.origin in ("", request.origin):
                    fault.seen += 1
                    if chosen is None and fault.nth <= fault.seen < fault.nth + fault.times:
                        fault.struck += 1
                        chosen = fault
        return chosen


Route = Callable[..., Answer]
_ROUTES: list[tuple[str, str, re.Pattern[str], Route]] = []
_PLACES = {
    "{api}": r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)",
    "{site}": r"/(?:(?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+?)",
    "{revision}": r"(?P<revision>[^/]+)",
    "{name}": r"(?P<name>[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{hash}": r"(?P<hash>[0-9a-f]{64})",
}


def _route(origin: str, methods: str, pattern: str) -> Callable[[Route], Route]:
    for name, expression in _PLACES.items():
        pattern = pattern.replace(name, expression)

    def register(function: Route) -> Route:
        _ROUTES.append((origin, methods, re.compile(pattern), function))
        return function

    return register


class Server:
    """What `serving` gives.

    Attributes:
        endpoint: URL of the Hub.
        storage: URL of the other origin, for large files.
        tokens: Secret by name, `write`, `read` and `foreign`.
        requests: All requests so far, in the order of their answers.
        violations: Requests that brought a token of the Hub to the other origin.
        faults: Switches for faults.
        lfs_threshold: Files of this many bytes or more, and binary files, are large files.
        part_size: Large files above this many bytes are uploaded in parts.
        page_size: Entries of one page of a listing.
        user: To whom the tokens `write` and `read` belong.
    """

    def __init__(self, folder: Path, lfs_threshold: int, part_size: int, page_size: int, user: str) -> None:
        self.folder, self.user = folder, user
        self.lfs_threshold, self.part_size, self.page_size = lfs_threshold, part_size, page_size
        self.tokens = {name: f"hf_{name}{secrets.token_hex(12)}" for name in _ROLES}
        self.requests: list[Exchange] = []
        self.violations: list[Exchange] = []
        self.crashes: list[BaseException] = []
        self.faults = Faults()
        self.closing = threading.Event()
        self._lock = threading.RLock()
        self._key = secrets.token_bytes(16)
        self._xet_tokens: dict[str, str] = {}
        for name in ("repositories", "contents", "parts", "xorbs", "xet", "clients"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._origins = {name: _Origin(self, name) for name in ("hub", "storage")}
        self.endpoint, self.storage = (origin.url for origin in self._origins.values())

    # --- what a test calls -------------------------------------------------------------------------------------------

    def environment(
        self, token: str | None = "write", cache: str | os.PathLike[str] | None = None, xet: bool = False
    ) -> dict[str, str]:
        """All environment variables of a client's process.

        Args:
            token: `write`, `read`, `foreign`, or None for a client without a token.
            cache: The client's HF_HOME; a new empty folder if None.
            xet: Whether the client may use Xet; if not, large files go by LFS.
        """
        inherited = {name: value for name, value in os.environ.items() if not _INHERITED_OUT.match(name)}
        home = Path(cache) if cache else Path(tempfile.mkdtemp(dir=self.folder / "clients"))
        return {
            **inherited,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home.absolute()),
            **({"HF_TOKEN": self.tokens[token]} if token else {}),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            **(_XET if xet else {"HF_HUB_DISABLE_XET": "1"}),
        }

    def add_repository(
        self,
        repo_id: str,
        folder: str | os.PathLike[str] | None = None,
        kind: str = "model",
        private: bool = False,
        message: str = "initial commit",
    ) -> str:
        """Make a repository, in anyone's namespace, that holds the files of a folder. Returns the commit's id."""
        assert kind in KINDS, f"unknown kind {kind!r}; known are {KINDS}"
        where = self._place(kind, repo_id)
        with self._lock:
            assert not self._exists(where), f"{kind} {repo_id} is there already"
            files = {".gitattributes": self._store(_ATTRIBUTES)}
            for path in sorted(Path(folder).rglob("*")) if folder else ():
                if path.is_file():
                    content = path.read_bytes()
                    files[path.relative_to(folder).as_posix()] = self._store(content, large=self._is_large(content))
            (where / "commits").mkdir(parents=True, exist_ok=True)
            state = {"private": private, "created": _now(), "refs": {}, "discussions": {}}
            return self._commit(where, state, "refs/heads/main", files, None, message, "", repo_id.split("/")[0])

    def commits(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """The commits of a revision, newest first."""
        where, found = self._place(kind, repo_id), []
        current = self._resolve(where, revision)
        while current:
            commit = _load(where / "commits" / f"{current}.json")
            found.append(
                Commit(current, **{name: commit[name] for name in ("parent", "title", "message", "author", "date")})
            )
            current = commit["parent"]
        return found

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content of all files at a revision, by path."""
        return {path: self._content(entry) for path, entry in self._files(self._place(kind, repo_id), revision).items()}

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        """Content of one file at a revision; KeyError if there is none."""
        return self._content(self._files(self._place(kind, repo_id), revision)[path])

    def refs(self, repo_id: str, kind: str = "model") -> dict[str, str]:
        """Commit id by ref, such as `refs/heads/main`, `refs/tags/v1` and `refs/pr/1`."""
        return self._state(self._place(kind, repo_id))["refs"]

    # --- storage -----------------------------------------------------------------------------------------------------

    def _place(self, kind: str, repo_id: str) -> Path:
        return self.folder / "repositories" / kind / repo_id.replace("/", "--")

    def _exists(self, where: Path) -> bool:
        return (where / "repository.json").exists()

    def _state(self, where: Path) -> dict[str, Any]:
        return _load(where / "repository.json")

    def _resolve(self, where: Path, revision: str) -> str:
        refs = self._state(where)["refs"]
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in refs:
                return refs[ref]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [path.stem for path in (where / "commits").glob(f"{revision}*.json")]
            if len(found) == 1:
                return found[0]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _files(self, where: Path, revision: str) -> Files:
        return _load(where / "commits" / f"{self._resolve(where, revision)}.json")["files"]

    def _commit(
        self,
        where: Path,
        state: dict[str, Any],
        ref: str,
        files: Files,
        parent: str | None,
        title: str,
        message: str,
        author: str,
    ) -> str:
        """Write a commit, then the state that points to it: until then, the commit does not exist."""
        commit = {
            "parent": parent,
            "title": title,
            "message": message,
            "author": author,
            "date": _now(),
            "files": files,
        }
        commit_id = hashlib.sha1(json.dumps([commit, time.time_ns()]).encode()).hexdigest()
        _save(where / "commits" / f"{commit_id}.json", commit)
        state["refs"][ref] = commit_id
        _save(where / "repository.json", state)
        return commit_id

    def _is_large(self, content: bytes, size: int | None = None) -> bool:
        size = len(content) if size is None else size
        return size > 0 and (size >= self.lfs_threshold or b"\0" in content[:512])

    def _store(self, content: bytes, large: bool = False) -> dict[str, Any]:
        if large:
            sha256 = hashlib.sha256(content).hexdigest()
            _save(self.folder / "contents" / sha256, content)
            return self._large_entry(sha256, len(content))
        oid = _git_oid(content)
        _save(self.folder / "contents" / oid, content)
        return {"oid": oid, "size": len(content), "sha256": None, "xet": None}

    def _large_entry(self, sha256: str, size: int) -> dict[str, Any]:
        pointer = _POINTER.format(sha256=sha256, size=size).encode()
        xet = self.folder / "xet" / sha256
        return {
            "oid": _git_oid(pointer),
            "size": size,
            "sha256": sha256,
            "xet": _load(xet)["hash"] if xet.exists() else None,
        }

    def _size_of_large(self, sha256: str) -> int | None:
        if (self.folder / "xet" / sha256).exists():
            return sum(term["size"] for term in _load(self.folder / "xet" / sha256)["terms"])
        path = self.folder / "contents" / sha256
        return path.stat().st_size if path.exists() else None

    def _content(self, entry: Mapping[str, Any]) -> bytes:
        path = self.folder / "contents" / (entry["sha256"] or entry["oid"])
        if path.exists():
            return path.read_bytes()
        content = bytearray()
        for term in _load(self.folder / "xet" / entry["sha256"])["terms"]:
            xorb = (self.folder / "xorbs" / term["xorb"]).read_bytes()
            for start, end, scheme in _chunks(xorb)[term["start"] : term["end"]]:
                assert scheme == 0, "the client compressed; set HF_XET_XORB_COMPRESSION_POLICY=none"
                content += xorb[start + 8 : end]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], "a Xet file differs from its SHA-256"
        return bytes(content)

    def _signed(self, path: str) -> str:
        """URL of the other origin that is valid without a token, as long as nobody changes it."""
        return f"{self.storage}{path}?{urlencode({'signature': self._signature(path)})}"

    def _signature(self, path: str) -> str:
        return hmac.new(self._key, path.encode(), hashlib.sha256).hexdigest()

    # --- who may do what ---------------------------------------------------------------------------------------------

    def name_of(self, secret: str) -> str:
        """Name of a token."""
        names = {value: name for name, value in self.tokens.items()}
        return "xet" if secret in self._xet_tokens else names.get(secret, "unknown")

    def _user(self, request: Request, write: bool = False) -> str | None:
        if request.token and request.token not in _ROLES:
            raise Refusal(401, "Invalid credentials in Authorization header")
        user = ("stranger" if request.token == "foreign" else self.user) if request.token else None
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and _ROLES[request.token] != "write":
            raise Refusal(403, "This token has no permission to write")
        return user

    def _open(self, request: Request, kind: str, repo_id: str, write: bool = False) -> Path:
        """The folder of a repository that this token may read, and write too if `write`."""
        user, where = self._user(request), self._place(kind, repo_id)
        owner = repo_id.split("/")[0]
        if not self._exists(where) or (self._state(where)["private"] and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and self._user(request, write=True) != owner:
            raise Refusal(403, f"You have no write access to {repo_id}")
        return where

    def _own(self, request: Request) -> tuple[str, str, Path]:
        """Kind, id and folder that a request to make or delete a repository names."""
        asked, user = request.json(), self._user(request, write=True)
        namespace, kind = asked.get("organization") or user, asked.get("type") or "model"
        if namespace != user:
            raise Refusal(403, f"You don't have the rights to create a {kind} under the namespace {namespace!r}")
        repo_id = f"{namespace}/{asked['name']}"
        return kind, repo_id, self._place(kind, repo_id)

    def _url(self, kind: str, repo_id: str) -> str:
        return f"{self.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        """Do what a request asks. One request at a time, so that none sees half of another."""
        for origin, methods, pattern, function in _ROUTES:
            match = pattern.fullmatch(request.path)
            if origin == request.origin and match and re.fullmatch(methods, request.method):
                places = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if "kind" in pattern.groupindex:
                    places.setdefault("kind", "model")
                with self._lock:
                    try:
                        return function(self, request, **places)
                    except Refusal as refusal:
                        return refusal.answer
                    except Exception as error:  # the client gets an answer, and `serving` raises at its end
                        self.crashes.append(error)
                        return Refusal(500, f"The server crashed: {error!r}").answer
        return Refusal(404, f"This server has no {request.method} {request.path}").answer

    def log(self, request: Request, status: int | None, fault: Fault | None) -> None:
        """Write a request down, and what it was answered."""
        kind, span = fault.kind if fault else None, request.headers.get("Range")
        line = Exchange(request.origin, request.method, request.target, status, request.token, span, kind)
        everything = f"{request.target}\n{request.headers}"
        with self._lock:
            self.requests.append(line)
            if request.origin == "storage" and any(secret in everything for secret in self.tokens.values()):
                self.violations.append(line)

    def close(self) -> None:
        self.closing.set()
        for origin in self._origins.values():
            origin.shutdown()
            origin.server_close()

    # --- the Hub: repositories ---------------------------------------------------------------------------------------

    @_route("hub", "GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        user = self._user(request)
        access = {"displayName": request.token, "role": _ROLES[request.token]}
        auth = {"type": "access_token", "accessToken": access}
        return _json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    @_route("hub", "POST", "/api/validate-yaml")
    def _validate_card(self, request: Request) -> Answer:
        try:
            card = _card_data(request.json()["content"].encode())
        except yaml.YAMLError as error:
            errors = [{"message": f"YAML Metadata Error: {error}"}]
            return _json({"errors": errors, "warnings": []}, 400)
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return _json({"errors": [], "warnings": warnings})

    @_route("hub", "POST", "/api/repos/create")
    def _create(self, request: Request) -> Answer:
        kind, repo_id, where = self._own(request)
        if self._exists(where):
            raise Refusal(409, f"You already created this {kind} repo", url=self._url(kind, repo_id))
        asked = request.json()
        self.add_repository(
            repo_id, kind=kind, private=asked.get("visibility") == "private" or asked.get("private", False)
        )
        return _json({"url": self._url(kind, repo_id), "name": repo_id})

    @_route("hub", "DELETE", "/api/repos/delete")
    def _delete(self, request: Request) -> Answer:
        kind, repo_id, _ = self._own(request)
        shutil.rmtree(self._open(request, kind, repo_id, write=True))
        return _json({})

    @_route("hub", "PUT", "{api}/settings")
    def _settings(self, request: Request, kind: str, repo_id: str) -> Answer:
        where = self._open(request, kind, repo_id, write=True)
        state = {**self._state(where), "private": request.json().get("visibility") == "private"}
        _save(where / "repository.json", state)
        return _json({})

    @_route("hub", "GET", "{api}/auth-check(?P<write>/write)?")
    def _check(self, request: Request, kind: str, repo_id: str, write: str = "") -> Answer:
        self._open(request, kind, repo_id, write=bool(write))
        return _json({})

    @_route("hub", "GET", "{api}(?:/revision/{revision})?")
    def _info(self, request: Request, kind: str, repo_id: str, revision: str = "main") -> Answer:
        where = self._open(request, kind, repo_id)
        commit_id, state = self._resolve(where, revision), self._state(where)
        commit = _load(where / "commits" / f"{commit_id}.json")
        files, card = commit["files"], None
        siblings = [{"rfilename": path} for path in sorted(files)]
        if request.query.get("blobs", "").lower() == "true":
            for sibling in siblings:
                item = _describe(sibling["rfilename"], files)
                sibling.update(size=item["size"], blobId=item["oid"])
                if "lfs" in item:
                    sibling["lfs"] = {**item["lfs"], "sha256": item["lfs"]["oid"]}
        readme = files.get("README.md")
        if readme:
            with contextlib.suppress(yaml.YAMLError):
                card = _card_data(self._content(readme))
        return _json(
            {
                "id": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit_id,
                "createdAt": state["created"],
                "lastModified": commit["date"],
                "private": state["private"],
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": (card or {}).get("tags", []),
                "cardData": card,
                "siblings": siblings,
            }
        )

    # --- the Hub: revisions ------------------------------------------------------------------------------------------

    @_route("hub", "GET", "{api}/refs")
    def _refs(self, request: Request, kind: str, repo_id: str) -> Answer:
        where = self._open(request, kind, repo_id)
        found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        groups = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, commit_id in self._state(where)["refs"].items():
            start = next(start for start in groups if ref.startswith(start))
            found[groups[start]].append({"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit_id})
        return _json(found)

    @_route("hub", "GET", "{api}/commits/{revision}")
    def _history(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        self._open(request, kind, repo_id)
        history = self.commits(repo_id, revision, kind)
        items = [
            {"id": commit.id, "authors": [{"user": commit.author}], "date": commit.date}
            | {"title": commit.title, "message": commit.message}
            for commit in history
        ]
        return self._page(request, items)

    @_route("hub", "POST|DELETE", "{api}/branch/{name}")
    def _branch(self, request: Request, kind: str, repo_id: str, name: str) -> Answer:
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        return self._change_ref(request, kind, repo_id, f"refs/heads/{name}", start)

    @_route("hub", "POST", "{api}/tag/{revision}")
    def _tag(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        return self._change_ref(request, kind, repo_id, f"refs/tags/{request.json()['tag']}", revision)

    @_route("hub", "DELETE", "{api}/tag/{name}")
    def _untag(self, request: Request, kind: str, repo_id: str, name: str) -> Answer:
        return self._change_ref(request, kind, repo_id, f"refs/tags/{name}", name)

    def _change_ref(self, request: Request, kind: str, repo_id: str, ref: str, revision: str) -> Answer:
        where = self._open(request, kind, repo_id, write=True)
        state = self._state(where)
        if request.method == "DELETE":
            if ref not in state["refs"] or ref == "refs/heads/main":
                raise Refusal(404, f"There is no {ref} to delete", "RevisionNotFound")
            del state["refs"][ref]
        elif ref in state["refs"]:
            raise Refusal(409, f"Reference {ref} exists already")
        else:
            state["refs"][ref] = self._resolve(where, revision)
        _save(where / "repository.json", state)
        return _json({})

    # --- the Hub: pull requests --------------------------------------------------------------------------------------

    def _open_pull_request(self, where: Path, state: dict[str, Any], user: str, title: str, start: str) -> str:
        number = str(len(state["discussions"]) + 1)
        state["discussions"][number] = {"title": title, "author": user, "createdAt": _now(), "base": "refs/heads/main"}
        state["refs"][f"refs/pr/{number}"] = start
        _save(where / "repository.json", state)
        return number

    @_route("hub", "POST", "{api}/discussions")
    def _discuss(self, request: Request, kind: str, repo_id: str) -> Answer:
        where, user = self._open(request, kind, repo_id), self._user(request, write=True)
        if not request.json()["pullRequest"]:
            raise Refusal(501, "This server has pull requests, and no other discussions")
        start = self._resolve(where, "main")
        number = self._open_pull_request(where, self._state(where), user or "", request.json()["title"], start)
        return _json({"num": int(number), "url": f"{self._url(kind, repo_id)}/discussions/{number}"})

    @_route("hub", "GET", "{api}/discussions(?:/{name})?")
    def _discussions(self, request: Request, kind: str, repo_id: str, name: str = "") -> Answer:
        where = self._open(request, kind, repo_id)
        found = [
            {
                "num": int(number),
                "title": pull["title"],
                "author": {"name": pull["author"]},
                "createdAt": pull["createdAt"],
                "status": "draft",
                "repo": {"name": repo_id, "type": kind},
                "isPullRequest": True,
                "changes": {"base": pull["base"]},
                "filesWithConflicts": [],
                "events": [],
            }
            for number, pull in self._state(where)["discussions"].items()
        ]
        if not name:
            return _json({"discussions": found, "count": len(found), "start": 0})
        if not 0 < int(name) <= len(found):
            raise Refusal(404, f"There is no discussion {name}")
        return _json(found[int(name) - 1])

    # --- the Hub: commits --------------------------------------------------------------------------------------------

    def _open_revision(self, request: Request, kind: str, repo_id: str, revision: str) -> tuple[Path, str, str]:
        """Folder, ref and head that a commit goes to; the ref is empty if it opens a pull request."""
        opens = request.query.get("create_pr") == "1"
        where = self._open(request, kind, repo_id)
        user, state = self._user(request, write=True), self._state(where)
        head = self._resolve(where, revision)
        ref = revision if revision in state["refs"] else f"refs/heads/{revision}"
        pull = state["discussions"].get(ref.removeprefix("refs/pr/"), {})
        if not opens and pull.get("author") != user:
            self._open(request, kind, repo_id, write=True)
        if ref not in state["refs"] or ref.startswith("refs/tags/"):
            raise Refusal(404, f"{revision!r} is no branch", "RevisionNotFound")
        return where, "" if opens else ref, head

    @_route("hub", "POST", "{api}/preupload/{revision}")
    def _preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        where, _, head = self._open_revision(request, kind, repo_id, revision)
        present = self._files(where, head)
        answer = []
        for file in request.json()["files"]:
            large = self._is_large(base64.b64decode(file["sample"]), file["size"])
            entry = present.get(file["path"], {})
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": entry.get("sha256") or entry.get("oid"),
                }
            )
        return _json({"files": answer})

    @_route("hub", "POST", "{api}/commit/{revision}")
    def _receive_commit(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        where, ref, head = self._open_revision(request, kind, repo_id, revision)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        expected = header.get("parentCommit")
        if expected and not ref:
            head = self._resolve(where, expected)
        elif expected and not head.startswith(expected):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self._files(where, head))
        for line in lines:
            self._apply(files, line["key"], line["value"])
        state, user, answer = self._state(where), self._user(request) or "", {}
        if not ref:
            number = self._open_pull_request(where, state, user, header["summary"], head)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self._url(kind, repo_id)}/discussions/{number}"
        title, message = header["summary"], header.get("description", "")
        commit_id = self._commit(where, state, ref, files, head, title, message, user)
        url = f"{self._url(kind, repo_id)}/commit/{commit_id}"
        return _json({"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": "", **answer})

    def _apply(self, files: Files, key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if key == "header":
            return
        if not path or {"..", ".git", ""} & set(path.rstrip("/").split("/")):
            raise Refusal(400, f"Invalid path {path!r}")
        if key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            gone = [name for name in gone if (name == path) == (key == "deletedFile")]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
            return
        if any(parent.as_posix() in files for parent in Path(path).parents) or any(
            f.startswith(f"{path}/") for f in files
        ):
            raise Refusal(400, f"{path!r} is a file and a folder")
        if key == "file":
            files[path] = self._store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            size = self._size_of_large(value["oid"])
            if size is None or size != value.get("size", size):
                raise Refusal(400, f"LFS pointer of {path!r} points to a file that was not uploaded")
            files[path] = self._large_entry(value["oid"], size)
        else:
            raise Refusal(400, f"Unknown operation {key!r}")

    # --- the Hub: reading files --------------------------------------------------------------------------------------

    @_route("hub", "GET|HEAD", "{site}/resolve/{revision}/{path}")
    def _resolve_file(self, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
        where = self._open(request, kind, repo_id)
        commit_id = self._resolve(where, revision)
        headers = {"X-Repo-Commit": commit_id}
        entry = self._files(where, commit_id).get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if entry["sha256"] is None:
            return _ranged(request, self._content(entry), {**headers, "ETag": f'"{entry["oid"]}"'})
        headers["X-Linked-Etag"] = f'"{entry["sha256"]}"'
        headers["X-Linked-Size"] = str(entry["size"])
        headers["Location"] = self._signed(f"/contents/{entry['sha256']}")
        if entry["xet"]:
            token_url = f"{self.endpoint}/api/{kind}s/{repo_id}/xet-read-token/{commit_id}"
            headers["X-Xet-Hash"] = entry["xet"]
            headers["X-Xet-Refresh-Route"] = token_url
            headers["Link"] = f'<{token_url}>; rel="xet-auth"'
        return Answer(302, f"Found. Redirecting to {headers['Location']}".encode(), headers)

    @_route("hub", "GET", "{api}/tree/{revision}(?:/{path})?")
    def _tree(self, request: Request, kind: str, repo_id: str, revision: str, path: str = "") -> Answer:
        where = self._open(request, kind, repo_id)
        below = f"{path.rstrip('/')}/" if path else ""
        files = {name: e for name, e in self._files(where, revision).items() if name.startswith(below)}
        if below and not files:
            raise Refusal(404, f"{below} does not exist on {revision!r}", "EntryNotFound")
        items = [
            _describe(name, files) for name in _paths(files) if name.startswith(below) and name != below.rstrip("/")
        ]
        if request.query.get("recursive", "").lower() != "true":
            items = [item for item in items if "/" not in item["path"].removeprefix(below)]
        return self._page(request, items)

    @_route("hub", "POST", "{api}/paths-info/{revision}")
    def _paths_info(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        files = self._files(self._open(request, kind, repo_id), revision)
        known = set(_paths(files))
        asked = [path.rstrip("/") for path in parse_qs(request.body.decode()).get("paths", [])]
        return _json([_describe(path, files) for path in asked if path in known])

    def _page(self, request: Request, items: list[dict[str, Any]]) -> Answer:
        start = int(request.query.get("cursor", 0))
        end, headers = start + self.page_size, {}
        if end < len(items):
            url = f"{self.endpoint}{request.path}?{urlencode({**request.query, 'cursor': end})}"
            headers["Link"] = f'<{url}>; rel="next"'
        return _json(items[start:end], **headers)

    # --- large files: LFS --------------------------------------------------------------------------------------------

    @_route("hub", "POST", r"{site}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, kind: str, repo_id: str) -> Answer:
        self._open(request, kind, repo_id)
        self._user(request, write=True)
        objects, asked = [], request.json()
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if self._size_of_large(oid) is not None:
                continue
            upload: dict[str, Any] = {"href": self._signed(f"/upload/{oid}")}
            if size > self.part_size and "multipart" in asked["transfers"]:
                numbers = range(1, -(-size // self.part_size) + 1)
                parts = {f"{number:05}": self._signed(f"/part/{oid}/{number}") for number in numbers}
                upload = {
                    "href": self._signed(f"/complete/{oid}"),
                    "header": {"chunk_size": str(self.part_size), **parts},
                }
            verify = {"href": f"{self._url(kind, repo_id)}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return _json({"transfer": "multipart" if "multipart" in asked["transfers"] else "basic", "objects": objects})

    @_route("hub", "POST", r"{site}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, request: Request, kind: str, repo_id: str) -> Answer:
        self._open(request, kind, repo_id)
        asked = request.json()
        if self._size_of_large(asked["oid"]) != asked["size"]:
            raise Refusal(404, f"Object {asked['oid']} was not uploaded")
        return _json({})

    def _receive_object(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"What was uploaded is not {oid}")
        _save(self.folder / "contents" / oid, content)
        return Answer(headers={"ETag": f'"{oid}"'})

    @_route("storage", "PUT", "/upload/{hash}")
    def _upload(self, request: Request, hash: str) -> Answer:
        self._check_signature(request)
        return self._receive_object(hash, request.body)

    @_route("storage", "PUT", "/part/{hash}/{name}")
    def _upload_part(self, request: Request, hash: str, name: str) -> Answer:
        self._check_signature(request)
        _save(self.folder / "parts" / f"{hash}-{name}", request.body)
        return Answer(headers={"ETag": f'"{hashlib.sha256(request.body).hexdigest()}"'})

    @_route("storage", "POST", "/complete/{hash}")
    def _complete(self, request: Request, hash: str) -> Answer:
        self._check_signature(request)
        content = b""
        for part in request.json()["parts"]:
            path = self.folder / "parts" / f"{hash}-{part['partNumber']}"
            if not path.exists() or part["etag"].strip('"') != hashlib.sha256(path.read_bytes()).hexdigest():
                raise Refusal(400, f"Part {part['partNumber']} was not uploaded")
            content += path.read_bytes()
        return self._receive_object(hash, content)

    @_route("storage", "GET|HEAD", "/contents/{hash}")
    def _download(self, request: Request, hash: str) -> Answer:
        self._check_signature(request)
        path = self.folder / "contents" / hash
        content = path if path.exists() else self._content({"sha256": hash})
        return _ranged(request, content, {"ETag": f'"{hash}"'})

    def _check_signature(self, request: Request) -> None:
        if not hmac.compare_digest(request.query.get("signature", ""), self._signature(request.path)):
            raise Refusal(403, "The signature does not match")

    # --- large files: Xet --------------------------------------------------------------------------------------------
    # Where an answer is 404 the client takes an older way to the same end: no deduplication across repositories, no
    # granted uploads, no progress of shards, and reconstruction of version 1.

    @_route("hub", "GET", "{api}/xet-(?P<name>read|write)-token/{revision}")
    def _xet_token(self, request: Request, kind: str, repo_id: str, name: str, revision: str) -> Answer:
        write = name == "write" and request.query.get("create_pr") != "1" and not revision.startswith("refs/pr/")
        self._open(request, kind, repo_id, write=write)
        if name == "write":
            self._user(request, write=True)
        token, expiry = f"xet_{secrets.token_hex(12)}", int(time.time()) + 3600
        self._xet_tokens[token] = name
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        headers = dict(zip(names, (self.storage, token, str(expiry)), strict=True))
        return _json({"casUrl": self.storage, "accessToken": token, "exp": expiry}, **headers)

    def _check_xet_token(self, request: Request, *roles: str) -> None:
        if self._xet_tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer ")) not in roles:
            raise Refusal(401, "This needs a token for Xet")

    @_route("storage", "POST", "/v1/xorbs/default/{hash}")
    def _upload_xorb(self, request: Request, hash: str) -> Answer:
        self._check_xet_token(request, "write")
        _chunks(request.body)
        _save(self.folder / "xorbs" / hash, request.body)
        return _json({"was_inserted": True})

    @_route("storage", "POST", "/v1/shards")
    def _upload_shard(self, request: Request) -> Answer:
        self._check_xet_token(request, "write")
        for file in _files_of_shard(request.body):
            if not all((self.folder / "xorbs" / term["xorb"]).exists() for term in file["terms"]):
                raise Refusal(400, "The shard names a xorb that was not uploaded")
            for name in (file["hash"], file["sha256"]):
                _save(self.folder / "xet" / name, file)
        return _json({"result": 1})

    @_route("storage", "GET", "/v1/reconstructions/{hash}")
    def _reconstruct(self, request: Request, hash: str) -> Answer:
        self._check_xet_token(request, "read", "write")
        if not (self.folder / "xet" / hash).exists():
            raise Refusal(404, "There is no such file")
        terms = _load(self.folder / "xet" / hash)["terms"]
        size = sum(term["size"] for term in terms)
        first, last = _span(request.headers.get("Range"), size) or (0, size - 1)
        position, offset = 0, 0
        chosen: list[dict[str, Any]] = []
        for term in terms:
            if position <= last and position + term["size"] > first:
                offset = offset if chosen else first - position
                span = {"start": term["start"], "end": term["end"]}
                chosen.append({"hash": term["xorb"], "unpacked_length": term["size"], "range": span})
            position += term["size"]
        fetch = {xorb: [self._fetch(xorb, chosen)] for xorb in {term["hash"] for term in chosen}}
        return _json({"offset_into_first_range": offset, "terms": chosen, "fetch_info": fetch})

    def _fetch(self, xorb: str, terms: list[dict[str, Any]]) -> dict[str, Any]:
        """Where the chunks of a xorb are that terms name; one range, because the client takes no overlapping ones."""
        ranges = [term["range"] for term in terms if term["hash"] == xorb]
        start, end = min(span["start"] for span in ranges), max(span["end"] for span in ranges)
        chunks = _chunks((self.folder / "xorbs" / xorb).read_bytes())[start:end]
        bytes_of = {"start": chunks[0][0], "end": chunks[-1][1] - 1}
        return {"range": {"start": start, "end": end}, "url": self._signed(f"/xorbs/{xorb}"), "url_range": bytes_of}

    @_route("storage", "GET", "/xorbs/{hash}")
    def _download_xorb(self, request: Request, hash: str) -> Answer:
        self._check_signature(request)
        return _ranged(request, (self.folder / "xorbs" / hash).read_bytes(), {})


@contextlib.contextmanager
def serving(
    folder: str | os.PathLike[str],
    *,
    lfs_threshold: int = 10_000_000,
    part_size: int = 50_000_000,
    page_size: int = 1000,
    user: str = _USER,
) -> Iterator[Server]:
    """Serve the Hub that a folder holds, or a new one, until the block ends.

    Args:
        folder: Where all state is; made if absent.
        lfs_threshold: Files of this many bytes or more, and binary files, are large files.
        part_size: Large files above this many bytes are uploaded in parts.
        page_size: Entries of one page of a listing.
        user: To whom the tokens `write` and `read` belong.

    Raises:
        Exception: What the server itself failed with while it answered.
    """
    server = Server(Path(folder).absolute(), lfs_threshold, part_size, page_size, user)
    try:
        yield server
    finally:
        server.close()
    if server.crashes:
        raise server.crashes[0]


# --- HTTP ------------------------------------------------------------------------------------------------------------


class _Origin(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Server, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), name=f"hub-server-{name}", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle of a request are none of a test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: _Origin

    def _serve(self) -> None:
        hub, request = self.server.hub, self._read()
        if request.path == "/api/agent-harnesses":
            # Every client asks this first, for its telemetry: no test has to count it, and no fault may hit it.
            return self._send(_json({"standardEnvVars": [], "harnesses": {}}), None)
        fault = hub.faults.take(request)
        kind = fault.kind if fault else None
        if fault and kind in ("429", "500", "503"):
            answer = _failure(fault)
        else:
            answer = Answer() if kind == "drop_before" else hub.answer(request)
        dropped = kind in ("drop_before", "drop_after")
        hub.log(request, None if dropped else answer.status, fault)
        if fault and kind == "slow":
            hub.closing.wait(fault.seconds)
        if not dropped:
            self._send(answer, kind)
        if fault and (dropped or kind == "truncate"):
            self._hang_up(fault.reset)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read(self) -> Request:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(iter(self._read_chunk, b""))
        else:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError("the client went away")
        secret = self.headers.get("Authorization", "").removeprefix("Bearer ")
        token = self.server.hub.name_of(secret) if secret else None
        return Request(self.server.name, self.command, self.path, self.headers, body, token)

    def _read_chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _send(self, answer: Answer, fault: str | None) -> None:
        self.send_response(answer.status)
        length = {"Content-Length": str(len(answer.body)), "X-Request-Id": secrets.token_hex(8)}
        for name, value in {**length, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        body = answer.body if self.command != "HEAD" else b""
        middle = len(body) // 2
        if fault == "truncate":
            body = body[:middle]
        elif fault == "corrupt" and body:
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        self.wfile.write(body)
        self.wfile.flush()

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for file in (self.rfile, self.wfile, self.connection):
                file.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the log is `Server.requests`."""


def _failure(fault: Fault) -> Answer:
    if fault.kind != "429":
        return Refusal(int(fault.kind), {"500": "Internal Error", "503": "Service Unavailable"}[fault.kind]).answer
    wait = str(int(fault.seconds))
    limits = {"RateLimit": f'"api";r=0;t={wait}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    return Refusal(429, "We had to rate limit you", headers={"Retry-After": wait, **limits}).answer


def _json(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte that a Range header asks for; None for all bytes."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start >= size or start > end:
        raise Refusal(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _ranged(request: Request, content: bytes | Path, headers: Mapping[str, str]) -> Answer:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    span = _span(request.headers.get("Range"), size)
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    start, end = span or (0, size - 1)
    if isinstance(content, bytes):
        body = content[start : end + 1]
    else:
        with content.open("rb") as file:
            file.seek(start)
            body = file.read(end + 1 - start)
    if span is None:
        return Answer(200, body, headers)
    return Answer(206, body, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


# --- files and formats -----------------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _save(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    draft.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    os.replace(draft, path)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _card_data(readme: bytes) -> dict[str, Any] | None:
    match = re.match(r"---\r?\n(.*?)\r?\n---", readme.decode(), re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def _paths(files: Files) -> list[str]:
    """Files and the folders that hold them, in order."""
    folders = {parent.as_posix() for path in files for parent in Path(path).parents}
    return sorted({*files, *folders} - {"."})


def _describe(path: str, files: Files) -> dict[str, Any]:
    if path not in files:
        inside = sorted(name + entry["oid"] for name, entry in files.items() if name.startswith(f"{path}/"))
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1("".join(inside).encode()).hexdigest()}
    entry = files[path]
    item = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["sha256"]:
        pointer = len(_POINTER.format(sha256=entry["sha256"], size=entry["size"]))
        item["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": pointer}
    if entry["xet"]:
        item["xetHash"] = entry["xet"]
    return item


def _chunks(xorb: bytes) -> list[tuple[int, int, int]]:
    """Start, end and compression scheme of the chunks of a xorb, each with its header of 8 bytes."""
    found, position = [], 0
    while position < len(xorb) and not xorb.startswith(b"XETBLOB", position):
        end = position + 8 + int.from_bytes(xorb[position + 1 : position + 4], "little")
        found.append((position, end, xorb[position + 4]))
        position = end
    if position > len(xorb):
        raise Refusal(400, "The xorb ends inside a chunk")
    return found


def _files_of_shard(shard: bytes) -> Iterator[dict[str, Any]]:
    """Hash, SHA-256 and terms of the files of a shard; each record has 48 bytes."""
    position = 48
    while not shard.startswith(b"\xff" * 32, position):
        raw, flags, count = struct.unpack_from("<32sII", shard, position)
        terms = []
        for index in range(1, count + 1):
            xorb, _, size, start, end = struct.unpack_from("<32sIIII", shard, position + 48 * index)
            terms.append({"xorb": _xet_hash(xorb), "size": size, "start": start, "end": end})
        position += 48 * (1 + count * (2 if flags & 1 << 31 else 1))
        if not flags & 1 << 30:
            raise Refusal(400, "The shard does not name the SHA-256 of its files")
        yield {"hash": _xet_hash(raw), "sha256": _xet_hash(shard[position : position + 32]), "terms": terms}
        position += 48


def _xet_hash(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


# --- from a shell ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command of the command line with the environment of a Hub, and give its exit status."""
    parser = argparse.ArgumentParser(description="Run a command with a Hub of its own on this machine.")
    parser.add_argument("--user", default=_USER, help=f"who the command is on this Hub; {_USER} if not given")
    parser.add_argument("--repo", action="append", default=[], metavar="ME/NAME=FOLDER", help="a model that it holds")
    parser.add_argument("command", nargs="+", help="the command, after --")
    given = parser.parse_args()
    from hf_spp.assets import cache_folder

    repositories = [repository.partition("=")[::2] for repository in given.repo]
    for repo_id, folder in repositories:
        if repo_id.count("/") != 1 or not (folder and Path(folder).is_dir()):
            parser.error(f"--repo {repo_id}={folder}: give ME/NAME=FOLDER, with a folder that is there")
    with tempfile.TemporaryDirectory() as state, serving(state, user=given.user) as server:
        for repo_id, folder in repositories:
            server.add_repository(repo_id, folder)
        # The client's caches are new and go with the Hub; the pinned assets stay where they are.
        environment = {**server.environment(), "HF_SPP_CACHE": str(cache_folder())}
        return subprocess.run(given.command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
