# harness itself: docker build -f images/harness.Dockerfile -t harness:local .
# It starts engines beside itself, through Docker's socket: see docker-compose.yml and docs/how-to/gpu-box.md.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY harness harness
# The versions that are tested, as constraints: of the lock only what this installation needs.
RUN grep -E '^[a-z0-9]' requirements.lock | sed 's/ *\\$//' > constraints.txt \
 && python3 -m venv /opt/harness \
 && /opt/harness/bin/pip install --no-cache-dir --constraint constraints.txt .
ENTRYPOINT ["/opt/harness/bin/harness"]
CMD ["doctor"]
