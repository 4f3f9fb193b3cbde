"""The node's ClientApp process: it answers each message that the SuperNode received, one after the other.

Flower would start a process for each message, and run in it the code of whatever bundle the lab sent. This one runs
the installed app and never opens a bundle; and it imports nothing twice.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

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

_LOOK_S = 0.2  # between two looks for a message
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_NOT_ANSWERED = "this hospital's app does not answer such a message"

_log = logging.getLogger("flwr")


def answer_messages(address: str, secret: bytes, app: ClientApp) -> None:
    """Answer the messages of the SuperNode whose Runtime API is at `address`, for ever.

    Raises KeyboardInterrupt when the SuperNode no longer knows the message that is being answered, as after a restart.
    """
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
    with closing(_client(address, signed)) as tasks:
        while True:
            task = tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if task.token:
                _answer(address, task.token, app)
            else:
                time.sleep(_LOOK_S)


def _answer(address: str, token: str, app: ClientApp) -> None:
    with closing(_client(address, RuntimeTokenHttpInterceptor(token))) as client:
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        context, end, details = None, SubStatus.FAILED, "no answer"
        try:
            message, context, _, _ = pull_task_input(client)  # run and bundle: not looked at
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


def _client(address: str, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # loopback
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
        retry_invoker=make_simple_http_retry_invoker(),
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
