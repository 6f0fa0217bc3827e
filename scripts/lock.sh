#!/usr/bin/env bash
# Resolves pyproject.toml again into requirements/*.lock and image/requirements.lock, with hashes. torch
# stays out, and what a CUDA build of it brings: builds differ from machine to machine, so torch.txt pins
# the version alone.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
without() {
    python3 - "$@" <<'PYTHON'
import pathlib, re, sys

file, names = pathlib.Path(sys.argv[1]), "|".join(sys.argv[2:])
entries = re.split(r"(?m)^(?=[a-z0-9#])", file.read_text())
file.write_text("".join(entry for entry in entries if not re.match(rf"({names})==", entry)))
PYTHON
}
cuda=(torch 'nvidia-[\w-]+' 'cuda-\w+')
compile=("$bin/uv" pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate
    --constraint requirements/torch.txt)
"$bin/pip" install --quiet uv
rm -f requirements/{laptop,dev,vllm,scanners}.lock image/requirements.lock
"${compile[@]}" --universal --python-version 3.11 --extra train --extra flow --extra serve --extra gke \
    --output-file requirements/laptop.lock pyproject.toml requirements/overrides.in
without requirements/laptop.lock "${cuda[@]}" triton
# Here Triton stays, of the release that torch asks for: its interpreter tests the GPU's kernels.
"${compile[@]}" --universal --python-version 3.11 --extra dev --constraint requirements/laptop.lock \
    --output-file requirements/dev.lock pyproject.toml
without requirements/dev.lock "${cuda[@]}"
"${compile[@]}" --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
    --extra train --extra flow --extra serve --extra gke --constraint requirements/laptop.lock \
    --output-file image/requirements.lock pyproject.toml image/requirements.in
without image/requirements.lock "${cuda[@]}" triton
# Wheels of Linux alone, by the names of PyPI: the package asks for torch's CPU build by its local version.
"${compile[@]}" --python-version 3.11 --python-platform x86_64-manylinux_2_28 --override requirements/torch.txt \
    --output-file requirements/vllm.lock requirements/vllm.in
without requirements/vllm.lock "${cuda[@]}" torchvision torchaudio torchcodec
"${compile[@]}" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --output-file requirements/scanners.lock requirements/scanners.in
