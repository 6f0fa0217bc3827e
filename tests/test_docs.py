"""The pages say what is there: commands parse, files exist, recipes load, and the tutorial runs.

python -m pytest tests/test_docs.py -v
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
import yaml
from samples import sql_rows, tiny_recipe, write_rows
from zygote import Commands, Process, until

from tuneship import cli
from tuneship import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("infra/**/*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LEAST = "model: {model_name_or_path: a/b}\ndata: {dataset_name: c/d}\n"
# What a page may name with a path; runs/, say, is the reader's.
OURS = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("runs", "build", "dist")}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks: (language, content)."""
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield found[2], "\n".join(line.removeprefix(found[1]) for line in found[3].splitlines())


def inline(text: str) -> list[str]:
    """What stands between backticks, blocks left out."""
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]


def commands_in(text: str) -> list[list[str]]:
    """Every `tuneship …` line of the blocks, as words."""
    lines = [line for _, block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    calls = [line.strip().removeprefix("$ ") for line in lines]
    return [shlex.split(call, comments=True)[1:] for call in calls if call.startswith("tuneship ")]


def parse(words: list[str]) -> str | None:
    """What the command line says against a command's words."""
    group = typer.main.get_command(cli.app)
    while words and words[0] in ("--debug", "--version", "--help"):
        words = words[1:]
    if not words:
        return None
    verb = group.commands.get(words[0])  # type: ignore[attr-defined]
    if verb is None:
        return f"no verb {words[0]}"
    if "--help" in words:
        return None
    try:
        verb.make_context(words[0], words[1:])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


# --- commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=name)
def test_commands_in_blocks_parse(page: Path) -> None:
    text = text_of(page)
    if page.suffix == ".yaml":
        # A recipe's head names the commands that use it.
        text = "```\n" + "\n".join(re.findall(r"^#\s+(tuneship .*?)(?:  .*)?$", text, re.MULTILINE)) + "\n```"
    wrong = {shlex.join(words): said for words in commands_in(text) if (said := parse(words))}
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_sentences_exist(page: Path) -> None:
    said = [code.removeprefix("tuneship ") for code in inline(text_of(page)) if code.startswith("tuneship ")]
    wrong = {code: told for code in said if (told := parse(shlex.split(code)))}
    # A sentence may leave the arguments out.
    assert {code: told for code, told in wrong.items() if not told.startswith("MissingParameter")} == {}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    lines = [line for _, block in blocks(text_of(page)) for line in block.splitlines()] + inline(text_of(page))
    named = {found[1] for line in lines if (found := re.match(r"(?:\$ )?make ([a-z0-9-]+)", line))}
    assert named <= targets


def test_a_wrong_command_would_be_seen() -> None:
    text = (
        "```\ntuneship train my.yaml --rum x\n$ tuneship trian my.yaml\ntuneship train\ntuneship train a --run b\n```"
    )
    told = [parse(words) for words in commands_in(text)]
    assert [bool(said) for said in told] == [True, True, True, False]


# --- files --------------------------------------------------------------------------------------------------


def exists(path: str) -> bool:
    path = path.removeprefix("./").rstrip("/")
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    named = [code for code in inline(text_of(page)) if re.fullmatch(r"[\w.*/-]+", code) and "/" in code]
    assert [path for path in named if path.split("/")[0] in OURS and not exists(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    for link in local:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, link


def tree(block: str) -> list[str]:
    """The paths of a drawn tree: one a line, folders end in a slash, what follows explains it."""
    paths: list[str] = []
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        bare = re.sub(r"[│├└─]", " ", line)
        if not bare.strip():
            continue
        depth = len(bare) - len(bare.lstrip())
        first = bare.split()[0]
        above = [(column, folder) for column, folder in above if column < depth]
        paths.append("".join(folder for _, folder in above) + first)
        if first.endswith("/"):
            above.append((depth, first))
    return paths


def test_a_tree_is_read_as_it_is_drawn() -> None:
    drawn = "Makefile   targets\na/         rooms\n  b/       more\n    c.py   one\n  d.py     two\ne/\n└── f.py\n"
    assert tree(drawn) == ["Makefile", "a/", "a/b/", "a/b/c.py", "a/d.py", "e/", "e/f.py"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_trees_name_what_is_there(page: Path) -> None:
    trees = [block for _, block in blocks(text_of(page)) if re.search(r"^tuneship/( |$)", block, re.MULTILINE)]
    assert [path for block in trees for path in tree(block) if path[:5] != "runs/" and not exists(path)] == []


# --- recipes (C2) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_yaml_block_loads(page: Path, tmp_path: Path) -> None:
    for language, block in blocks(text_of(page)):
        if language not in ("yaml", "yml"):
            continue
        documents = [document for document in yaml.safe_load_all(block) if document is not None]
        assert documents
        if any("apiVersion" in document for document in documents):
            continue
        # A fragment is one of a whole recipe.
        whole = {**yaml.safe_load(LEAST), **documents[0]}
        for section, least in yaml.safe_load(LEAST).items():
            whole[section] = {**least, **whole[section]}
        (tmp_path / "block.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
        recipes.load(tmp_path / "block.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_recipe_is_written_as_it_is_meant(recipe: Path) -> None:
    recipes.load(recipe)
    first = text_of(recipe).splitlines()[0]
    # What `tuneship init` lists.
    assert re.fullmatch(r"# \w.*[.\w]", first)
    assert f"tuneship run {recipe.stem}" in text_of(recipe)


def test_the_reference_is_what_the_recipe_makes() -> None:
    script = ROOT / "scripts" / "make_recipe_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the tutorial ----------------------------------------------------------------------------------------------------


def serving(server: Process) -> str:
    """Waits until a server answers; returns its address."""
    url: str = server.until(lambda: re.search(r"http://127\.0\.0\.1:\d+(?= \()", server.err()))[0]
    until(lambda: httpx.get(f"{url}/health", trust_env=False).status_code == 200)
    return url


def test_the_tutorial_runs(commands: Commands, tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Every command of docs/tutorial.md, in its order, on the tiny model; `tuneship run` is in test_flow.py."""
    text = text_of(ROOT / "docs" / "tutorial.md")
    calls = commands_in(text)
    # The tiny model in the place of the real one.
    mine = recipes.dump(tiny_recipe(tiny_base, rows_file, name="my", train={"max_steps": 2}))
    write_rows(tmp_path / "rows.jsonl", sql_rows(30))
    with sqlite3.connect(tmp_path / "attendees.sqlite") as db:
        db.execute("CREATE TABLE attendees (name VARCHAR, age INTEGER, kubecon VARCHAR)")
    db.close()
    url, ran = "", []
    for words in calls:
        ran.append(words[0])
        if words[0] == "serve":
            server = commands.start([*words, "--port", "0"], cwd=tmp_path)
            url = serving(server)
        elif words[0] != "run" or "--dry-run" in words:
            finished = commands.run([url if word == "http://127.0.0.1:8000" else word for word in words], cwd=tmp_path)
            # What the tiny model answers is no SQL, but it is printed and tried.
            tried = words[0] == "ask" and finished.out and "syntax error" in finished.err
            assert finished.code == 0 or tried, (words, finished.err)
            if words[:2] == ["init", "tiny"]:
                (tmp_path / words[2]).write_text(mine, encoding="utf-8")
    assert {"init", "validate", "run", "prepare", "train", "evaluate", "report", "export", "serve", "ask"} <= set(ran)
    assert (tmp_path / "runs" / "my" / "report.html").exists()
    # The tutorial's curl.
    (body,) = re.findall(r"/generate .*? <<'EOF'\n(.*?)\nEOF", text, re.DOTALL)
    reply = httpx.post(f"{url}/generate", json=json.loads(body), trust_env=False)
    assert reply.status_code == 200
    (prediction,) = reply.json()["predictions"]
    assert prediction.startswith(f"Prompt:\n{json.loads(body)['prompt']}\nOutput:\n")
    server.send(signal.SIGTERM)
    assert server.wait().code == 0
