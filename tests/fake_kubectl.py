"""A kubectl on PATH that keeps one namespace in a folder: what deploy asks of a cluster, and no more.

    kubectl = fake_kubectl.install(tmp_path, monkeypatch)
    …
    assert kubectl.calls[-1][:2] == ["rollout", "status"]

`exec … python` runs for real, here: what asks the pod's gateway asks the one at `kubectl.gateways[pod]`.
Set `kubectl.failing = "rollout"` to have a command fail.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


class Kubectl:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configure()
        self.point_at("gke_my-project_us-central1_tuneship")

    def point_at(self, context: str) -> None:
        """The current context."""
        (self.folder / "context").write_text(context)

    def configure(self, *, failing: str = "", gateways: dict[str, str] | None = None, goldens: Any = None) -> None:
        """What fails, which gateway is in which pod, and what the golden prompts are answered."""
        settings = {"failing": failing, "gateways": gateways or {}, "goldens": goldens}
        (self.folder / "settings.json").write_text(json.dumps(settings))

    @property
    def calls(self) -> list[list[str]]:
        """Every command so far, without `--namespace serving`."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line)["argv"] for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def inputs(self) -> list[str]:
        """What each of them got on its standard input."""
        return [json.loads(line)["stdin"] for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def changes(self) -> list[list[str]]:
        """Those commands that change something."""
        return [call for call in self.calls if call[0] not in ("get", "exec")]

    @property
    def shares_file(self) -> Path:
        """The ConfigMap's shares, as a pod would see them mounted."""
        return self.folder / "shares.json"

    def record(self) -> dict[str, Any]:
        """The record in the ConfigMap."""
        found: dict[str, Any] = json.loads(json.loads((self.folder / "configmap.json").read_text())["record.json"])
        return found

    def applied(self) -> list[dict[str, Any]]:
        """The documents that were last applied."""
        found: list[dict[str, Any]] = json.loads((self.folder / "applied.json").read_text())
        return found


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    """Puts it first on PATH."""
    programs, state = folder / "bin", folder / "cluster"
    programs.mkdir()
    state.mkdir()
    program = programs / "kubectl"
    program.write_text(f'#!/bin/sh\nFAKE_KUBECTL={state} exec {sys.executable} -E {__file__} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Kubectl(state)


# --- the program ------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    folder = Path(os.environ["FAKE_KUBECTL"])
    if argv == ["config", "current-context"]:
        print((folder / "context").read_text())
        return 0
    assert argv[:2] == ["--namespace", "serving"], argv
    argv = argv[2:]
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"argv": argv, "stdin": sys.stdin.read()}) + "\n")
    settings = json.loads((folder / "settings.json").read_text())
    if settings["failing"] and settings["failing"] in " ".join(argv):
        print("error: it is broken", file=sys.stderr)
        return 1
    config = folder / "configmap.json"
    if argv[:3] == ["get", "configmap", "vllm-config"]:
        assert argv[-1] == r"--output=jsonpath={.data.record\.json}", argv
        if config.exists():
            print(json.loads(config.read_text())["record.json"], end="")
    elif argv[:3] == ["get", "secret", "gateway-keys"]:
        if (folder / "secret").exists():
            print("secret/gateway-keys")
    elif argv[:3] == ["create", "secret", "generic"]:
        (folder / "secret").touch()
    elif argv[0] == "apply":
        import yaml

        documents = [
            d for f in sorted(Path(argv[-1]).rglob("*.yaml")) for d in yaml.load_all(f.read_text(), yaml.CSafeLoader)
        ]
        (data,) = [d["data"] for d in documents if d["kind"] == "ConfigMap"]
        (folder / "applied.json").write_text(json.dumps(documents))
        config.write_text(json.dumps(data))
        # As the kubelet: the new file stands in the old one's place all at once.
        (folder / "shares.new").write_text(data["shares.json"])
        (folder / "shares.new").replace(folder / "shares.json")
    elif argv[:2] == ["get", "pods"]:
        ending = {"metadata": {"name": "old", "deletionTimestamp": "now"}, "status": {"phase": "Running"}}
        running = [{"metadata": {"name": name}, "status": {"phase": "Running"}} for name in settings["gateways"]]
        print(json.dumps({"items": [ending, *running]}))
    elif argv[0] == "exec" and "-c" in argv:
        code = argv[-1].replace("http://127.0.0.1:8000", settings["gateways"][argv[1]])
        assert code != argv[-1]
        os.environ["no_proxy"] = "*"
        exec(code, {})
    elif argv[0] == "exec":
        assert "tuneship.serve.goldens" in argv
        print(json.dumps(settings["goldens"]))
    elif argv[:2] != ["rollout", "status"]:
        print(f"unknown: {argv}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
