"""The command line as a whole: every verb, what it prints where, and the exit codes of the contract.

What can be wrong with a recipe or a row, and how well it is told, is tested beside the rooms that
tell it; here stands that the command line passes it on: one message, nothing on stdout, the right code.

python -m pytest tests/test_cli.py -v
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from fake_hub import Hub
from samples import sql_rows, tiny_recipe
from zygote import Commands, Finished, until

import tuneship
from tuneship import cli
from tuneship import recipe as recipes
from tuneship.journal import open_run, read_run

VERBS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
ROW = sql_rows(1)[0]
LONG = "x" * 5000


@pytest.fixture
def recipe(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the recipe of a tiny run to my.yaml, with sections changed."""

    def write(**sections: Any) -> Path:
        file = tmp_path / "my.yaml"
        file.write_text(recipes.dump(tiny_recipe(tiny_base, rows_file, **sections)), encoding="utf-8")
        return file

    return write


@pytest.fixture
def tuneship_(commands: Commands, tmp_path: Path) -> Callable[..., Finished]:
    """Runs `tuneship …` in a folder of its own."""

    def run(*argv: str | Path, **settings: Any) -> Finished:
        return commands.run(argv, cwd=tmp_path, **settings)

    return run


def refused(finished: Finished, code: int, *said: str) -> str:
    """Holds a refusal against its form: one message on stderr, with where, and nothing on stdout."""
    assert finished.code == code, finished.err
    assert finished.out == ""
    assert finished.err.count("error: ") == 1
    message = finished.err[finished.err.index("error: ") :]
    assert "\n  where: " in message
    assert "Traceback" not in finished.err
    for text in said:
        assert text in message
    return message


# --- what every verb has ------------------------------------------------------------------------------


def test_the_verbs_of_the_contract_are_there() -> None:
    stages = ["prepare", "train", "evaluate", "export", "publish", "report"]
    assert {"init", "validate", "run", *stages, "serve", "ask"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(tuneship_: Callable[..., Finished], verb: str) -> None:
    finished = tuneship_(verb, "--help")
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.startswith(f"Usage: tuneship {verb} ")
    about = " ".join(finished.out.partition("Options:")[0].partition("\n\n")[2].split())
    assert re.match(r"[A-Z].*[a-z.]", about), "the verb has no docstring"


def test_help_and_version(tuneship_: Callable[..., Finished]) -> None:
    assert tuneship_("--version") == Finished(0, f"{tuneship.__version__}\n", "")
    finished = tuneship_("--help")
    assert finished.code == 0
    assert all(re.search(rf"^  {verb} ", finished.out, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Usage: tuneship"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "--nope", "my.yaml"], "No such option: --nope"),
        (["train", "my.yaml", "--run"], "requires an argument"),
        (["serve", "runs/my", "--port", "many"], "should be a valid integer"),
    ],
)
def test_a_command_that_is_none(tuneship_: Callable[..., Finished], argv: list[str], said: str) -> None:
    finished = tuneship_(*argv)
    assert finished.code == 2
    assert said in finished.out + finished.err
    assert "Traceback" not in finished.err


def test_the_command_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("tuneship")
    done = subprocess.run([script, "validate", "tinny"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such recipe; did you mean tiny?\n  where: tinny\n  fix:   ")


# --- init, validate, run --dry-run --------------------------------------------------------------------


def test_init_lists_and_copies(tuneship_: Callable[..., Finished], tmp_path: Path) -> None:
    listed = tuneship_("init")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == list(recipes.shipped())
    assert list(json.loads(tuneship_("init", "--json").out)) == list(recipes.shipped())
    copied = tuneship_("init", "tiny", "my.yaml")
    assert (copied.code, copied.out) == (0, "")
    assert "next: tuneship validate my.yaml" in copied.err
    assert (tmp_path / "my.yaml").read_bytes() == recipes.shipped()["tiny"].read_bytes()
    refused(tuneship_("init", "gemma2-9b-l4", "my.yaml"), 2, "the file exists", "my.yaml")
    refused(tuneship_("init", "tiny", "away/my.yaml"), 2, "no such folder", "where: away")
    assert tuneship_("init", "tiny").code == 0
    assert (tmp_path / "tiny.yaml").exists()


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        (".", 2, "this is a folder"),
        ("/dev/null", 2, "the file exists"),
        ("/dev/null/x", 2, "no such folder"),
        ("/proc/x", 3, "the file cannot be written"),
        (LONG, 2, "the name is too long"),
    ],
)
def test_init_to_where_no_file_can_be(tuneship_: Callable[..., Finished], target: str, code: int, said: str) -> None:
    refused(tuneship_("init", "tiny", target), code, said, "\n  fix:   ")


@pytest.mark.parametrize(
    "argv",
    [
        ["init", LONG],
        ["validate", LONG],
        ["report", "tiny", "--run", LONG],
        ["serve", LONG],
        ["ask", LONG, "Why?"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_name_that_is_too_long(tuneship_: Callable[..., Finished], argv: list[str]) -> None:
    assert len(refused(tuneship_(*argv), 2, "the name is too long", "name a shorter one")) < 200


@pytest.mark.parametrize("argv", [["init"], ["init", "--json"], ["--version"], ["--help"]], ids=" ".join)
def test_output_that_has_no_room_is_one_message(argv: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tuneship", *argv], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == "error: what was to be printed cannot be written: No space left on device"
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_a_character_that_the_terminal_lacks_is_printed_as_an_escape(trained: Path, tmp_path: Path) -> None:
    trained.rename(tmp_path / "été")
    done = subprocess.run(
        [sys.executable, "-m", "tuneship", "report", str(tmp_path / "été")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, encoding="ascii", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("/\\xe9t\\xe9/report.html\n")


@pytest.mark.parametrize("change", ["lora.layers_to_transform=[9]", "lora.target_modules=[x_proj]"])
def test_plan_refuses_an_adapter_that_the_base_has_no_place_for(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], change: str
) -> None:
    refused(tuneship_("plan", recipe(), "--set", change), 2, "where: " + change.split("=")[0])


@pytest.mark.parametrize("size", ["inf", "-inf", "nan", "0", "-1", "1e300"])
def test_a_card_of_no_size(tuneship_: Callable[..., Finished], size: str) -> None:
    refused(tuneship_("plan", "tiny", "--card-gb", size), 2, "no card has that size", "where: --card-gb ")


def test_validate_counts(tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path) -> None:
    plain, as_json = tuneship_("validate", recipe()), tuneship_("validate", recipe(), "--json")
    assert (plain.code, as_json.code) == (0, 0)
    assert plain.out.endswith("the recipe and its data are good\n")
    assert f"next: tuneship run {tmp_path}/my.yaml" in plain.err
    assert json.loads(as_json.out)["rows"] == 60
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_whole_recipe(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    expected = recipes.load(recipe(), overrides=["train.seed=3"])
    finished = tuneship_("run", recipe(), "--dry-run", "--set", "train.seed=3")
    assert finished.code == 0
    (tmp_path / "resolved.yaml").write_text(finished.out, encoding="utf-8")
    assert recipes.load(tmp_path / "resolved.yaml") == expected
    as_json = tuneship_("run", recipe(), "--dry-run", "--json", "--set", "train.seed=3")
    assert json.loads(as_json.out) == expected.model_dump(mode="json")
    assert not (tmp_path / "runs").exists()


def test_the_tutorials_names_are_taken_from_the_environment(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path]
) -> None:
    finished = tuneship_("run", recipe(), "--dry-run", "--json", env={"LORA_R": "3"})
    assert json.loads(finished.out)["lora"]["r"] == 3
    assert "lora.r is set by the environment: LORA_R=3" in finished.err


# --- the stages, by hand ------------------------------------------------------------------------------


def test_the_stages_by_hand(tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path) -> None:
    file, run = recipe(publish={"folder": str(tmp_path / "published")}), tmp_path / "else where"
    verbs = ["prepare", "train", "evaluate", "export", "publish", "report"]
    change = ["--set", "train.max_steps=2"]
    told = {}
    for verb in verbs:
        finished = tuneship_(verb, file, "--run", run, "--json", *change)
        assert finished.code == 0, finished.err
        # One document and nothing else, so that it can be piped.
        told[verb] = json.loads(finished.out)
        if verb != "report":
            said = re.search(r"^next: (.*)$", finished.err, re.MULTILINE)
            assert said is not None
            # As a shell takes it. serve takes a run's folder, not a recipe.
            argv = ["serve", str(run)] if verb in ("export", "publish") else [str(file), "--run", str(run), *change]
            assert shlex.split(said[1])[-len(argv) :] == argv
    assert told["prepare"]["rows"] == 60
    assert told["train"]["updates"] == 2
    assert told["evaluate"]["gate"]["passed"] is True
    assert told["export"]["prompts"] > 0
    assert list(told["publish"]) == [str(tmp_path / "published")]
    assert Path(told["report"]["report"]) == run / "report.html"
    assert not (tmp_path / "runs").exists()
    # A run is as good as the recipe that made it.
    again = tuneship_("publish", run)
    assert (again.code, again.out) == (0, "")
    assert "already published" in again.err
    sql = tuneship_("ask", run, "How many?", "--context", ROW["context"], "--json")
    assert sql.code == 0, sql.err
    assert json.loads(sql.out)["question"] == "How many?"


def test_a_run_is_named_by_its_recipe(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    finished = tuneship_("prepare", recipe())
    assert (finished.code, finished.out) == (0, "")
    assert (tmp_path / "runs" / "tiny-test" / "data" / "prepared.json").exists()


@pytest.mark.parametrize(
    ("verb", "code", "said"),
    [
        ("evaluate", 2, "the run has no adapter yet"),
        ("export", 2, "the run has no adapter yet"),
        ("publish", 4, "nothing was evaluated"),
        ("report", 2, "there is nothing to report yet"),
    ],
)
def test_a_stage_before_its_time(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], verb: str, code: int, said: str
) -> None:
    file = recipe(publish={"folder": "published"})
    assert tuneship_("prepare", file).code == 0
    assert "\n  fix:   tuneship " in refused(tuneship_(verb, file), code, said)


@pytest.mark.parametrize("verb", ["evaluate", "export", "publish", "report"])
def test_a_stage_without_a_run_makes_none(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path, verb: str
) -> None:
    refused(tuneship_(verb, recipe()), 2, "no run here", "where: runs/tiny-test", "tuneship train RECIPE")
    assert not (tmp_path / "runs").exists()


def test_a_report_is_made_while_another_process_writes(tuneship_: Callable[..., Finished], trained: Path) -> None:
    with open_run(trained, read_run(trained).recipe):
        refused(tuneship_("evaluate", trained), 3, "another process")
        assert tuneship_("report", trained).out == f"{trained}/report.html\n"


def test_a_folder_of_another_recipe(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert tuneship_("prepare", recipe()).code == 0
    changed = ("prepare", recipe(), "--set", "train.seed=7", "--set", "lora.r=2")
    refused(tuneship_(*changed), 2, "lora.r: 4 there, 2 now; train.seed: 42 there, 7 now", "--fresh")
    finished = tuneship_(*changed, "--fresh")
    assert finished.code == 0, finished.err
    old, new = sorted((tmp_path / "runs").iterdir(), key=lambda folder: len(folder.name), reverse=True)
    assert old.name.startswith("tiny-test.old-")
    seeds = [json.loads((folder / "recipe.json").read_text())["train"]["seed"] for folder in (old, new)]
    assert seeds == [42, 7]


def test_the_gates_no_is_4(tuneship_: Callable[..., Finished], trained: Path, tmp_path: Path) -> None:
    finished = tuneship_("evaluate", trained, "--set", "evaluate.gate.min_score=1.0", "--json")
    assert finished.code == 4
    # The result is there all the same.
    assert json.loads(finished.out)["gate"]["passed"] is False
    assert finished.err.count("error: the gate said no: ") == 1
    settings = ("--set", f"publish.folder={tmp_path}/published")
    refused(tuneship_("publish", trained, *settings), 4, "the gate said no", "--force")
    assert not (tmp_path / "published").exists()
    forced = tuneship_("publish", trained, *settings, "--force", "a trial")
    assert forced.code == 0, forced.err
    assert "a trial" in (tmp_path / "published" / "README.md").read_text(encoding="utf-8")


# --- bad input ----------------------------------------------------------------------------------------

# The base does not exist: whoever looks for it first says so, and fails these tests.
NOWHERE = {"model_name_or_path": "nobody/has-this-model"}


@pytest.mark.parametrize(
    ("line", "said", "where"),
    [
        ("train: {lerning_rate: 1.0e-3}", "unknown key train.lerning_rate: did you mean learning_rate?", "my.yaml:3"),
        ("trian: {seed: 1}", "unknown key trian: did you mean train?", "my.yaml:3"),
        ("train: {max_steps: many}", "train.max_steps: ", "my.yaml:3"),
        ("train: {max_length: 5000}", "must fit into one forward pass", "my.yaml"),
        ("hub_token: x", "a secret does not belong in a recipe", "hub_token"),
        ("train: {seed: 1", "not a YAML recipe", "my.yaml:"),
    ],
)
def test_a_bad_recipe(tuneship_: Callable[..., Finished], tmp_path: Path, line: str, said: str, where: str) -> None:
    text = f"model: {{model_name_or_path: nobody/has-this-model}}\ndata: {{dataset_name: missing.jsonl}}\n{line}\n"
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    for verb in ("validate", "train", "run"):
        assert f"\n  where: {where}" in refused(tuneship_(verb, "my.yaml"), 2, said)


def test_a_bad_override(tuneship_: Callable[..., Finished], recipe: Callable[..., Path]) -> None:
    refused(tuneship_("train", recipe(), "--set", "train.sed=1"), 2, "did you mean seed?", "where: --set train.sed")
    secret = "hf_" + "CANARYabcdefgh12345678"
    assert secret not in refused(tuneship_("train", recipe(), "--set", f"model.token={secret}"), 2, "HF_TOKEN")


def jsonl(*rows: dict[str, Any], end: bytes = b"") -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode() + end


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (jsonl(*sql_rows(9), {"question": "q", "context": "c"}), "row 10: answer is missing"),
        (jsonl(*sql_rows(9), {**ROW, "answer": None}), "row 10: answer is null"),
        (jsonl(*sql_rows(9), {**ROW, "answer": " "}), "row 10: answer is empty"),
        (jsonl(*sql_rows(9), {**ROW, "answer": 7}), "row 10: answer is int, not text"),
        (jsonl(*sql_rows(9), end=b'{"question": "q"\n'), "row 10: not JSON"),
        (jsonl(*sql_rows(9), end=b'{"question": "\xff"}\n'), "row 10: not UTF-8"),
        (jsonl(*sql_rows(9), {**ROW, "answer": "x" * 20_000_000}), "row 10: longer than 1048576 bytes"),
        (b"", "there are no rows"),
        (jsonl(*[ROW] * 20), "all 20 rows are the same"),
    ],
    ids=["missing", "null", "empty", "number", "broken", "bytes", "20 MB", "none", "the same"],
)
def test_bad_rows(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], tmp_path: Path, content: bytes, said: str
) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_bytes(content)
    file = recipe(model=NOWHERE, data={"dataset_name": str(rows)})
    for verb in ("validate", "train"):
        refused(tuneship_(verb, file), 2, said, f"where: {rows}")


def test_rows_and_a_model_that_are_not_there(tuneship_: Callable[..., Finished], recipe: Callable[..., Path]) -> None:
    refused(tuneship_("validate", recipe(data={"dataset_name": "away.jsonl"})), 2, "no such file", "away.jsonl")
    refused(tuneship_("validate", recipe(data={"dataset_name": "./a/b/c"})), 2, "no such data", "a Hub id")
    refused(tuneship_("train", recipe(model={"model_name_or_path": "./a/b/c"})), 2, "no such model", "a Hub id")
    # The Hub is not reachable from tests.
    refused(tuneship_("train", recipe(model=NOWHERE)), 3, "the Hub cannot be reached", "model nobody/has-this-model")


def test_a_hub_that_knows_nothing_or_refuses(
    tuneship_: Callable[..., Finished], recipe: Callable[..., Path], hub: Hub, tmp_path: Path
) -> None:
    settings = {"env": hub.environment, "prelude": hub.prelude(tmp_path / "cache")}
    model, data = recipe(model=NOWHERE), ("--set", "data.dataset_name=user/rows")
    refused(tuneship_("train", model, **settings), 2, "no such repository", "where: model nobody/has-this-model")
    refused(tuneship_("train", model, *data, **settings), 2, "no such repository", "where: dataset user/rows")
    hub.add("nobody/has-this-model", {"config.json": b"{}"}, gated=True)
    refused(
        tuneship_("train", model, **settings), 3, "asks for a licence to be accepted", "accept it on the model's page"
    )
    hub.fail("GET", "/api/models", 401)
    refused(tuneship_("train", model, **settings), 3, "the Hub refuses this token", "set HF_TOKEN")


# --- serve and ask ------------------------------------------------------------------------------------


def test_a_port_that_is_taken(tuneship_: Callable[..., Finished], trained: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(tuneship_("serve", trained, "--port", str(port)), 3, f"127.0.0.1:{port}", "--port")


def test_serve_then_ask(commands: Commands, tuneship_: Callable[..., Finished], trained: Path, tmp_path: Path) -> None:
    server = commands.start(["serve", trained, "--port", "0"], cwd=tmp_path)
    url = server.until(lambda: re.search(r"http://127\.0\.0\.1:\d+(?= \()", server.err()))[0]
    until(lambda: httpx.get(f"{url}/health", trust_env=False).status_code == 200)
    asked = tuneship_("ask", url, "How many?", "--context", ROW["context"], "--json")
    assert asked.code == 0, asked.err
    here = tuneship_("ask", trained, "How many?", "--context", ROW["context"], "--json")
    assert json.loads(asked.out) == json.loads(here.out)
    server.send(signal.SIGTERM)
    assert server.wait().code == 0
    assert server.wait().out == ""


def test_nobody_to_ask(tuneship_: Callable[..., Finished]) -> None:
    refused(tuneship_("ask", "http://127.0.0.1:9", "How many?"), 3, "no server answers", "tuneship serve")
    refused(tuneship_("ask", "runs/away", "How many?"), 2, "no such folder", "where: runs/away")


# --- what nobody foresaw ------------------------------------------------------------------------------


def test_a_defect_shows_its_traceback(tuneship_: Callable[..., Finished]) -> None:
    prelude = "from tuneship import recipe\ndef broken(): raise RuntimeError('a defect')\nrecipe.shipped = broken"
    finished = tuneship_("init", prelude=prelude)
    assert (finished.code, finished.out) == (1, "")
    assert finished.err.startswith("Traceback")
    assert finished.err.endswith("RuntimeError: a defect\n\n")


def test_debug_shows_the_traceback_of_an_error(tuneship_: Callable[..., Finished]) -> None:
    finished = tuneship_("--debug", "validate", "tinny")
    assert finished.code == 2
    assert "Traceback" in finished.err
    assert finished.err.count("\nerror: no such recipe; did you mean tiny?") == 1


@pytest.mark.parametrize("raised", [True, False])
def test_ctrl_c_ends_with_130_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: bool
) -> None:
    def interrupted(**_: object) -> int:
        if raised:
            raise KeyboardInterrupt
        return 130  # what typer makes of it

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_a_verb_exits_with_is_the_exit_code(commands: Commands, tmp_path: Path) -> None:
    outputs = str(Path(__file__).parents[1] / "infra" / "example-outputs.json")
    changed = commands.run(["render", "--outputs", outputs, "--diff", "--out", "none"], cwd=tmp_path)
    assert changed.code == 1 and changed.out
    assert commands.run(["render", "--outputs", outputs, "--out", "made"], cwd=tmp_path).code == 0
    same = commands.run(["render", "--outputs", outputs, "--diff", "--out", "made"], cwd=tmp_path)
    assert (same.code, same.out) == (0, "")
