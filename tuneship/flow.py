"""The flow: start → prepare → train → evaluate → publish → end. No logic of its own.

    tuneship run tiny                                        on this machine, with the tiny recipe
    python -m tuneship.flow run                              the same, by Metaflow's own command
    python -m tuneship.flow --config config FILE argo-workflows create
                                                             compiled for Argo Workflows on GKE

FILE is JSON: {"recipe": NAME or a resolved recipe, "image_name": IMAGE, "new_model": NAME}; all but
the recipe may be left out, and the recipe is `tiny` then, or the tutorial's where there is an image.
A new_model of the form user/name is also the Hub repository that the adapter is published to.

With an image, each step is a pod. What passes between steps are plain values; the run's folder goes
through the bucket of Metaflow's datastore:

    gs://BUCKET/runs/NAME/RUN_ID             the run's folder: each step takes it from there, and brings it back
    gs://BUCKET/checkpoints/NAME/RUN_ID      checkpoints and log while it trains; a retry goes on from there

A GPU is paid for once: the pod of `train` measures base and tuned too, while the weights are on its
disk, and `evaluate` reads what it wrote. Only `train` asks for a GPU, and only it fetches the base's
weights; prepare fetches the tokenizer.
"""

from __future__ import annotations

import html
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaflow import Config, FlowMutator, FlowSpec, card, current, retry, step
from metaflow.cards import MetaflowCardComponent
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY
from metaflow.metaflow_config import DATASTORE_SYSROOT_GS
from metaflow.plugins.argo.argo_workflows import ArgoWorkflows

from tuneship import recipe as recipes
from tuneship.cluster import kept, template
from tuneship.cluster.kept import Kept
from tuneship.console import say
from tuneship.credentials import redact
from tuneship.damage import guarded
from tuneship.errors import InputError, OutsideError, TuneshipError
from tuneship.journal import Run, open_run, write_json
from tuneship.recipe import Recipe
from tuneship.signals import stopped_by_sigterm

# A file to which the error that ended a step is written, for whoever started the flow.
ERROR_FILE = "TUNESHIP_ERROR_FILE"

# The step whose pod gets the GPU.
GPU_STEP = "train"

# The steps that may call the Hub.
SECRET_STEPS = ("prepare", "train", "publish")

# What a pod without a GPU asks for. Autopilot refuses an ephemeral disk of more than 10 GiB there.
SMALL_POD = {"cpu": 1, "memory": 4096, "disk": 4096}


def read_config(text: str) -> dict[str, Any]:
    """A flow config as {"recipe": a resolved recipe, "run": the run's folder}.

    Raises:
        InputError: it is no JSON object, a value is none that it may have, or the recipe is wrong.
    """
    fix = 'it is {"recipe": NAME, "image_name": IMAGE, "new_model": NAME}'
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the flow's config is not JSON: {error}", where="--config", fix=fix) from None
    if not isinstance(config, dict):
        raise InputError("the flow's config is no JSON object", where="--config", fix=fix)
    for key, kind in {"recipe": str | dict, "image_name": str, "new_model": str, "run": str}.items():
        if not isinstance(config.get(key) or "", kind):
            raise InputError(f"{key} in the flow's config is no text", where="--config", fix=fix)
    image = config.get("image_name")
    named = config.get("recipe") or ("gemma2-9b-a100" if image else "tiny")
    if isinstance(named, dict):
        recipe = recipes.validate(named, where="the flow's config")
    else:
        recipe = recipes.load(named, environ=os.environ)
    tree = recipe.model_dump(mode="json")
    if image:
        tree["cluster"]["image"] = image
    if new_model := config.get("new_model"):
        tree["name"] = new_model.rpartition("/")[2].lower()
        if "/" in new_model:
            tree["publish"]["hub_model_id"] = new_model
    recipe = recipes.validate(tree, where="the flow's config")
    return {"recipe": recipe.model_dump(mode="json"), "run": config.get("run") or f"runs/{recipe.name}"}


def _parse_config(text: str) -> dict[str, Any]:
    """`read_config` for Metaflow, which would show an error of ours as a traceback."""
    try:
        return read_config(text)
    except TuneshipError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)


class pods(FlowMutator):
    """Makes every step a pod where the recipe names an image, with the GPU where training needs it."""

    def pre_mutate(self, mutable_flow: Any) -> None:
        """Called by Metaflow once the config is read."""
        config = dict(mutable_flow.configs)["config"]
        cluster = recipes.validate(config["recipe"], where="the flow's config").cluster
        if cluster.image is None:
            return
        for name, mutable_step in mutable_flow.steps:
            wants: dict[str, Any] = {"image": cluster.image, "qos": "Guaranteed", **SMALL_POD}
            if name == GPU_STEP:
                wants |= template.gpu_pod(cluster)
            if name in SECRET_STEPS:
                wants["secrets"] = list(cluster.secrets)
            mutable_step.add_decorator("kubernetes", deco_kwargs=wants)


_compile = ArgoWorkflows._compile_workflow_template


def _compile_and_finish(deployment: Any) -> Any:
    """Metaflow has no hook between compiling a WorkflowTemplate and deploying it; this stands in for one."""
    compiled = _compile(deployment)
    cluster = recipes.validate(deployment.flow.config["recipe"], where="the flow's config").cluster
    compiled.payload = template.finish(compiled.to_json(), cluster, gpu_step=GPU_STEP)
    return compiled


ArgoWorkflows._compile_workflow_template = _compile_and_finish


class Page(MetaflowCardComponent):
    """A whole HTML page inside a card, in a frame of its own."""

    def __init__(self, page: str) -> None:
        self._page = page

    def render(self) -> dict[str, str]:
        """Called by Metaflow when the card is made."""
        frame = f'<iframe style="width:100%;height:2400px;border:0" srcdoc="{html.escape(self._page)}"></iframe>'
        return {"type": "html", "data": frame}


@pods
class FinetuneFlow(FlowSpec):
    """Fine-tunes the recipe's base, measures it, and publishes it if it passes the gate."""

    config = Config("config", default_value="{}", parser=_parse_config, help="recipe, image_name, new_model, run")

    @step
    def start(self) -> None:
        """Says what will be done."""
        self.recipe = dict(self.config["recipe"])
        self.run = str(self.config["run"])
        print(f"recipe {self.recipe['name']}, run {self.run}")
        self.next(self.prepare)

    @retry(times=2)
    @step
    def prepare(self) -> None:
        """Rows in, checked, split, tokenised."""
        from tuneship.prepare import prepare

        with _stage(self) as run:
            self.prepared = prepare(run, weights=_kept(self) is None)
        self.next(self.train)

    @retry(times=4, minutes_between_retries=1)
    @step
    def train(self) -> None:
        """The adapter; a retry goes on from the last checkpoint.

        On the cluster, its measurement too, and a merged model if that is what is published: both want
        the GPU and the base, which are here.
        """
        from tuneship.evaluate import evaluate
        from tuneship.train import train

        self.published: dict[str, str] = {}
        with _stage(self) as run:
            place = _kept(self)
            self.trained = asdict(train(run, mirror=place.checkpoints if place else None))
            if place:
                kept.bring_back(run.path, place)
                evaluate(run)
                if run.recipe.publish.merged:
                    self.published = _publish(run)
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=2)
    @step
    def evaluate(self) -> None:
        """Base against tuned, and the gate."""
        from tuneship import report

        with _stage(self) as run:
            if _kept(self):
                self.evaluation = _evaluation(run)
            else:
                from tuneship.evaluate import evaluate

                self.evaluation = evaluate(run)
            page = report.report(run)
            current.card.append(Page(page.read_text(encoding="utf-8")))
        self.next(self.publish)

    @retry(times=2)
    @step
    def publish(self) -> None:
        """The adapter, or the merged model, goes where the recipe says, if the gate has passed."""
        if not self.published:
            with _stage(self) as run:
                self.published = _publish(run)
        self.next(self.end)

    @step
    def end(self) -> None:
        """Says how it went."""
        score = self.evaluation["scores"][-1]["score"]
        verdict = "the gate passed" if self.evaluation["gate"]["passed"] else "the gate said no"
        print(f"{self.recipe['name']}: {self.evaluation['metric']} {score:.1%}; {verdict}")
        place = _kept(self)
        self.adapter = f"{place.run}/adapter" if place else self.trained["adapter"]
        print(f"adapter: {self.adapter}")


def _evaluation(run: Run) -> dict[str, Any]:
    """What evaluate wrote, without the answers; another pod may have, and it came through the bucket."""
    with guarded(run.evaluation_file):
        facts = run.evaluation()
        del facts["rows"]
        bool(facts["gate"]["passed"])
    return facts


def _publish(run: Run) -> dict[str, str]:
    """What was published where; nothing, if the gate has said no."""
    from tuneship.publish import publish

    if not _evaluation(run)["gate"]["passed"]:
        return {}
    if run.recipe.publish.merged:
        from tuneship.export import export

        export(run)
    return publish(run)


def _kept(flow: FinetuneFlow) -> Kept | None:
    """Where the run is kept between pods; None on one machine, whose folder stays."""
    if flow.recipe["cluster"]["image"] is None:
        return None
    return kept.place(DATASTORE_SYSROOT_GS, flow.recipe["name"], current.run_id)


@contextmanager
def _stage(flow: FinetuneFlow) -> Iterator[Run]:
    """The run's folder for one step; an error ends the process, said without tokens and with the right code.

    In a pod that is the error's own code, by which Argo decides about another attempt; where nothing
    would change (a plain failure: a loss that is no number, too little memory) it is Metaflow's for
    "not again". On this machine Metaflow decides: only what lies outside (network, a busy service) is
    worth another attempt.
    """
    place = _kept(flow)
    try:
        recipe: Recipe = recipes.validate(flow.recipe, where="the flow's config")
        folder = Path(flow.run)
        if place:
            kept.take(place, folder)
        # Not only while it trains: a step that dies of the signal would be started again.
        with stopped_by_sigterm(flow.run), open_run(folder, recipe) as run:
            yield run
            if place:
                kept.bring_back(folder, place)
    except TuneshipError as error:
        if file := os.environ.get(ERROR_FILE):
            # Whoever started the flow says it.
            write_json(Path(file), error.to_dict())
        else:
            say(f"error: {redact(str(error))}")
        if place and error.exit_code != 1:
            sys.exit(error.exit_code)
        sys.exit(1 if isinstance(error, OutsideError) else METAFLOW_EXIT_DISALLOW_RETRY)
    except Exception:
        # A defect. Metaflow would show it and keep it as an artifact, with any token that it holds.
        say(redact(traceback.format_exc()))
        sys.exit(1)


if __name__ == "__main__":
    FinetuneFlow()
