"""What the Hub client raises, as one kind of error that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, SPPError


@contextmanager
def explained(repo: str, revision: str | None, wanted: str) -> Iterator[None]:
    """Turn whatever the client raises inside the block into a `HubError`.

    Args:
        repo: Id of the repository.
        revision: Its branch, tag or commit.
        wanted: What is read of it, such as `"file 'config.json'"`.

    Raises:
        HubError: The repository, revision or file does not exist, needs access rights, or cannot be reached.
    """
    at = f"{repo!r} (revision {revision!r})" if revision else f"{repo!r}"
    try:
        yield
    except SPPError:
        raise
    except HFValidationError as error:
        raise HubError(
            f"{repo!r} is neither a folder on this machine nor a repository id. "
            "Accepted: an existing folder, 'name', or 'user/name'. Check the spelling and the working directory."
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"Repository {at} is gated, and this account has no access to its {wanted}. "
            "Accepted: an account that was granted access. Ask for it on the repository's page, then log in with "
            "`hf auth login` or pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"Repository {at} was not found on the Hub, and no folder of that name exists here. Accepted: a public "
            "repository, or a private one with a token. Check the spelling, run `hf auth login`, or pass token=."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"Repository {repo!r} has no revision {revision!r}. Accepted: a branch, a tag or a commit. "
            "Leave revision= out for the default branch."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"The {wanted} of {at} is not in the local cache, and the Hub cannot be reached. Accepted: a cached "
            "file, or a connection. Unset HF_HUB_OFFLINE and connect once, or pass a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(
            f"Repository {at} has no {wanted}. Accepted: a file that its page lists. "
            "Check that this is the repository and revision you mean."
        ) from error
    # A connection that breaks raises a type of the HTTP client, which differs between versions of huggingface_hub.
    except Exception as error:
        raise HubError(
            f"The {wanted} of {at} could not be read: {error}. Accepted: an answer without error. "
            "Try again later, or pass a local folder."
        ) from error
