"""API keys: what a file of them may hold. How they guard is in test_gateway.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneship.errors import InputError, OutsideError
from tuneship.serve import keys
from tuneship.serve.keys import KeyFile

GOOD = "0123456789abcdef"


def test_v1_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="missing"):
        KeyFile(tmp_path / "keys")


@pytest.mark.parametrize("text", ["", "\n\n", "# no key\n"])
def test_v1_an_empty_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(OutsideError, match="empty"):
        KeyFile(tmp_path / "keys")


@pytest.mark.parametrize("key", ["short", "with a blank in it", "schlüssel-schlüssel"])
def test_v1_a_bad_key_is_told_without_the_key(tmp_path: Path, key: str) -> None:
    (tmp_path / "keys").write_text(f"{GOOD}\n{key}\n")
    with pytest.raises(InputError, match="API key 2") as caught:
        KeyFile(tmp_path / "keys")
    assert key not in str(caught.value)


def test_v1_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="cannot be read"):
        KeyFile(tmp_path)


def test_v1_the_last_keys_stay_while_the_file_is_half_written(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(GOOD)
    found = KeyFile(file)
    file.write_text("")
    assert found.accepts(f"Bearer {GOOD}".encode())
    file.write_text(GOOD[::-1])
    assert found.accepts(f"bearer  {GOOD[::-1]}".encode())
    assert not found.accepts(f"Bearer {GOOD}".encode())


def test_v1_every_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is shown and wherever it would match, as many whole digests are compared."""
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    file = tmp_path / "keys"
    file.write_text(f"{GOOD}1\n{GOOD}2\n{GOOD}3\n")
    found = KeyFile(file)
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    for shown in (f"Bearer {GOOD}1", f"Bearer {GOOD}3", "Bearer no", "", None, f"Basic {GOOD}1"):
        compared.clear()
        found.accepts(None if shown is None else shown.encode())
        assert compared == [(32, 32)] * 3, shown
