"""Tools for agents: every answer has its label, a failure is an answer, and nothing is fetched that was not allowed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.serving.agents import AgentTools, make_server
from tests.support.calibrations import store_of
from tests.unit.prediction.test_tuning import MADE_UP

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tools(tmp_path: Path) -> AgentTools:
    return AgentTools(store_of(tmp_path / "store", MADE_UP))


def test_answers_are_labelled(tools: AgentTools) -> None:
    fits = tools.check(["made-up@8192"], "24GiB")
    assert (fits["verdict"], fits["label"], fits["models"][0]["label"]) == ("fits", "measured", "measured")
    both = tools.check(["made-up@8192", "unheard-of@4096"], "24GiB")
    assert (both["verdict"], both["label"]) == ("unknown", "unknown")
    assert tools.check(["made-up@8192"], "8GiB,8GiB")["label"] in ("measured", "derived")
    assert tools.tune("made-up", min_ctx=80_000, available="7GiB")["label"] == "derived"
    assert tools.tune("made-up", available="24GiB")["label"] == "measured"
    plan = tools.plan(available="24GiB")
    assert (plan["label"], plan["memories"][0]["models"][0]["largest_context"]) == ("measured", 131_072)


def test_a_model_that_is_not_calibrated_is_never_estimated_by_check(tools: AgentTools, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    found = tools.check([f"{tmp_path}/x.gguf@4096"], "24GiB")
    assert found["label"] == "unknown"


def test_nothing_is_fetched_unless_it_is_allowed(tools: AgentTools) -> None:
    server = pytest.importorskip("mcp.server")
    assert server.MCPServer is not None
    import anyio

    async def asked(model: str) -> Any:
        return await make_server(tools).call_tool("estimate", {"models": [model]})

    for model in ("https://example.org/x.gguf", "hf.co/o/r:Q4_K_M", "qwen2.5", "hf://o/r/x.gguf", "huggingface.co/o/r/x.gguf"):
        answer = anyio.run(asked, model)
        assert "only local .gguf files are read" in str(answer)


def test_a_client_sees_the_tools_and_their_answers(tools: AgentTools, tmp_path: Path) -> None:
    mcp = pytest.importorskip("mcp")
    import anyio
    from mcp.client.stdio import stdio_client

    assert isinstance(tools, AgentTools)
    env = {**{key: value for key, value in os.environ.items() if not key.startswith("HARNESS_")}, "PYTHONPATH": str(ROOT)}
    parameters = mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "harness", "mcp", "--store", str(tmp_path / "store")], env=env
    )

    async def talk() -> tuple[set[str], Any, Any]:
        async with stdio_client(parameters) as (read, write), mcp.ClientSession(read, write) as session:
            await session.initialize()
            listed = await session.list_tools()
            fits = await session.call_tool("check", {"models": ["made-up@8192"], "available": "24GiB"})
            nonsense = await session.call_tool("check", {"models": ["made-up"], "available": "24GiB"})
            return {one.name for one in listed.tools}, fits, nonsense

    names, fits, nonsense = anyio.run(talk)
    assert names == {"check", "plan", "tune", "estimate"}
    assert '"label": "measured"' in fits.content[0].text.replace('":"', '": "')
    assert "missing context for made-up" in nonsense.content[0].text
