"""The lab's gateway: nodes' calls and health pass, nothing else does, and a revoked key is turned away at once."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import server.gateway
from common.enrolment import make_node_key
from server.certificates import Authority
from server.gateway import Traffic, gateway, key_bytes

GOOD_KEY, BAD_KEY = key_bytes(make_node_key()[1]), key_bytes(make_node_key()[1])
HEADER = "flwr-public-key"
CALL = "/v1/fleet/pull-messages"


@dataclass
class Upstream:
    """A SuperLink that answers whatever it is asked, and notes it."""

    heard: list[tuple[str, str, bytes, dict[str, str]]] = field(default_factory=list)
    answer: Response = field(default_factory=lambda: Response(b"answer", headers={"flwr-x": "1", "server": "secret"}))

    def app(self) -> Starlette:
        async def hear(request: Request) -> Response:
            body = await request.body()
            self.heard.append((request.method, request.url.path, body, dict(request.headers)))
            return self.answer

        methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
        return Starlette(routes=[Route("/{path:path}", hear, methods=methods)])


@dataclass
class Lab:
    """A gateway that runs, and how a hospital reaches it."""

    port: int
    trust: ssl.SSLContext
    upstream: Upstream
    traffic: Traffic
    barred: set[bytes]

    def ask(self, method: str, path: str, **more: object) -> httpx.Response:
        with httpx.Client(verify=self.trust, timeout=10, trust_env=False) as client:
            return client.request(method, f"https://127.0.0.1:{self.port}{path}", **more)  # type: ignore[arg-type]

    def ask_raw(self, request: bytes) -> bytes:
        """The status line of the answer to bytes that no client would send."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            self.trust.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            wrapped.sendall(request)
            return wrapped.makefile("rb").readline()


def listener() -> socket.socket:
    """On a free port of loopback."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    return bound


@contextmanager
def running(app: Starlette, certificate: Path, key: Path) -> Iterator[int]:
    """`app` over TLS, in a thread of its own; its port."""
    tls: dict[str, Any] = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    quiet: dict[str, Any] = {"log_config": None, "server_header": False, "ws": "none", "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, **tls, **quiet)
    uvicorn_server = uvicorn.Server(config)
    with listener() as bound:
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not uvicorn_server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            uvicorn_server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("lab", "other"):
        authority = Authority(folder / f"{name}-ca.crt", folder / f"{name}-ca.key")
        authority.create(name)
        authority.issue("lab.example.org", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")
    return folder


@pytest.fixture(scope="module")
def shared_lab(certificates: Path) -> Iterator[Lab]:
    upstream, traffic, barred = Upstream(), Traffic(), {BAD_KEY}
    trust = ssl.create_default_context(cafile=str(certificates / "lab-ca.crt"))
    crt, key = certificates / "lab.crt", certificates / "lab.key"
    with running(upstream.app(), crt, key) as behind:
        url = f"https://127.0.0.1:{behind}"
        app = gateway(url, certificates / "lab-ca.crt", barred=lambda: barred, traffic=traffic)
        with running(app, crt, key) as port:
            yield Lab(port, trust, upstream, traffic, barred)


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    """As new."""
    fresh = Upstream()
    shared_lab.upstream.heard, shared_lab.upstream.answer = fresh.heard, fresh.answer
    shared_lab.barred.clear()
    shared_lab.barred.add(BAD_KEY)
    shared_lab.traffic.__init__()  # type: ignore[misc]
    return shared_lab


def shown(key: bytes) -> str:
    return base64.b64encode(key).decode()


# ---- what passes ---------------------------------------------------------------------------------------------------


def test_a_nodes_call_passes_with_body_and_headers(lab: Lab) -> None:
    body = bytes(range(256)) * 10
    answer = lab.ask("POST", f"{CALL}?a=1", content=body, headers={HEADER: shown(GOOD_KEY), "x-signed": "yes"})
    assert (answer.status_code, answer.content, answer.headers["flwr-x"]) == (200, b"answer", "1")
    ((method, path, heard, headers),) = lab.upstream.heard
    assert (method, path, heard) == ("POST", CALL, body)
    assert (headers[HEADER], headers["x-signed"]) == (shown(GOOD_KEY), "yes")
    assert (lab.traffic.calls, lab.traffic.bytes_in, lab.traffic.bytes_out) == ({200: 1}, len(body), 6)


def test_a_call_in_pieces_passes_whole(lab: Lab) -> None:
    """Flower's own: no length is said before."""
    answer = lab.ask("POST", CALL, content=iter([b"one", b"two", bytes(2**20)]))
    assert answer.status_code == 200
    assert lab.upstream.heard[0][2] == b"onetwo" + bytes(2**20)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_passes(lab: Lab, method: str) -> None:
    assert lab.ask(method, "/health").status_code == 200
    assert [heard[:2] for heard in lab.upstream.heard] == [(method, "/health")]


def test_an_answers_status_passes_and_its_server_does_not(lab: Lab) -> None:
    lab.upstream.answer = Response(b"no", status_code=401, headers={"server": "secret"})
    answer = lab.ask("POST", CALL)
    assert (answer.status_code, answer.content) == (401, b"no")
    assert "secret" not in str(answer.headers)
    assert "date" in answer.headers  # doctor compares clocks by it


# ---- what does not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/v1/control/start-run",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/serverappio/pull",
        "/v1/fleet/a/b",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/%2e%2e%2fcontrol",
        "/v1/fleet/..",
        "/v1/fleet/%2e%2e",
        "/v1/fleet/.",
        "/v1/fleet/..;/control",
        "/v1/fleet/%252e%252e",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages%0a",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull%20messages",
        "/v1/fleet/Pull-Messages",
        "/v1/fleet/" + "a" * 41,
        "/V1/FLEET/pull-messages",
        "/health/../v1/control/start-run",
        "/healthz",
        "/docs",
        "/openapi.json",
        "http://127.0.0.1/v1/control/start-run",
        "*",
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_no_other_path_passes(lab: Lab, method: bytes, target: str) -> None:
    request = b"%s %s HTTP/1.1\r\nHost: lab\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    status = lab.ask_raw(request % (method, target.encode()))
    assert status.split()[1] in (b"400", b"404", b"405", b"307")
    assert not lab.upstream.heard


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_no_other_method_passes(lab: Lab, method: str) -> None:
    assert lab.ask(method, CALL).status_code == 405
    if method not in ("GET", "HEAD"):
        assert lab.ask(method, "/health").status_code == 405
    assert not lab.upstream.heard
    assert lab.ask("POST", "/health").status_code == 405


def test_a_second_request_is_not_smuggled_in_a_first_ones_body(lab: Lab) -> None:
    inner = b"POST /v1/control/start-run HTTP/1.1\r\nHost: lab\r\nContent-Length: 0\r\n\r\n"
    head = b"POST %s HTTP/1.1\r\nHost: lab\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
    lab.ask_raw(head % (CALL.encode(), len(inner) + 5) + b"0\r\n\r\n" + inner)
    assert {path for _, path, _, _ in lab.upstream.heard} <= {CALL}


def test_a_client_that_does_not_trust_the_lab_says_nothing(lab: Lab, certificates: Path) -> None:
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.post(f"https://127.0.0.1:{lab.port}{CALL}", content=b"secret", trust_env=False,
                   verify=ssl.create_default_context(cafile=str(certificates / "other-ca.crt")))  # fmt: skip
    assert not lab.upstream.heard


# ---- revoked keys --------------------------------------------------------------------------------------------------


def test_a_revoked_key_is_turned_away_and_others_pass(lab: Lab) -> None:
    for path, method in ((CALL, "POST"), ("/health", "GET")):
        answer = lab.ask(method, path, headers={HEADER: shown(BAD_KEY)})
        assert (answer.status_code, answer.text) == (403, "this node's key was revoked")
    assert not lab.upstream.heard
    assert lab.traffic.turned_away == 2
    assert lab.ask("POST", CALL, headers={HEADER: shown(GOOD_KEY)}).status_code == 200


def test_a_key_is_barred_from_the_moment_of_its_revocation(lab: Lab) -> None:
    with httpx.Client(verify=lab.trust, trust_env=False) as client:
        url, headers = f"https://127.0.0.1:{lab.port}{CALL}", {HEADER: shown(GOOD_KEY)}
        assert client.post(url, headers=headers).status_code == 200
        lab.barred.add(GOOD_KEY)
        assert client.post(url, headers=headers).status_code == 403  # on the open connection


@pytest.mark.parametrize("keys", [(GOOD_KEY, BAD_KEY), (BAD_KEY, GOOD_KEY), (b"", BAD_KEY)])
def test_a_revoked_key_beside_another_one_is_turned_away(lab: Lab, keys: tuple[bytes, bytes]) -> None:
    answer = lab.ask("POST", CALL, headers=[(HEADER.title(), shown(key)) for key in keys])
    assert answer.status_code == 403
    assert not lab.upstream.heard


@pytest.mark.parametrize("key", ["", "no base64!", "////", shown(BAD_KEY)[:-4]])
def test_what_is_no_key_is_left_to_the_superlink(lab: Lab, key: str) -> None:
    assert lab.ask("POST", CALL, headers={HEADER: key}).status_code == 200
    assert len(lab.upstream.heard) == 1


# ---- sizes and faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_call_that_is_too_large_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch, in_pieces: bool) -> None:
    monkeypatch.setattr(server.gateway, "_LARGEST", 2**18)
    body = bytes(2**18)
    assert lab.ask("POST", CALL, content=iter([body]) if in_pieces else body).status_code == 200
    answer = lab.ask("POST", CALL, content=iter([body, b"x"]) if in_pieces else body + b"x")
    assert (answer.status_code, answer.text) == (413, "the call is too large")
    assert len(lab.upstream.heard) == 1
    assert lab.traffic.calls == {200: 1, 413: 1}
    assert lab.ask("POST", CALL, content=b"small").status_code == 200  # and the next one passes


def test_a_call_that_comes_drop_by_drop_is_given_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gateway._SLOWEST_S", 0.5)

    def drops() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x"
            time.sleep(0.05)

    answer = lab.ask("POST", CALL, content=drops())
    assert (answer.status_code, answer.text) == (408, "the call came too slowly")
    assert lab.upstream.heard == []
    assert lab.ask("POST", CALL, content=b"quick").status_code == 200  # and the next one passes


@contextmanager
def before(url: str, certificates: Path) -> Iterator[Lab]:
    """A gateway before `url`."""
    traffic = Traffic()
    app = gateway(url, certificates / "lab-ca.crt", barred=frozenset, traffic=traffic)
    trust = ssl.create_default_context(cafile=str(certificates / "lab-ca.crt"))
    with running(app, certificates / "lab.crt", certificates / "lab.key") as port:
        yield Lab(port, trust, Upstream(), traffic, set())


def test_a_superlink_that_is_down_is_unavailable(certificates: Path) -> None:
    with listener() as nobody, before(f"https://127.0.0.1:{nobody.getsockname()[1]}", certificates) as lab:
        for method, path in (("POST", CALL), ("GET", "/health")):
            answer = lab.ask(method, path)
            assert (answer.status_code, answer.text) == (503, "the lab's server is starting, or down")
        assert lab.traffic.calls == {503: 2}


def test_an_impostor_behind_the_gateway_hears_nothing(certificates: Path) -> None:
    """Another program took the SuperLink's port: it has no certificate of the lab's."""
    impostor = Upstream()
    with (
        running(impostor.app(), certificates / "other.crt", certificates / "other.key") as port,
        before(f"https://127.0.0.1:{port}", certificates) as lab,
    ):
        assert lab.ask("POST", CALL, content=b"secret").status_code == 503
    assert not impostor.heard


def test_the_gateway_takes_no_proxy_of_the_environment(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with (
        running(Upstream().app(), certificates / "lab.crt", certificates / "lab.key") as port,
        before(f"https://127.0.0.1:{port}", certificates) as behind,
    ):
        assert behind.ask("GET", "/health").status_code == 200
