"""Files in a folder or under a gs:// URI, the latter against fake-gcs-server.

python -m pytest tests/test_storage.py -v
"""

from __future__ import annotations

import gc
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_gcs
import pytest
from samples import sql_rows, write_rows

from tuneship import journal, storage
from tuneship.data import sources
from tuneship.errors import InputError, OutsideError
from tuneship.prepare import prepare
from tuneship.recipe import Data, Recipe

# Google's client says it while it is imported; gRPC is not used.
pytestmark = pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with fake_gcs.serving() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """An empty bucket."""
    from google.cloud.storage import Client

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    client = Client()
    made = client.create_bucket(f"bucket-{abs(hash(request.node.nodeid))}")
    yield made
    for blob in list(made.list_blobs()):
        blob.delete()
    client.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an adapter's is: some files, one below, and the mark of a whole."""
    made = tmp_path / "adapter"
    (made / "deep" / "er").mkdir(parents=True)
    (made / "weights.safetensors").write_bytes(bytes(range(256)) * 400)
    (made / "a.json").write_text("{}")
    (made / "deep" / "er" / "b.txt").write_text("b")
    (made / "deep" / "50 % of #1? ü.txt").write_text("awkward")
    return made


def content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def size(path: Path) -> int:
    return sum(map(len, content(path).values()))


@pytest.fixture(params=["gs", "folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where to: both kinds of storage keep the same promises."""
    if request.param == "folder":
        return str(tmp_path / "published" / "run")
    return f"gs://{request.getfixturevalue('bucket').name}/published/run"


# --- both kinds -------------------------------------------------------------------------------


def test_what_goes_up_comes_down(folder: Path, target: str, tmp_path: Path) -> None:
    assert storage.upload(folder, target) == size(folder)
    assert storage.listing(target) == sorted(content(folder))
    assert storage.download(target, tmp_path / "back") == sorted(content(folder))
    assert content(tmp_path / "back") == content(folder)


def test_twice_sends_nothing(folder: Path, target: str) -> None:
    storage.upload(folder, target)
    assert storage.upload(folder, target) == 0
    (folder / "a.json").write_text("[]")
    assert storage.upload(folder, target) == 2


def test_a_file_of_the_same_size_is_told_from_another(folder: Path, target: str, tmp_path: Path) -> None:
    storage.upload(folder, target)
    (folder / "deep" / "er" / "b.txt").write_text("c")
    assert storage.upload(folder, target) == 1
    storage.download(target, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)


def test_the_mark_of_a_whole_goes_last(folder: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    for name in ("_send", "_copy"):
        real: Callable[[Path, Any], int] = getattr(storage, name)

        def noted(file: Path, uri: Any, real: Callable[[Path, Any], int] = real) -> int:
            sent.append(file.name)
            return real(file, uri)

        monkeypatch.setattr(storage, name, noted)
    storage.upload(folder, target, last="a.json")
    assert len(sent) == 4
    assert sent[-1] == "a.json"


def test_some_files_may_be_left(folder: Path, target: str) -> None:
    storage.upload(folder, target, leave={"a.json"})
    assert storage.listing(target) == sorted(set(content(folder)) - {"a.json"})


def test_a_name_is_no_prefix(folder: Path, target: str) -> None:
    storage.upload(folder, f"{target}-2")
    storage.upload(folder, target, leave=set(content(folder)) - {"a.json"})
    assert storage.listing(target) == ["a.json"]
    assert storage.listing(f"{target}/") == ["a.json"]
    storage.delete(target)
    assert storage.listing(target) == []
    assert len(storage.listing(f"{target}-2")) == 4


def test_a_file_is_read_as_a_stream_that_can_be_sought(folder: Path, target: str) -> None:
    storage.upload(folder, target)
    with storage.open_read(f"{target}/weights.safetensors") as stream:
        assert stream.read(3) == b"\x00\x01\x02"
        stream.seek(-1, 2)
        assert stream.read() == b"\xff"
    with storage.open_read(f"{target}/deep/50 % of #1? ü.txt") as stream:
        assert stream.read() == b"awkward"


def test_what_is_not_there_is_told(target: str) -> None:
    with pytest.raises(InputError, match="no such") as caught, storage.open_read(f"{target}/missing.json") as stream:
        stream.read()
    assert caught.value.where == f"{target}/missing.json"
    assert storage.listing(target) == []
    assert storage.download(target, Path("nowhere")) == []


# --- gs:// ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["listing", "upload", "download", "delete", "checksum"])
def test_a_bucket_that_does_not_exist_is_told(bucket: Any, folder: Path, use: str) -> None:
    uri = f"gs://{bucket.name}-not/run"
    calls: dict[str, Callable[[], object]] = {
        "listing": lambda: storage.listing(uri),
        "upload": lambda: storage.upload(folder, uri),
        "download": lambda: storage.download(uri, folder),
        "delete": lambda: storage.delete(uri),
        "checksum": lambda: storage.checksum(uri),
    }
    with pytest.raises(InputError, match="no such object or bucket"):
        calls[use]()


@pytest.mark.parametrize(
    "uri",
    ["gs://", "gs://bucket", "gs://bucket/", "gs:///path", "gs://Bucket/x", "gs://-b-/x", "gs://[::1/x", "gs://a b/x"],
)
def test_a_uri_that_is_none_is_told(uri: str) -> None:
    with pytest.raises(InputError, match="names a bucket and a path"), storage.open_read(uri):
        pass


# S6: names of objects are somebody else's.
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "..", "/etc/evil"])
def test_an_object_cannot_leave_the_folder(bucket: Any, tmp_path: Path, name: str) -> None:
    bucket.blob("run/good").upload_from_string("x")
    # The emulator tidies such names up itself; the real storage keeps them.
    monkey = pytest.MonkeyPatch()

    class Listed:
        def __init__(self, name: str) -> None:
            self.name = name

    class Client:
        def list_blobs(self, *_: object, **__: object) -> list[Listed]:
            return [Listed("run/good"), Listed(f"run/{name}")]

    with monkey.context() as patched:
        patched.setattr(storage, "_client", Client)
        with pytest.raises(OutsideError, match="leave the folder"):
            storage.download(f"gs://{bucket.name}/run", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_placeholders_of_folders_are_no_files(bucket: Any) -> None:
    for name in ("run/", "run/sub/", "run/sub/file"):
        bucket.blob(name).upload_from_string("")
    assert storage.listing(f"gs://{bucket.name}/run") == ["sub/file"]


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A storage that answers everything with one status."""
    status = 200

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error": {"code": status, "message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    def answer(code: int) -> None:
        nonlocal status
        status = code

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{served.server_port}")
        yield answer
        served.shutdown()
        thread.join()


# google-auth leaves the answer of a 401 open when it has nothing to refresh: it is collected here, and not
# in the middle of another test.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize(
    ("status", "message", "fix"),
    [
        (403, "refuses these credentials", "roles/storage.objectUser"),
        # The emulator's client has none to show.
        (401, "no Google credentials", "gcloud auth application-default login"),
    ],
)
def test_credentials_that_are_refused_are_told(
    refusing: Callable[[int], None], folder: Path, status: int, message: str, fix: str
) -> None:
    refusing(status)
    for use in (
        lambda: storage.listing("gs://bucket/run"),
        lambda: storage.upload(folder, "gs://bucket/run"),
        lambda: list(sources.read(Data(dataset_name="gs://bucket/rows.jsonl"))),
    ):
        with pytest.raises(OutsideError, match=message) as caught:
            use()
        assert fix in caught.value.fix
        del caught
        gc.collect()


def test_other_failures_are_told_as_the_storages() -> None:
    from google.api_core.exceptions import ServiceUnavailable
    from google.auth.exceptions import DefaultCredentialsError
    from requests.exceptions import ConnectionError

    # Google's client tries again for two minutes before it says so.
    for error, message in (
        (ServiceUnavailable("busy"), "the storage failed: 503 busy"),
        (ConnectionError("refused"), "the storage failed: refused"),
        (DefaultCredentialsError("none found"), "no Google credentials: none found"),
    ):
        with pytest.raises(OutsideError, match=message), storage._errors("gs://bucket/run"):
            raise error


def test_without_googles_client_there_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("google.cloud", "google.api_core", "google.auth"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OutsideError, match="needs the Google Cloud client") as caught:
        storage.listing("gs://bucket/run")
    assert caught.value.fix == "pip install 'tuneship[gke]'"


# --- rows from a bucket -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_are_read_from_a_bucket(bucket: Any, tmp_path: Path, suffix: str) -> None:
    import csv

    import pyarrow
    from pyarrow import parquet

    rows, file = sql_rows(30), tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_rows(file, rows)
    elif suffix == ".csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    bucket.blob(file.name).upload_from_filename(str(file))
    assert [row for _, row in sources.read(Data(dataset_name=f"gs://{bucket.name}/{file.name}"))] == rows


def test_rows_in_a_bucket_that_changed_are_refused(
    bucket: Any, make_recipe: Callable[..., Recipe], rows_file: Path, tmp_path: Path
) -> None:
    blob = bucket.blob("rows.jsonl")
    blob.upload_from_filename(str(rows_file))
    recipe = make_recipe(data={"dataset_name": f"gs://{bucket.name}/rows.jsonl"})
    for _ in range(2):
        with journal.open_run(tmp_path / "run", recipe) as run:
            assert prepare(run)["rows"] == 60
    blob.upload_from_string(rows_file.read_bytes() + rows_file.read_bytes()[:10])
    with journal.open_run(tmp_path / "run", recipe) as run, pytest.raises(InputError, match="the data changed"):
        prepare(run)


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutsideError, match="cannot be written"):
        storage.upload(folder, str(tmp_path / "file" / "below"))
    with pytest.raises(OutsideError, match="cannot be written"):
        storage.upload(folder, "/proc/nothing/here")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"), storage.open_read(str(tmp_path)):
        pass
