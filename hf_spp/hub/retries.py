"""Requests that are repeated while the Hub is busy or the connection breaks."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.utils import logging

from .._compat import CONNECTION_ERRORS

logger = logging.get_logger(__name__)

# Seconds before each further try.
DELAYS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)

Result = TypeVar("Result")


def retried(call: Callable[[], Result]) -> Result:
    """The result of a call that may be made more than once, made again while it fails for a reason that passes.

    Raises:
        Exception: Whatever the call raises for another reason, or at the last try.
    """
    for delay in DELAYS:
        try:
            return call()
        except Exception as error:  # which are worth another try is decided by `is_passing`
            if not is_passing(error):
                raise
            logger.info(f"The Hub did not answer ({_in_short(error)}); the request is repeated.")
            time.sleep(max(delay, min(_asked_wait(error), _LONGEST_WAIT)))
    return call()


def is_passing(error: BaseException) -> bool:
    """Whether an error of the client means that the Hub is busy or the connection broke."""
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in _BUSY
    return isinstance(error, CONNECTION_ERRORS) and not is_unreachable(error)


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of the client means that there is no way to the Hub, so that another try is not worth it."""
    # The class is that of httpx or httpx2, by version.
    return isinstance(error, OfflineModeIsEnabled) or type(error).__name__ == "ConnectError"


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of the client, None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _asked_wait(error: Exception) -> float:
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


def _in_short(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
