"""Distils what the tests need to know of the Terraform providers into provider_schema.json.

    python tests/infra/provider_schema.py            write the file again
    python tests/infra/provider_schema.py --check    fail where it would change

The registry's providers are large binaries. Their prebuilt bindings for CDK for Terraform are Python packages,
each with a `.jsii` file inside that names every argument of one exact provider version:

    pip install --no-deps cdktf-cdktf-provider-google==16.12.1 \\
        cdktf-cdktf-provider-helm==12.1.2 cdktf-cdktf-provider-random==12.0.1

Kept are the resources that infra/terraform uses: their arguments with type and whether they are required, what
they export, and of nested blocks those that are opened there. Not known from that source: which arguments are
sets rather than lists, defaults, and which values are allowed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCHEMA = HERE / "provider_schema.json"

# Provider: its version, and the package that describes that version.
PACKAGES = {
    "google": ("6.50.0", "cdktf-cdktf-provider-google", "16.12.1"),
    "helm": ("3.1.1", "cdktf-cdktf-provider-helm", "12.1.2"),
    "random": ("3.7.2", "cdktf-cdktf-provider-random", "12.0.1"),
}

# The bindings leave out ephemeral resources. From the provider's own documentation of 3.7.2
# (hashicorp/terraform-provider-random, docs/ephemeral-resources/password.md).
EPHEMERAL = {
    "random_password": {
        "arguments": {
            "length": {"type": "number", "required": True},
            **{
                name: {"type": kind}
                for kind, names in {
                    "bool": ("lower", "numeric", "special", "upper"),
                    "number": ("min_lower", "min_numeric", "min_special", "min_upper"),
                    "string": ("override_special",),
                }.items()
                for name in names
            },
        },
        "blocks": {},
        "exports": {"bcrypt_hash": "string", "result": "string"},
    }
}

_DOCUMENTED = re.compile(r"#(\w+) \w+#")
_FRAMEWORK = {"connection", "count", "dependsOn", "forEach", "lifecycle", "provider", "provisioners"}
_INHERITED = {
    "cdktfStack",
    "constructNodeMetadata",
    "fqn",
    "friendlyUniqueId",
    "node",
    "rawOverrides",
    "tfResourceType",
}
_INHERITED |= {"terraformGeneratorMetadata", "terraformMetaArguments", "terraformResourceType", *_FRAMEWORK}


def installed() -> bool:
    """Whether every package that describes a provider is there."""
    return all(importlib.util.find_spec(package.replace("-", "_")) for _, package, _ in PACKAGES.values())


def distil(used: dict[str, Any]) -> dict[str, Any]:
    """The schema of what is used.

    Args:
        used: kind of block ("resource", "data", "provider") to type to the tree of blocks opened in it.
    """
    schema: dict[str, Any] = {"providers": {}, "resource": {}, "data": {}, "ephemeral": EPHEMERAL, "provider": {}}
    for provider, (version, package, package_version) in PACKAGES.items():
        types = _types(package, package_version)
        schema["providers"][provider] = {"version": version, "source": f"{package} {package_version}"}
        for kind in ("resource", "data", "provider"):
            for name, opened in sorted(used.get(kind, {}).items()):
                if name.split("_")[0] == provider:
                    schema[kind][name] = _resource(types, provider, kind, name, opened)
    return schema


def _types(package: str, version: str) -> dict[str, Any]:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {package}=={version}")
    archives = list((Path(spec.origin).parent / "_jsii").glob(f"*@{version}.jsii.tgz"))
    if not archives:
        raise SystemExit(f"another version is installed: pip install --no-deps {package}=={version}")
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile("package/.jsii")
        assert member is not None
        types: dict[str, Any] = json.load(member)["types"]
    return types


def _resource(types: dict[str, Any], provider: str, kind: str, name: str, opened: Any) -> dict[str, Any]:
    # google_compute_network is ComputeNetwork, its data source DataGoogleComputeNetwork.
    words = name.split("_") if kind == "data" or provider == name else name.split("_")[1:]
    title = "".join(word.capitalize() for word in words)
    wanted = {"resource": title, "data": f"Data{title}", "provider": f"{title}Provider"}[kind]
    configs = [key for key in types if key.split(".")[-1] in (f"{wanted}Config", f"{wanted}ResourceConfig")]
    if len(configs) != 1:
        raise SystemExit(f"{kind} {name}: found {configs}")
    distilled = _block(types, configs[0], opened)
    known = set(distilled["arguments"]) | set(distilled["blocks"])
    exports = {"id": "string"} if kind != "provider" else {}
    for entry in types[configs[0].removesuffix("Config")].get("properties", ()):
        attribute = _snake(entry["name"])
        if entry.get("static") or entry["name"] in _INHERITED or entry["name"].endswith("Input") or attribute in known:
            continue
        exports[attribute] = _type(types, entry["type"])
    distilled["exports"] = dict(sorted(exports.items())) if kind != "provider" else {}
    return distilled


def _block(types: dict[str, Any], fqn: str, opened: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    for entry in types[fqn].get("properties", ()):
        documentation = entry.get("docs", {})
        match = _DOCUMENTED.search(documentation.get("remarks", "")) or _DOCUMENTED.search(
            documentation.get("summary", "")
        )
        if match is None or entry["name"] in _FRAMEWORK:
            continue
        name = match[1]
        if name.endswith("_custom_endpoint"):  # a hundred of them, for those who test Google itself
            continue
        required = {} if entry.get("optional") else {"required": True}
        if documentation.get("summary", "") == f"{name} block.":
            inner, repeated = _struct(entry["type"])
            kept = _block(types, inner, opened[name]) if name in opened else {"unopened": True}
            blocks[name] = {**required, **({"repeated": True} if repeated else {}), **kept}
        else:
            arguments[name] = {"type": _type(types, entry["type"]), **required}
    distilled = {"arguments": dict(sorted(arguments.items())), "blocks": dict(sorted(blocks.items()))}
    if f"{fqn}OutputReference" in types:
        exports = _exported(types, fqn)[1]
        distilled["exports"] = {name: kind for name, kind in sorted(exports.items()) if name not in arguments | blocks}
    return distilled


def _struct(kind: dict[str, Any]) -> tuple[str, bool]:
    """The type of a block, and whether there may be several of it."""
    if "fqn" in kind:
        return kind["fqn"], False
    if "collection" in kind:
        return kind["collection"]["elementtype"]["fqn"], True
    (inner,) = [one for one in kind["union"]["types"] if one.get("fqn") != "cdktf.IResolvable"]
    return _struct(inner)


def _type(types: dict[str, Any], kind: dict[str, Any]) -> Any:
    """A type, as Terraform writes it in JSON."""
    if "primitive" in kind:
        return {"boolean": "bool"}.get(kind["primitive"], kind["primitive"])
    if "collection" in kind:
        container = {"array": "list"}.get(kind["collection"]["kind"], kind["collection"]["kind"])
        return [container, _type(types, kind["collection"]["elementtype"])]
    if "union" in kind:
        return _type(types, next(one for one in kind["union"]["types"] if one.get("fqn") != "cdktf.IResolvable"))
    plain = {"cdktf.IResolvable": "bool", "cdktf.StringMap": ["map", "string"], "cdktf.BooleanMap": ["map", "bool"]}
    if kind["fqn"] in plain:
        return plain[kind["fqn"]]
    if kind["fqn"].endswith("List") and kind["fqn"].removesuffix("List") + "OutputReference" in types:
        return ["list", _exported(types, kind["fqn"].removesuffix("List"))]
    if kind["fqn"].endswith("OutputReference"):
        return ["list", _exported(types, kind["fqn"].removesuffix("OutputReference"))]
    fields = types.get(kind["fqn"], {}).get("properties", ())
    optional = [_snake(field["name"]) for field in fields if field.get("optional")]
    return ["object", {_snake(field["name"]): _type(types, field["type"]) for field in fields}, optional]


def _exported(types: dict[str, Any], fqn: str) -> Any:
    fields = types[fqn + "OutputReference"].get("properties", ())
    inherited = {"internalValue", "complexObjectIndex", "complexObjectIsFromSet"}
    names = [field for field in fields if field["name"] not in inherited and not field["name"].endswith("Input")]
    return ["object", {_snake(field["name"]): _type(types, field["type"]) for field in names}]


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", lambda match: "_" + match[1].lower(), name)


def dump(schema: dict[str, Any]) -> str:
    """JSON with one line an argument or export list, so that a difference can be read."""
    text = json.dumps(schema, indent=1, sort_keys=True)
    # What fits on a line goes on one: {"type": "string"} rather than three lines.
    inner = re.compile(r"[\[{]\s*([^\[\]{}]*?)\s*[\]}]")
    for _ in range(6):
        text = inner.sub(lambda match: _flat(match[0]), text)
    return text.replace("\x01", "[").replace("\x02", "]").replace("\x03", "{").replace("\x04", "}") + "\n"


def _flat(text: str) -> str:
    flat = re.sub(r"\s*\n\s*", " ", text)
    flat = re.sub(r"([\[{\x01\x03]) ", r"\1", flat)
    flat = re.sub(r" ([\]}\x02\x04])", r"\1", flat)
    if len(flat) > 110:
        return text
    return flat.replace("[", "\x01").replace("]", "\x02").replace("{", "\x03").replace("}", "\x04")


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(HERE))
    from terraform_files import load, used

    text = dump(distil(used(load())))
    if "--check" in arguments:
        same = SCHEMA.read_text(encoding="utf-8") == text
        print(f"{SCHEMA.name}: {'up to date' if same else 'out of date, run this without --check'}")
        return 0 if same else 1
    SCHEMA.write_text(text, encoding="utf-8")
    print(f"{SCHEMA.name}: {len(text)} characters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
