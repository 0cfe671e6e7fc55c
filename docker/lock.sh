#!/bin/sh
# Makes docker/requirements.lock from pyproject.toml: every package of the image, pinned, with the
# SHA-256 of each of its files. Needs uv (pip install uv) and a package index, whose address stays
# out of the file. What is pinned already stays so; to take newer versions:
#
#     docker/lock.sh --upgrade
#
# For Python 3.11 on Linux x86_64, wheels alone: nothing is compiled where the image is built.
set -eu
cd "$(dirname "$0")/.."

# torch and torchvision are of one build or do not load; all pods of a cluster run one Ray.
uv pip compile pyproject.toml --constraint - "$@" \
    --output-file docker/requirements.lock --custom-compile-command docker/lock.sh \
    --generate-hashes --no-emit-index-url --only-binary :all: \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --quiet <<PINS
ray==2.60.0
torch==2.14.1
torchvision==0.29.1
PINS
