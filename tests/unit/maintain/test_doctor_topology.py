"""Cards beside each other, and remote devices."""

from __future__ import annotations

import socket
from pathlib import Path

from harness.maintain.doctor_topology import topology_findings


def card(sys: Path, address: str, vendor: str, kind: str = "0x030000", **parts: str) -> None:
    folder = sys / "bus" / "pci" / "devices" / address
    folder.mkdir(parents=True)
    for name, text in {"vendor": vendor, "class": kind, **parts}.items():
        (folder / name).write_text(f"{text}\n")


def test_cards_are_listed_with_the_links_that_the_kernel_knows(tmp_path: Path) -> None:
    link = {"current_link_speed": "16.0 GT/s PCIe", "max_link_width": "16", "numa_node": "0"}
    card(tmp_path, "0000:01:00.0", "0x10de", current_link_width="16", **link)
    card(tmp_path, "0000:02:00.0", "0x10de", "0x030200", current_link_width="4", **link)
    card(tmp_path, "0000:03:00.0", "0x10de", "0x020000")
    (found,) = topology_findings(tmp_path, {})
    assert found.text == (
        "0000:01:00.0 NVIDIA, PCIe 16.0 GT/s x16, memory node 0; 0000:02:00.0 NVIDIA, PCIe 16.0 GT/s x4 of x16, memory node 0"
    )
    assert (found.code, found.state) == ("topology", "note")
    assert "narrow link" in (found.hint or "")


def test_cards_of_several_vendors_are_a_note(tmp_path: Path) -> None:
    card(tmp_path, "0000:01:00.0", "0x10de", current_link_speed="Unknown", current_link_width="255", numa_node="-1")
    card(tmp_path, "0000:02:00.0", "0x1002")
    (found,) = topology_findings(tmp_path, {})
    assert found.text == "0000:01:00.0 NVIDIA, link not known; 0000:02:00.0 AMD, link not known"
    assert (found.code, found.state) == ("topology-mixed", "note")


def test_a_remote_device_answers_or_is_missing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        answers, *silent = topology_findings(tmp_path, {"LLAMA_ARG_RPC": f"{there}, 127.0.0.1:1,nonsense"})
    assert (answers.subject, answers.code) == (f"remote device {there}", "rpc-ok")
    assert [(one.code, one.state) for one in silent] == [("rpc-silent", "missing")] * 2


def test_a_machine_without_either_has_nothing_to_say(tmp_path: Path) -> None:
    assert list(topology_findings(tmp_path, {})) == []
