"""The flow: start → prepare → train → evaluate → publish → end. No logic of its own.

    tuneship run tiny                                        on this machine, with the tiny recipe
    python -m tuneship.flow run                              the same, by Metaflow's own command
    python -m tuneship.flow --config config FILE argo-workflows create
                                                             compiled for Argo Workflows on GKE

FILE is JSON: {"recipe": NAME or a resolved recipe, "image_name": IMAGE, "new_model": NAME}; all but
the recipe may be left out, and the recipe is `tiny` then, or the tutorial's where there is an image.
With an image, steps run as pods; training gets the GPU that the recipe's cluster section asks for.

What passes between steps are plain values; weights stay in the run's folder, and go through the
datastore's bucket where steps run on different machines.
"""

from __future__ import annotations

import html
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaflow import Config, FlowMutator, FlowSpec, card, current, retry, step
from metaflow.cards import MetaflowCardComponent
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY

from tuneship import recipe as recipes
from tuneship.errors import OutsideError, TuneshipError
from tuneship.journal import Run, open_run, write_json
from tuneship.recipe import Recipe

# A file to which the error that ended a step is written, for whoever started the flow.
ERROR_FILE = "TUNESHIP_ERROR_FILE"
GPU_STEPS = ("train", "evaluate")


def read_config(text: str) -> dict[str, Any]:
    """A flow config as {"recipe": a resolved recipe, "run": the run's folder}.

    Raises:
        InputError: it is not JSON, or the recipe is wrong.
    """
    config = json.loads(text)
    image = config.get("image_name")
    named = config.get("recipe") or ("gemma2-9b-a100" if image else "tiny")
    if isinstance(named, dict):
        recipe = recipes.validate(named, where="the flow's config")
    else:
        recipe = recipes.load(named, environ=os.environ)
    tree = recipe.model_dump(mode="json")
    if image:
        tree["cluster"]["image"] = image
    if config.get("new_model"):
        tree["name"] = config["new_model"]
    recipe = recipes.validate(tree, where="the flow's config")
    return {"recipe": recipe.model_dump(mode="json"), "run": config.get("run") or f"runs/{recipe.name}"}


class pods(FlowMutator):
    """Makes every step a pod where the recipe names an image, with the GPU where training needs it."""

    def pre_mutate(self, mutable_flow: Any) -> None:
        """Called by Metaflow once the config is read."""
        config = dict(mutable_flow.configs)["config"]
        cluster = recipes.validate(config["recipe"], where="the flow's config").cluster
        if cluster.image is None:
            return
        for name, mutable_step in mutable_flow.steps:
            wants: dict[str, Any] = {"image": cluster.image, "secrets": list(cluster.secrets)}
            if name in GPU_STEPS:
                wants |= {
                    "cpu": cluster.cpu,
                    "memory": cluster.memory_mb,
                    "disk": cluster.disk_mb,
                    "gpu": cluster.gpu,
                    "node_selector": {"cloud.google.com/gke-accelerator": cluster.accelerator},
                }
            mutable_step.add_decorator("kubernetes", deco_kwargs=wants)


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

    config = Config("config", default_value="{}", parser=read_config, help="recipe, image_name, new_model, run")

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
            self.prepared = prepare(run)
        self.next(self.train)

    @retry(times=3)
    @step
    def train(self) -> None:
        """The adapter; a retry goes on from the last checkpoint."""
        from tuneship.train import train

        with _stage(self) as run:
            self.trained = asdict(train(run))
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=2)
    @step
    def evaluate(self) -> None:
        """Base against tuned, and the gate."""
        from tuneship import report
        from tuneship.evaluate import evaluate

        with _stage(self) as run:
            self.evaluation = evaluate(run)
            page = report.report(run)
            current.card.append(Page(page.read_text(encoding="utf-8")))
        self.next(self.publish)

    @retry(times=2)
    @step
    def publish(self) -> None:
        """The adapter goes where the recipe says, if the gate has passed."""
        from tuneship.publish import publish

        self.published: dict[str, str] = {}
        if self.evaluation["gate"]["passed"]:
            with _stage(self) as run:
                self.published = publish(run)
        self.next(self.end)

    @step
    def end(self) -> None:
        """Says how it went."""
        score = self.evaluation["scores"][-1]["score"]
        verdict = "the gate passed" if self.evaluation["gate"]["passed"] else "the gate said no"
        print(f"{self.recipe['name']}: {self.evaluation['metric']} {score:.1%}; {verdict}")


@contextmanager
def _stage(flow: FinetuneFlow) -> Iterator[Run]:
    """The run's folder for one step; an error of ours ends the process with the right code.

    Only what lies outside (network, a busy service) is worth another attempt on this machine.
    """
    try:
        recipe: Recipe = recipes.validate(flow.recipe, where="the flow's config")
        with open_run(Path(flow.run), recipe) as run:
            yield run
    except TuneshipError as error:
        print(f"error: {error}", file=sys.stderr)
        if file := os.environ.get(ERROR_FILE):
            write_json(
                Path(file), {"exit_code": error.exit_code, "what": error.what, "where": error.where, "fix": error.fix}
            )
        sys.exit(1 if isinstance(error, OutsideError) else METAFLOW_EXIT_DISALLOW_RETRY)


if __name__ == "__main__":
    FinetuneFlow()
