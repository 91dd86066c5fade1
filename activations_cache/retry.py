"""Calls to a storage driver, tried again where what went wrong may pass by itself."""

import logging
import re
from collections.abc import Callable
from typing import Any

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

from saekit import files
from saekit.errors import CacheError, first_line

log = logging.getLogger(__name__)

_TRIES = 6
_BACKOFF = wait_exponential(multiplier=2, max=30)  # 2 + 4 + 8 + 16 + 30 s: one minute in all


def call(
    where: str,
    function: Callable[..., Any],
    *args: Any,
    sleep: Callable[[float], None],
    **kwargs: Any,
) -> Any:
    """What `function` gives; `where` names it in messages.

    Raises CacheError where it fails to the last, or refuses; FileNotFoundError, a full disk of this
    machine, and mistakes in the code (TypeError and the like) as they are.
    """

    def warn(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        assert isinstance(error, Exception) and state.next_action
        log.warning(
            "%s: %s; try %d of %d in %.0f s",
            where,
            first_line(error),
            state.attempt_number + 1,
            _TRIES,
            state.next_action.sleep,
        )

    # No jitter: it would draw from Python's global generator, whose seed belongs to the user.
    attempts = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(_TRIES),
        wait=_BACKOFF,
        sleep=sleep,
        before_sleep=warn,
        reraise=True,
    )
    try:
        return attempts(function, *args, **kwargs)
    except FileNotFoundError:
        raise
    except Exception as error:
        if files.disk_full(error):
            raise
        if _may_pass(error):
            raise CacheError(
                f"{where} could not be reached in {_TRIES} tries ({first_line(error)}). Give "
                "the same command again: it goes on from what is complete"
            ) from error
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise  # a mistake in the code, not something the user can put right
        raise CacheError(
            f"{where} refuses ({type(error).__name__}: {first_line(error)}). Check the URL and "
            "the credentials (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY), then give the same command again"
        ) from error


_WILL_NOT_PASS = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
# Drivers raise the exceptions of the libraries below them (botocore, aiohttp, azure), which have no
# base in common and may not be installed: they are known by the names of their classes.
_NAMES_THAT_PASS = re.compile(
    "Connection|Timeout|Disconnect|Payload|Incomplete|Streaming|Transport|HTTPClientError"
    "|ServiceRequestError|ServiceResponseError"
)


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, OSError):
        return not isinstance(error, _WILL_NOT_PASS) and not files.disk_full(error)
    for attribute in ("status_code", "status", "code"):
        status = getattr(error, attribute, None)
        if isinstance(status, int):
            return status >= 500 or status in (408, 429)
    return any(_NAMES_THAT_PASS.search(base.__name__) for base in type(error).__mro__)
