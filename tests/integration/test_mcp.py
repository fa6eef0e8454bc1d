"""``harness mcp`` as a client sees it, and what it does not fetch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.serving.agents import AgentTools, make_server
from tests.support.calibrations import store_of
from tests.unit.prediction.test_tuning import MADE_UP

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(tmp_path: Path) -> AgentTools:
    return AgentTools(store_of(tmp_path / "store", MADE_UP))


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
