"""API keys from a mounted file: one a line, several at a time, so that they can be rotated.

    head -c 24 /dev/urandom | base64 > keys.txt

The file is looked at again with each request and read when it changed, so a new key is good as
soon as Kubernetes has renewed the mount. While it cannot be read, the last keys stay good.
Every key is compared, by digest and in constant time, so an answer's time tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from tuneship.errors import InputError, OutsideError
from tuneship.serve.files import stamp

# A guess at 2^30 a second would take centuries.
SHORTEST = 16


class KeyFile:
    """The keys that a file holds at this moment.

    Raises:
        InputError, OutsideError: there is no such file, or no good key in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = stamp(self._path)
        if self._seen is None:
            raise OutsideError(
                "the file of API keys is missing", where=str(path), fix="mount it, or serve with --no-auth"
            )
        self._keys = self._read()

    def accepts(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries one of the keys."""
        self._renew()
        scheme, _, token = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        good = scheme.lower() == b"bearer"
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(hashlib.sha256(key).digest(), digest)
        return good and found

    def first(self) -> str:
        """The first key: the one that we show to an engine of ours."""
        self._renew()
        return self._keys[0].decode()

    def _renew(self) -> None:
        now = stamp(self._path)
        if now is not None and now != self._seen:
            try:
                self._keys = self._read()
            except (OutsideError, InputError):
                # Half-written or half-mounted: looked at again with the next request.
                return
            self._seen = now

    def _read(self) -> list[bytes]:
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError as error:
            raise OutsideError(
                f"the file of API keys cannot be read: {error.strerror}",
                where=str(self._path),
                fix="give the user that serves the right to read it",
            ) from error
        keys = [key for line in lines if (key := line.strip()) and not key.startswith(b"#")]
        if not keys:
            raise OutsideError("the file of API keys is empty", where=str(self._path), fix="put one key on a line")
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST or not key.isascii() or b" " in key:
                raise InputError(
                    f"API key {number} is not at least {SHORTEST} characters of ASCII without a blank",
                    where=str(self._path),
                    fix="make one with: head -c 24 /dev/urandom | base64",
                )
        return keys
