"""The site's own page: HTTP on 127.0.0.1, for whoever has the token.

    GET /?token=...    the address that is printed: sets a cookie, and leads to / without it
    GET /...           `client.local_page`, with the cookie

Nothing but GET is answered, and no answer changes anything at the site. Whoever asks by another name than this
machine's own is turned away first: a web page elsewhere may have its name lead to 127.0.0.1. No answer may load or run
anything, be framed, be kept, or say where it was. Users of one machine share its loopback: they cannot ask without the
token, but a browser sends a cookie to every port of a host; so do not visit their servers on 127.0.0.1 with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client import local_page
from client.local_page import LocalPage
from common.errors import ConsiliumError, RunError

HOST = "127.0.0.1"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_OWN_NAME = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_TOKEN_BYTES = 32
T = TypeVar("T")


def serve(page: LocalPage, *, port: int, ready: Callable[[str], object]) -> None:
    """Answer on 127.0.0.1:`port` (0: a free one) until Ctrl-C or SIGTERM; `ready` is told the address with its token.

    Raises RunError if the port is taken, KeyboardInterrupt on Ctrl-C.
    """
    with _listening(port) as listener:
        chosen, token = listener.getsockname()[1], secrets.token_urlsafe(_TOKEN_BYTES)
        app = local_app(page, token=token, cookie=f"consilium-{chosen}")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # it would tell the token
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        ready(f"http://{HOST}:{chosen}/?token={token}")
        uvicorn.Server(config).run(sockets=[listener])


def local_app(page: LocalPage, *, token: str, cookie: str) -> ASGIApp:
    """The pages behind their door; `cookie` is the name under which a browser keeps the token."""
    return _door(Starlette(routes=_routes(page)), token=token, cookie=cookie)


def _routes(page: LocalPage) -> list[Route]:
    def data(request: Request) -> Response:
        number = request.query_params.get("check", "")
        if not number.isdecimal():
            return HTMLResponse(local_page.data(page))
        page.check.begin(int(number[:9]))
        return RedirectResponse("/data", status_code=303)

    def ledger(request: Request) -> Response:
        try:
            return HTMLResponse(local_page.privacy_to_print(page))
        except ConsiliumError as error:
            return HTMLResponse(local_page.closed(str(error)), status_code=404)

    def report(request: Request) -> Response:
        found = local_page.report_of(page, request.path_params["key"])
        if found is None:
            return HTMLResponse(local_page.closed("There is no such report."), status_code=404)
        return HTMLResponse(found)

    return [
        _route("/", lambda request: HTMLResponse(local_page.overview(page))),
        _route("/studies", lambda request: HTMLResponse(local_page.studies(page))),
        _route("/privacy", lambda request: HTMLResponse(local_page.privacy(page))),
        _route("/privacy/ledger", ledger),
        _route("/data", data),
        _route("/models", lambda request: HTMLResponse(local_page.models(page))),
        _route("/models/{key}", report),
    ]


def _route(path: str, answer: Callable[[Request], Response]) -> Route:
    async def endpoint(request: Request) -> Response:
        return await beside(lambda: answer(request))

    return Route(path, endpoint)


async def beside(compute: Callable[[], T]) -> T:
    """What `compute` returns, by a thread of its own that keeps no process from ending: Ctrl-C waits for no page."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(cast(T, result))
        else:
            done.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = compute()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=work, name="page", daemon=True).start()
    return await done


def _door(inside: ASGIApp, *, token: str, cookie: str) -> ASGIApp:
    """Nobody gets in but by this machine's own name, to read, and with the token."""

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = _turned_away(Request(scope), token, cookie) or inside
        try:
            await answer(scope, receive, send_guarded)
        except asyncio.CancelledError:  # Ctrl-C, while a page is made
            await PlainTextResponse("the page was stopped", status_code=503)(scope, receive, send_guarded)

    return door


def _turned_away(request: Request, token: str, cookie: str) -> Response | None:
    """What is answered instead of a page; None: come in."""
    names = request.headers.getlist("host")
    if len(names) != 1 or not _OWN_NAME.fullmatch(names[0]):
        return PlainTextResponse("this page answers to 127.0.0.1 and localhost only", status_code=421)
    if request.method not in ("GET", "HEAD"):
        return PlainTextResponse("this page is for reading", status_code=405, headers={"Allow": "GET, HEAD"})
    if request.url.path == "/" and "token" in request.query_params:
        if not _same(request.query_params["token"], token):
            return _closed()
        entered = RedirectResponse("/", status_code=303)
        entered.set_cookie(cookie, token, path="/", httponly=True, samesite="strict")
        return entered
    return None if _same(request.cookies.get(cookie, ""), token) else _closed()


def _closed() -> Response:
    reason = "Paste the address that `consilium-site page` printed into this browser's address bar."
    return HTMLResponse(local_page.closed(reason), status_code=403)


def _same(one: str, other: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(one.encode(errors="surrogatepass"), other.encode())


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket on loopback alone. Raises RunError if the port is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()  # whoever is told the address may ask at once
        except OSError as error:
            raise RunError(f"port {port} of {HOST}: {error.strerror}; choose another with --port, 0 for any") from None
        yield listener
