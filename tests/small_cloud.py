"""As much of a cloud as the flow needs, on this machine's loopback.

    bucket        fake-gcs-server, the real binary
    credentials   a metadata server, as Workload Identity has it: pods and laptops ask it for a token
    metadata      Metaflow's metadata service over HTTP (`metadata_service.py`)
    Kubernetes    an API that keeps what it is given, for `argo-workflows create` and `trigger`

with serving(folder) as cloud:
    subprocess.run([...], env=cloud.environment)
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fake_gcs
from metadata_service import MetadataService

BUCKET = "tuneship-datastore"
NAMESPACE = "argo"


@dataclass
class Cloud:
    """Where everything is."""

    gcs: str
    environment: dict[str, str]
    """Of a person's shell, as `tuneship connect` leaves it."""
    pod_environment: dict[str, str]
    """What a pod gets from its node and its image, not from the template."""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the Kubernetes API keeps, by path."""

    def names(self, prefix: str) -> list[str]:
        """The names of the bucket's objects below a prefix."""
        with urllib.request.urlopen(f"{self.gcs}/storage/v1/b/{BUCKET}/o?prefix={prefix}") as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def workflows(self) -> list[dict[str, Any]]:
        """What was submitted, in order."""
        return [value for path, value in self.objects.items() if "/workflows/" in path]

    def template(self, name: str) -> dict[str, Any]:
        """A WorkflowTemplate that was deployed."""
        return self.objects[f"/apis/argoproj.io/v1alpha1/namespaces/{NAMESPACE}/workflowtemplates/{name}"]


@contextmanager
def serving(folder: Path) -> Iterator[Cloud]:
    """Starts all of it; `folder` is the person's home."""
    objects: dict[str, dict[str, Any]] = {}
    with (
        fake_gcs.serving() as gcs,
        _http(_Identity) as identity,
        _http(_Kubernetes, objects=objects) as kubernetes,
        _http(MetadataService, objects={}, lists={}) as metadata,
    ):
        body = json.dumps({"name": BUCKET}).encode()
        request = urllib.request.Request(
            f"{gcs}/storage/v1/b?project=p", data=body, headers={"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        shared = {
            "STORAGE_EMULATOR_HOST": gcs,
            "GCE_METADATA_HOST": identity,
            "GCE_METADATA_IP": identity,
            "GCE_METADATA_ROOT": identity,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        }
        environment = {
            **shared,
            "HOME": str(folder),
            "KUBECONFIG": str(_kubeconfig(folder / "kubeconfig", f"http://{kubernetes}")),
            "METAFLOW_USER": "somebody",
            "METAFLOW_DEFAULT_DATASTORE": "gs",
            "METAFLOW_DATASTORE_SYSROOT_GS": f"gs://{BUCKET}/metaflow",
            "METAFLOW_DEFAULT_METADATA": "service",
            "METAFLOW_SERVICE_URL": f"http://{metadata}",
            "METAFLOW_SERVICE_INTERNAL_URL": f"http://{metadata}",
            "METAFLOW_KUBERNETES_NAMESPACE": NAMESPACE,
            "METAFLOW_KUBERNETES_SERVICE_ACCOUNT": "metaflow-argo",
        }
        yield Cloud(gcs, environment, shared, objects)


def _kubeconfig(file: Path, server: str) -> Path:
    context = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [context],
    }
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


@contextmanager
def _http(handler: type[BaseHTTPRequestHandler], **state: Any) -> Iterator[str]:
    """A server of a handler on a free port; gives host:port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), state))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def answer(self, body: str, *, code: int = 200, kind: str = "application/json") -> None:
        content = body.encode()
        self.send_response(code)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Identity(_Handler):
    """What google-auth asks a node's metadata server."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/token"):
            self.answer(json.dumps({"access_token": "pod-token", "expires_in": 3600, "token_type": "Bearer"}))
        elif "/service-accounts/" in path:
            self.answer(json.dumps({"email": "training@p.iam.gserviceaccount.com", "scopes": [], "aliases": []}))
        elif path.endswith("/project-id"):
            self.answer("p", kind="application/text")
        elif path.endswith("/universe-domain"):
            self.answer("googleapis.com", kind="application/text")
        else:
            self.answer("ok", kind="application/text")


class _Kubernetes(_Handler):
    """Keeps objects by path; a POST to a collection names them."""

    objects: dict[str, dict[str, Any]]

    def do_GET(self) -> None:
        found = self.objects.get(self.path)
        self.answer(json.dumps(found)) if found else self._missing()

    def do_DELETE(self) -> None:
        self._missing() if self.objects.pop(self.path, None) is None else self.answer("{}")

    def do_POST(self) -> None:
        body = self._body()
        name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{len(self.objects):05d}"
        body["metadata"] |= {"name": name, "resourceVersion": "1"}
        self.objects[f"{self.path}/{name}"] = body
        self.answer(json.dumps(body), code=201)

    def do_PUT(self) -> None:
        body = self._body()
        self.objects[self.path] = body
        self.answer(json.dumps(body))

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return body

    def _missing(self) -> None:
        self.answer(json.dumps({"message": f"{self.path} not found", "code": 404}), code=404)
