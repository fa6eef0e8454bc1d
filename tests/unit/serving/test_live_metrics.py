"""What runs here beside what was predicted of it; what cannot be read is not exported."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from harness.engines.running import RunningModel, RunningServer
from harness.errors import UnavailableError
from harness.exports.prometheus import METRICS as PREDICTED
from harness.exports.prometheus import MetricSample, exposition
from harness.model.gpu import LocalGpu
from harness.prediction.memory import predict
from harness.serving.live_metrics import METRICS, Exporter, listen
from harness.units import GIB, KIB
from tests.support.calibrations import made_up, on_host, store_of

ROOT = Path(__file__).parents[3]
CARD = LocalGpu(key="0", name="NVIDIA Test A", uuid="GPU-1", driver="1", total_bytes=8 * GIB, free_bytes=2 * GIB)
PID = 999_999_999
SERVER = ("/opt/llama-server", "--model", "/models/made-up.gguf", "-c", "32768", "-np", "2")


class Meter:
    def __init__(self, size: int | None) -> None:
        self.size = size

    def accounted(self, pids: frozenset[int]) -> int | None:
        return self.size if PID in pids else None


def process(proc: Path, *words: str, pid: int = PID, anonymous: int = 0) -> Path:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
    (folder / "environ").write_bytes(b"")
    (folder / "status").write_text(f"Name:\tx\nRssAnon:\t{anonymous // KIB} kB\n")
    return proc


def collected(
    tmp_path: Path,
    proc: Path,
    measured: int | None = 5 * GIB,
    card: LocalGpu | None = CARD,
    servers: Any = lambda _: (),
    **store: Any,
) -> dict[str, list[MetricSample]]:
    shelf = store_of(tmp_path / "store", *(store.values() or [made_up()]))
    exporter = Exporter(
        shelf,
        proc=proc,
        gpus=lambda: [card] if card else [],
        meter=lambda _: Meter(measured),
        servers=servers,
        clock=lambda: 0.0,
    )
    found: dict[str, list[MetricSample]] = {}
    for sample in exporter.samples():
        found.setdefault(sample.name, []).append(sample)
    assert set(found) <= set(METRICS)
    return found


def value(found: dict[str, list[MetricSample]], name: str) -> float:
    (sample,) = found[f"harness_{name}"]
    return sample.value


def test_a_model_that_runs_is_measured_beside_what_was_predicted(tmp_path: Path) -> None:
    found = collected(tmp_path, process(tmp_path / "proc", *SERVER))

    needed = predict(made_up(), 16_384, 2)
    assert value(found, "memory_measured_bytes") == 5 * GIB
    assert value(found, "memory_predicted_bytes") == needed.total_bytes
    assert value(found, "context_tokens") == 16_384
    assert value(found, "memory_margin_bytes") == 7 * GIB - GIB - needed.total_bytes
    assert value(found, "layers_spilled") == 0
    (sample,) = found["harness_memory_measured_bytes"]
    assert sample.labels == {
        "model": "made-up", "engine": "llama-server", "calibration": "llama-server/made-up", "device": "NVIDIA Test A",
    }  # fmt: skip
    assert value(found, "up") == 1


def test_a_card_that_is_full_has_nothing_free(tmp_path: Path) -> None:
    full = msgspec.structs.replace(CARD, free_bytes=0)
    assert value(collected(tmp_path, tmp_path, card=full), "memory_free_bytes") == 0


def test_layers_that_spill_are_counted(tmp_path: Path) -> None:
    found = collected(tmp_path, process(tmp_path / "proc", *SERVER), measured=3 * GIB)

    assert value(found, "layers_spilled") > 0
    assert value(found, "memory_margin_bytes") < 0


@pytest.mark.parametrize(
    "words",
    [
        *("-ctk q8_0", "-ctv q8_0", "-fa off", "--ubatch-size 2048", "--cpu-moe x", "-ot exps=CPU", "LLAMA_ARG_FLASH_ATTN=off"),
        *("LLAMA_ARG_N_GPU_LAYERS=3", "LLAMA_ARG_N_CPU_MOE=2", "LLAMA_ARG_OVERRIDE_TENSOR=exps=CPU"),
    ],
)
def test_nothing_is_predicted_of_settings_that_are_not_known(tmp_path: Path, words: str) -> None:
    proc = process(tmp_path / "proc", *SERVER, *(() if words.startswith("LLAMA") else words.split()))
    (proc / str(PID) / "environ").write_text(words)
    unknown = collected(tmp_path, proc)
    assert "harness_memory_predicted_bytes" not in unknown
    assert value(unknown, "memory_measured_bytes") == 5 * GIB


def test_what_is_as_it_was_calibrated_is_predicted(tmp_path: Path) -> None:
    words = ("-ctk", "f16", "-ctv", "f16", "-fa", "on", "-ub", "512", "-ngl", "99")
    plain = collected(tmp_path, process(tmp_path / "plain", *SERVER))
    found = collected(tmp_path, process(tmp_path / "proc", *SERVER, *words))
    assert value(found, "memory_predicted_bytes") == value(plain, "memory_predicted_bytes")


def test_context_and_slots_are_those_of_the_variables_where_no_option_says_them(tmp_path: Path) -> None:
    proc = process(tmp_path / "proc", "llama-server", "--model", "made-up.gguf", "-np", "2")
    (proc / str(PID) / "environ").write_text("LLAMA_ARG_CTX_SIZE=16384\0LLAMA_ARG_N_PARALLEL=4\0")
    options = process(tmp_path / "plain", "llama-server", "--model", "made-up.gguf", "-np", "2", "-c", "16384")
    found, plain = collected(tmp_path, proc), collected(tmp_path, options)
    assert value(found, "context_tokens") == 8192
    assert value(found, "memory_predicted_bytes") == value(plain, "memory_predicted_bytes")


def test_nothing_is_predicted_without_a_context(tmp_path: Path) -> None:
    unnamed = collected(tmp_path, process(tmp_path / "other", "llama-server", "--model", "made-up.gguf"))
    assert "harness_memory_predicted_bytes" not in unnamed


def test_what_cannot_be_read_has_no_sample(tmp_path: Path) -> None:
    found = collected(tmp_path, process(tmp_path / "proc", *SERVER), measured=None)
    assert "harness_memory_measured_bytes" not in found
    strange = collected(tmp_path, process(tmp_path / "other", "llama-server", "--model", "unheard-of.gguf"))
    assert set(strange) == {"harness_memory_free_bytes", "harness_up", "harness_collect_seconds"}


def test_host_memory_is_that_of_the_processes(tmp_path: Path) -> None:
    proc = process(tmp_path / "proc", *SERVER, anonymous=3 * GIB)
    found = collected(tmp_path, proc, card=None, a=on_host(made_up()))

    (sample,) = found["harness_memory_measured_bytes"]
    assert (sample.labels["device"], sample.value) == ("host", 3 * GIB)


def test_ollama_says_the_context_and_its_own_account(tmp_path: Path) -> None:
    calibration = msgspec.structs.replace(made_up(), id="ollama/made-up", engine="ollama")
    model = RunningModel(name="made-up", size_bytes=6 * GIB, gpu_bytes=4 * GIB, context=8192)
    server = RunningServer(pid=1, port=11434, version="b2", models=(model,))
    digest = (calibration.metadata.model.digest or "").replace(":", "-")
    proc = process(tmp_path / "proc", "/usr/lib/ollama/llama-server", "--model", f"/root/.ollama/models/blobs/{digest}")
    found = collected(tmp_path, proc, servers=lambda engine: (server,) if engine == "ollama" else (), a=calibration)

    assert value(found, "context_tokens") == 8192
    assert value(found, "calibration_outdated") == 1
    account = {sample.labels["place"]: sample.value for sample in found["harness_memory_engine_bytes"]}
    assert account == {"gpu": 4 * GIB, "host": 2 * GIB}


def test_a_store_is_read_again_when_a_file_changes(tmp_path: Path) -> None:
    shelf = store_of(tmp_path / "store")
    exporter = Exporter(
        shelf, proc=process(tmp_path / "proc", *SERVER), gpus=lambda: [CARD], meter=lambda _: Meter(GIB), servers=lambda _: ()
    )
    assert not [one for one in exporter.samples() if one.name == "harness_memory_measured_bytes"]
    store_of(tmp_path / "store", made_up())
    assert [one.value for one in exporter.samples() if one.name == "harness_memory_measured_bytes"] == [GIB]
    (shelf.root / "llama-server/broken.yaml").write_text("nonsense")
    for _ in range(2):
        assert [one.value for one in exporter.samples() if one.name == "harness_up"] == [0], "also where nothing changed since"


def test_it_answers_as_openmetrics_on_this_machine(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    import httpx

    shelf = store_of(tmp_path / "store", made_up())
    exporter = Exporter(
        shelf, proc=process(tmp_path / "proc", *SERVER), gpus=lambda: [CARD], meter=lambda _: Meter(GIB), servers=lambda _: ()
    )
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = listen(exporter, "127.0.0.1", port)
    try:
        answer = httpx.get(
            f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        families = {family.name for family in parser.text_string_to_metric_families(answer.text)}
        assert {"harness_memory_measured_bytes", "harness_memory_predicted_bytes", "harness_up"} <= families
        with pytest.raises(UnavailableError, match="cannot be listened on"):
            listen(exporter, "127.0.0.1", port)
    finally:
        stop()


def expressions() -> dict[str, str]:
    rules = yaml.safe_load((ROOT / "monitoring/alerts.yml").read_text())["groups"][0]["rules"]
    board = json.loads((ROOT / "monitoring/grafana-dashboard.json").read_text())
    return {rule["alert"]: rule["expr"] for rule in rules} | {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in board["panels"] for target in panel["targets"]
    }


@pytest.mark.parametrize("where", expressions())
def test_alerts_and_panels_ask_for_metrics_that_there_are(where: str) -> None:
    names = set(re.findall(r"\bharness_\w+", expressions()[where]))
    assert names
    assert names <= set(METRICS)


def test_the_dashboard_has_no_panel_over_another() -> None:
    board = json.loads((ROOT / "monitoring/grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.requires("promtool")
def test_prometheus_takes_the_rules_and_the_metrics(tmp_path: Path) -> None:
    rules = ROOT / "monitoring/alerts.yml"
    done = subprocess.run(["promtool", "check", "rules", str(rules)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = collected(tmp_path, process(tmp_path / "proc", *SERVER))
    text = exposition([one for some in found.values() for one in some], PREDICTED | METRICS)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
