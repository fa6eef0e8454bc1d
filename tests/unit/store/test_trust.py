"""What a file may set, and what is refused until the user allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from harness.cli.main import cli
from harness.engines.settings import is_setting, shown, shown_arguments
from harness.errors import NotPermittedError, UsageError
from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.record import EngineVersion, Machine, Model, Settings, VllmSettings
from harness.options import Allowed
from harness.store.store import Store
from harness.store.trust import by_digest, handed_env, refusals
from harness.sweep.matrix import Cell
from harness.sweep.merge import merge
from harness.sweep.untrusted import refuse_plan
from tests.support.records import load, record

PINNED = "ollama/ollama:0.33.0"
DIGEST = "sha256:" + "a" * 64


def made(env: dict[str, str] | None = None, **changes: Any) -> Calibration:
    base = fit_record(record(load(8192), load(16384), load(32768)))
    metadata = msgspec.structs.replace(base.metadata, settings=Settings(env=env or {}), run=None)
    return msgspec.structs.replace(base, metadata=msgspec.structs.replace(metadata, **changes))


def asked(calibration: Calibration, **here: Any) -> list[str]:
    return [one.what for one in refusals(calibration, PINNED, **here)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LD_PRELOAD", "/tmp/x.so"),
        ("LD_LIBRARY_PATH", "/tmp"),
        ("PATH", "/tmp"),
        ("PYTHONPATH", "/tmp"),
        ("GGML_BACKEND_PATH", "/tmp/x.so"),
        ("OLLAMA_LLM_LIBRARY", "/tmp/x"),
        ("LLAMA_ARG_LOG_FILE", "/home/u/.bashrc"),
        ("LLAMA_ARG_MODEL_URL", "http://127.0.0.1/x"),
        ("LLAMA_ARG_RPC", "10.0.0.1:50052"),
        ("LLAMA_ARG_TOOLS", "all"),
        ("LLAMA_ARG_HOST", "0.0.0.0"),
        ("LLAMA_ARG_MMPROJ", "/etc/shadow"),
        ("LLAMA_ARG_CACHE_TYPE_K", "../../x"),
        ("LLAMA_ARG_N_GPU_LAYERS", "1\nX=2"),
        ("LLAMA_ARG_OVERRIDE_KV", "tokenizer.chat_template=str:{{x}}"),
        ("OLLAMA_HOST", "0.0.0.0"),
        ("OLLAMA_NO_CLOUD", "0"),
        ("OLLAMA_NOPRUNE", "0"),
        ("VLLM_PLUGINS", "evil"),
        ("VLLM_LOGGING_CONFIG_PATH", "/tmp/x.json"),
        ("VLLM_ARGS", "--trust-remote-code"),
        ("VLLM_ARGS", "--trust_remote_code"),
        ("VLLM_ARGS", "--dtype half --middleware evil.Class"),
        ("VLLM_ARGS", "--distributed-executor-backend evil.Class"),
        ("VLLM_ARGS", "--dtype=half --config=/tmp/x.yaml"),
        ("VLLM_ARGS", "'"),
        ("HTTPS_PROXY", "http://10.0.0.1"),
        ("A", "1"),
    ],
)
def test_what_loads_code_opens_files_or_talks_to_hosts_is_no_setting(name: str, value: str) -> None:
    assert asked(made({name: value})) == [name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LLAMA_ARG_FIT_TARGET", "512"),
        ("LLAMA_ARG_N_GPU_LAYERS", "all"),
        ("LLAMA_ARG_TENSOR_SPLIT", "3,1"),
        ("LLAMA_ARG_OVERRIDE_KV", "llama.context_length=int:8192,llama.expert_used_count=int:2"),
        ("LLAMA_ARG_OVERRIDE_TENSOR", r"blk\.(1|2)\.ffn_.*_exps=CPU"),
        ("OLLAMA_GPU_OVERHEAD", "0"),
        ("OLLAMA_SCHED_SPREAD", "true"),
        ("CUDA_VISIBLE_DEVICES", "GPU-0a1b2c3d-0000-1111-2222-333344445555,1"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "1"),
        ("VLLM_ARGS", "--dtype half --enforce-eager -tp 2 --max-num-batched-tokens=2048"),
    ],
)
def test_settings_pass_and_are_written_in_clear(name: str, value: str) -> None:
    assert asked(made({name: value})) == []
    assert shown(name, value) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FOO", "Bearer s3cr3t"),
        *(
            (name, "s3cr3t")
            for name in ("PASS", "PASSPHRASE", "SSH_KEY", "GH_PAT", "DB_DSN", "AWS_ACCESS_KEY_ID", "LLAMA_ARG_API_KEY")
        ),
        ("HTTPS_PROXY", "http://u:s3cr3t@proxy"),
        ("VLLM_ARGS", "--dtype half --hf_token s3cr3t"),
        ("VLLM_ARGS", "--hf-tok=s3cr3t"),
        ("VLLM_ARGS", "--dtype s3cr3t/x"),
        ("VLLM_ARGS", "s3cr3t --s3cr3t:x 's3cr3t"),
        ("OLLAMA_GPU_OVERHEAD", "s3cr3t"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_not_written(name: str, value: str) -> None:
    assert "s3cr3t" not in shown(name, value)
    assert not is_setting(name, value)


def test_options_keep_what_is_a_setting() -> None:
    assert shown_arguments("--dtype half --hf-token x -tp 2") == "--dtype half --hf-token '(redacted)' -tp 2"


def test_an_image_of_the_pinned_repository_is_known_by_its_digest_and_no_other_is() -> None:
    docker = Machine(target="gpu", sandbox="docker", meter="nvml")

    def of(image: str | None, digest: str | None = DIGEST) -> Calibration:
        return made(machine=docker, engine=EngineVersion(version="1", image=image, image_digest=digest))

    assert asked(of(PINNED, None)) == []
    assert asked(of("ollama/ollama:0.31.0")) == []
    assert by_digest(of("ollama/ollama:0.31.0").metadata.engine) == f"ollama/ollama:0.31.0@{DIGEST}"
    for image, digest in (("ollama/ollama:0.31.0", None), ("evil/ollama:0.33.0", DIGEST), ("evil.com/ollama/ollama", DIGEST)):
        assert asked(of(image, digest)) == ["image"]


def test_weights_come_from_where_the_name_says() -> None:
    def of(name: str, vllm: str | None = None, identity: str = "llama-server/made-up", **here: Any) -> list[str]:
        settings = Settings(vllm=VllmSettings(model=vllm, max_num_seqs=8) if vllm else None)
        one = made(model=Model(name=name), settings=settings)
        return asked(msgspec.structs.replace(one, id=identity), **here)

    assert of("made-up") == []
    assert of("evil") == ["weights"]
    assert of("hf.co/org/name", identity="ollama/hf.co--org--name") == []
    assert of("evil.com/org/name", identity="ollama/evil.com--org--name") == ["weights"]
    assert of("localhost/org/name", identity="ollama/localhost--org--name") == ["weights"]
    assert of("host:5000/org/name", identity="ollama/host-5000--org--name") == ["weights"]
    assert of("org/name", "org/name", "vllm/org--name") == []
    assert of("org/name", "evil/name", "vllm/org--name") == ["weights"]
    assert of("org/name", "/tmp/name", "vllm/org--name") == ["weights"]
    assert of("short", "Org/Long", "vllm/short", named="Org/Long") == []


def test_options_that_a_file_adds_to_a_command_line_are_looked_at_too() -> None:
    def of(*arguments: str) -> list[str]:
        settings = Settings(vllm=VllmSettings(model="org/name", max_num_seqs=8, arguments=arguments))
        one = made(model=Model(name="org/name"), settings=settings)
        return asked(msgspec.structs.replace(one, id="vllm/org--name"))

    assert of("--dtype", "half", "--enforce-eager") == []
    assert of("--trust-remote-code") == of("--config", "/tmp/x.yaml") == of("--dtype", "$(reboot)") == ["VLLM_ARGS"]


def test_a_redacted_value_is_asked_of_the_user() -> None:
    settings = Settings(env={"GH_TOKEN": "(redacted)", "VLLM_ARGS": "--dtype half --hf-token '(redacted)'"})
    assert asked(made(settings.env)) == ["VLLM_ARGS"]  # an option that is no setting
    with pytest.raises(UsageError, match="GH_TOKEN"):
        handed_env(Settings(env={"GH_TOKEN": "(redacted)"}), {}, "x")
    assert handed_env(Settings(env={"GH_TOKEN": "(redacted)"}), {"GH_TOKEN": "t"}, "x") == {"GH_TOKEN": "t"}


def test_merge_takes_nothing_that_asks_for_more_and_the_rest(tmp_path: Path) -> None:
    theirs = Store(tmp_path / "theirs")
    theirs.write(theirs.path_of("llama-server", "made-up"), made({"LD_PRELOAD": "/tmp/x.so"}))
    theirs.write(theirs.path_of("llama-server", "made-up", "fine"), made({"LLAMA_ARG_FIT_TARGET": "512"}))
    ours = Store(tmp_path / "ours")
    assert sorted(one.action for one in merge(ours, [theirs.root], here=tmp_path)) == ["added", "refused"]
    assert [path.name for path in ours.paths()] == ["made-up@fine.yaml"]
    done = CliRunner().invoke(cli, ["merge", str(theirs.root), "--store", str(ours.root)])
    assert done.exit_code == 77
    assert "LD_PRELOAD='/tmp/x.so'" in done.output
    assert "--allow-env LD_PRELOAD" in done.output
    done = CliRunner().invoke(cli, ["merge", str(theirs.root), "--store", str(ours.root), "--allow-env", "LD_PRELOAD"])
    assert done.exit_code == 0


def test_a_record_of_others_is_fitted_with_what_it_may_set_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = msgspec.structs.replace(record(load(8192), load(16384), load(32768)), settings=Settings(env={"LD_PRELOAD": "/x"}))
    store.write_record(run)
    done = CliRunner().invoke(cli, ["fit", run.run, "--store", str(tmp_path)])
    assert done.exit_code == 77
    assert CliRunner().invoke(cli, ["fit", run.run, "--store", str(tmp_path), "--allow-env", "LD_PRELOAD"]).exit_code == 0


@pytest.mark.parametrize(
    ("cell", "option"),
    [
        (Cell(model="m", env={"LD_PRELOAD": "/x"}), "--allow-env LD_PRELOAD"),
        (Cell(model="m", engine="ollama", image="evil/x"), "--allow-image"),
        (Cell(model="m", engine_binary="./x"), "--allow-binary"),
        (Cell(model="m", models="/"), "--allow-model"),
    ],
)
def test_a_plan_of_others_asks_too(cell: Cell, option: str, tmp_path: Path) -> None:
    with pytest.raises(NotPermittedError) as refused:
        refuse_plan([cell], tmp_path, Allowed(), "plan.yaml")
    assert option in str(refused.value.hint)
    everything = Allowed(env=frozenset({"LD_PRELOAD"}), image=True, model=True, binary=True)
    refuse_plan([cell, Cell(model="m")], tmp_path, everything, "plan.yaml")


def test_an_image_is_named_by_the_digest_that_was_recorded_where_there_is_one() -> None:
    digest = f"sha256:{'ab' * 32}"
    assert by_digest(EngineVersion()) is None
    assert by_digest(EngineVersion(image="ollama/ollama:1")) == "ollama/ollama:1"
    assert by_digest(EngineVersion(image="ollama/ollama:1", image_digest=digest)) == f"ollama/ollama:1@{digest}"
    assert by_digest(EngineVersion(image=f"o/o@{digest}", image_digest=f"sha256:{'cd' * 32}")) == f"o/o@{digest}"
