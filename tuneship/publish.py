"""publish: the adapter and its card, into a folder, under a gs:// URI, or to the Hub.

Megabytes go out, not the merged gigabytes, unless the recipe says so. Publishing twice is once:
what is there already, with the same content, is not sent again. The Hub gets one commit, in a
repository that is private unless the recipe says otherwise. Nothing is published that the gate has
not passed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tuneship import hub, storage
from tuneship.console import say
from tuneship.errors import InputError, OutsideError
from tuneship.journal import PROVENANCE, Run, read_json, sha256_file, write_text


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
    _check_weights(source)
    if settings.folder is not None:
        _check_folder(settings.folder, run)
    parcel = run.path / "publish"
    _pack(source, parcel, card(run, evaluation, force))
    done: dict[str, str] = {}
    if settings.folder is not None:
        _check_destination(settings.folder, run, update)
        sent = storage.upload(parcel, settings.folder, last=PROVENANCE)
        say(f"published to {settings.folder}" if sent else f"already published: {settings.folder}")
        done[settings.folder] = sha256_file(parcel / PROVENANCE)
    if settings.hub_model_id is not None:
        done[settings.hub_model_id] = _to_hub(parcel, run, update)
    return done


def _check_weights(source: Path) -> None:
    """Refuses weights that nobody could load: the header is read, and the length held against it."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(source.glob("*.safetensors"))
    fix = f"remove {source}, and make it again: tuneship {'export' if source.name == 'merged' else 'train'} RECIPE"
    if not weights:
        raise InputError("the weights are missing", where=str(source), fix=fix)
    for file in weights:
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            raise InputError(f"the weights are damaged: {error}", where=str(file), fix=fix) from error


def _check_folder(destination: str, run: Run) -> None:
    if not storage.is_remote(destination) and Path(destination).resolve().is_relative_to(run.path.resolve()):
        raise InputError(
            "a run is not published into its own folder",
            where=f"publish.folder: {destination}",
            fix="name a folder outside of it",
        )


def _pack(source: Path, parcel: Path, text: str) -> None:
    """Lays out what is sent: links to the files, so that gigabytes are not copied, and the card."""
    shutil.rmtree(parcel, ignore_errors=True)
    parcel.mkdir()
    for file in sorted(source.iterdir()):
        (parcel / file.name).hardlink_to(file)
    write_text(parcel / "README.md", text)


def _check_destination(destination: str, run: Run, update: bool) -> None:
    """Refuses a destination that another run, or a person, has filled."""
    there = storage.listing(destination) if storage.is_remote(destination) or Path(destination).exists() else []
    if not there or update:
        return
    if PROVENANCE in there:
        with storage.open_read(f"{destination.rstrip('/')}/{PROVENANCE}") as stream:
            if json.loads(stream.read())["recipe"]["name"] == run.recipe.name:
                return
    elif set(there) <= {file.name for file in (run.path / "publish").iterdir()}:
        # A copy of ours that was cut off: provenance goes last.
        return
    raise _taken(destination)


def _taken(destination: str) -> InputError:
    return InputError(
        "something else is published there",
        where=destination,
        fix="name another destination, or replace it with --update",
    )


# --- the Hub ----------------------------------------------------------------------------------


def _to_hub(parcel: Path, run: Run, update: bool) -> str:
    """One commit with everything that differs; returns the commit that holds it."""
    from huggingface_hub import CommitOperationAdd

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
    keep_card = "README.md" in there and PROVENANCE not in there
    if not update:
        _check_hub(what, there, run, api, repo)
    files = [f for f in sorted(parcel.iterdir()) if not (f.name == "README.md" and keep_card and not update)]
    changed = [file for file in files if not _same(file, there.get(file.name))]
    if not changed:
        say(f"already published: {repo} at {info.sha}")
        return str(info.sha)
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in changed]
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


def _check_hub(what: str, there: dict[str, Any], run: Run, api: Any, repo: str) -> None:
    """Refuses a repository that holds another run's work, or somebody's weights."""
    if PROVENANCE in there:
        file = hub.call(what, lambda: api.hf_hub_download(repo, PROVENANCE))
        if read_json(Path(file))["recipe"]["name"] != run.recipe.name:
            raise _taken(what)
    elif set(there) - {".gitattributes", "README.md"}:
        raise _taken(what)


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
    recipe, facts = run.recipe, read_json(run.adapter / PROVENANCE)
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
