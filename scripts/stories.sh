#!/bin/sh
# Acts out what users come with, and prints each command, its seconds and its status: sh scripts/stories.sh
# Calibrations are those that were recorded on an H100 (tests/golden); nothing is measured, so it takes a minute.
set -u
cd "$(dirname "$0")/.." || exit 2
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
export HARNESS_STORE="$place/store" COLUMNS=100 PYTHONPATH="$PWD"
harness=$PWD/.venv/bin/harness golden=$PWD/tests/golden/llama-server/b11434-cuda-h100
mkdir -p "$HARNESS_STORE/llama-server"
for name in small-1b mid-8b large-32b moe; do cp "$golden/$name/$name.yaml" "$HARNESS_STORE/llama-server/"; done
cp "$golden/mid-8b-batches/mid-8b-batches.yaml" "$HARNESS_STORE/llama-server/mid-8b@batches.yaml"

story() { printf '\n== %s\n' "$*"; }
act() {
    began=$(date +%s%N)
    "$harness" "$@" >"$place/out" 2>&1
    status=$?
    printf '$ harness %s   [%s ms, status %d]\n' "$*" "$((($(date +%s%N) - began) / 1000000))" "$status"
    sed 's/^/    /' "$place/out" | head -30
}

story '1. A log and a figure of nvidia-smi'
log=tests/golden/llama-server/b10434/host-8192.log
act parse $log
act import $log --total 600MiB --model own
story '2. Ollama without Docker'
mkdir "$place/bin" "$place/home"
.venv/bin/python -c 'import sys; from pathlib import Path; from tests.support.ollama_installed import program, store
program(Path(sys.argv[1], "bin"), Path("/engine")); store(Path(sys.argv[1], "home/.ollama/models"))' "$place"
HOME=$place/home PATH=$place/bin:$PATH act calibrate tiny --engine ollama --sandbox process --gpus none --dry-run
story '3. CI on a runner with 16 GiB'
act check mid-8b@32k --available 16GiB
act check large-32b@8k --available 16GiB
story '4. An upgrade of the engine'
act recalibrate --stale --dry-run
act diff mid-8b mid-8b@batches
story '5. Many models on one card'
act plan --available 24GiB
story '6. A model that is not calibrated'
act check phi4@8k --available 24GiB
story '7. An own GGUF at 128k with q8_0'
.venv/bin/python -c 'import sys; from pathlib import Path; from tests.support.gguf_file import write_gguf; write_gguf(Path(sys.argv[1]), train_context=131072)' "$place/mine.gguf"
act calibrate "$place/mine.gguf" --ctx 128k --kv-cache-type q8_0 --dry-run
