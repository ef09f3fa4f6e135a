"""A way to PostgreSQL that breaks after so many bytes."""

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import quote

import psycopg


class Proxy:
    """Forwards to the server of a libpq URL. `url` leads through it; `cut` says when it breaks everything that is open."""

    def __init__(self, url: str) -> None:
        parts = psycopg.conninfo.conninfo_to_dict(url)
        host, port = str(parts.get("host", "localhost")), str(parts.get("port", "5432"))
        self._target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        login = quote(str(parts["user"])) + (f":{quote(str(parts['password']))}" if "password" in parts else "")
        self.url = f"postgresql://{login}@127.0.0.1:{self._listener.getsockname()[1]}/{parts['dbname']}?sslmode=disable"
        self._lock = threading.Lock()
        self._left: dict[str, int | None] = {"sent": None, "received": None}
        self.counted = {"sent": 0, "received": 0}
        self._open: set[socket.socket] = set()

    def cut(self, direction: str, after: int | None) -> None:
        """Break once so many more bytes were sent to, or received from, the server; None: never."""
        with self._lock:
            self._left = {"sent": None, "received": None} | {direction: after}
            self.counted = {"sent": 0, "received": 0}

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._break()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
                server.connect(self._target)
                with self._lock:
                    self._open |= {client, server}
                for direction, source, sink in (("sent", client, server), ("received", server, client)):
                    threading.Thread(target=self._pump, args=(direction, source, sink), daemon=True).start()

    def _pump(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                with self._lock:
                    left = self._left[direction]
                    self.counted[direction] += len(data)
                    if left is not None:
                        self._left[direction] = left - len(data)
                if left is not None and left <= len(data):
                    sink.sendall(data[: max(left, 0)])
                    self.cut(direction, None)
                    self._break()
                    return
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _break(self) -> None:
        # what is opened meanwhile is not among them, and must be found by the next
        with self._lock:
            broken, self._open = self._open, set()
        for each in broken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
