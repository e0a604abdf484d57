"""Commits to repositories: all files of a push become visible at once, or none does."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from .. import checkpoint
from ..errors import HubError
from .failures import explained
from .files import forget_file
from .retries import DELAYS, is_passing, retried, status_of

logger = logging.get_logger(__name__)

_CONFLICT = 412
_BRANCH = "main"


@dataclass(frozen=True)
class Head:
    """What a repository holds at one commit.

    Attributes:
        repo_id: Id of the repository.
        commit: The commit.
        digests: By path: the SHA-256 sum of a large file, the git object id of another.
        token: Hub token.
    """

    repo_id: str
    commit: str
    digests: Mapping[str, str]
    token: str | bool | None = field(default=None, repr=False)

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, None where there is none.

        Raises:
            HubError: It cannot be read.
        """
        if path not in self.digests:
            return None
        with explained(self.repo_id, self.commit, f"file {path!r}"):
            for again in (False, True):
                found = Path(retried(partial(self._download, path, again=again)))
                if _has_digest(found, self.digests[path]):
                    return checkpoint.read_bytes(found)
            forget_file(found)
            raise HubError(
                f"The file {path!r} of {self.repo_id!r} arrived twice with other bytes than the Hub says. Accepted: "
                "the file as it was pushed. Try again later."
            )

    def _download(self, path: str, *, again: bool) -> str:
        return huggingface_hub.hf_hub_download(
            self.repo_id, path, revision=self.commit, token=self.token, force_download=again
        )


@dataclass(frozen=True)
class Change:
    """What a push makes of a repository.

    Attributes:
        files: Files on this machine by their path in the repository.
        removed: Paths that go.
        sums: SHA-256 sums of files, as far as they are known.
    """

    files: Mapping[str, Path]
    removed: frozenset[str] = frozenset()
    sums: Mapping[str, str] = field(default_factory=dict)

    def missing(self, head: Head) -> dict[str, Path]:
        """The files that a repository does not hold with the same bytes."""
        return {path: file for path, file in self.files.items() if not self._is_held(head.digests.get(path), path)}

    def is_done(self, head: Head) -> bool:
        """Whether a repository is as the change makes it."""
        return self.removed.isdisjoint(head.digests) and not self.missing(head)

    def _is_held(self, digest: str | None, path: str) -> bool:
        return digest is not None and _has_digest(self.files[path], digest, self.sums.get(path))


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Attributes:
        repo_id: Id of the repository.
        url: Where it is seen: the repository, or the pull request.
        commit: The commit that holds the files.
        files: How many files went up; others lay there already.
        bytes: Their size.
        note: What happened besides that a user should know; None where nothing did.
    """

    repo_id: str
    url: str
    commit: str
    files: int
    bytes: int
    note: str | None = None


def push_files(
    repo_id: str,
    prepare: Callable[[Head], Change],
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Pushed:
    """Make one commit that holds all files of a push.

    The commit is bound to the state that it was prepared for. If others commit meanwhile, it is prepared anew. Where
    the answer to it is lost, the repository is read: what has landed is not repeated. A repository that holds
    everything already is left as it is.

    Args:
        repo_id: Id of the repository, which is made if absent.
        prepare: Gives the change for what the repository holds.
        message: Title of the commit, or of the pull request.
        private: Whether a new repository is private; None leaves it to the account.
        revision: Branch, which is made if absent.
        create_pr: Whether to open a pull request in place of a commit to the branch.
        token: Hub token.

    Raises:
        HubError: The Hub refused, or could not be reached; the repository is then as it was.
    """
    api = HfApi(token=token)
    with explained(repo_id, revision, "files", "written"):
        repo_id = retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        branch = revision or _BRANCH
        if revision is not None and not revision.startswith("refs/"):
            retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        lost: Exception | None = None
        for _ in (*DELAYS, None):
            head = _head(api, repo_id, branch)
            change = prepare(head)
            done = _done(api, head, change, branch, message, create_pr, lost)
            if done is not None:
                return done
            try:
                return _commit(api, head, change, message, branch, create_pr)
            except Exception as error:  # whatever came back, only the repository tells whether the commit landed
                conflict = status_of(error) == _CONFLICT
                if isinstance(error, HfHubHTTPError) and not conflict and not is_passing(error):
                    raise
                lost = error
            logger.info(f"The commit to {repo_id} got no answer ({lost}); what became of it is read.")
            if not conflict and not is_passing(lost):
                break
        head = _head(api, repo_id, branch)
        done = _done(api, head, change, branch, message, create_pr, lost)
        if done is None:
            raise HubError(
                f"The files of {repo_id!r} could not be written: {lost} The repository is as it was before. Accepted: "
                "an answer without error. Push again later; what was uploaded is not uploaded again."
            ) from lost
        return done


def _commit(api: HfApi, head: Head, change: Change, message: str, branch: str, create_pr: bool) -> Pushed:
    added = change.missing(head)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path, file) for path, file in added.items()),
        *(CommitOperationDelete(path) for path in sorted(change.removed & head.digests.keys())),
    ]
    made = api.create_commit(
        head.repo_id,
        operations,
        commit_message=message,
        revision=branch,
        create_pr=create_pr,
        parent_commit=head.commit,
    )
    url = made.pr_url if create_pr and made.pr_url else f"{api.endpoint}/{head.repo_id}"
    return Pushed(head.repo_id, url, made.oid, len(added), sum(file.stat().st_size for file in added.values()))


def _done(
    api: HfApi, head: Head, change: Change, branch: str, message: str, create_pr: bool, lost: Exception | None
) -> Pushed | None:
    """What a push has already come to, by an earlier try or an earlier run."""
    note = "The connection broke after the commit had landed." if lost else "The repository held these files already."
    if change.is_done(head):
        return Pushed(head.repo_id, f"{api.endpoint}/{head.repo_id}", head.commit, 0, 0, note)
    if not create_pr:
        return None

    def opened() -> list[tuple[str, str]]:
        found = api.get_repo_discussions(head.repo_id, discussion_type="pull_request")
        return [
            (one.url, str(one.git_reference))
            for one in found
            if one.title == message and one.status in ("open", "draft")
        ]

    for url, reference in retried(opened):
        proposed = _head(api, head.repo_id, reference)
        if change.is_done(proposed):
            return Pushed(head.repo_id, url, proposed.commit, 0, 0, note.replace("repository", "pull request"))
    return None


def _head(api: HfApi, repo_id: str, revision: str) -> Head:
    info = retried(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    digests = {one.rfilename: one.lfs.sha256 if one.lfs else str(one.blob_id) for one in info.siblings or ()}
    return Head(repo_id, str(info.sha), digests, api.token)


def _has_digest(file: Path, digest: str, sha256: str | None = None) -> bool:
    """Whether a file is the one that the Hub knows by a digest: a SHA-256 sum, or a git object id."""
    if len(digest) == 64:
        return digest == (sha256 or checkpoint.sha256_of(file))
    data = checkpoint.read_bytes(file)
    return digest == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
