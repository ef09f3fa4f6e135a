"""The HTTP server: a listening socket, uvicorn with limits on request heads, worker processes, an orderly end.

A single worker runs in this process. Several are processes of their own that share the socket and are watched from here;
a socket pair ties each of them to this process: over it comes the word that the worker serves, and its closing tells
the worker to finish, whether this process chose to close it or was killed.
"""

import asyncio
import logging
import os
import pkgutil
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from litestar import Litestar

from app import settings as environment
from app import stopping, telemetry
from app.api.front import Front, hosts
from app.api.head import KEEP_ALIVE, MOST_CONNECTIONS, OTHER_FILES, HeadLimits
from app.errors import SetupError
from app.settings import Settings

log = logging.getLogger(__name__)

UNWIND = 2.0
"""Seconds cancelled requests get to roll back, and a worker gets beyond its own time-outs before it is killed."""

BACKLOG = 2048
INTERRUPTED = 128 + signal.SIGINT


def serve(
    target: str,
    *,
    host: str,
    port: int,
    workers: int,
    settings: Settings,
    on_started: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; returns the exit status: 0, 1 when the lifespan hung, 130 when interrupted early.

    `target` is `module:function`, a factory without arguments that returns the Litestar application and reads its
    settings from the environment; every worker calls it. Port 0 takes a free one. `on_started` gets the address
    (`http://127.0.0.1:8000`) once every worker serves.

    On a signal no new connection is accepted; requests under way have `settings.shutdown_timeout` seconds to finish and
    are cancelled then; the application's lifespan, which ends last, has as long again. A worker that dies is replaced.

    Raises SetupError when the address cannot be listened on or a worker ends before it serves, and whatever the factory
    and the lifespan raise. To be called from the main thread.
    """
    with _listen(host, port) as listener:
        started = partial(on_started or log.info, _address(listener))
        try:
            if workers == 1:
                return _run(_work(target, listener, settings, started))
            return _run(_supervise(target, listener, workers, settings, started))
        except KeyboardInterrupt:
            return INTERRUPTED


def _run(work: Coroutine[Any, Any, int]) -> int:
    try:
        return asyncio.run(work)
    except BaseExceptionGroup as group:
        # Litestar's lifespan holds a task group, and so does _supervise.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _listen(host: str, port: int) -> socket.socket:
    with ExitStack() as failed:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # Without the protocol asyncio leaves Nagle's algorithm on: 44 ms for each answer on a kept connection.
            listener = failed.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise SetupError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
        failed.pop_all()
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, telling when it serves, and ending without raising again the signal that ended it."""

    def __init__(self, app: Litestar, address: str, settings: Settings, on_started: Callable[[], object]) -> None:
        config = uvicorn.Config(
            Front(app, hosts(settings.allowed_hosts, address)),
            http=partial(HeadLimits, settings.header_timeout, settings.body_timeout, _most_connections()),  # type: ignore[arg-type]
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
        """Take signals while serving; what comes after is the caller's, who has more to stop than this."""
        with _signals(self.handle_exit):
            yield


def _most_connections() -> int:
    """How many connections fit into the files this process may open, of which it takes as many as it is allowed.

    The usual soft limit of 1,024 is for programs that use select(): a thousand idle clients would keep out all others.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(soft // 2, min(soft, wanted) - OTHER_FILES)


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in stopping.signals()}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


async def _work(
    target: str,
    listener: socket.socket,
    settings: Settings,
    on_started: Callable[[], object],
    tie: socket.socket | None = None,
) -> int:
    app: Litestar = pkgutil.resolve_name(target)()
    server = Server(app, listener.getsockname()[0], settings, on_started)
    if tie is not None:
        loop, this = asyncio.get_running_loop(), asyncio.current_task()

        def finish() -> None:
            loop.remove_reader(tie)
            if server.started:
                server.should_exit = True
            elif this is not None:
                this.cancel()

        loop.add_reader(tie, finish)
    # Entered here and not by uvicorn, which would print a traceback of what the lifespan raises, and exit.
    lifespan = AsyncExitStack()
    await lifespan.enter_async_context(app.lifespan())
    status = 0
    try:
        await server.serve([listener])
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=UNWIND)
    finally:
        try:
            async with asyncio.timeout(settings.shutdown_timeout):
                await lifespan.aclose()
        except TimeoutError:
            log.error("the application did not close within %d seconds", settings.shutdown_timeout)  # noqa: TRY400
            status = 1
    return status


async def _supervise(
    target: str, listener: socket.socket, workers: int, settings: Settings, on_started: Callable[[], object]
) -> int:
    loop = asyncio.get_running_loop()
    patience = 2 * (settings.shutdown_timeout + UNWIND)
    awaited = set(range(workers))

    async def keep(number: int) -> None:
        while True:
            async with _worker(target, listener, patience) as (process, tie):
                if not await loop.sock_recv(tie, 1):
                    raise SetupError(f"worker {number} ended before it served; why stands above")
                if number in awaited:
                    awaited.remove(number)
                    if not awaited:
                        on_started()
                log.error("worker %d ended with status %d; starting another", number, await process.wait())

    def stop() -> None:
        # The first time each task tells its worker to finish and waits, the second time it kills it.
        listener.close()
        for task in tasks:
            task.cancel()

    with _signals(lambda *_: loop.call_soon_threadsafe(stop)):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keep(number)) for number in range(workers)]
    return INTERRUPTED if awaited else 0


@asynccontextmanager
async def _worker(
    target: str, listener: socket.socket, patience: float
) -> AsyncIterator[tuple[asyncio.subprocess.Process, socket.socket]]:
    tie, theirs = socket.socketpair()
    tie.setblocking(False)
    with tie:
        with theirs:
            shared = (listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", __name__, target, *map(str, shared)),
                # Modules come from where they came from here: the current folder may hold another `app`.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=shared,
                process_group=0,  # the terminal's Ctrl-C is for this process, which then tells its workers
            )
        try:
            yield process, tie
        finally:
            tie.close()
            try:
                async with asyncio.timeout(patience):
                    await process.wait()
            except (TimeoutError, asyncio.CancelledError):
                process.kill()
                await process.wait()


def _main(target: str, listener: str, tie: str) -> int:
    settings = environment.read()
    telemetry.set_up(settings)
    with socket.socket(fileno=int(listener)) as shared, socket.socket(fileno=int(tie)) as parent:

        def tell() -> None:
            with suppress(OSError):
                parent.send(b"1")

        try:
            return _run(_work(target, shared, settings, tell, parent))
        except SetupError as error:
            log.error("%s", error)  # noqa: TRY400  the message says what to do; a traceback would bury it
            return 1
        except asyncio.CancelledError:
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
