"""Stand-in providers: real `terraform validate`, `plan`, `apply` and `destroy` without the registry or a cloud.

Terraform asks a provider for its schema and hands it every resource to check, plan and make; here the schema is
provider_schema.json, and what is made exists in the state only. So the real Terraform evaluates every expression,
type, condition, reference and order. Covered: the language, arguments and their types, references, validation of
variables, what differs between the two kinds of cluster, the order in which things are made and taken away, what
gets into the state. Not covered: what only Google knows (allowed values, quotas, rights, what an argument does).

Terraform connects by TF_REATTACH_PROVIDERS, its way of debugging a provider that is already running. The messages
are the few of protocol 5 that it needs, written out by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgpack

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "provider_schema.json").read_text(encoding="utf-8"))

UNKNOWN = msgpack.ExtType(0, b"\0")

# What the random provider's ephemeral password is here: nothing that Terraform keeps may have it.
CANARY = "Canary-Password-0123456789"


@dataclass
class Providers:
    """The three stand-ins, and what they were asked to do."""

    folder: Path
    environment: dict[str, str]
    # ("create" or "delete", type, the planned or last state)
    log: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def terraform(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs Terraform on a copy of the folder."""
        done = subprocess.run(
            ["terraform", f"-chdir={self.folder}", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"terraform {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done

    def plan(self, *arguments: str) -> dict[str, Any]:
        """A plan, as Terraform writes it in JSON."""
        self.terraform("plan", "-input=false", "-out=plan.bin", *arguments)
        plan: dict[str, Any] = json.loads(self.terraform("show", "-json", "plan.bin").stdout)
        return plan


@contextmanager
def providers(source: Path) -> Iterator[Providers]:
    """Serves the stand-ins for a copy of a folder of Terraform files."""
    with tempfile.TemporaryDirectory(prefix="tf-") as temporary:
        folder = Path(temporary) / "terraform"
        folder.mkdir()
        for path in source.iterdir():
            if path.suffix in (".tf", ".tfvars"):
                shutil.copy(path, folder)
        reattach = {}
        served = Providers(folder, {})
        servers = []
        for name in SCHEMA["providers"]:
            socket = f"{temporary}/{name}.sock"
            server = grpc.server(ThreadPoolExecutor(max_workers=4))
            server.add_generic_rpc_handlers((_handlers(name, served),))
            server.add_insecure_port(f"unix:{socket}")
            server.start()
            servers.append(server)
            reattach[f"registry.terraform.io/hashicorp/{name}"] = {
                "Protocol": "grpc",
                "ProtocolVersion": 5,
                "Pid": os.getpid(),
                "Test": True,
                "Addr": {"Network": "unix", "String": socket},
            }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        settings = Path(temporary) / "terraform.rc"
        settings.write_text("disable_checkpoint = true\n", encoding="utf-8")
        served.environment = {
            **inherited,
            "TF_REATTACH_PROVIDERS": json.dumps(reattach),
            "TF_CLI_CONFIG_FILE": str(settings),
            "TF_IN_AUTOMATION": "1",
            "TF_CLI_ARGS": "-no-color",
        }
        try:
            served.terraform("init", "-input=false", "-backend=false")
            yield served
        finally:
            for server in servers:
                server.stop(None)


def _handlers(provider: str, served: Providers) -> grpc.GenericRpcHandler:
    def plan(request: dict[int, list[bytes]]) -> bytes:
        kind = request[1][0].decode()
        proposed = _value(request[3][0])
        prior = _value(request[2][0])
        if proposed is not None:
            proposed = _compute(SCHEMA["resource"][kind], proposed, prior, lambda path: UNKNOWN)
        return _bytes(1, _dynamic(proposed)) + _number(5, 1)

    def apply(request: dict[int, list[bytes]]) -> bytes:
        kind = request[1][0].decode()
        planned = _value(request[3][0])
        prior = _value(request[2][0])
        if planned is None:
            protected = prior.get("deletion_protection") is True
            full = kind == "google_storage_bucket" and prior.get("force_destroy") is not True
            if protected or full:
                reason = "deletion_protection is on" if protected else "the bucket is not empty"
                return _bytes(1, _dynamic(prior)) + _bytes(3, _number(1, 1) + _bytes(2, f"{kind}: {reason}".encode()))
            served.log.append(("delete", kind, prior))
            return _bytes(1, _dynamic(None))
        made = _made(kind, planned)
        if prior is None:
            served.log.append(("create", kind, made))
        return _bytes(1, _dynamic(made)) + _number(4, 1)

    def read_data(request: dict[int, list[bytes]]) -> bytes:
        kind = request[1][0].decode()
        schema = SCHEMA["data"][kind]
        return _bytes(
            1, _dynamic(_compute(schema, _value(request[2][0]), None, lambda path: _fake(schema, kind, path)))
        )

    def open_ephemeral(request: dict[int, list[bytes]]) -> bytes:
        kind = request[1][0].decode()
        result = _value(request[2][0])
        result |= dict.fromkeys(SCHEMA["ephemeral"][kind]["exports"], CANARY)
        return _bytes(3, _dynamic(result))

    answers: dict[str, Callable[[dict[int, list[bytes]]], bytes]] = {
        "GetSchema": lambda request: _provider_schema(provider),
        "PrepareProviderConfig": lambda request: _bytes(1, request[1][0]),
        "ValidateResourceTypeConfig": lambda request: b"",
        "ValidateDataSourceConfig": lambda request: b"",
        "ValidateEphemeralResourceConfig": lambda request: b"",
        "Configure": lambda request: b"",
        "UpgradeResourceState": lambda request: _bytes(1, _bytes(2, _fields(request[3][0])[1][0])),
        "ReadResource": lambda request: _bytes(1, request[2][0]),
        "PlanResourceChange": plan,
        "ApplyResourceChange": apply,
        "ReadDataSource": read_data,
        "OpenEphemeralResource": open_ephemeral,
        "CloseEphemeralResource": lambda request: b"",
        "Stop": lambda request: b"",
    }

    def method(answer: Callable[[dict[int, list[bytes]]], bytes]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(_fields(request)))

    return grpc.method_handlers_generic_handler(
        "tfplugin5.Provider", {name: method(one) for name, one in answers.items()}
    )


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────


def _compute(
    schema: dict[str, Any], value: dict[str, Any], prior: Any, fill: Callable[[str], Any], path: str = ""
) -> Any:
    """A configuration with what is not said in it filled: from before, or anew."""
    filled = dict(value)
    for name in (*schema["arguments"], *schema.get("exports", ())):
        if filled.get(name) is None and _computed(schema, name):
            filled[name] = prior.get(name) if isinstance(prior, dict) else fill(f"{path}{name}")
    for name in schema["arguments"]:
        if name.endswith("_wo"):  # write-only: seen, and never given back
            filled[name] = None
    for name, block in schema["blocks"].items():
        if isinstance(filled.get(name), list):
            priors = prior.get(name) if isinstance(prior, dict) else None
            same = isinstance(priors, list) and len(priors) == len(filled[name])
            filled[name] = [
                _compute(block, one, priors[index] if same else None, fill, f"{path}{name}.")
                for index, one in enumerate(filled[name])
            ]
    return filled


def _made(kind: str, planned: Any, path: str = "") -> Any:
    """A planned state with every unknown decided."""
    if planned == UNKNOWN:
        return _fake(SCHEMA["resource"][kind], kind, path)
    if isinstance(planned, dict):
        return {name: _made(kind, value, f"{path}.{name}".strip(".")) for name, value in planned.items()}
    if isinstance(planned, list):
        return [_made(kind, value, path) for value in planned]
    return planned


def _fake(schema: dict[str, Any], kind: str, path: str) -> Any:
    *outer, name = path.split(".")
    for step in outer:
        schema = schema["blocks"].get(step, {"arguments": {}, "exports": {}, "blocks": {}})
    declared = schema["arguments"].get(name, {}).get("type") or schema.get("exports", {}).get(name, "string")
    if declared == "number":
        return 0
    if declared == "bool":
        return False
    if isinstance(declared, list):
        return {} if declared[0] == "map" else [] if declared[0] == "list" else None
    return {"private_ip_address": "10.64.0.3", "private_endpoint": "10.128.0.2", "hex": "0a1b2c"}.get(
        name, f"{kind}-{name}"
    )


def _computed(schema: dict[str, Any], name: str) -> bool:
    argument = schema["arguments"].get(name)
    return argument is None or not (argument.get("required") or name.endswith("_wo"))


def _value(dynamic: bytes) -> Any:
    fields = _fields(dynamic)
    if 2 in fields:
        return json.loads(fields[2][0])
    return msgpack.unpackb(fields[1][0], ext_hook=msgpack.ExtType, strict_map_key=False)


def _dynamic(value: Any) -> bytes:
    return _bytes(1, msgpack.packb(value))


# ── The schema, as the protocol has it ───────────────────────────────────────────────────────────────────────


def _provider_schema(provider: str) -> bytes:
    message = _bytes(1, _schema(SCHEMA["provider"].get(provider, {"arguments": {}, "blocks": {}})))
    for number, kind in ((2, "resource"), (3, "data"), (8, "ephemeral")):
        for name, schema in SCHEMA[kind].items():
            if name.split("_")[0] == provider:
                entry = _bytes(1, name.encode()) + _bytes(2, _schema(schema, computed=kind != "ephemeral"))
                message += _bytes(number, entry)
    return message


def _schema(schema: dict[str, Any], *, computed: bool = True) -> bytes:
    return _number(1, 0) + _bytes(2, _block(schema, computed=computed and bool(schema.get("exports"))))


def _block(schema: dict[str, Any], *, computed: bool) -> bytes:
    message = b""
    for name, argument in schema["arguments"].items():
        attribute = _bytes(1, name.encode()) + _bytes(2, json.dumps(argument["type"]).encode())
        if argument.get("required"):
            attribute += _number(4, 1)
        else:
            attribute += _number(5, 1)
            if computed and _computed(schema, name):
                attribute += _number(6, 1)
        if name.endswith("_wo"):
            attribute += _number(7, 1) + _number(10, 1)
        message += _bytes(2, attribute)
    for name, kind in schema.get("exports", {}).items():
        if name not in schema["arguments"]:
            message += _bytes(2, _bytes(1, name.encode()) + _bytes(2, json.dumps(kind).encode()) + _number(6, 1))
    for name, block in schema["blocks"].items():
        if "unopened" in block:
            continue
        single = name == "timeouts"
        nested = _bytes(1, name.encode()) + _bytes(2, _block(block, computed=computed and not single))
        nested += _number(3, 1 if single else 2)
        if not single:
            nested += _number(4, 1 if block.get("required") else 0) + _number(5, 0 if block.get("repeated") else 1)
        message += _bytes(3, nested)
    return message


# ── Protocol buffers, as far as needed ───────────────────────────────────────────────────────────────────────


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _number(tag: int, number: int) -> bytes:
    return _varint(tag << 3) + _varint(number)


def _bytes(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(content)) + content


def _fields(message: bytes) -> dict[int, list[bytes]]:
    fields: dict[int, list[bytes]] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        number = shift = 0
        while True:
            byte = message[position]
            position += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while position < len(message):
        key = varint()
        tag, wire = key >> 3, key & 7
        if wire == 0:
            fields.setdefault(tag, []).append(_varint(varint()))
        else:
            assert wire == 2, f"wire type {wire}"
            length = varint()
            fields.setdefault(tag, []).append(message[position : position + length])
            position += length
    return fields
