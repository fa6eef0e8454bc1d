# llama.cpp's server as xllamacpp on PyPI has it, as locked: x86-64 and aarch64, on the CPU.
#     docker build -f images/llama-server.Dockerfile -t harness-llama-server:b11549 .
#     harness calibrate model.gguf --engine llama-server --sandbox docker --gpus none
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libstdc++6 && rm -rf /var/lib/apt/lists/*
COPY requirements.lock /
RUN awk '/^xllamacpp==/ { on = 1 } on { print } on && !/\\$/ { exit }' /requirements.lock > /wheel.txt \
 && pip install --no-cache-dir --no-deps --require-hashes --target /opt/llama-server -r /wheel.txt
COPY harness/engines/llama_server/xllamacpp_server.py /opt/llama-server/llama-server
ENTRYPOINT ["python3", "/opt/llama-server/llama-server"]
