"""Files in a folder or under a gs:// URI, by the same few functions.

Google Cloud Storage is reached with the ambient credentials (Workload Identity in a pod, `gcloud
auth application-default login` on a laptop), or through the emulator that STORAGE_EMULATOR_HOST
names.
"""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tuneship.errors import InputError, OutsideError


def is_remote(uri: str) -> bool:
    """Whether a name is a gs:// URI."""
    return uri.startswith("gs://")


@contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """A file's bytes, streamed; seekable.

    Raises:
        InputError: there is no such file.
        OutsideError: the storage refuses.
    """
    if not is_remote(uri):
        try:
            stream: IO[bytes] = Path(uri).open("rb")  # noqa: SIM115 - closed below
        except (FileNotFoundError, IsADirectoryError):
            raise InputError("no such file", where=uri) from None
        except OSError as error:
            raise OutsideError(f"the file cannot be read: {error.strerror}", where=uri) from error
        with stream:
            yield stream
        return
    with _errors(uri), _blob(uri).open("rb", chunk_size=8 * 2**20) as remote:
        yield remote


def upload(folder: Path, uri: str, *, last: str = "", leave: Collection[str] = ()) -> int:
    """Copies the files of a folder below a URI (or into another folder); returns the bytes.

    Files that are there already, with the same content, are not sent again.

    Args:
        last: name of the file that is sent after all others, as the mark that the copy is whole.
        leave: names of files and of folders that are not sent.

    Raises:
        InputError: there is no such bucket.
        OutsideError: the storage refuses, or the folder cannot be written.
    """
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.name == last, str(path))
    )
    sent = 0
    for file in files:
        name = file.relative_to(folder).as_posix()
        if name in leave or name.partition("/")[0] in leave:
            continue
        sent += put(file, f"{uri.rstrip('/')}/{name}")
    return sent


def put(file: Path, uri: str) -> int:
    """Copies one file to a URI (or a path), unless the same content is there; returns the bytes.

    Raises:
        InputError: there is no such bucket.
        OutsideError: the storage refuses, or the folder cannot be written.
    """
    if not is_remote(uri):
        return _copy(file, Path(uri))
    with _errors(uri):
        return _send(file, uri)


def _copy(file: Path, target: Path) -> int:
    try:
        if target.is_file() and filecmp.cmp(file, target, shallow=False):
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(file, partial)
        partial.replace(target)
    except OSError as error:
        raise OutsideError(f"the folder cannot be written: {error.strerror}", where=str(target)) from error
    return file.stat().st_size


def download(uri: str, folder: Path) -> list[str]:
    """Copies every file below a URI (or of another folder) into a folder; returns their names."""
    names = listing(uri)
    for name in names:
        get(f"{uri.rstrip('/')}/{name}", folder / name)
    return names


def get(uri: str, file: Path) -> None:
    """Copies one file from a URI (or a path).

    Raises:
        InputError: there is no such file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(uri):
        with _errors(uri):
            _blob(uri).download_to_filename(str(file))
    elif Path(uri).is_file():
        shutil.copyfile(uri, file)
    else:
        raise InputError("no such file", where=uri)


def listing(uri: str) -> list[str]:
    """The names of all files below a URI or in a folder, relative to it.

    Raises:
        OutsideError: a name would leave the folder.
    """
    if not is_remote(uri):
        root = Path(uri)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    bucket, prefix = _parts(uri.rstrip("/") + "/")
    with _errors(uri):
        names = sorted(blob.name.removeprefix(prefix) for blob in _client().list_blobs(bucket, prefix=prefix))
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise OutsideError("an object's name would leave the folder", where=f"{uri}/{name}")
    return [name for name in names if name and not name.endswith("/")]


def checksum(uri: str) -> str:
    """The crc32c of an object, as the storage keeps it: another one, and its content has changed.

    Raises:
        InputError: there is no such object.
    """
    with _errors(uri):
        blob = _blob(uri)
        blob.reload()
        return str(blob.crc32c)


def delete(uri: str) -> None:
    """Removes every file below a gs:// URI, or a folder."""
    if not is_remote(uri):
        shutil.rmtree(uri, ignore_errors=True)
        return
    for name in listing(uri):
        remove(f"{uri.rstrip('/')}/{name}")


def remove(uri: str) -> None:
    """Removes one file that is at a URI (or a path).

    Raises:
        OutsideError: the storage refuses, or the file cannot be removed.
    """
    if is_remote(uri):
        with _errors(uri):
            _blob(uri).delete()
        return
    try:
        Path(uri).unlink(missing_ok=True)
    except OSError as error:
        raise OutsideError(f"the file cannot be removed: {error.strerror}", where=uri) from error


def _send(file: Path, uri: str) -> int:
    import base64

    import google_crc32c

    blob = _blob(uri)
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while chunk := stream.read(8 * 2**20):
            checksum.update(chunk)
    if blob.exists():
        blob.reload()
        if blob.crc32c == base64.b64encode(checksum.digest()).decode():
            return 0
    blob.upload_from_filename(str(file), checksum="crc32c")
    return file.stat().st_size


def _parts(uri: str) -> tuple[str, str]:
    # Not urlsplit: ? and # are ordinary characters of an object's name.
    bucket, _, path = uri.removeprefix("gs://").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket) or not path.strip("/"):
        raise InputError("a gs:// URI names a bucket and a path", where=uri, fix="as gs://bucket/folder")
    return bucket, path.lstrip("/")


def _client() -> Any:
    try:
        from google.cloud import storage
    except ModuleNotFoundError:
        raise OutsideError(
            "gs:// needs the Google Cloud client", where="google-cloud-storage", fix="pip install 'tuneship[gke]'"
        ) from None
    return storage.Client()


def _blob(uri: str) -> Any:
    bucket, name = _parts(uri)
    return _client().bucket(bucket).blob(name)


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Google's errors as ours."""
    try:
        from google.api_core import exceptions
        from google.auth import exceptions as auth
        from requests import exceptions as transport
    except ModuleNotFoundError:
        _client()
        raise
    try:
        yield
    except exceptions.NotFound as error:
        raise InputError("no such object or bucket", where=uri) from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise OutsideError(
            "the storage refuses these credentials", where=uri, fix="grant roles/storage.objectUser on the bucket"
        ) from error
    except auth.GoogleAuthError as error:
        raise OutsideError(
            f"no Google credentials: {error}", where=uri, fix="gcloud auth application-default login"
        ) from error
    except (exceptions.GoogleAPIError, transport.RequestException) as error:
        raise OutsideError(f"the storage failed: {error}", where=uri, fix="run the same command again") from error
