"""The node's ClientApp process: it answers the messages that the SuperNode received.

Flower would start a program for each message, and run in it the code of whatever bundle the lab sent. This one runs the
installed app and never opens a bundle; and it imports everything once, and forks for each message. A message that never
comes whole, as of a study that was stopped meanwhile, keeps its own process waiting and no other.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx
from flwr.app import Message
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.app import app
from common.children import die_with_parent

_LOOK_S = 0.2  # between two looks for a message
_ARRIVES_S = 900  # for a message's arrays; then its process ends
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_NOT_ANSWERED = "this hospital's app does not answer such a message"

_log = logging.getLogger("flwr")


def answer_messages(address: str, secret: bytes, app: ClientApp) -> None:
    """Answer the messages of the SuperNode whose Runtime API is at `address`, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
    with closing(_client(address, signed, tries=1)) as tasks:
        while True:
            try:
                token = tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token
            except httpx.TransportError:  # the SuperNode is being started
                token = ""
            if not token:
                time.sleep(_LOOK_S)
            elif os.fork() == 0:
                try:
                    die_with_parent()
                    _answer(address, token, app)
                finally:
                    os._exit(0)


def _answer(address: str, token: str, app: ClientApp) -> None:
    with closing(_client(address, RuntimeTokenHttpInterceptor(token))) as client:
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        context, end, details = None, SubStatus.FAILED, "no answer"
        try:
            signal.alarm(_ARRIVES_S)
            message, context, _, _ = pull_task_input(client)  # run and bundle: not looked at
            signal.alarm(0)
            push_message(client, _reply(app, message, context), context)
            end, details = SubStatus.COMPLETED, ""
        except Exception:
            _log.exception("a message was not answered")
        finally:
            push_task_output(client, context, end, details)
            heartbeat.stop()


def _reply(app: ClientApp, message: Message, context: object) -> Message:
    try:
        return app(message=message, context=context)  # type: ignore[arg-type]
    except Exception:  # its text would travel to the lab
        _log.exception("a message of type %r was not understood", message.metadata.message_type)
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=_NOT_ANSWERED), reply_to=message)


def _client(address: str, interceptor: ProtobufClientInterceptor, *, tries: int | None = None) -> RuntimeHttpClient:
    retry = make_simple_http_retry_invoker()
    retry.max_tries = tries
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # loopback
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
        retry_invoker=retry,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until stopped: `python -m client.app_process ADDRESS SECRET_FILE`."""
    parser = argparse.ArgumentParser(description="The ClientApp process of a hospital's node.")
    parser.add_argument("address", help="the SuperNode's Runtime API, HOST:PORT on loopback")
    parser.add_argument("secret", type=Path, help="the file of the secret that the SuperNode shares")
    given = parser.parse_args(arguments)
    answer_messages(given.address, given.secret.read_bytes(), app)


if __name__ == "__main__":
    main()
