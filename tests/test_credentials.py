"""Tokens: a file before the environment, and out of everything that we write.

python -m pytest tests/test_credentials.py -v
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneship import credentials
from tuneship.errors import InputError, OutsideError

# Made up, each in its issuer's form; split so that no scanner takes this file for a leak.
TOKENS = {
    "hugging face": "hf_" + "CANARYabcdefgh12345678",
    "github": "ghp_" + "A1b2C3d4E5f6G7h8I9j0K1l2",
    "github, fine-grained": "github_pat_" + "A1b2C3d4E5f6G7h8I9j0K1l2",
    "google api": "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p",
    "google access": "ya29." + "a0AfB_byA1b2C3d4E5f6G7h8I9j0",
    "openai": "sk-" + "proj-A1b2C3d4E5f6G7h8I9j0",
    "slack": "xoxb-" + "1234567890-abcdef",
    "private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
}
HF = TOKENS["hugging face"]


def test_the_environment_gives_the_token() -> None:
    assert credentials.hub_token({"HF_TOKEN": HF}) == HF
    assert credentials.hub_token({"HF_TOKEN": ""}) is None
    assert credentials.hub_token({}) is None


def test_a_mounted_file_wins_over_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{HF}\n")
    assert credentials.hub_token({"HF_TOKEN": "other", "HF_TOKEN_FILE": str(tmp_path / "token")}) == HF


def test_the_first_line_of_a_key_file_is_the_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of November\n\nfirst-key \nsecond-key\n")
    assert credentials.api_key({"TUNESHIP_API_KEY_FILE": str(tmp_path / "keys")}) == "first-key"
    assert credentials.api_key({"TUNESHIP_API_KEY": "from-environment"}) == "from-environment"
    assert credentials.api_key({}) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "cannot be read"),
        (lambda file: file.mkdir(), "cannot be read"),
        (lambda file: file.write_text(" \n"), "empty"),
        (lambda file: file.write_bytes(b"hf_\xff\xfe"), "not UTF-8"),
    ],
    ids=["missing", "folder", "empty", "bytes"],
)
def test_a_token_file_that_gives_no_token_is_told(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "token")
    # Never the environment instead: whoever names a file means it.
    with pytest.raises(OutsideError, match=message) as caught:
        credentials.hub_token({"HF_TOKEN": HF, "HF_TOKEN_FILE": str(tmp_path / "token")})
    assert "HF_TOKEN_FILE" in str(caught.value)


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_token_in_a_value_is_refused_and_not_repeated(token: str) -> None:
    for tree in ({"a": {"b": [1, f"x{token}"]}}, {"a": {"b": token}}, {"a": {token: 1}}):
        with pytest.raises(InputError, match="secret") as caught:
            credentials.refuse_secrets(tree, "")
        assert token not in str(caught.value)
        assert caught.value.where.startswith("a")


@pytest.mark.parametrize(
    "key", ["hf_token", "token", "HF_TOKEN", "password", "db_passwd", "api_key", "apikey", "secret"]
)
def test_a_key_that_asks_for_a_secret_is_refused(key: str) -> None:
    with pytest.raises(InputError) as caught:
        credentials.refuse_secrets({"model": {key: "hunter2"}}, "")
    assert caught.value.where == f"model.{key}"
    assert "hunter2" not in str(caught.value)


def test_ordinary_values_pass() -> None:
    credentials.refuse_secrets(
        {
            "max_new_tokens": 5,
            "tokens_per_batch": 256,
            "name": "the hf_ prefix alone",
            "secrets": ["hf-token"],
            "token": None,
            "keyboard": "sk-short",
        },
        "",
    )


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_tokens_are_redacted_by_their_form(token: str) -> None:
    text = credentials.redact(f"GET https://x/?k={token} failed", {})
    assert text == "GET https://x/?k=[redacted] failed"


def test_known_tokens_are_redacted_whatever_their_form(tmp_path: Path) -> None:
    environ = {"HF_TOKEN": "an unusual token", "TUNESHIP_API_KEY": "correct horse"}
    assert credentials.redact("an unusual token, correct horse", environ) == "[redacted], [redacted]"


def test_a_token_read_from_a_file_is_redacted_from_then_on(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("battery staple, mounted\n")
    credentials.hub_token({"HF_TOKEN_FILE": str(tmp_path / "token")})
    assert credentials.redact("401 for battery staple, mounted", {}) == "401 for [redacted]"


def test_log_records_and_their_tracebacks_are_redacted() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(credentials.RedactingFilter())
    logger = logging.getLogger("test.redacting")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        logger.warning("sent %s to %s", HF, "somewhere")
        try:
            raise RuntimeError(f"bad token {HF}")
        except RuntimeError:
            logger.exception("it failed")
    finally:
        logger.removeHandler(handler)
    written = stream.getvalue()
    assert "sent [redacted] to somewhere" in written
    assert "RuntimeError: bad token [redacted]" in written
    assert HF not in written
