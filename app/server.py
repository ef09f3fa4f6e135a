"""The HTTP server: a listening socket, uvicorn with limits on request heads, worker processes, an orderly end.

A single worker runs in this process. Several are processes of their own that share the socket and are watched from here;
a socket pair ties each of them to this process: over it comes the word that the worker serves, and its closing tells
the worker to finish, whether this process chose to close it or was killed.
"""

import asyncio
import logging
import pkgutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from http import HTTPStatus

import msgspec
import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import settings as environment
from app import telemetry
from app.errors import SetupError
from app.settings import Settings

log = logging.getLogger(__name__)

MAX_HEAD = 65_536
"""Bytes of a request line with its headers."""

KEEP_ALIVE = 75
"""Seconds an idle connection is kept; more than the usual 60 of the proxies in front, so that they close first."""

UNWIND = 2.0
"""Seconds cancelled requests get to roll back, and a worker gets beyond its own time-outs before it is killed."""

BACKLOG = 2048


def serve(
    target: str,
    *,
    host: str,
    port: int,
    workers: int,
    settings: Settings,
    on_started: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status: 0, or 130 when interrupted while starting or twice.

    `target` is `module:function`, a factory without arguments that returns the Litestar application and reads its
    settings from the environment; every worker calls it. Port 0 takes a free one. `on_started` gets the address
    (`http://127.0.0.1:8000`) once every worker serves.

    On a signal no new connection is accepted; requests under way have `settings.shutdown_timeout` seconds to finish and
    are cancelled then; the application's lifespan, which ends last, has as long again. A worker that dies is replaced.

    Raises SetupError when the address cannot be listened on or a worker ends before it serves, TimeoutError when the
    lifespan did not end in time, and whatever the factory and the lifespan raise. To be called from the main thread.
    """
    with _listen(host, port) as listener:
        started = partial(on_started or log.info, _address(listener))
        try:
            if workers == 1:
                asyncio.run(_work(target, listener, settings, started))
            else:
                asyncio.run(_supervise(target, listener, workers, settings, started))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, address[1]), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SetupError(f"cannot listen on {host}, port {port}: {error.strerror}") from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class HeadLimits(HttpToolsProtocol):
    """A uvicorn connection that must bring the head of each request in time and within MAX_HEAD bytes.

    uvicorn has neither limit (issue 157 there): its one time-out is for idle connections, and any byte ends that.
    """

    def __init__(self, header_timeout: float, **given: object) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self._header_timeout = header_timeout
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = False
        self._told = self._held = 0

    def _expect_head(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the first head."""
        super().connection_made(transport)
        self._expect_head(self._header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._expect_head(None)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Expect the rest of the head that begins; the first one has been expected since the connection was made."""
        super().on_message_begin()
        self._in_head = True
        self._told = self._held = 0
        if self.cycle is not None:
            self._expect_head(self._header_timeout)

    def on_headers_complete(self) -> None:
        """Expect nothing: the body is the application's to wait for."""
        self._in_head = False
        self._expect_head(None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Expect another request; what is left of a body that was not read has to be over by then, too."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._expect_head(KEEP_ALIVE)

    def on_url(self, url: bytes) -> None:
        """Count a piece of the request line."""
        super().on_url(url)
        self._tell(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        super().on_header(name, value)
        self._tell(len(name) + len(value) + len(": \r\n"))

    def _tell(self, size: int) -> None:
        self._told += size
        if self._told > MAX_HEAD:
            raise ValueError  # for the parser, which makes it the error that send_400_response answers

    def data_received(self, data: bytes) -> None:
        """Count what the parser holds back: it tells of a header when it is whole, and one may never end."""
        in_head = self._in_head
        super().data_received(data)
        if in_head and self._in_head and not self.transport.is_closing():
            self._held += len(data)
            if self._held > MAX_HEAD:
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request with a problem (RFC 9457) and hang up."""
        status, detail = HTTPStatus.BAD_REQUEST, msg
        if max(self._told, self._held) > MAX_HEAD:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            detail = f"request line and headers are too large; allowed: at most {MAX_HEAD} bytes"
        problem = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail}
        body = msgspec.json.encode(problem)
        self.transport.write(
            f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
        )
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, telling when it serves, and ending without raising again the signal that ended it."""

    def __init__(self, app: Litestar, settings: Settings, on_started: Callable[[], object]) -> None:
        config = uvicorn.Config(
            app,
            http=partial(HeadLimits, settings.header_timeout),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=settings.shutdown_timeout,
        )
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and tell."""
        await super().startup(sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while serving; the caller has something to do after they came."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def _work(
    target: str,
    listener: socket.socket,
    settings: Settings,
    on_started: Callable[[], object],
    tie: socket.socket | None = None,
) -> None:
    app: Litestar = pkgutil.resolve_name(target)()
    server = Server(app, settings, on_started)

    def finish() -> None:
        server.should_exit = True
        asyncio.get_running_loop().remove_reader(tie)

    if tie is not None:
        asyncio.get_running_loop().add_reader(tie, finish)
    # The lifespan is entered here and not by uvicorn, which would print what it raises and exit.
    lifespan = AsyncExitStack()
    await lifespan.enter_async_context(app.lifespan())
    try:
        await server.serve([listener])
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=UNWIND)
    finally:
        async with asyncio.timeout(settings.shutdown_timeout):
            await lifespan.aclose()


async def _supervise(
    target: str, listener: socket.socket, workers: int, settings: Settings, on_started: Callable[[], object]
) -> None:
    patience = 2 * settings.shutdown_timeout + 2 * UNWIND
    waiting = set(range(workers))

    async def keep(number: int) -> None:
        while True:
            async with _worker(target, listener, patience) as (process, tie):
                if not await asyncio.get_running_loop().sock_recv(tie, 1):
                    raise SetupError(f"worker {number} ended before it served; its message stands above")
                if waiting and not waiting.discard(number) and not waiting:
                    on_started()
                log.error("worker %d ended with status %d; starting another one", number, await process.wait())

    def stop() -> None:
        listener.close()
        for task in tasks:
            task.cancel()

    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop)
    tasks = [asyncio.create_task(keep(number)) for number in range(workers)]
    ...
