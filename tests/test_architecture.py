"""The rules of the house that import-linter does not know: what loads what, who may read a token, what travels.

python -m pytest tests/test_architecture.py -v
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tuneship"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room that no longer shows itself at one glance is two rooms.
MOST_LINES = 420
LONGER = {
    "kernels/fused.py": "each Triton kernel beside the function that starts it",
    "generation.py": "one continuous batch, read from top to bottom",
}


def name(source: Path) -> str:
    return source.relative_to(PACKAGE).as_posix()


def imports(source: Path) -> Iterator[str]:
    """The packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def importers(package: str) -> set[str]:
    return {name(source) for source in SOURCES if package in imports(source)}


# --- starting is quick, since nothing is loaded -------------------------------------------------------


def loaded_by(script: str) -> set[str]:
    """The packages, Python's own excepted, that a process has loaded in the end."""
    script += "\nprint('|'.join({m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-c", "import sys\n" + script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split("|"))


HEAVY = {
    "datasets", "google", "httpx", "huggingface_hub", "jinja2", "kubernetes", "metaflow", "numpy", "peft", "pyarrow",
    "rich", "safetensors", "starlette", "tokenizers", "torch", "transformers", "uvicorn", "yaml",
}  # fmt: skip


def test_the_package_loads_nothing() -> None:
    assert loaded_by("import tuneship") <= {"__main__", "_distutils_hack", "tuneship"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["run", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = (
        f"from tuneship.cli import main\nsys.argv = ['tuneship', *{arguments!r}]\ntry: main()\nexcept SystemExit: pass"
    )
    loaded = loaded_by(script)
    assert "typer" in loaded
    assert not loaded & HEAVY


# --- who may do what ----------------------------------------------------------------------------------


def test_metaflow_is_for_the_flow_and_kubernetes_for_the_cluster() -> None:
    at_home = {room for room in importers("metaflow") if not room.startswith("cluster/")}
    assert at_home == {"flow.py"}
    assert len(importers("metaflow")) <= 2
    assert all(room.startswith("cluster/") for room in importers("kubernetes"))


def test_pickles_are_for_nobody() -> None:
    for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
        assert importers(package) == set(), package
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), f"{name(source)}:{node.lineno}"
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", f"{name(source)}:{node.value.lineno}"


def reads_a_token(text: str) -> bool:
    """Whether a module looks a token up in an environment, or lets huggingface_hub do so."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called, looked_up = ast.unparse(node.func), node.args[:1]
            if called.endswith("get_token"):
                return True
            if not called.endswith(("environ.get", "environ.pop", "getenv")):
                continue
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            looked_up = [node.slice]
        else:
            continue
        if any(re.match(r"['\"](HF_TOKEN|HUGGING_FACE_HUB_TOKEN|TUNESHIP_API_KEY)", ast.unparse(k)) for k in looked_up):
            return True
    return False


@pytest.mark.parametrize(
    "text",
    ["os.environ.get('HF_TOKEN')", "os.environ['HF_TOKEN_FILE']", "os.getenv('TUNESHIP_API_KEY', '')", "h.get_token()"],
)
def test_a_reader_would_be_seen(text: str) -> None:
    assert reads_a_token(text)
    assert not reads_a_token("fix = 'set HF_TOKEN'\nenv = {'name': 'HF_TOKEN'}\nos.environ.get('HF_ENDPOINT')")


def test_only_credentials_reads_a_token() -> None:
    readers = {name(source) for source in SOURCES if reads_a_token(source.read_text(encoding="utf-8"))}
    # It puts the names together, as NAME and NAME_FILE; `redact` looks for both.
    assert readers == {"credentials.py"}


# --- one glance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_a_room_shows_itself_at_one_glance(source: Path) -> None:
    lines = len(source.read_text(encoding="utf-8").splitlines())
    if name(source) in LONGER:
        assert lines > MOST_LINES, "it has become short: take it off the list"
    else:
        assert lines <= MOST_LINES


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = [line.split("|")[2] for line in page.splitlines() if line.startswith("|") and "`" in line.split("|")[2]]
    named = {room.strip("`/") for floor in floors for room in floor.split()}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} - named == set(), "a room that docs/architecture.md does not name"
    assert named - rooms == set(), "a room that is not there"


# --- what travels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as pip would unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_and_nothing_else(installed: Path) -> None:
    assert {entry.name for entry in installed.iterdir() if not entry.name.endswith(".dist-info")} == {"tuneship"}
    ours = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    theirs = {
        path.relative_to(installed / "tuneship") for path in (installed / "tuneship").rglob("*") if path.is_file()
    }
    assert ours <= theirs
    assert {path.parts[0] for path in theirs - ours} == {"_share"}
    assert Path("py.typed") in theirs
    (facts,) = installed.glob("*.dist-info")
    assert "tuneship = tuneship.cli:main" in (facts / "entry_points.txt").read_text(encoding="utf-8")
    assert list(facts.rglob("LICENSE"))


def test_an_installed_package_has_its_recipes(installed: Path, tmp_path: Path) -> None:
    shared = {file.name: file.read_bytes() for file in (installed / "tuneship" / "_share" / "recipes").iterdir()}
    assert shared == {file.name: file.read_bytes() for file in (ROOT / "recipes").iterdir()}
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    command = [sys.executable, "-P", "-m", "tuneship.cli", "init", "tiny", "my.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my.yaml").read_bytes() == (ROOT / "recipes" / "tiny.yaml").read_bytes()
