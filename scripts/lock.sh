#!/usr/bin/env bash
# Resolves pyproject.toml again into requirements/*.lock, with hashes; torch is pinned in torch.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(.venv/bin/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --unsafe-package torch
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --constraint requirements/torch.txt)
.venv/bin/pip install --quiet pip-tools
"${compile[@]}" --extra train --extra flow --extra serve --extra gke \
    --output-file requirements/laptop.lock pyproject.toml requirements/overrides.in
"${compile[@]}" --extra dev --constraint requirements/laptop.lock \
    --output-file requirements/dev.lock pyproject.toml
