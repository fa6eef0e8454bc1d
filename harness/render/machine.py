"""What is on this machine, for people: findings of ``doctor``, what ``clean`` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from harness.render.style import paint
from harness.render.tables import Drawn, Hanging
from harness.text import clean, counted

if TYPE_CHECKING:
    from harness.maintain.clean import Survey
    from harness.model.finding import Finding, Readiness
    from harness.prediction.gpu_transfer import DriverOverhead

_MARKS: Final = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "red")}


def findings(ready: Readiness, found: Sequence[Finding], settings: Mapping[str, tuple[Any, str]]) -> Iterator[str | Drawn]:
    """Whether a calibration works here; what works and what does not; each setting and where it comes from; what to do next."""
    missing = sum(one.state == "missing" for one in found)
    word = paint("harness can calibrate here: ", "green") if ready.works else paint("harness cannot calibrate here: ", "red")
    yield word + clean(f"{ready.text} ({missing} of {counted(len(found), 'thing')} missing)")
    for finding in found:
        word, colour = _MARKS[finding.state]
        yield Hanging(f"{paint(f'{word:>9}', colour)}  {finding.subject}: {clean(finding.text)}", 11)
        if finding.hint:
            yield f"{'':>9}  {paint(clean(finding.hint), dim=True)}"
    for key, (value, origin) in sorted(settings.items()):
        yield Hanging(f"  setting  {key} = {clean(str(value))}  ({clean(origin)})", 11)
    if ready.next:
        yield Hanging(f"next: {clean(ready.next)}", 6)


def overhead(found: DriverOverhead) -> Iterator[str]:
    """What a driver takes."""
    yield f"{clean(found.gpu)}: the driver takes {found.overhead_gb:.3f} GiB beyond what {clean(found.engine)} logs"


def leftovers(survey: Survey, *, removed: bool) -> Iterator[str | Drawn]:
    """What harness has left, and what became of it; ``removed``: the user asked for that."""
    for item in survey.items:
        word = "removed" if item.removed else item.state.replace("-", " ")
        yield Hanging(f"{word:>9}  {item.kind} {clean(item.name)}", 11)
        yield f"{'':>9}  {paint(clean(item.why), dim=True)}"
    if survey.docker is not None:
        yield f"no containers were looked for: {clean(survey.docker)}"
    abandoned = sum(item.state == "abandoned" for item in survey.items)
    if not survey.items:
        yield "nothing of harness is left here"
    elif abandoned and not removed:
        yield f"nothing was removed; harness clean --yes removes what is abandoned ({abandoned})"
