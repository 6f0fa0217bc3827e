"""A token that is known goes through everything, and is then looked for everywhere (S1, S3).

The flow's part of it, Metaflow's datastore, is in tests/test_flow.py. That recipes and overrides refuse
tokens (S2) is in tests/test_recipe.py, what recognises them in tests/test_credentials.py.

python -m pytest tests/test_secrets.py -v
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_hub
import pytest
from fake_hub import Hub
from samples import tiny_recipe
from zygote import Commands, Finished

from tuneship import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
CANARY = "hf_" + "CANARYsings0123456789"
# A key of no form that anybody would recognise.
KEY = "the canary that opens doors"
STAGES = ["validate", "prepare", "train", "evaluate", "export", "publish", "report"]


def found_in(folder: Path, secret: str) -> list[str]:
    """The files of a folder that hold a text."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return [str(file) for file in files if secret.encode() in file.read_bytes()]


def clean(finished: Finished) -> Finished:
    for secret in (CANARY, KEY):
        assert secret not in finished.out + finished.err
    return finished


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that takes the canary for its token."""
    monkeypatch.setattr(fake_hub, "TOKEN", CANARY)
    with fake_hub.serving() as served:
        yield served


@pytest.fixture
def run(commands: Commands, canary: Hub, tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Runs a verb on the tiny recipe with the canary in its environment."""
    recipe = tiny_recipe(
        tiny_base,
        rows_file,
        train={"max_steps": 2},
        evaluate={"max_rows": 2, "few_shot": 0},
        publish={"folder": "published", "hub_model_id": "user/tiny"},
    )
    (tmp_path / "my.yaml").write_text(recipes.dump(recipe), encoding="utf-8")

    def start(*argv: str, prelude: str = "", **environ: str) -> Finished:
        environment = {**canary.environment, "HF_TOKEN": CANARY, "TUNESHIP_API_KEY": KEY, **environ}
        return commands.run(
            argv, cwd=tmp_path, env=environment, prelude=canary.prelude(tmp_path / "hub-cache") + prelude
        )

    return start


def test_s1_no_stage_keeps_a_token(run: Callable[..., Finished], canary: Hub, tmp_path: Path) -> None:
    for stage in STAGES:
        finished = clean(run(stage, "my.yaml"))
        assert finished.code == 0, finished.err
    # The token was used, and the Hub has all but that.
    assert any(request.token == CANARY for request in canary.requests)
    published = canary.repos["models", "user/tiny"].head.files
    assert "adapter_model.safetensors" in published
    assert not [name for name, content in published.items() if CANARY.encode() in content]
    assert (tmp_path / "runs" / "tiny-test" / "report.html").exists()
    assert found_in(tmp_path, CANARY) == found_in(tmp_path, KEY) == []


def test_s1_a_mounted_token_is_not_kept_either(
    run: Callable[..., Finished], canary: Hub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mounted = tmp_path_factory.mktemp("secrets") / "token"
    mounted.write_text(CANARY + "\n", encoding="utf-8")
    assert clean(run("train", "my.yaml", HF_TOKEN_FILE=str(mounted))).code == 0
    finished = clean(run("publish", "my.yaml", "--force", "a trial", HF_TOKEN="", HF_TOKEN_FILE=str(mounted)))
    assert finished.code == 0, finished.err
    assert any(request.token == CANARY for request in canary.requests)
    assert found_in(tmp_path, CANARY) == []


def test_s1_a_refusal_does_not_repeat_the_token(run: Callable[..., Finished], canary: Hub, tmp_path: Path) -> None:
    assert run("train", "my.yaml").code == 0
    publish = ["publish", "my.yaml", "--force", "a trial"]
    for status, said in ((401, "the Hub refuses this token"), (403, "the Hub refuses"), (400, "the Hub answers 400")):
        canary.faults.clear()
        # A Hub that repeats the token in what it answers.
        canary.fail("POST", "/api/", status, headers={"X-Error-Message": f"the token {CANARY} may not do that"})
        finished = clean(run(*publish))
        assert finished.code == 3, finished.err
        assert said in finished.err
        finished = clean(run("--debug", *publish))
        assert finished.code == 3
        # It was there, in the traceback, and was struck out.
        assert "the token [redacted] may not do that" in finished.err
    assert found_in(tmp_path, CANARY) == []


@pytest.mark.parametrize("secret", [CANARY, KEY])
def test_s1_the_traceback_of_a_defect_does_not_repeat_it(run: Callable[..., Finished], secret: str) -> None:
    broken = f"import tuneship.prepare as room\ndef broken(*_): raise RuntimeError({secret!r})\nroom.validate = broken"
    finished = clean(run("validate", "my.yaml", prelude=broken))
    assert finished.code == 1
    assert "RuntimeError: [redacted]" in finished.err


@pytest.mark.parametrize("override", [f"model.token={CANARY}", f"publish.hub_model_id={CANARY}", CANARY])
def test_s1_s2_a_token_on_the_command_line_is_refused_and_not_repeated(
    run: Callable[..., Finished], tmp_path: Path, override: str
) -> None:
    for verb in ("validate", "train", "run"):
        finished = clean(run(verb, "my.yaml", "--set", override))
        assert finished.code == 2
        assert finished.err.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


# --- S3: none was ever committed ----------------------------------------------------------------------

# As gitleaks looks for them; a test that needs one puts it together from pieces.
TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,}|AIza[0-9A-Za-z_-]{35}|ya29\.[\w-]{30,}"
    r"|\bsk-[A-Za-z0-9]{40,}|xox[abp]-[0-9]{8,}|AKIA[0-9A-Z]{16}"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\s*\n\s*[A-Za-z0-9+/]{16}|\"private_key\": \"-----BEGIN"
)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout.decode(
        errors="replace"
    )


def test_s3_the_rule_finds_what_it_should() -> None:
    for token in (
        "hf_" + "a1" * 17,
        "gh" + "p_" + "a" * 36,
        "AI" + "za" + "b" * 35,
        "AK" + "IA" + "ABCDEFGH12345678",
        "-----BEGIN " + "PRIVATE KEY-----\nMIIEvQIBADANBgkq",
    ):
        assert TOKENS.search(f"x = '{token}'"), token


def test_s3_no_file_holds_a_token() -> None:
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert len(files) > 100
    assert [str(file) for file in files if TOKENS.search(file.read_text(encoding="utf-8", errors="replace"))] == []


def test_s3_no_commit_ever_held_one() -> None:
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("a shallow clone has no history")
    added = (line for line in git("log", "-p", "--unified=0", "--no-color").splitlines() if line[:1] == "+")
    assert [line[:80] for line in added if TOKENS.search(line)] == []


def test_s3_the_hook_refuses_them(tmp_path: Path) -> None:
    bad, large, good = (tmp_path / name for name in ("bad.py", "large.bin", "good.py"))
    token = "hf_" + "b2" * 17
    bad.write_text(f"one = 1\ntoken = '{token}'\n", encoding="utf-8")
    large.write_bytes(b"x" * 500_001)
    good.write_text("token = os.environ['HF_TOKEN']\n", encoding="utf-8")
    hook = [sys.executable, str(ROOT / "scripts" / "check_staged.py")]
    done = subprocess.run([*hook, bad, large, good], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"{bad}:2: looks like a secret\n{large}: 500001 bytes, more than 500000\n"
    assert subprocess.run([*hook, good]).returncode == 0
    assert "scripts/check_staged.py" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
