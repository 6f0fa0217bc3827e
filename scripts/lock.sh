#!/usr/bin/env bash
# Resolves pyproject.toml again into requirements/*.lock, with hashes. torch stays out, and what a CUDA
# build of it brings: builds differ from machine to machine, so torch.txt pins the version alone.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
compile=("$bin/pip-compile" --quiet --strip-extras --generate-hashes --allow-unsafe --unsafe-package torch
    --constraint requirements/torch.txt --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header)
without_torch() {
    python3 - "$1" <<'PYTHON'
import pathlib, re, sys

file = pathlib.Path(sys.argv[1])
entries = re.split(r"(?m)^(?=[a-z0-9#])", file.read_text())
file.write_text("".join(e for e in entries if not re.match(r"(torch|triton|nvidia-[\w-]+|cuda-\w+)==", e)))
PYTHON
}
"$bin/pip" install --quiet pip-tools
"${compile[@]}" --extra train --extra flow --extra serve --extra gke \
    --output-file requirements/laptop.lock pyproject.toml requirements/overrides.in
without_torch requirements/laptop.lock
"${compile[@]}" --extra dev --constraint requirements/laptop.lock \
    --output-file requirements/dev.lock pyproject.toml
