"""Metaflow's metadata service as its client knows it, in memory: what netflixoss/metaflow_metadata_service answers.

Objects by path (/flows/F/runs/R/steps/S/tasks/T), made by POST to their kind (…/run, /step, /task), 409
where they exist; lists of metadata and artifacts below a task; heartbeats. A client may choose a
run's or a task's id, as pods do.
"""

from __future__ import annotations

import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

VERSION = "2.5.1"

_MADE = re.compile(r"^(?P<parent>/flows/[^/]+(?:/runs/[^/]+(?:/steps/[^/]+)?)?)/(?P<kind>run|step|task)$")
_IDS = {"run": "run_number", "task": "task_id"}


class MetadataService(BaseHTTPRequestHandler):
    """One request; `objects` and `lists` belong to the server."""

    objects: dict[str, dict[str, Any]]
    lists: dict[str, list[dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        path = self.path
        if path.endswith("/heartbeat"):
            self._answer({"wait_time_in_seconds": 10})
        elif path.endswith(("/metadata", "/artifact")):
            key = path if path.endswith("/metadata") else f"{path}s"
            self.lists.setdefault(key, []).extend(body)
            self._answer(body)
        elif made := _MADE.match(path):
            parent, kind = made["parent"], made["kind"]
            if kind == "step":
                self._make(parent, body)
                return
            id_ = body.get(_IDS[kind]) or body.get("run_id") or str(len(self.objects))
            self._make(f"{parent}/{kind}s/{id_}", body | {_IDS[kind]: id_})
        else:
            self._make(path, body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/ping":
            self._answer("pong")
        elif path in self.objects:
            self._answer(self.objects[path])
        elif artifacts := re.match(r"^(.*/tasks/[^/]+)(?:/attempt/(\d+))?/artifacts$", path):
            self._answer(self._artifacts(artifacts[1], artifacts[2]))
        elif artifact := re.match(r"^(.*/tasks/[^/]+)/artifacts/([^/]+)(?:/attempt/(\d+))?$", path):
            found = [a for a in self._artifacts(artifact[1], artifact[3]) if a["name"] == artifact[2]]
            self._answer(found[0]) if found else self._answer({}, 404)
        elif path.endswith("/metadata"):
            self._answer(self.lists.get(path, []))
        elif re.search(r"/(flows|runs|steps|tasks)$", path):
            self._answer([v for key, v in self.objects.items() if re.fullmatch(f"{re.escape(path)}/[^/]+", key)])
        else:
            self._answer({"message": "not found"}, 404)

    def _artifacts(self, task: str, attempt: str | None) -> list[dict[str, Any]]:
        """Those of one attempt; of the last one by default."""
        every = self.lists.get(f"{task}/artifacts", [])
        wanted = int(attempt) if attempt else max((a["attempt_id"] for a in every), default=0)
        return [artifact for artifact in every if artifact["attempt_id"] == wanted]

    def _make(self, path: str, body: dict[str, Any]) -> None:
        if path in self.objects:
            self._answer({"message": "exists"}, 409)
            return
        names = dict(zip(["flow_id", "run_number", "step_name", "task_id"], path.split("/")[2::2], strict=False))
        self.objects[path] = {"tags": [], "system_tags": [], **body, **names, "ts_epoch": int(time.time() * 1000)}
        self._answer(self.objects[path])

    def _answer(self, value: Any, code: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("METADATA_SERVICE_VERSION", VERSION)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
