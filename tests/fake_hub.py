"""A small Hugging Face Hub on this machine: repositories, commits, LFS, downloads, and faults on demand.

    with fake_hub.serving() as hub:
        hub.add("user/name", {"config.json": b"{}"})     # a repository with a commit
        hub.fail("PUT", "/lfs/", 503, times=2)           # the next two uploads fail
        hub.requests                                     # what was asked for

It speaks what huggingface_hub needs for create_repo, repo_info, create_commit (LFS, without Xet),
hf_hub_download, snapshot_download and streamed data sets. A process uses it with `hub.environment`,
a fork of tests/zygote.py with `hub.prelude`, and a test in this process with the fixture `hub`.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "fakehubfakehubfakehub"
# What goes through LFS there, whatever its size.
LARGE = (".safetensors", ".bin", ".gguf", ".parquet", ".model")


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]
    message: str


@dataclass
class Repo:
    name: str
    kind: str = "models"
    private: bool = False
    gated: bool = False
    writable: bool = True
    commits: list[Commit] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, files: dict[str, bytes], message: str) -> Commit:
        seed = f"{self.name}{len(self.commits)}{message}{sorted(files)}".encode()
        made = Commit(hashlib.sha1(seed).hexdigest(), files, message)
        self.commits.append(made)
        return made

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.sha == revision), None)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    size: int


@dataclass
class Fault:
    method: str
    pattern: str
    status: int | None
    times: int
    headers: dict[str, str]
    act: Callable[[], None] | None
    after: bool


class Hub:
    """The server's state, and what tests do to it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.url = ""
        self.lock = threading.RLock()

    def add(self, name: str, files: dict[str, bytes], *, kind: str = "models", **settings: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[kind, name] = Repo(name, kind, **settings)
        repo.commit(files, "by hand")
        return repo

    def fail(
        self, method: str, pattern: str, status: int, *, times: int = 10**9, headers: dict[str, str] | None = None
    ) -> None:
        """Answers requests whose path matches with a status."""
        self.faults.append(Fault(method, pattern, status, times, headers or {}, None, False))

    def cut(self, method: str, pattern: str, *, times: int = 1, after: bool = False) -> None:
        """Closes the connection without an answer; `after`: once the request has done its work."""
        self.faults.append(Fault(method, pattern, None, times, {}, None, after))

    def on(self, method: str, pattern: str, act: Callable[[], None]) -> None:
        """Does something with the next request whose path matches, before it is answered."""
        self.faults.append(Fault(method, pattern, None, 1, {}, act, False))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, pattern: str) -> int:
        """How many requests there were."""
        return sum(
            request.method == method and re.search(pattern, request.path) is not None for request in self.requests
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this Hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}

    def constants(self, cache: Path) -> dict[str, Any]:
        """What of huggingface_hub.constants a process must change that has imported it already."""
        return {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }

    def prelude(self, cache: Path) -> str:
        """The same as Python, for a fork."""
        return f"from huggingface_hub import constants\nvars(constants).update({self.constants(cache)!r})\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """The protocol."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, token, len(body)))
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.act is not None:
            fault.act()
        elif fault is not None and fault.status is not None:
            self._send(fault.status, {"error": "injected"}, fault.headers)
            return
        elif fault is not None and not fault.after:
            self.close_connection = True
            return
        with self.hub.lock:
            answer = self._route(path, parse_qs(urlsplit(self.path).query), token, body)
        if fault is not None and fault.after:
            self.close_connection = True
            return
        self._send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- the calls ----------------------------------------------------------------------------

    def _route(self, path: str, query: dict[str, list[str]], token: str | None, body: bytes) -> tuple[Any, ...]:
        if token is not None and token != TOKEN and not token.startswith("hf_CANARY"):
            return 401, {"error": "bad token"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._put(match[1], body)
        kinds = r"(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+?)"
        for pattern, call in (
            (rf"/{kinds}\.git/info/lfs/objects/batch", self._batch),
            (rf"/{kinds}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
            (r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", self._preupload),
            (r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", self._commit),
            (
                r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<under>.*))?",
                self._tree,
            ),
            (r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", self._paths),
            (r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", self._info),
        ):
            if match := re.fullmatch(pattern, path):
                parts = match.groupdict()
                repo = self.hub.repos.get((parts["kind"] or "models", parts["repo"]))
                if repo is None or (repo.private and token is None):
                    return 404 if token else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}
                commit = repo.at(parts.get("revision") or "main")
                if commit is None:
                    return 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"}
                return call(repo, commit, parts, query, body)
        return 404, {"error": f"no such call: {self.command} {path}"}

    def _create(self, asked: dict[str, Any], token: str | None) -> tuple[Any, ...]:
        if token is None:
            return 401, {"error": "no token"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name.startswith("others/") and ("models", name) not in self.hub.repos:
            return 403, {"error": "not yours"}, {"X-Error-Message": "You don't have the rights to create a model there"}
        if ("models", name) in self.hub.repos:
            return 409, {"error": "You already created this model repo", **answer}
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return 200, answer

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": len(content), "oid": blob_id(content)}
        if name.endswith(LARGE):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _info(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        siblings = []
        for name, content in sorted(commit.files.items()):
            entry = self._entry(name, content)
            detail = (
                {"size": entry["size"], "blobId": entry["oid"], "lfs": entry.get("lfs")} if "blobs" in query else {}
            )
            siblings.append({"rfilename": name, **{key: value for key, value in detail.items() if value is not None}})
        gated = "manual" if repo.gated else False
        return 200, {"id": repo.name, "sha": commit.sha, "private": repo.private, "gated": gated, "siblings": siblings}

    def _tree(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        under = f"{parts['under']}/" if parts.get("under") else ""
        return 200, [
            {"type": "file", "path": name, **self._listed(name, content)}
            for name, content in sorted(commit.files.items())
            if name.startswith(under)
        ]

    def _listed(self, name: str, content: bytes) -> dict[str, Any]:
        entry = self._entry(name, content)
        if "lfs" in entry:
            entry["lfs"] = {"oid": entry["lfs"]["sha256"], "size": len(content), "pointerSize": 134}
        return entry

    def _paths(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        found = {name: content for name, content in commit.files.items() if name in paths}
        return 200, [{"type": "file", "path": name, **self._listed(name, content)} for name, content in found.items()]

    def _resolve(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        about = {"X-Repo-Commit": commit.sha}
        if repo.gated:
            return 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", **about}
        content = commit.files.get(parts["file"])
        if content is None:
            return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", **about}
        entry = self._entry(parts["file"], content)
        tag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{tag}"', "Content-Type": "application/octet-stream", **about}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, {"Accept-Ranges": "bytes", **headers}

    def _preupload(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        if not repo.writable:
            return 403, {"error": "read only"}, {"X-Error-Message": "You have read access only"}
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def _batch(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, answer = wanted["oid"], {"oid": wanted["oid"], "size": wanted["size"]}
            if oid not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, oid: str, body: bytes) -> tuple[Any, ...]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 422, {"error": "another sha256"}
        self.hub.large[oid] = body
        return 200, b""

    def _commit(self, repo: Repo, commit: Commit, parts: Any, query: Any, body: bytes) -> tuple[Any, ...]:
        lines = [json.loads(line) for line in body.splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repo.head.sha):
            return 412, {"error": "the branch has moved"}
        files = dict(repo.head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del files[value["path"]]
        made = repo.commit(files, head["summary"])
        return 200, {
            "success": True,
            "commitOid": made.sha,
            "commitUrl": f"{self.hub.url}/{repo.name}/commit/{made.sha}",
        }


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a Hub on a free port."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
