"""The digest of a tag, asked of its registry: Docker's registry API, version 2, without an account.

    digest("gcr.io/cloud-sql-connectors/cloud-sql-proxy:2.25.3")   # "sha256:…"

One HEAD request; where the registry wants a token even of strangers (Docker Hub, GHCR, Quay), one more
for the token. Loopback registries are spoken to without TLS, as Docker does.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from tuneship.errors import InputError, OutsideError

TIMEOUT_S = 30

# An index of several platforms counts as the image, where there is one.
ACCEPT = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)


class Image(NamedTuple):
    """The parts of an image's name."""

    registry: str
    repository: str
    tag: str


def parse(image: str) -> Image:
    """An image's name in its parts, with Docker Hub's defaults.

    Raises:
        InputError: no exact tag.
    """
    path, _, tag = image.rpartition(":")
    if not path or "/" in tag or "@" in image or tag == "latest":
        raise InputError("an image is named by an exact tag", where=image, fix="as name:1.2.3")
    first, _, rest = path.partition("/")
    # As Docker tells a registry from a user: by a dot, a port, or being this machine.
    if rest and ("." in first or ":" in first or first == "localhost"):
        registry, repository = first, rest
    else:
        registry, repository = "docker.io", path
    if registry == "docker.io":
        registry = "registry-1.docker.io"
        repository = repository if "/" in repository else f"library/{repository}"
    return Image(registry, repository, tag)


def digest(image: str) -> str:
    """The digest that the registry has for an image's tag now.

    Raises:
        InputError: the name has no exact tag, or the registry does not know it.
        OutsideError: the registry cannot be reached, or refuses.
    """
    registry, repository, tag = parse(image)
    scheme = "http" if _is_loopback(registry) else "https"
    url = f"{scheme}://{registry}/v2/{repository}/manifests/{tag}"
    status, headers, _ = _ask(url, image, method="HEAD", headers={"Accept": ACCEPT})
    if status == 401:
        token = _token(headers.get("WWW-Authenticate", ""), image)
        headers = {"Accept": ACCEPT, "Authorization": f"Bearer {token}"}
        status, headers, _ = _ask(url, image, method="HEAD", headers=headers)
    if status == 404:
        raise InputError("the registry has no such tag", where=image, fix="name a tag that exists")
    if status != 200:
        raise OutsideError(f"the registry answers {status}", where=image, fix="try again later")
    found = headers.get("Docker-Content-Digest", "")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
        raise OutsideError(f"the registry names no sha256 digest: {found!r}", where=image)
    return found


def _ask(
    url: str, image: str, *, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of an answer, whatever the status."""
    request = urllib.request.Request(url, method=method, headers=dict(headers or {}))  # noqa: S310 - http(s), ours
    try:
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, answer.headers, answer.read()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise OutsideError(f"the registry cannot be reached: {reason}", where=image, fix="try again") from None


def _token(challenge: str, image: str) -> str:
    """A stranger's token, from where the registry's challenge says."""
    scheme, _, rest = challenge.partition(" ")
    asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = urlsplit(asked.pop("realm", ""))
    if scheme.lower() != "bearer" or not (realm.scheme == "https" or _is_loopback(realm.netloc)):
        raise OutsideError("the registry wants an account", where=image, fix="mirror the image where everybody reads")
    query = urlencode({key: asked[key] for key in ("service", "scope") if key in asked})
    _, _, body = _ask(f"{realm.geturl()}?{query}", image)
    try:
        grant = json.loads(body)
        return str(grant.get("token") or grant["access_token"])
    except (ValueError, AttributeError, KeyError):
        raise OutsideError("the registry's token server gives no token", where=image) from None


def _is_loopback(netloc: str) -> bool:
    return urlsplit(f"//{netloc}").hostname in ("127.0.0.1", "localhost", "::1")
