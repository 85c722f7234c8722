"""What web servers do when they are asked for a picture: mostly send it, sometimes not, seldom never answer.

In: a request, the picture (painted only when it is sent) and its media type. Out: the answer of a behaviour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

BEHAVIOURS: dict[str, tuple[float, str | None]] = {
    # all is well in the end
    "redirect": (0.01, None),
    "duplicate": (0.01, None),
    "wrong_type": (0.003, None),
    "cmyk": (0.004, None),
    "deep": (0.004, None),
    "rotated": (0.006, None),
    "palette": (0.005, None),
    "alpha": (0.003, None),
    # nothing comes of it
    "not_found": (0.012, "not_found"),
    "gone": (0.003, "gone"),
    "forbidden": (0.002, "forbidden"),
    "server_error": (0.004, "server_error"),
    "too_many_requests": (0.002, "too_many_requests"),
    "redirect_loop": (0.002, "too_many_redirects"),
    "html": (0.005, "not_an_image"),
    "empty_body": (0.002, "empty_body"),
    "disallowed": (0.002, "disallowed"),
    "truncated": (0.004, "truncated_image"),
    "hang": (0.001, "timeout"),
    "drip": (0.001, "timeout"),
}
"""Behaviour of the server → its share, and the reason code a download ends with (None: a picture comes).
All others are `plain`."""

Answer = Callable[[web.Request, Callable[[], bytes], str, int], Awaitable[web.StreamResponse]]
"""(request, picture, media type, row) → response."""

_HTML = "<!doctype html><html><head><title>Not here any more</title></head><body>Try the search.</body></html>"
_DRIP_SECONDS = 0.3


async def _plain(request: web.Request, picture: Callable[[], bytes], media_type: str, row: int) -> web.StreamResponse:
    return web.Response(body=picture(), content_type=media_type)


def _status(status: int, **headers: str) -> Answer:
    async def answer(
        request: web.Request, picture: Callable[[], bytes], media_type: str, row: int
    ) -> web.StreamResponse:
        return web.Response(status=status, text="Sorry.", headers=headers)

    return answer


async def _redirect(
    request: web.Request, picture: Callable[[], bytes], media_type: str, row: int
) -> web.StreamResponse:
    hop = int(request.query.get("hop", "0"))
    if hop > row % 3:
        return await _plain(request, picture, media_type, row)
    return web.Response(status=(301, 302, 307)[hop % 3], headers={"Location": f"{request.path}?hop={hop + 1}"})


async def _redirect_loop(
    request: web.Request, picture: Callable[[], bytes], media_type: str, row: int
) -> web.StreamResponse:
    other = "b" if request.query.get("to") == "a" else "a"
    return web.Response(status=302, headers={"Location": f"{request.path}?to={other}"})


async def _wrong_type(
    request: web.Request, picture: Callable[[], bytes], media_type: str, row: int
) -> web.StreamResponse:
    return web.Response(body=picture(), content_type="text/plain")


async def _html(request: web.Request, picture: Callable[[], bytes], media_type: str, row: int) -> web.StreamResponse:
    return web.Response(text=_HTML, content_type=media_type)


async def _empty_body(
    request: web.Request, picture: Callable[[], bytes], media_type: str, row: int
) -> web.StreamResponse:
    return web.Response(body=b"", content_type=media_type)


async def _disallowed(
    request: web.Request, picture: Callable[[], bytes], media_type: str, row: int
) -> web.StreamResponse:
    return web.Response(body=picture(), content_type=media_type, headers={"X-Robots-Tag": "noai, noimageai"})


async def _hang(request: web.Request, picture: Callable[[], bytes], media_type: str, row: int) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response(status=503)


async def _drip(request: web.Request, picture: Callable[[], bytes], media_type: str, row: int) -> web.StreamResponse:
    """A byte every now and then: never silent long enough for a time-out of single reads."""
    body = picture()
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": media_type})
    await response.prepare(request)
    for position in range(len(body)):
        await response.write(body[position : position + 1])
        await asyncio.sleep(_DRIP_SECONDS)
    return response


ANSWERS: dict[str, Answer] = {
    **dict.fromkeys(["plain", *BEHAVIOURS], _plain),
    "redirect": _redirect,
    "wrong_type": _wrong_type,
    "not_found": _status(404),
    "gone": _status(410),
    "forbidden": _status(403),
    "server_error": _status(500),
    "too_many_requests": _status(429, **{"Retry-After": "1"}),
    "redirect_loop": _redirect_loop,
    "html": _html,
    "empty_body": _empty_body,
    "disallowed": _disallowed,
    "hang": _hang,
    "drip": _drip,
}
"""Behaviour → what it does. Those not named here send the picture (which may be an odd one)."""
