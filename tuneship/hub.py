"""The Hugging Face Hub: the one place that calls it, its errors as ours, and the retries.

401, 403 and 404 are answers: they are told at once and never asked again. A busy Hub (429, 5xx)
and a broken connection are tried again with growing, jittered waits.
"""

from __future__ import annotations

import importlib.util
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tuneship.credentials import hub_token, redact
from tuneship.errors import InputError, OutsideError

T = TypeVar("T")

ATTEMPTS = 5
BUSY = (429, 500, 502, 503, 504)
_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)


def is_id(name: str) -> bool:
    """Whether a name can be a Hub id: `name` or `user/name`, no path."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def call(what: str, request: Callable[[], T], *, sleep: Callable[[float], None] = time.sleep) -> T:
    """Runs a request to the Hub.

    Args:
        what: what is asked for, as `model google/gemma-2-9b`, for messages.

    Raises:
        InputError: the Hub knows no such repository, revision or file.
        OutsideError: it refuses, is busy for too long, or cannot be reached.
    """
    from huggingface_hub import errors

    transport = transport_errors()
    absent: tuple[type[Exception], ...] = (*transport, errors.OfflineModeIsEnabled)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except errors.GatedRepoError as error:
            raise OutsideError(
                "the Hub asks for a licence to be accepted first",
                where=what,
                fix="accept it on the model's page, then set HF_TOKEN (or HF_TOKEN_FILE) to a token with read access",
            ) from error
        except errors.RepositoryNotFoundError as error:
            hint = "" if hub_token() else "; a private one needs HF_TOKEN"
            raise InputError("the Hub knows no such repository" + hint, where=what, fix="check the name") from error
        except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise InputError(f"the Hub knows no such revision or file: {_short(error)}", where=what) from error
        except errors.LocalEntryNotFoundError as error:
            # huggingface_hub hides the cause where it looked into its cache as a last resort.
            failure: Exception = error
            cause = error.__cause__ or error.__context__
            retryable = isinstance(cause, transport) or _status(cause) in BUSY
            if _status(cause) in (401, 403):
                raise _refused(what, error) from error
        except errors.HfHubHTTPError as error:
            failure, retryable = error, _status(error) in BUSY
            if _status(error) in (401, 403):
                raise _refused(what, error) from error
        except absent as error:
            failure, retryable = error, isinstance(error, transport)
        except RuntimeError as error:
            # What went wrong with a file that is sent is this error's cause.
            failure = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if not isinstance(failure, (errors.HfHubHTTPError, *transport)):
                raise
            retryable = isinstance(failure, transport) or _status(failure) in BUSY
            if _status(failure) in (401, 403):
                raise _refused(what, failure) from error
        except errors.HFValidationError as error:
            raise InputError(f"not a name on the Hub: {_short(error)}", where=what) from error
        if not retryable or attempt == ATTEMPTS:
            raise unreachable(what, failure) from failure
        sleep(min(30.0, 2.0**attempt) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
    raise AssertionError("unreachable")


def transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub 1 speaks through httpx, 2 through httpx2."""
    names = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return tuple(importlib.import_module(name).TransportError for name in names)


def unreachable(what: str, error: Exception) -> OutsideError:
    """The error of a Hub that is away, busy or broken."""
    status = _status(error) or _status(error.__cause__)
    if status:
        return OutsideError(f"the Hub answers {status}: {_short(error)}", where=what, fix="run the same command again")
    return OutsideError(
        f"the Hub cannot be reached: {_short(error)}",
        where=what,
        fix="check the network and HF_ENDPOINT; or name a local folder or a package: model instead",
    )


def _refused(what: str, error: Exception) -> OutsideError:
    return OutsideError(
        f"the Hub refuses this token: {_short(error)}",
        where=what,
        fix="set HF_TOKEN (or HF_TOKEN_FILE) to a token with the right to it",
    )


def _status(error: object) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _short(error: Exception) -> str:
    lines = redact(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def download(repo: str, revision: str | None, *, repo_type: str = "model", patterns: list[str] | None = None) -> str:
    """A snapshot of a repository in the local cache; returns its folder, whose name is the commit."""
    import huggingface_hub

    def request() -> str:
        return huggingface_hub.snapshot_download(
            repo, repo_type=repo_type, revision=revision, allow_patterns=patterns, token=hub_token()
        )

    return call(f"{repo_type} {repo}", request)


def api() -> Any:
    """A client with the user's token."""
    import huggingface_hub

    return huggingface_hub.HfApi(token=hub_token())
