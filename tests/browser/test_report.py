"""The report in a real browser: its answers are those of ``harness check``, its controls work, and names are never markup."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.report.build import assets
from harness.report.page import DriftLine, ReportEntry, page
from harness.units import GIB, format_size
from tests.support.planner_cases import base, with_metadata, zoo
from tests.support.rules import judge
from tests.support.vllm_artifacts import vllm_calibration

pytestmark = pytest.mark.requires("playwright", "chromium")

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- <b>'\"&amp;"
#: How long a browser may take on a machine that does other things, too, milliseconds.
_LIMIT = 200_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    import shutil

    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=_LIMIT)
        yield started
        started.close()


class Shown:
    """A page in the browser, and everything that it complained of or asked the network for."""

    def __init__(self, tab: Any, file: Path) -> None:
        self.tab = tab
        tab.set_default_timeout(_LIMIT)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.goto(file.as_uri())

    def text(self, selector: str) -> str:
        return str(self.tab.inner_text(selector))


def show(browser: Any, folder: Path, entries: list[ReportEntry], **options: Any) -> Shown:
    options = {"viewport": {"width": 1280, "height": 900}, **options}
    file = folder / "report.html"
    drift = (DriftLine(key=HOSTILE, status="moved", lines=(HOSTILE,)),)
    file.write_text(page(entries, assets(), subtitle=f"by {HOSTILE}", drift=drift, against="old"), encoding="utf-8")
    shown = Shown(browser.new_page(**options), file)
    assert shown.complaints == []
    return shown


def test_every_control_does_what_it_says(browser: Any, tmp_path: Path) -> None:
    """What the tables say is compared with ``check`` in tests/unit/report."""
    entries = [
        ReportEntry(key="ollama/first", calibration=base("first")),
        ReportEntry(key="ollama/second", calibration=base("second")),
    ]
    shown = show(browser, tmp_path, entries)
    tab, row = shown.tab, "#planner tbody tr:first-child"
    context, slots = f"{row} select >> nth=0", f"{row} select >> nth=1"

    assert "✓" not in shown.text(f"{row} .verdict"), "the mark is the style's, the word stands alone"
    assert shown.text(f"{row} .verdict") == "fits"
    tab.select_option("#card", "6")
    assert tab.input_value("#free") == "6"
    tab.select_option(context, "32768")
    verdict = judge(base(), 32768, 1, (6 * GIB,))
    assert (shown.text(f"{row} .verdict") == "fits") is (verdict.verdict == "fits")
    tab.fill("#free", "4.5")
    assert shown.text(f"{row} .verdict") == "CPU OFFLOAD LIKELY"
    layers = judge(base(), 32768, 1, (round(4.5 * GIB),))
    assert f"{layers.layers_offloaded} of {layers.layers_total}" in shown.text(row)
    tab.fill("#free", "24")
    tab.fill(f"{row} input[type=range]", "0")
    assert tab.input_value(context) == "2048"
    needs = judge(base(), 2048, 4, (24 * GIB,)).required_bytes or 0
    tab.select_option(slots, "4")
    assert format_size(needs) in shown.text(row)
    assert "first resident, ollama/second resident" in shown.text("#together")
    tab.select_option(slots, "1")
    tab.select_option("#cards", "2")
    assert "harness check judges them together" in shown.text("#together")
    tab.select_option(context, "3072")
    assert shown.text(f"{row} .verdict") == "unknown"
    assert "ollama/first: several cards are listed at powers of two" in shown.text("#together"), "why, for a phone too"
    tab.select_option("#cards", "1")

    tab.fill("#pick", "ollama")
    tab.click("#add")
    assert tab.locator("#planner tbody tr").count() == 2, "two models have that in their name"
    tab.fill("#pick", "OLLAMA SECOND")
    tab.press("#pick", "Enter")
    assert tab.locator("#planner tbody tr").count() == 3
    tab.click("#planner tbody tr:last-child button")
    assert tab.locator("#planner tbody tr").count() == 2

    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement !== document.body")
    colours = set()
    for _ in range(3):
        tab.click("#theme")
        colours.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2

    tab.click("#overview a >> nth=1")
    tab.wait_for_selector("#ollama-second .plot svg.main-svg")
    assert tab.locator("#ollama-second .plot").count() == tab.locator("#ollama-second .plot:has(svg.main-svg)").count() == 3
    assert tab.locator("#ollama-first .plot:has(svg.main-svg)").count() == 0, "what is closed is not drawn"
    assert shown.complaints == []


def test_free_memory_that_is_no_number_has_no_verdict(browser: Any, tmp_path: Path) -> None:
    shown = show(browser, tmp_path, [ReportEntry(key="one", calibration=base())])
    cells = shown.tab.locator("#planner tbody td")

    for typed in ("-5", ""):
        shown.tab.fill("#free", typed)
        assert cells.nth(3).inner_text() == "unknown"
        assert "a number from 0 on" in shown.text("#together")
    shown.tab.fill("#free", "0")
    assert cells.nth(3).inner_text() == "CPU OFFLOAD LIKELY"
    assert cells.nth(8).inner_text() == "none", "no context fits: not a context of 0"


def test_many_calibrations_are_filtered_and_sorted(browser: Any, tmp_path: Path) -> None:
    speeds = {"b-10": 62.0, "b-9": None, "a-1": 5.0}
    entries = []
    for name, speed in speeds.items():
        one = base(target="host" if name == "a-1" else "gpu")
        timed = msgspec.structs.replace(one.metadata.performance, decode_tokens_per_s=speed)
        entries.append(ReportEntry(key=name, calibration=with_metadata(one, performance=timed)))
    shown = show(browser, tmp_path, entries)
    tab, names = shown.tab, "#overview tbody td:first-child:visible"

    def sorted_by(index: int) -> list[str]:
        tab.click(f"#overview th >> nth={index} >> button")
        return list(tab.locator(names).all_inner_texts())

    assert sorted_by(0) == ["a-1", "b-9", "b-10"]
    assert sorted_by(0) == ["b-10", "b-9", "a-1"]
    assert sorted_by(6) == ["a-1", "b-10", "b-9"]
    assert sorted_by(6) == ["b-10", "a-1", "b-9"], "what was not measured is last in both directions"
    tab.fill("#filter", "made-up 24 B-")
    assert tab.locator(names).all_inner_texts() == ["b-10", "b-9"]
    assert tab.locator("#models details:visible").count() == 2
    assert "2 of 3" in shown.text("#overview .controls")
    tab.fill("#filter", "")
    assert tab.locator(names).count() == 3
    assert "62.0 ± 15 %" in shown.text("#overview"), "a speed bears its uncertainty"


def test_memory_of_the_host_is_not_pooled_with_a_cards(browser: Any, tmp_path: Path) -> None:
    entries = [ReportEntry(key="on-gpu", calibration=base()), ReportEntry(key="on-host", calibration=base(target="host"))]
    shown = show(browser, tmp_path, entries)
    tab, words = shown.tab, "#planner tbody .verdict"

    tab.fill("#free", "24")
    tab.fill("#host", "1")
    assert tab.locator(words).all_inner_texts() == ["fits", "CPU OFFLOAD LIKELY"]
    tab.fill("#free", "1")
    tab.fill("#host", "24")
    assert tab.locator(words).all_inner_texts() == ["CPU OFFLOAD LIKELY", "fits"]


def test_an_engine_that_pages_its_cache_has_its_own_settings_and_a_line(browser: Any, tmp_path: Path) -> None:
    shown = show(browser, tmp_path, [ReportEntry(key="vllm/tern", calibration=vllm_calibration())])

    assert shown.tab.locator("#overview th button").count() == 0, "one calibration is not sorted"
    assert "max num seqs 64" in shown.text("#vllm-tern dl")
    assert "slot" not in shown.text("#vllm-tern dl")
    shown.tab.wait_for_selector("#vllm-tern .plot svg.main-svg")
    assert "what one sequence needs" in shown.text("#vllm-tern figcaption >> nth=0")
    assert shown.complaints == []


def test_names_and_notes_are_data(browser: Any, tmp_path: Path) -> None:
    bad = base(HOSTILE)
    quality = msgspec.structs.replace(bad.metadata.quality, notes=(HOSTILE,))
    shown = show(browser, tmp_path, [ReportEntry(key=HOSTILE, calibration=with_metadata(bad, quality=quality))])

    assert shown.tab.title() == "harness report"
    assert shown.tab.locator("img").count() == 0
    assert HOSTILE in shown.text("#overview")
    assert HOSTILE in shown.text("#drift")
    assert HOSTILE in shown.text(".notes")
    assert shown.complaints == []


def test_the_page_asks_nobody_for_anything(browser: Any, tmp_path: Path) -> None:
    shown = show(browser, tmp_path, [ReportEntry(key="one", calibration=base())])

    shown.tab.wait_for_selector(".plot svg.main-svg")

    assert [url for url in shown.requests if not url.startswith(("file:", "data:", "blob:"))] == []


OVER = (
    "[...document.querySelectorAll('.scroll, html')].filter(one => one.scrollWidth > one.clientWidth).map(one => one.outerHTML)"
)


@pytest.mark.parametrize("width", [360, 390, 760, 1020, 1024, 1100, 1440])
def test_the_page_and_its_tables_fit_on_the_screen(browser: Any, tmp_path: Path, width: int) -> None:
    long = f"ollama/{'a-long-name-' * 8}"
    many = [ReportEntry(key=name, calibration=one) for name, one in zoo(random.Random(1)).items()] if width == 1024 else []
    entries = [ReportEntry(key=long, calibration=base()), *many]
    shown = show(browser, tmp_path, entries, viewport={"width": width, "height": 800})
    shown.tab.evaluate("document.querySelector('details.model').open = true")

    shown.tab.wait_for_selector(".plot svg.main-svg")

    shown.tab.fill("#free", "2")
    assert shown.tab.evaluate(OVER) == []
    assert shown.tab.locator("#planner .verdict.offload >> nth=0").bounding_box()["x"] < width - 100
    bar, area = (shown.tab.locator(f".plot >> nth=0 >> {name} >> nth=0").bounding_box() for name in (".modebar", ".nsewdrag"))
    assert bar["y"] + bar["height"] <= area["y"], "the toolbar is above the chart"


def test_paper_has_every_column_and_the_card(browser: Any, tmp_path: Path) -> None:
    entries = [ReportEntry(key=f"llama-server/{name}", calibration=base(), record=None) for name in ("first", "second")]
    shown = show(browser, tmp_path, entries, viewport={"width": 1020, "height": 1000}, color_scheme="dark")
    tab = shown.tab
    tab.evaluate("document.querySelector('details.model').open = true")
    tab.wait_for_selector(".plot svg.main-svg")

    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 718, "height": 1000})

    assert tab.evaluate(OVER) == []
    assert tab.locator(".plot svg.main-svg >> nth=0").bounding_box()["width"] <= 660, "what A4 has between its margins"
    assert tab.locator("#overview th:visible").count() == 9
    assert tab.locator("#planner th:visible").count() == 9, "all but the one with buttons"
    shown_as = tab.evaluate("[...document.querySelectorAll('th button')].map(one => getComputedStyle(one).display)")
    assert set(shown_as) == {"contents"}, "Chromium repeats heads on later pages only where no control is in them"
    assert tab.locator("#card").is_visible()
    assert not tab.locator("#filter").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_the_keyboard_is_enough(browser: Any, tmp_path: Path) -> None:
    entries = [ReportEntry(key=f"llama-server/{name}", calibration=base()) for name in ("b", "a")]
    tab = show(browser, tmp_path, entries).tab

    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.hash") == "#planner"
    tab.keyboard.press("Tab")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#overview"
    tab.focus("#overview th >> nth=0 >> button")
    tab.keyboard.press("Enter")
    assert tab.get_attribute("#overview th >> nth=0", "aria-sort") == "ascending"
    assert tab.locator("#overview tbody td:first-child").all_inner_texts() == ["llama-server/a", "llama-server/b"]
    tab.focus("#overview tbody a >> nth=0")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#llama-server-a .plot svg.main-svg")


def test_charts_have_the_colours_that_the_system_forces(browser: Any, tmp_path: Path) -> None:
    entries = [ReportEntry(key="one", calibration=base())]
    tab = show(browser, tmp_path, entries, forced_colors="active", color_scheme="dark").tab

    tab.wait_for_selector(".plot svg.main-svg")

    forced = tab.evaluate("getComputedStyle(document.body).color")
    assert tab.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill") == forced


def test_an_empty_store_says_what_to_do(browser: Any, tmp_path: Path) -> None:
    shown = show(browser, tmp_path, [])

    assert "harness calibrate" in shown.text("main")


def test_the_data_can_be_read_by_other_programs(tmp_path: Path) -> None:
    text = page([ReportEntry(key=HOSTILE, calibration=base(HOSTILE))], assets(), subtitle="")

    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["calibrations"][0]["key"] == HOSTILE


def test_a_model_that_fits_until_its_server_has_filled_its_caches_is_tight_and_says_why(browser: Any, tmp_path: Path) -> None:
    shown = show(browser, tmp_path, [ReportEntry(key="llama-server/first", calibration=base("first", target="host"))])
    verdict = "#planner tbody tr:first-child .verdict"
    assert shown.text(verdict) == "fits"
    shown.tab.fill("#host", "8")
    assert shown.text(verdict) == "fits, tight"
    left = 8 * GIB - (judge(base("first", target="host"), 8192, 1, (8 * GIB,)).required_bytes or 0)
    said = shown.text("#together")
    assert "LLAMA_ARG_CTX_CHECKPOINTS) may take up to " in said
    assert f"more of host memory: only {format_size(left, 1)} are left" in said
