"""Tokens: where they come from, and how they are kept out of everything that we write.

The only room that reads a token. A mounted file wins over the environment, because a file is
what Kubernetes mounts and what a shell history does not keep:

    HF_TOKEN_FILE=/var/run/secrets/hf/token   or   HF_TOKEN=…

Covered: recipes, logs, error messages, provenance. Not covered: a token that a user writes into
the rows of a data set.

The room is called `credentials`, not `secrets`: Metaflow starts flow.py as a script, which puts
this folder first on sys.path, where a module of that name would hide the standard library's.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from tuneship.errors import InputError, OutsideError

# Prefixes published by the issuers: huggingface.co/docs (hf_), docs.github.com (gh?_),
# cloud.google.com/docs (AIza, ya29., service-account JSON), OpenAI-style sk-.
_TOKEN = re.compile(
    r"hf_[A-Za-z0-9_]{8,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abp]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_KEY = re.compile(r"(^|_)(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)

# What was read from files, so that `redact` knows it too.
_READ: set[str] = set()


def hub_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Hugging Face token, or None where there is none.

    Raises:
        OutsideError: HF_TOKEN_FILE names a file that cannot be read or is empty.
    """
    return _named("HF_TOKEN", environ)


def api_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """The key that `tuneship ask` shows to a server, from TUNESHIP_API_KEY_FILE or TUNESHIP_API_KEY, or None.

    Raises:
        OutsideError: TUNESHIP_API_KEY_FILE names a file that cannot be read or is empty.
    """
    key = _named("TUNESHIP_API_KEY", environ)
    # The file may be the server's, with a key on each line, and comments.
    lines = [line.strip() for line in (key or "").splitlines()]
    return next((line for line in lines if line and not line.startswith("#")), None)


def _named(name: str, environ: Mapping[str, str]) -> str | None:
    if path := environ.get(f"{name}_FILE"):
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise OutsideError(
                f"the token file cannot be read: {error.strerror}",
                where=f"{name}_FILE={path}",
                fix=f"mount the secret there, or unset {name}_FILE",
            ) from error
        except UnicodeDecodeError:
            # Without its cause: that holds the file's bytes.
            raise OutsideError("the token file is not UTF-8", where=f"{name}_FILE={path}") from None
        if not token:
            raise OutsideError("the token file is empty", where=f"{name}_FILE={path}")
        _READ.update(line.strip() for line in token.splitlines() if line.strip())
        return token
    return environ.get(name) or None


def refuse_secrets(value: object, where: str) -> None:
    """Refuses a tree of plain values that holds a token or a key that asks for one.

    Raises:
        InputError: names the key; the value is never part of the message.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if _TOKEN.search(str(key)):
                raise _refusal(where)
            path = f"{where}.{key}" if where else str(key)
            if isinstance(inner, str) and inner and _SECRET_KEY.search(str(key)):
                raise _refusal(path)
            refuse_secrets(inner, path)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            refuse_secrets(inner, f"{where}[{index}]")
    elif isinstance(value, str) and _TOKEN.search(value):
        raise _refusal(where)


def _refusal(where: str) -> InputError:
    return InputError(
        "a secret does not belong in a recipe or on a command line",
        where=where,
        fix="put it in HF_TOKEN, or in a file named by HF_TOKEN_FILE, and revoke the one written here",
    )


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with every token that we know or recognise replaced by `[redacted]`."""
    for known in {*_READ, environ.get("HF_TOKEN"), environ.get("TUNESHIP_API_KEY")}:
        if known:
            text = text.replace(known, "[redacted]")
    return _TOKEN.sub("[redacted]", text)


class RedactingFilter(logging.Filter):
    """Keeps tokens out of log records, those of libraries and tracebacks included. Add it to each handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record; never drops it."""
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            # What a formatter finds here it does not format itself.
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True
