"""`consilium-lab serve`: the SuperLink and what starts ServerApps, kept running; the gateway before them; and the lab's
list of hospitals, which the SuperLink follows."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import uvicorn
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.addresses import parse_address
from common.children import Child, stop_all
from common.errors import ConsiliumError, RunError
from common.service import health, metrics, only_instance, open_log
from server.certificates import days_left, read_certificate
from server.enrolment import EnrolledSite, enrolled_sites
from server.flower import Control, superlink_children
from server.gateway import Traffic, gateway, key_bytes
from server.lab import Lab, renew_certificate

SERVICE = "serve"

_TICK_S = 0.2
_FOLLOW_S, _LOOK_S = 1.0, 5.0  # between two looks at the enrolled sites; at the nodes
_RENEW_S = 3600.0
_START_S = 60.0


@dataclass(eq=False)
class Standing:
    """What the service knows of itself; read by metrics and health."""

    traffic: Traffic = field(default_factory=Traffic)
    online: dict[str, bool] = field(default_factory=dict)  # by site
    sites: Mapping[str, EnrolledSite] = field(default_factory=dict)  # as last read
    barred: frozenset[bytes] = frozenset()  # keys that are turned away
    children: list[Child] = field(default_factory=list)
    certificate_days: float = 0.0
    serving: threading.Event = field(default_factory=threading.Event)

    def collect(self) -> Iterator[Metric]:
        """As Prometheus wants it."""
        site_online = GaugeMetricFamily("consilium_site_online", "1 if the site's node is connected", labels=["site"])
        for site, is_online in self.online.items():
            site_online.add_metric([site], float(is_online))
        yield site_online
        calls = CounterMetricFamily("consilium_gateway_calls", "Calls of nodes by HTTP status", labels=["status"])
        for status, count in dict(self.traffic.calls).items():
            calls.add_metric([str(status)], count)
        yield calls
        size = CounterMetricFamily("consilium_gateway_bytes", "Bytes through the gateway", labels=["direction"])
        size.add_metric(["in"], self.traffic.bytes_in)
        size.add_metric(["out"], self.traffic.bytes_out)
        yield size
        yield CounterMetricFamily(
            "consilium_gateway_turned_away", "Calls with a revoked key", value=self.traffic.turned_away
        )
        starts = CounterMetricFamily("consilium_program_starts", "Starts of Flower's programs", labels=["program"])
        for child in self.children:
            starts.add_metric([child.name], child.starts)
        yield starts
        yield GaugeMetricFamily(
            "consilium_certificate_days", "Days until the server's certificate ends", value=self.certificate_days
        )
        yield GaugeMetricFamily(
            "consilium_serving", "1 if the lab's server answers", value=float(self.serving.is_set())
        )


def serve(lab: Lab, stop: threading.Event) -> None:
    """Serve until `stop` is set. Raises RunError if the lab is served already, or a port is taken."""
    with ExitStack() as stack:
        stack.enter_context(only_instance(lab.folder, SERVICE))
        log = open_log(lab.folder / "log" / "lab.log", name="lab")
        standing = Standing()
        renew_certificate(lab)
        _read_sites(lab, standing, log)
        standing.children = superlink_children(lab)
        stack.enter_context(health(lab.config.health_port, standing.serving))
        stack.enter_context(metrics(lab.config.metrics_port, standing))
        stack.callback(stop_all, standing.children)
        while not stop.is_set():
            standing.certificate_days = days_left(read_certificate(lab.server_certificate))
            with _gateway(lab, standing):
                log.info("serving", extra={"fields": {"listen": lab.config.listen, "address": lab.config.address}})
                _tend(lab, standing, stop, log)
            if not stop.is_set():  # a new certificate: everything that shows the old one starts again
                stop_all(standing.children)
        log.info("stopped")


def _tend(lab: Lab, standing: Standing, stop: threading.Event, log: logging.Logger) -> None:
    """Keep everything running until `stop`, or until the certificate was renewed."""
    followed = looked = renewed = -math.inf
    shown = lab.server_certificate.stat().st_mtime_ns
    while not stop.wait(_TICK_S):
        now = time.monotonic()
        for child in standing.children:
            child.tend(log)
        if now - followed >= _FOLLOW_S:
            followed = now
            _read_sites(lab, standing, log)
            if now - looked >= _LOOK_S or _active(standing) != set(standing.online):
                looked = now
                _follow(lab, standing, log)
            if lab.server_certificate.stat().st_mtime_ns != shown:
                log.info("another server certificate is there")
                return
        if now - renewed >= _RENEW_S:
            renewed = now
            renew_certificate(lab)
            standing.certificate_days = days_left(read_certificate(lab.server_certificate))


def _active(standing: Standing) -> set[str]:
    return {name for name, site in standing.sites.items() if site.active}


def _read_sites(lab: Lab, standing: Standing, log: logging.Logger) -> None:
    """The list as it is now; one that cannot be read leaves the last one in force."""
    try:
        standing.sites = enrolled_sites(lab)
    except ConsiliumError as error:
        log.error("the list of sites cannot be read: %s", error)
    standing.barred = frozenset(key_bytes(site.node_key) for site in standing.sites.values() if not site.active)


def _follow(lab: Lab, standing: Standing, log: logging.Logger) -> None:
    """Let in who is enrolled, and nobody else."""
    try:
        with Control(lab) as control:
            wanted = {name: key_bytes(standing.sites[name].node_key) for name in _active(standing)}
            known = control.nodes()
            for node in known:
                if node.key not in wanted.values():
                    control.unregister(node)
                    log.info("site shut out", extra={"fields": {"site": node.name}})
            there = {node.key for node in known}
            for name, key in wanted.items():
                if key not in there:
                    control.register(name, key)
                    log.info("site let in", extra={"fields": {"site": name}})
            online = {node.name: node.online for node in known if node.key in wanted.values()}
    except ConsiliumError as error:
        standing.serving.clear()
        log.debug("the SuperLink does not answer: %s", error)
        return
    for name, is_online in online.items():
        if standing.online.get(name) != is_online:
            log.info("site %s", "connected" if is_online else "gone", extra={"fields": {"site": name}})
    standing.online = {name: online.get(name, False) for name in wanted}
    standing.serving.set()


@contextmanager
def _gateway(lab: Lab, standing: Standing) -> Iterator[None]:
    """The gateway, in a thread of its own. Raises RunError if its address is taken."""
    host, port = parse_address(lab.config.listen)
    app = gateway(
        f"https://127.0.0.1:{lab.config.superlink_port}",
        lab.authority.certificate,
        barred=lambda: standing.barred,
        traffic=standing.traffic,
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=str(lab.server_certificate),
        ssl_keyfile=str(lab.server_key),
        log_config=None,
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_run_quietly, args=(server,), name="gateway", daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RunError(f"the gateway cannot listen on {lab.config.listen}: is the port taken?")
        time.sleep(0.02)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10.0)


def _run_quietly(server: uvicorn.Server) -> None:
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that it cannot bind
        return
