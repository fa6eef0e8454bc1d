"""Tags of an image in its registry (OCI distribution spec, ``/v2/NAME/tags/list``), with an anonymous token."""

from __future__ import annotations

import re
from typing import Any, Final

import httpx

from harness.errors import UnavailableError, UsageError

_HUB: Final = "registry-1.docker.io"
_NAME: Final = re.compile(r"(?:(?P<host>[a-z0-9.-]+(?:\.[a-z]{2,}|:\d+)|localhost(?::\d+)?)/)?(?P<path>[a-z0-9._/-]{1,200})")
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
#: A page has up to 10 000 tags; no image of an engine has more than a few.
_PAGES: Final = 20
_LARGEST: Final = 8 << 20


def tags(repository: str, client: httpx.Client | None = None) -> tuple[str, ...]:
    """All tags of an image, as the registry lists them.

    Raises:
        UsageError: no repository. UnavailableError: the registry does not answer, or not with a list.
    """
    match = _NAME.fullmatch(repository)
    if match is None:
        raise UsageError(f"{repository!r} is not an image repository")
    host, path = match["host"] or _HUB, match["path"]
    path = path if "/" in path or match["host"] else f"library/{path}"
    advice = "name the versions with --versions 0.31.0,0.31.1"
    with client or httpx.Client(timeout=20, follow_redirects=False) as opened:
        found: list[str] = []
        headers: dict[str, str] = {}
        last = ""
        for _ in range(_PAGES):
            url = f"https://{host}/v2/{path}/tags/list?n=1000{f'&last={last}' if last else ''}"
            try:
                answer = opened.get(url, headers=headers)
                if answer.status_code == httpx.codes.UNAUTHORIZED and not headers:
                    headers = _token(opened, answer.headers.get("www-authenticate", ""), host)
                    answer = opened.get(url, headers=headers)
                page = _json(answer).get("tags")
            except (httpx.HTTPError, ValueError) as error:
                raise UnavailableError(f"{host} does not list {path}: {error}", hint=advice, code="no-tags") from error
            some = [one for one in page if isinstance(one, str)] if isinstance(page, list) else []
            found += some
            if len(some) < 1000 or 'rel="next"' not in answer.headers.get("link", ""):
                break
            last = some[-1]
    if not found:
        raise UnavailableError(f"{host} names no tag of {path}", hint=advice, code="no-tags")
    return tuple(found)


def _token(client: httpx.Client, challenge: str, host: str) -> dict[str, str]:
    """An anonymous token, from the registry's own realm: https, and a host of the same domain."""
    found = dict(_CHALLENGE.findall(challenge))
    realm = httpx.URL(found.get("realm", ""))
    domain = ".".join(host.partition(":")[0].split(".")[-2:])
    if realm.scheme != "https" or not (realm.host == domain or realm.host.endswith(f".{domain}")):
        raise ValueError("it wants a login elsewhere")
    answer = client.get(realm, params={key: found[key] for key in ("service", "scope") if key in found})
    token = _json(answer).get("token")
    if not isinstance(token, str):
        raise ValueError("it gives no token")  # noqa: TRY004 - what it sent is wrong
    return {"Authorization": f"Bearer {token}"}


def _json(answer: httpx.Response) -> dict[str, Any]:
    answer.raise_for_status()
    if len(answer.content) > _LARGEST:
        raise ValueError("its answer is too large")
    found = answer.json()
    if not isinstance(found, dict):
        raise ValueError("its answer is no list of tags")  # noqa: TRY004 - what it sent is wrong
    return found
