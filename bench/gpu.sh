#!/bin/sh
# Builds, tests, sanitizes and measures rkfast on a machine with an NVIDIA GPU, in slices; see bench/gpu.py for the flags.
#   bench/gpu.sh --out FOLDER [--budget SECONDS]   run it again, with the same folder, until it says that nothing is left
# Where .git does not come along, RKFAST_COMMIT (git describe --always --abbrev=40 --exclude '*' --dirty) names the commit.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py "$@"
