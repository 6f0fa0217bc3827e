"""publish: the adapter and its card, into a folder, under a gs:// URI, or to the Hub.

Megabytes go out, not the merged gigabytes, unless the recipe says so. Publishing twice is once:
what is there already, with the same content, is not sent again. What an earlier publication left and
this one has no use for goes away; what a person put there stays. The Hub gets one commit, in a
repository that is private unless the recipe says otherwise. Nothing is published that the gate has
not passed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tuneship import base, hub, storage
from tuneship.console import say
from tuneship.damage import guarded, read_json, remake
from tuneship.errors import InputError, OutsideError
from tuneship.journal import PROVENANCE, Run, sha256_file, write_json, write_text

CARD = "README.md"

# What a loader takes for a part of the model, whoever put it there: with --update it goes, too.
_MODEL = """
    *.safetensors *.safetensors.index.json adapter_config.json config.json generation_config.json tokenizer.json
    tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    prompt.json proof.json
""".split()


def publish(run: Run, *, update: bool = False, force: str = "") -> dict[str, str]:
    """Publishes a run wherever its recipe says; returns destination → what stands there now.

    Args:
        update: replace what another run published under the same name.
        force: publish although the gate said no, for this reason; it is kept in the card.

    Raises:
        InputError: there is nothing to publish, or only damaged weights; the destination is the run itself, or
            holds something else.
        GateError: the gate said no, or nothing was evaluated.
        OutsideError: the destination refuses or cannot be reached.
    """
    settings = run.recipe.publish
    if settings.folder is None and settings.hub_model_id is None:
        say("nothing to publish: the recipe names neither publish.folder nor publish.hub_model_id")
        return {}
    evaluation = run.gate(force)
    source = run.merged if settings.merged else run.adapter
    if not (source / PROVENANCE).exists():
        missing, verb = ("merged model", "export") if settings.merged else ("adapter", "train")
        raise InputError(f"the run has no {missing} yet", where=str(run.path), fix=f"tuneship {verb} RECIPE")
    base.check_weights(source, fix=remake(source / PROVENANCE))
    with guarded(source / PROVENANCE):
        read_json(source / PROVENANCE)["base"]
    if settings.folder is not None:
        _check_folder(settings.folder, run)
    parcel = run.path / "publish"
    _pack(source, parcel, card(run, evaluation, force))
    done: dict[str, str] = {}
    if settings.folder is not None:
        done[settings.folder] = _to_folder(parcel, settings.folder, update)
    if settings.hub_model_id is not None:
        done[settings.hub_model_id] = _to_hub(parcel, run, update)
    return done


def _pack(source: Path, parcel: Path, text: str) -> None:
    """Lays out what is sent: links to the files, so that gigabytes are not copied, the card, and a list of it all."""
    shutil.rmtree(parcel, ignore_errors=True)
    parcel.mkdir()
    for file in sorted(source.iterdir()):
        (parcel / file.name).hardlink_to(file)
    write_text(parcel / CARD, text)
    _list(parcel, sorted(file.name for file in parcel.iterdir()))


def _list(parcel: Path, names: list[str]) -> None:
    """Notes which files are ours where they are published; the next publication may take them away."""
    write_json(parcel / PROVENANCE, {**read_json(parcel / PROVENANCE), "files": names})


def _stale(
    where: str, there: Collection[str], published: bytes, parcel: Path, update: bool, begun: Collection[str]
) -> set[str]:
    """The files of an earlier publication that this one lacks; refuses what another run, or a person, put there.

    Args:
        there: the names of the files at the destination.
        published: its tuneship.json, or nothing where it has none.
        begun: files that may be there without it.
    """
    names = {file.name for file in parcel.iterdir()}
    ours = _with_partial(names | _listed(published))
    if update:
        ours |= {name for name in there if any(fnmatchcase(name, pattern) for pattern in _MODEL)}
    elif PROVENANCE in there:
        if set(there) - ours or _training(_facts(published)) != _training(read_json(parcel / PROVENANCE)):
            raise _taken(where)
    elif set(there) - set(begun):
        raise _taken(where)
    # A parcel has no folders: what lies in one is not ours.
    return {name for name in there if name in ours - names and "/" not in name}


def _with_partial(names: set[str]) -> set[str]:
    """Files, and what a copy that was killed leaves of them."""
    return names | {f".{name}.partial" for name in names}


def _facts(content: bytes) -> dict[str, Any]:
    """What a tuneship.json says; nothing, where somebody else wrote it."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _listed(published: bytes) -> set[str]:
    """The files that an earlier publication has put there."""
    files = _facts(published).get("files")
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def _training(facts: dict[str, Any]) -> list[Any] | None:
    """What tells a run from others: its name, its rows, its base, and how it is trained."""
    try:
        recipe = facts["recipe"]
        settings = [recipe["name"], recipe["lora"], recipe["train"]]
        return [*settings, facts["data"]["train_sha256"], facts["base"]["fingerprint"]]
    except (KeyError, TypeError):
        return None


def _taken(destination: str) -> InputError:
    return InputError(
        "something else is published there",
        where=destination,
        fix="name another destination, or replace it with --update",
    )


# --- a folder ---------------------------------------------------------------------------------


def _check_folder(destination: str, run: Run) -> None:
    if not storage.is_remote(destination) and Path(destination).resolve().is_relative_to(run.path.resolve()):
        raise InputError(
            "a run is not published into its own folder",
            where=f"publish.folder: {destination}",
            fix="name a folder outside of it",
        )


def _to_folder(parcel: Path, destination: str, update: bool) -> str:
    """What differs, and the mark that it is whole at the end; returns the mark's sha256."""
    root = destination.rstrip("/")
    there = storage.listing(destination) if storage.is_remote(destination) or Path(destination).exists() else []
    published = b""
    if PROVENANCE in there:
        with storage.open_read(f"{root}/{PROVENANCE}") as stream:
            published = stream.read()
    begun = _with_partial({file.name for file in parcel.iterdir()})
    stale = _stale(destination, there, published, parcel, update, begun)
    sent = storage.upload(parcel, destination, leave={PROVENANCE})
    # Before the mark: until it is replaced, the old one lists them as ours.
    for name in sorted(stale):
        storage.remove(f"{root}/{name}")
    sent += storage.put(parcel / PROVENANCE, f"{root}/{PROVENANCE}")
    say(f"published to {destination}" if sent else f"already published: {destination}")
    return sha256_file(parcel / PROVENANCE)


# --- the Hub ----------------------------------------------------------------------------------


def _to_hub(parcel: Path, run: Run, update: bool) -> str:
    """One commit with everything that differs; returns the commit that holds it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, private = run.recipe.publish.hub_model_id, run.recipe.publish.hub_private_repo
    assert repo is not None
    if not hub.is_id(repo) or "/" not in repo:
        raise InputError("a Hub repository is user/name", where=f"publish.hub_model_id: {repo}")
    what, api = f"model {repo}", hub.api()
    if api.token is None:
        raise OutsideError(
            "publishing to the Hub needs a token",
            where=what,
            fix="set HF_TOKEN (or HF_TOKEN_FILE) to a token with the right to write",
        )
    hub.call(what, lambda: api.create_repo(repo, private=private, exist_ok=True))
    info = hub.call(what, lambda: api.repo_info(repo, files_metadata=True))
    if info.private is not None and info.private != private:
        raise InputError(
            f"the repository is {'private' if info.private else 'public'}, the recipe says "
            f"{'private' if private else 'public'}",
            where=what,
            fix="set publish.hub_private_repo to what it is, or change the repository's visibility by hand",
        )
    there = {file.rfilename: file for file in info.siblings or []}
    published = b""
    if PROVENANCE in there:
        file = hub.call(what, lambda: api.hf_hub_download(repo, PROVENANCE, revision=info.sha))
        published = Path(file).read_bytes()
    # The Hub's own.
    found = set(there) - {".gitattributes"}
    stale = _stale(what, found, published, parcel, update, {CARD})
    if CARD in there and not update and CARD not in _listed(published):
        # Somebody wrote it by hand.
        (parcel / CARD).unlink()
        _list(parcel, sorted(file.name for file in parcel.iterdir()))
    changed = [file for file in sorted(parcel.iterdir()) if not _same(file, there.get(file.name))]
    if not changed and not stale:
        say(f"already published: {repo} at {info.sha}")
        return str(info.sha)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in changed
    ]
    operations.extend(CommitOperationDelete(path_in_repo=name) for name in sorted(stale))
    commit = hub.call(
        what,
        lambda: api.create_commit(
            repo,
            operations,
            commit_message=f"Publish {run.recipe.name}",
            parent_commit=info.sha,
        ),
    )
    say(f"published to {repo}: {sum(f.stat().st_size for f in changed) / 1e6:.1f} MB in one commit {commit.oid}")
    return str(commit.oid)


def _same(file: Path, remote: Any) -> bool:
    """Whether the Hub has a file's content: by sha256 for large files, by git's blob id for others."""
    if remote is None:
        return False
    content = file.read_bytes()
    if remote.lfs is not None:
        return bool(remote.lfs["sha256"] == hashlib.sha256(content).hexdigest())
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return bool(remote.blob_id == blob)


# --- the card ---------------------------------------------------------------------------------


def card(run: Run, evaluation: dict[str, Any], force: str = "") -> str:
    """The model card: what it is, how it was measured, how to use it."""
    with guarded(run.adapter / PROVENANCE):
        return _card(run, read_json(run.adapter / PROVENANCE), evaluation, force)


def _card(run: Run, facts: dict[str, Any], evaluation: dict[str, Any], force: str) -> str:
    recipe = run.recipe
    kind = "merged model" if recipe.publish.merged else "LoRA adapter"
    hub_base = recipe.model.model_name_or_path if hub.is_id(recipe.model.model_name_or_path) else None
    head = ["---", "library_name: " + ("transformers" if recipe.publish.merged else "peft")]
    if hub_base:
        head.append(f"base_model: {hub_base}")
    if hub.is_id(recipe.data.dataset_name):
        head += ["datasets:", f"- {recipe.data.dataset_name}"]
    head += ["pipeline_tag: text-generation", "tags:", "- lora", "- text-to-sql", "- tuneship", "---"]
    lines = [
        *head,
        "",
        f"# {recipe.name}",
        "",
        f"A {kind} of `{facts['base']['name']}` (revision `{facts['base']['revision']}`), "
        f"tuned with tuneship on {facts['data']['splits']['train']} rows of `{facts['data']['source']['name']}`.",
        "",
    ]
    if evaluation:
        with guarded(run.evaluation_file):
            lines += ["## Measured", "", *_scores(evaluation), ""]
    if force:
        lines += [f"> Published although the gate did not pass: {force}", ""]
    lines += [
        "## Prompt",
        "",
        "```",
        recipe.data.template.replace("{answer}", "").rstrip(" "),
        "```",
        "",
        "The model ends its answer with the end-of-sequence token. `prompt.json` holds the template, the stops and "
        "golden prompts with their token ids.",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps({"lora": facts["recipe"]["lora"], "train": facts["recipe"]["train"]}, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _scores(evaluation: dict[str, Any]) -> list[str]:
    metric = evaluation["metric"].replace("_", " ")
    lines = [f"| | {metric} | 95 % interval | exact match | answers that end |", "|---|--:|---|--:|--:|"]
    for score in evaluation["scores"]:
        low, high = score["interval"]
        lines.append(
            f"| {score['name']} | {score['score']:.1%} | {low:.1%} – {high:.1%} "
            f"| {score['exact_match']:.1%} | {score['ended']:.1%} |"
        )
    rows = evaluation["scores"][-1]["rows"]
    return [*lines, "", f"On {rows} held-out rows of the {evaluation['split']} split."]
