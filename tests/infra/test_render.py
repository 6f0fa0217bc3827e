"""`tuneship render`: outputs in, manifests out, and the registry that is asked for digests.

python -m pytest tests/infra/test_render.py -v
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from typer.testing import CliRunner

from tuneship import cli
from tuneship.cluster import outputs, registry, render
from tuneship.errors import InputError, OutsideError

EXAMPLE = Path(__file__).parents[2] / "infra" / "example-outputs.json"
DIGEST = "sha256:" + "ab" * 32


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(cli.app, ["render", *arguments], input=stdin)


# ── Outputs ──────────────────────────────────────────────────────────────────────────────────────────────────


def changed(**changes: Any) -> str:
    tree = json.loads(EXAMPLE.read_text())
    for name, value in changes.items():
        if value is None:
            del tree[name]
        else:
            tree[name] = {"sensitive": False, "type": "string", "value": value}
    return json.dumps(tree)


def test_outputs_from_a_file_and_from_text() -> None:
    built = outputs.read(EXAMPLE)
    assert built == outputs.read(EXAMPLE.read_text())
    assert (built.argo_namespace, built.autopilot_cluster) == ("argo", True)
    assert built.labels["app"] == "tuneship"


def test_an_output_of_somebody_elses_is_no_error() -> None:
    assert outputs.read(changed(vpn_name="x")) == outputs.read(EXAMPLE)


@pytest.mark.parametrize("name", sorted(outputs.Outputs.model_fields))
def test_every_output_is_needed(name: str) -> None:
    with pytest.raises(InputError, match=f"the output {name} is missing"):
        outputs.read(changed(**{name: None}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            changed(image_registry_url=None, image_registy_url="x"),
            "image_registry_url is missing; there is image_registy",
        ),
        (changed(argo_namespace=None, project_id=None), "is missing (1 more)"),
        (changed(argo_namespace=""), "the output argo_namespace: string should have at least 1 character"),
        (changed(argo_namespace=7), "the output argo_namespace: input should be a valid string"),
        (changed(autopilot_cluster="yes"), "the output autopilot_cluster: input should be a valid boolean"),
        ("{}", "nothing has been applied"),
        ("", "not what `terraform output -json` prints"),
        ("[]", "not what `terraform output -json` prints"),
        ('{"project_id": "my-project"}', "not what `terraform output -json` prints"),
        ("[" * 100_000, "not what `terraform output -json` prints"),
    ],
)
def test_wrong_outputs_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        outputs.read(text)
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        outputs.read(tmp_path / "outputs.json")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        outputs.read(tmp_path / "latin")


# ── Filling ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_value_alone_keeps_its_type_and_one_inside_is_text() -> None:
    values = {"n": 2, "yes": True, "args": ["--a", "--b"], "where": "here"}
    document = {
        "replicas": "${n}",
        "on": "${yes}",
        "args": "${args}",
        "at": "${where}/${n}",
        "${where}": ["x-${where}"],
    }
    assert render.fill(document, values, where="x.yaml") == {
        "replicas": 2,
        "on": True,
        "args": ["--a", "--b"],
        "at": "here/2",
        "here": ["x-here"],
    }


def test_a_value_can_not_change_a_manifests_shape(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("metadata:\n  name: ${name}\n  note: at ${name}\n")
    hostile = "x\nspec: {hostNetwork: true} # ${other} $(HOME)"
    (text,) = render.render(tmp_path, {"name": hostile}, images={}).values()
    assert yaml.safe_load(text) == {"metadata": {"name": hostile, "note": f"at {hostile}"}}


def test_a_name_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: ${projct_id}\n")
    with pytest.raises(InputError) as caught:
        render.render(tmp_path, {"project_id": "x"}, images={})
    assert "projct_id; did you mean project_id?" in str(caught.value)
    assert "a.yaml: ${projct_id}" in str(caught.value)


@pytest.mark.parametrize("value", [True, None, ["a"], {"a": 1}])
def test_what_is_no_text_does_not_go_inside_one(value: Any) -> None:
    with pytest.raises(InputError, match="stands inside one"):
        render.fill("a ${x} b", {"x": value}, where="a.yaml")


def test_a_template_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        render.render(tmp_path, {}, images={})


def test_digests_follow_their_tags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "spec:\n  containers:\n"
        + "".join(f"    - {{name: c{n}, image: {image}}}\n" for n, image in enumerate(["r.io/a:1", "r.io/b:1"]))
    )
    (text,) = render.render(tmp_path, {}, images={"r.io/a:1": DIGEST, "r.io/b:1": None}).values()
    assert [c["image"] for c in yaml.safe_load(text)["spec"]["containers"]] == [f"r.io/a:1@{DIGEST}", "r.io/b:1"]


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_diff_says_what_write_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = {"a.yaml": f"{render.MARK}\na: 1\n", "b/c.yaml": f"{render.MARK}\nc: 1\n"}
    second = {"a.yaml": f"{render.MARK}\na: 2\n"}
    assert "+a: 1" in render.diff(first, out)
    render.write(first, out)
    assert render.diff(first, out) == ""
    assert "-a: 1" in (change := render.diff(second, out)) and "+a: 2" in change and "-c: 1" in change
    (out / "mine.yaml").write_text("mine: true\n")
    render.write(second, out)
    assert render.diff(second, out) == ""
    assert sorted(path.name for path in out.rglob("*.*")) == ["a.yaml", "mine.yaml"]


def test_a_strangers_file_is_not_overwritten(tmp_path: Path) -> None:
    mine = "größe: 1\n".encode("latin-1")
    (tmp_path / "a.yaml").write_bytes(mine)
    with pytest.raises(InputError, match="in the way"):
        render.write({"a.yaml": f"{render.MARK}\na: 1\n"}, tmp_path)
    assert (tmp_path / "a.yaml").read_bytes() == mine


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutsideError, match="cannot be written"):
        render.write({"a.yaml": render.MARK}, tmp_path / "out")


# ── The verb ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_render_then_diff(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("--outputs", str(EXAMPLE), "--out", str(out), "--json")
    assert found.exit_code == 0
    result = json.loads(found.stdout)
    assert result["folder"] == str(out / "platform") and "metaflow/ui.yaml" in result["files"]
    assert "gcr.io/cloud-sql-connectors/cloud-sql-proxy:2.25.3" in result["without_digest"]
    assert "without a digest yet" in found.stderr and "kubectl apply --server-side" in found.stderr

    same = run("--outputs", "-", "--out", str(out), "--diff", stdin=EXAMPLE.read_text())
    assert (same.exit_code, same.stdout) == (0, "")
    other = run("--outputs", "-", "--out", str(out), "--diff", stdin=changed(metaflow_k8s_namespace="flows"))
    assert other.exit_code == 1
    assert "-  namespace: metaflow" in other.stdout and "+  namespace: flows" in other.stdout
    again = run("--outputs", str(EXAMPLE), "--out", str(out), "--diff")
    assert again.exit_code == 0, "a diff writes nothing"


def test_wrong_input_writes_nothing(tmp_path: Path) -> None:
    found = run("--outputs", "-", "--out", str(tmp_path / "out"), stdin=changed(project_id=None))
    assert isinstance(found.exception, InputError)
    assert not (tmp_path / "out").exists()


# ── Digests ──────────────────────────────────────────────────────────────────────────────────────────────────


class Registry(BaseHTTPRequestHandler):
    """A registry as Docker Hub is one: strangers need a token, which its token server gives to anybody."""

    manifests: ClassVar[dict[str, str | None]] = {
        "/v2/library/cuda/manifests/12.9": DIGEST,
        "/v2/a/b/manifests/1": None,
    }
    status = 0
    challenge = 'Bearer realm="{here}/token",service="here",scope="repository:x:pull"'
    grant = b'{"token": "stranger"}'

    def do_HEAD(self) -> None:
        server: Any = self.server
        server.seen.append((self.command, self.path, self.headers["Authorization"]))
        assert "manifest.list" in self.headers["Accept"]
        if server.status:
            self.send_response(server.status)
        elif self.headers["Authorization"] != "Bearer stranger":
            self.send_response(401)
            self.send_header("WWW-Authenticate", server.challenge.format(here=server.here))
        elif self.path in self.manifests:
            self.send_response(200)
            if found := self.manifests[self.path]:
                self.send_header("Docker-Content-Digest", found)
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self) -> None:
        server: Any = self.server
        server.seen.append((self.command, self.path, self.headers["Authorization"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(server.grant)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    server.seen, server.status, server.challenge, server.grant = [], 0, Registry.challenge, Registry.grant
    server.name = f"127.0.0.1:{server.server_port}"
    server.here = f"http://{server.name}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_digest_by_a_strangers_token(hub: Any) -> None:
    assert registry.digest(f"{hub.name}/library/cuda:12.9") == DIGEST
    assert [method for method, _, _ in hub.seen] == ["HEAD", "GET", "HEAD"]
    asked = urlsplit(hub.seen[1][1])
    assert (asked.path, parse_qs(asked.query)) == ("/token", {"service": ["here"], "scope": ["repository:x:pull"]})


def test_the_registry_does_not_know_the_tag(hub: Any) -> None:
    with pytest.raises(InputError, match="no such tag"):
        registry.digest(f"{hub.name}/library/cuda:13.0")


def test_no_digest_is_invented(hub: Any) -> None:
    with pytest.raises(OutsideError, match="names no sha256 digest"):
        registry.digest(f"{hub.name}/a/b:1")


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_the_registry_refuses(hub: Any, status: int) -> None:
    hub.status = status
    with pytest.raises(OutsideError, match=f"answers {status}"):
        registry.digest(f"{hub.name}/library/cuda:12.9")


@pytest.mark.parametrize(
    ("challenge", "grant", "says"),
    [
        ('Basic realm="x"', b"", "wants an account"),
        ('Bearer realm="http://example.org/token"', b"", "wants an account"),
        ("", b"", "wants an account"),
        (Registry.challenge, b"{}", "gives no token"),
        (Registry.challenge, b"<html>", "gives no token"),
        (Registry.challenge, b"[]", "gives no token"),
        (Registry.challenge, b'{"token": "expired"}', "answers 401"),
    ],
)
def test_a_token_that_is_not_to_be_had(hub: Any, challenge: str, grant: bytes, says: str) -> None:
    hub.challenge, hub.grant = challenge, grant
    with pytest.raises(OutsideError, match=says):
        registry.digest(f"{hub.name}/library/cuda:12.9")


def test_nobody_answers(hub: Any) -> None:
    with pytest.raises(OutsideError, match="cannot be reached"):
        registry.digest("127.0.0.1:9/a/b:1")


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("ubuntu:24.04", ("registry-1.docker.io", "library/ubuntu", "24.04")),
        ("nvidia/cuda:12", ("registry-1.docker.io", "nvidia/cuda", "12")),
        ("docker.io/nvidia/cuda:12", ("registry-1.docker.io", "nvidia/cuda", "12")),
        ("gcr.io/a/b/c:2.25.3", ("gcr.io", "a/b/c", "2.25.3")),
        ("localhost/a:1", ("localhost", "a", "1")),
        ("127.0.0.1:5000/a:1", ("127.0.0.1:5000", "a", "1")),
    ],
)
def test_an_images_name_in_parts(image: str, parts: tuple[str, str, str]) -> None:
    assert registry.parse(image) == parts


@pytest.mark.parametrize("image", ["ubuntu", "gcr.io/a/b", "127.0.0.1:5000/a", "a:latest", f"a:1@{DIGEST}", ":1", ""])
def test_a_name_without_an_exact_tag(image: str) -> None:
    with pytest.raises(InputError, match="exact tag"):
        registry.parse(image)


def test_lock_asks_for_every_image_and_writes_once(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "images.lock"
    monkeypatch.setattr(render, "image_names", lambda: [f"{hub.name}/library/cuda:12.9"])
    arguments = ["--outputs", str(EXAMPLE), "--out", str(tmp_path / "out"), "--images", str(lock)]
    assert isinstance(run(*arguments).exception, InputError), "no lock yet"
    found = run(*arguments, "--lock", "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["without_digest"] == []
    assert render.read_lock(lock) == {f"{hub.name}/library/cuda:12.9": DIGEST}

    lock.write_text("r.io/old:1: null\n")
    monkeypatch.setattr(render, "image_names", lambda: [f"{hub.name}/library/cuda:12.9", f"{hub.name}/library/cuda:13"])
    assert isinstance(run(*arguments, "--lock").exception, InputError)
    assert render.read_lock(lock) == {"r.io/old:1": None}, "all of them or none"


@pytest.mark.parametrize("text", ["a: [", "- a", "r.io/a:1: sha256:12\n", "r.io/a:1: latest\n", ""])
def test_a_lock_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "images.lock").write_text(text)
    with pytest.raises(InputError, match=r"not a (lock file|digest)"):
        render.read_lock(tmp_path / "images.lock")
