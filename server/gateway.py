"""What hospitals reach of the lab: Flower's calls for nodes and its health, over TLS, and nothing else.

Behind it, on loopback, stands the SuperLink with all its other calls. A node whose key the lab revoked is turned away
here at once, before the SuperLink hears of it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import serialization
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

NODE_CALLS = "/v1/fleet/"
_NODE_CALL = re.compile(r"[a-z-]{1,40}\Z")
_KEY_HEADER = "flwr-public-key"
_LARGEST = 16 * 2**20  # bytes of a call; Flower cuts arrays into pieces of 5 MB
_SLOWEST_S = 120.0  # for a call to arrive
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "proxy-connection"}
_OWN = _HOP_BY_HOP | {"date", "server"}  # the gateway says these itself


@dataclass
class Traffic:
    """What went through, for the metrics."""

    calls: dict[int, int] = field(default_factory=dict)  # by HTTP status
    bytes_in: int = 0
    bytes_out: int = 0
    turned_away: int = 0

    def note(self, status: int) -> None:
        self.calls[status] = self.calls.get(status, 0) + 1


class Refused(Exception):
    """A call that is not passed on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def gateway(superlink: str, authority: Path, *, barred: Callable[[], Collection[bytes]], traffic: Traffic) -> Starlette:
    """The application; `superlink` is its URL, `barred()` the public keys (`key_bytes`) that are turned away."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        trust = ssl.create_default_context(cafile=str(authority))
        async with httpx.AsyncClient(base_url=superlink, verify=trust, timeout=_TIMEOUT, trust_env=False) as client:
            app.state.client = client
            yield

    async def pass_on(request: Request) -> Response:
        if not _NODE_CALL.match(request.path_params.get("call", "health")):
            return PlainTextResponse("there is no such call", status_code=404)
        if _is_barred(request, barred()):
            traffic.turned_away += 1
            return PlainTextResponse("this node's key was revoked", status_code=403)
        client: httpx.AsyncClient = request.app.state.client
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        path = f"{NODE_CALLS}{request.path_params['call']}" if request.path_params else "/health"
        call = client.build_request(request.method, path, headers=headers, content=_body(request, traffic))
        try:
            answer = await client.send(call, stream=True)
        except Refused as refused:
            traffic.note(refused.status)
            return PlainTextResponse(refused.reason, status_code=refused.status)
        except httpx.HTTPError:
            traffic.note(503)
            return PlainTextResponse("the lab's server is starting, or down", status_code=503)
        traffic.note(answer.status_code)
        kept = {name: value for name, value in answer.headers.items() if name not in _OWN}
        return StreamingResponse(_counted(answer, traffic), status_code=answer.status_code, headers=kept)

    routes = [
        Route(f"{NODE_CALLS}{{call}}", pass_on, methods=["POST"]),
        Route("/health", pass_on, methods=["GET", "HEAD"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def key_bytes(public_line: str) -> bytes:
    """A node's OpenSSH public key in the form in which its calls show it."""
    key = serialization.load_ssh_public_key(public_line.encode())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _is_barred(request: Request, barred: Collection[bytes]) -> bool:
    for shown in request.headers.getlist(_KEY_HEADER):
        with contextlib.suppress(ValueError):  # the SuperLink refuses what is no base64
            if base64.b64decode(shown, validate=True) in barred:
                return True
    return False


async def _body(request: Request, traffic: Traffic) -> AsyncIterator[bytes]:
    """The call's body, as it comes. Raises Refused if it is larger than any of Flower's, or comes too slowly."""
    size, pieces, deadline = 0, aiter(request.stream()), time.monotonic() + _SLOWEST_S
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces), deadline - time.monotonic())
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refused(408, "the call came too slowly") from None
        size += len(piece)
        if size > _LARGEST:
            raise Refused(413, "the call is too large")
        traffic.bytes_in += len(piece)
        yield piece


async def _counted(answer: httpx.Response, traffic: Traffic) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            traffic.bytes_out += len(chunk)
            yield chunk
    finally:
        await answer.aclose()
