"""The command line: one verb a stage.

Results go to stdout, everything else to stderr. Exit codes are those of tuneship.errors. Every verb
imports only what it needs: `tuneship --help` loads no torch, no transformers, no metaflow.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import tuneship
from tuneship import cli_gke
from tuneship.console import print_anything, say
from tuneship.credentials import redact
from tuneship.damage import of_system
from tuneship.errors import GateError, InputError, OutsideError, TuneshipError

app = typer.Typer(
    help="One recipe, from rows to a tuned, measured, published and served model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_gke.app)

Target = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file or name, or a run's folder.")]
RunOption = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run's folder; runs/NAME by default.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, as train.seed=1. Repeatable.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Put an existing run aside and start anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

# As a shell tells a process that SIGINT has ended.
INTERRUPTED = 130


def main() -> None:
    """Runs the command line; an error becomes one message and an exit code."""
    print_anything()
    try:
        # What a verb exits with comes back as a number from some releases of typer, and is raised by others.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            say("interrupted")
        # Here a full disk can be said; at the interpreter's end it would be a traceback.
        sys.stdout.flush()
        if code:
            sys.exit(code)
    except TuneshipError as error:
        if "--debug" in sys.argv or os.environ.get("TUNESHIP_DEBUG"):
            say(redact(traceback.format_exc()))
        say(f"error: {redact(str(error))}")
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        say("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        # click's own errors (a wrong option) carry how they want to be shown.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(2)
        if isinstance(error, OSError) and (wrong := of_system(error)):
            say(f"error: {redact(str(wrong))}")
            sys.exit(wrong.exit_code)
        # A defect: its traceback is what a report needs, without tokens.
        say(redact(traceback.format_exc()))
        sys.exit(1)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """One recipe, from rows to a tuned, measured, published and served model."""
    if version:
        print(tuneship.__version__)
        raise typer.Exit


@app.command()
def init(
    name: Annotated[str | None, typer.Argument(help="The shipped recipe to copy.")] = None,
    target: Annotated[Path | None, typer.Argument(help="Where to; ./NAME.yaml by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, or copy one to edit."""
    from tuneship import recipe

    shipped = recipe.shipped()
    if name is None:
        about = {key: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for key, path in shipped.items()}
        if as_json:
            print(json.dumps(about))
            return
        width = max(map(len, about))
        for key, line in about.items():
            print(f"{key:{width}}  {line}")
        say("next: tuneship init tiny my.yaml, then tuneship validate my.yaml")
        return
    source = recipe.find(name)
    target = target or Path(f"{source.stem}.yaml")
    if target.exists():
        what = "this is a folder" if target.is_dir() else "the file exists"
        raise InputError(what, where=str(target), fix="name another file")
    if not target.parent.is_dir():
        raise InputError("no such folder", where=str(target.parent), fix="make it, or name another file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutsideError(
            f"the file cannot be written: {error.strerror}", where=str(target), fix="name another"
        ) from error
    say(f"copied {name} to {target}")
    _next("validate", target)


@app.command()
def validate(target: Target, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and every row of its data, without loading a model."""
    from tuneship import prepare

    counts = prepare.validate(_recipe(target, overrides))
    if as_json:
        print(json.dumps(counts))
        return
    for line in prepare.summary(counts):
        print(line)
    print("the recipe and its data are good")
    _next("run", target, overrides=overrides)


@app.command()
def plan(
    target: Target,
    overrides: Overrides = None,
    card_gb: Annotated[
        float | None, typer.Option("--card-gb", help="Memory of the card; by the recipe's accelerator otherwise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what training will take of a card's memory, and of a pod's disk and memory, without reading weights."""
    from tuneship import base, memory, model

    recipe = _recipe(target, overrides)
    accelerator = recipe.cluster.accelerator
    card = memory.card(accelerator, card_gb)
    files = base.resolve(recipe.model, weights=False)
    model.check_lora(files, recipe.lora)
    result = memory.plan(recipe, files.config, card=card, shards=files.shards())
    if as_json:
        print(json.dumps(result))
        return
    for name in ("weights", "adapter", "kept", "working", "peak"):
        print(f"{name:8} {result[f'{name}_bytes'] / 1e9:6.1f} GB")
    print(f"of {card / 1e9:.0f} GB on {accelerator if card_gb is None else 'the card'}, in {result['precision']}")
    print(f"a pass holds {result['tokens_per_pass']:,} tokens; a layer keeps {result['keep']}")
    for part, asked in (("disk", recipe.cluster.disk_mb), ("memory", recipe.cluster.memory_mb)):
        print(f"a pod's {part}: {result[f'{part}_bytes'] / 1e9:.0f} GB of the {asked / 1e3:.0f} it asks for")
    _next("run", target, overrides=overrides)


@app.command()
def prepare(
    target: Target, run: RunOption = None, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Check, split and tokenise the rows into the run's folder."""
    from tuneship.prepare import prepare

    with _opened(target, run, overrides, fresh) as opened:
        result = prepare(opened)
    _done(result, as_json, "train", target, run, overrides)


@app.command()
def train(
    target: Target, run: RunOption = None, overrides: Overrides = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Train the adapter, or go on where a stop left it."""
    from dataclasses import asdict

    from tuneship.prepare import prepare
    from tuneship.train import train

    with _opened(target, run, overrides, fresh) as opened:
        prepare(opened)
        result = train(opened)
    say(f"adapter: {result.adapter} ({result.updates} updates, loss {result.loss:.3f})")
    _done(asdict(result), as_json, "evaluate", target, run, overrides)


@app.command()
def evaluate(target: Target, run: RunOption = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure base and tuned on held-out rows; exit 4 if the gate says no."""
    from tuneship.evaluate import evaluate

    with _opened(target, run, overrides, there=True) as opened:
        result = evaluate(opened)
    _done(result, as_json, "report", target, run, overrides)
    _check_gate(result, str(opened.evaluation_file))


@app.command()
def export(target: Target, run: RunOption = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Merge the adapter into bfloat16 safetensors, and prove that it is the same model."""
    from tuneship.export import export

    with _opened(target, run, overrides, there=True) as opened:
        result = export(opened)
    _done(result, as_json, "serve", opened.path)


@app.command()
def publish(
    target: Target,
    run: RunOption = None,
    overrides: Overrides = None,
    update: Annotated[bool, typer.Option("--update", help="Replace what another run published there.")] = False,
    force: Annotated[str, typer.Option("--force", metavar="REASON", help="Publish although the gate said no.")] = "",
    as_json: AsJson = False,
) -> None:
    """Send the adapter to a folder, a gs:// URI or the Hub, as the recipe says."""
    from tuneship.publish import publish

    with _opened(target, run, overrides, there=True) as opened:
        result = publish(opened, update=update, force=force)
    _done(result, as_json, "serve", opened.path)


@app.command()
def report(target: Target, run: RunOption = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the run as one HTML page."""
    from tuneship.journal import read_run
    from tuneship.report import report

    recipe = _recipe(target, overrides)
    path = report(read_run(_there(_folder(target, run, recipe)), recipe))
    if as_json:
        print(json.dumps({"report": str(path)}))
    else:
        print(path)


@app.command()
def serve(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="A run, an adapter or a merged model.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; the recipe's by default.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = None,
    base: Annotated[str | None, typer.Option(help="Where the base is now, if it moved.")] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|vllm|URL", help="In this process, vLLM as its child, or one elsewhere.")
    ] = "local",
    engine_args: Annotated[str, typer.Option(metavar="ARGS", help="More arguments for vLLM, in one string.")] = "",
    engine_key_file: Annotated[Path | None, typer.Option(help="File with the engine's key.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the keys that clients may show, one a line.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Answer without keys beyond this machine.")] = False,
    shares: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Put the runs behind one name, each with a share of its requests."),
    ] = None,
    drain_s: Annotated[float, typer.Option(help="Seconds that running requests have after a signal.")] = 30.0,
) -> None:
    """Serve tuned models: OpenAI's routes, /ask, /generate."""
    from tuneship.journal import is_run, read_run
    from tuneship.recipe import Serve
    from tuneship.serve.server import serve

    settings = read_run(folders[0]).recipe.serve if is_run(folders[0]) else Serve()
    changes = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    serve(
        folders,
        settings=Serve.model_validate(settings.model_dump() | changes),
        base=base,
        engine=engine,
        engine_args=engine_args,
        engine_key_file=engine_key_file,
        api_key_file=api_key_file,
        no_auth=no_auth,
        shares=shares,
        drain_s=drain_s,
    )


@app.command()
def ask(
    where: Annotated[
        str, typer.Argument(metavar="URL|RUN", help="A server's address, or the folder of a run or adapter.")
    ],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    context: Annotated[str | None, typer.Option(help="CREATE TABLE statements; those of --db by default.")] = None,
    db: Annotated[Path | None, typer.Option(help="SQLite file to run the SQL on, read-only.")] = None,
    run_it: Annotated[bool, typer.Option("--run", help="Run the SQL on rows made up from the context.")] = False,
    model: Annotated[str | None, typer.Option(help="Of a server that has several.")] = None,
    base: Annotated[str | None, typer.Option(help="Of a folder: where the base is now, if it moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a tuned model; print its SQL, and run it if told on what."""
    from dataclasses import asdict

    from tuneship.database import SqlError
    from tuneship.serve.client import Asked, ask

    try:
        asked = ask(where, question, context=context, db=db, run=run_it, model=model, base=base, quiet=as_json)
    except SqlError as error:
        if as_json:
            told = {"kind": error.kind, "message": error.what}
            print(json.dumps({**asdict(Asked(question, error.sql)), "error": told}))
        raise
    if as_json:
        print(json.dumps(asdict(asked), default=repr))


@app.command("run")
def run_flow(
    target: Target,
    run: RunOption = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run all stages as one Metaflow run on this machine."""
    from tuneship import recipe

    resolved = _recipe(target, overrides)
    if dry_run:
        tree = resolved.model_dump(mode="json")
        print(json.dumps(tree, indent=2) if as_json else recipe.dump(resolved), end="\n" if as_json else "")
        return
    from tuneship import launch

    folder = _folder(target, run, resolved)
    result = launch.run_flow(resolved, folder, fresh=fresh)
    say(f"report: {folder}/report.html")
    _done(result, as_json, "serve", folder)
    _check_gate(result, f"{folder}/evaluation.json")


@contextmanager
def _opened(
    target: str, run: Path | None, overrides: list[str] | None, fresh: bool = False, *, there: bool = False
) -> Iterator[Any]:
    from tuneship.journal import open_run

    recipe = _recipe(target, overrides)
    folder = _folder(target, run, recipe)
    with open_run(_there(folder) if there else folder, recipe, fresh=fresh) as opened:
        yield opened


def _there(folder: Path) -> Path:
    """The folder, if it holds a run: a verb that needs one makes none."""
    from tuneship.journal import check_run

    check_run(folder, fix="tuneship train RECIPE, or name its --run")
    return folder


def _recipe(target: str, overrides: list[str] | None) -> Any:
    """The recipe of a file, a shipped name, or a run's folder."""
    from tuneship import journal, recipe

    if journal.is_run(Path(target)):
        return recipe.load(Path(target) / "recipe.json", overrides=overrides or ())
    for name, key in recipe.ENVIRONMENT.items():
        if name in os.environ:
            say(f"{key} is set by the environment: {name}={os.environ[name]}")
    return recipe.load(target, overrides=overrides or (), environ=os.environ)


def _folder(target: str, run: Path | None, recipe: Any) -> Path:
    from tuneship import journal

    if journal.is_run(Path(target)):
        return run or Path(target)
    return run or Path("runs") / recipe.name


def _done(result: Any, as_json: bool, verb: str, target: str | Path, *options: Any) -> None:
    if as_json:
        print(json.dumps(result))
    _next(verb, target, *options)


def _check_gate(evaluation: dict[str, Any], where: str) -> None:
    if not evaluation["gate"]["passed"]:
        raise GateError(
            "the gate said no: " + "; ".join(evaluation["gate"]["reasons"]),
            where=where,
            fix="train longer or on more rows, or lower evaluate.gate",
        )


def _next(verb: str, target: str | Path, run: Path | None = None, overrides: list[str] | None = None) -> None:
    """Says what to run next, so that a shell takes it as it stands."""
    changes = [word for change in overrides or () for word in ("--set", change)]
    argv = ["tuneship", verb, str(target), *(("--run", str(run)) if run else ()), *changes]
    say(redact(f"next: {shlex.join(argv)}"))


if __name__ == "__main__":
    main()
