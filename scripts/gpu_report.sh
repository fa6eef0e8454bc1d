#!/bin/sh
# What a real NVIDIA driver, GPU and engine do, in one file: gpu-report.tar.gz. Eight minutes at most, neither network nor root.
#
#   sh scripts/gpu_report.sh [--engine-binary LLAMA_SERVER] [-o FILE] [--seconds N] [--scratch FOLDER] [--only SECTIONS]
#
# PYTHON names the Python to use; default: the one of .venv, else python3. It needs what requirements.lock lists.
# Exit: 0 all sections that could run did / 1 one failed (the file says why) / 69 no driver, or no such Python.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$here/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
"$PYTHON" -c 'import httpx, msgspec, psutil, pynvml' 2>/dev/null || {
    echo "gpu-report: $PYTHON lacks what harness needs: make setup, or PYTHON=... with the packages of requirements.lock" >&2
    exit 69
}
exec "$PYTHON" -m tests.gpu.report "$@"
