"""What the Hub client raises, as one kind of error that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, SPPError
from .retries import status_of


@contextmanager
def explained(
    repo: str, revision: str | None, wanted: str, doing: Literal["read", "written"] = "read"
) -> Iterator[None]:
    """Turn whatever the client raises inside the block into a `HubError`.

    Args:
        repo: Id of the repository.
        revision: Its branch, tag or commit.
        wanted: What is read or written of it, such as `"file 'config.json'"`.
        doing: Which of the two.

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
        cached = f"the local cache lacks the {wanted} of {at}" if doing == "read" else f"{at} was not written"
        way = "Unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "Connect and try again"
        raise HubError(
            f"The Hub cannot be reached, and {cached}. Accepted: a connection, or to read also what lies in the cache. "
            f"{way}, or pass a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(
            f"Repository {at} has no {wanted}. Accepted: a file that its page lists. "
            "Check that this is the repository and revision you mean."
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        if isinstance(error, HfHubHTTPError) and status_of(error) not in (401, 403):
            raise _other(at, wanted, doing, error) from error
        raise HubError(
            f"The {wanted} of {at} may not be {doing} with this token, or without one: {error} Accepted: a token of an "
            "account that may. Log in with `hf auth login`, or pass token=."
        ) from error
    # A connection that breaks raises a type of the HTTP client, which differs between versions of huggingface_hub.
    except Exception as error:
        raise _other(at, wanted, doing, error) from error


def _other(at: str, wanted: str, doing: str, error: Exception) -> HubError:
    instead = ", or pass a local folder" if doing == "read" else ""
    return HubError(
        f"The {wanted} of {at} could not be {doing}: {error}. Accepted: a Hub that can be reached and answers without "
        f"error. Check the network, or try again later{instead}."
    )
