"""Loads that are planned and not made: the engine reads a header and says what it would allocate, in bytes, in a second."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from harness.engines.base import Options
from harness.engines.registry import EMBEDDED, recipe_of, version_here
from harness.errors import CannotWriteError
from harness.logs.planned import read_plan, refusal
from harness.model.planned import PlannedLoad
from harness.model.record import LoadRequest
from harness.sandboxes.environment import clean_environment
from harness.store.catalog import cache_folder
from harness.store.store import write_atomically

#: How long one may take, seconds.
TIMEOUT: Final = 60.0
#: A planned load ends by a failure, and llama.cpp writes its log from another thread: the last lines may be missing.
_TRIES: Final = 3
#: Plans that are kept: a few bytes each.
_KEPT: Final = 2000


class Planner:
    """Plans loads of one file with the embedded engine; ``key`` names the header, so that a plan is made once.

    ``refused`` says why the engine does not load such a model at all, where it said so.
    """

    def __init__(self, path: Path, key: str, options: Options) -> None:
        self.path, self.options = path, options
        self.refused: str | None = None
        asked = (key, version_here(EMBEDDED, "process"), options.num_parallel, options.kv_cache_type, options.flash_attention)
        self._planned: dict[str, PlannedLoad] = {}
        self._key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]

    def prepare(self, requests: Sequence[LoadRequest]) -> bool:
        """Plan several loads, as many at once as there are cores; whether all could be planned."""
        known = _kept()
        missing = [one for one in dict.fromkeys(requests) if self._name(one) not in known]
        if missing:
            with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as threads:
                self._keep(dict(zip(map(self._name, missing), threads.map(self._run, missing), strict=True)))
        return all(self._name(one) in self._planned or self._name(one) in known for one in requests)

    def plan(self, request: LoadRequest) -> PlannedLoad | None:
        """One load; ``None`` where the engine cannot plan it."""
        name = self._name(request)
        if name not in self._planned:
            with suppress(KeyError, msgspec.ValidationError):
                return msgspec.convert(_kept()[name], PlannedLoad)
            self._keep({name: self._run(request)})
        return self._planned.get(name)

    def _name(self, request: LoadRequest) -> str:
        return f"{self._key}:{request.context}:{request.num_batch}"

    def _keep(self, found: dict[str, PlannedLoad | None]) -> None:
        new = {name: plan for name, plan in found.items() if plan is not None}
        self._planned |= new
        items = list({**_kept(), **msgspec.to_builtins(new)}.items())[-_KEPT:]
        with suppress(CannotWriteError):  # without a cache they are planned again next time
            write_atomically(_file(), json.dumps(dict(items)).encode())

    def _run(self, request: LoadRequest) -> PlannedLoad | None:
        launch = recipe_of(EMBEDDED).planning(self.path, request, self.options)
        if launch is None:
            return None
        env = clean_environment(os.environ) | launch.env
        for _ in range(_TRIES):
            try:
                done = subprocess.run(
                    launch.argv, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    timeout=TIMEOUT, check=False,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired):
                return None
            text = done.stdout.decode("utf-8", "replace")
            if (plan := read_plan(text)) is not None:
                return plan
            if why := refusal(text):
                self.refused = why
                return None
        return None


def _file() -> Path:
    return cache_folder() / "planned.json"


def _kept() -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads(_file().read_text()))
    return {}
