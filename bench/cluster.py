"""What the GKE path's commands take on this machine: `render`, and `submit` beside Metaflow's own two commands.

    python bench/cluster.py

The cloud is tests/small_cloud.py: a bucket, a metadata service and a Kubernetes API on loopback, so that what is
measured is this machine's work. Not covered: a network, and what Argo does afterwards.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from small_cloud import Cloud, serving

ROUNDS = 7
BIN = Path(sys.executable).parent
IMAGE = "europe-docker.pkg.dev/p/images/tuneship:1"


def seconds(command: Callable[[], None]) -> float:
    began = time.monotonic()
    command()
    return time.monotonic() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch)) as cloud:
        folder = Path(scratch)
        (folder / "finetune_flow_config.json").write_text(json.dumps({"image_name": IMAGE}))
        (folder / "flow.json").write_text(json.dumps({"recipe": "tiny", "image_name": IMAGE}))
        sides: dict[str, Callable[[], None]] = {
            "render": lambda: run(
                cloud, folder, [str(BIN / "tuneship"), "render", "--outputs", str(ROOT / "infra/example-outputs.json")]
            ),
            "submit": lambda: run(cloud, folder, [str(BIN / "tuneship"), "submit", "tiny"]),
            "Metaflow's create and trigger": lambda: by_hand(cloud, folder),
        }
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(ROUNDS + 1):
            for name, side in sides.items():
                spent = seconds(side)
                if turn:
                    taken[name].append(spent)
    medians = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    for name, value in medians.items():
        print(f"{name:30} {value:6.2f} s")
    ratios = [one / other for one, other in zip(taken["submit"], taken["Metaflow's create and trigger"], strict=True)]
    print(f"{'submit, to Metaflow alone':30} {statistics.median(ratios):6.2f} ×")
    print(json.dumps({**medians, "ratio": round(statistics.median(ratios), 3)}))


def by_hand(cloud: Cloud, folder: Path) -> None:
    for verb in ("create", "trigger"):
        flow = [str(BIN / "python"), str(ROOT / "tuneship" / "flow.py"), "--config", "config", "flow.json"]
        run(cloud, folder, [*flow, "argo-workflows", "--name", "tiny", verb])


def run(cloud: Cloud, folder: Path, argv: list[str]) -> None:
    subprocess.run(argv, env=cloud.environment, cwd=folder, check=True, capture_output=True)


if __name__ == "__main__":
    main()
