"""Connections: how many, request heads that come too slowly or are too large, answers that nobody reads."""

import asyncio
from collections import deque
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api import problems

MAX_HEAD = 65_536
"""Bytes of a request line with its headers."""

MOST_CONNECTIONS = 10_000
"""Open connections of a process, each of which takes some 20 kB when nothing is asked over it."""

OTHER_FILES = 128
"""Files a process may have open beside its connections to clients."""

KEEP_ALIVE = 75
"""Seconds an idle connection is kept; more than the usual 60 of the proxies in front, so that they close first."""


class HeadLimits(HttpToolsProtocol):
    """A uvicorn connection that must bring the head of each request in time and within MAX_HEAD bytes.

    There are at most `most` of them: idle ones make room, and where none is idle a new one gets 503.

    One that takes none of an answer for `write_timeout` seconds is cut: what makes the answer waits for it and would
    wait for ever. uvicorn has none of these limits (issue 157 there): its one time-out is for idle connections, and any
    byte ends that.
    """

    def __init__(self, header_timeout: float, write_timeout: float, most: int, **given: object) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self._most = most
        self._idle_since = 0.0
        self._header_timeout = header_timeout
        self._write_timeout = write_timeout
        self._unread: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = self._heard = self._offered = False
        self._told = self._held = 0
        self._unanswered: deque[RequestResponseCycle] = deque()

    def _expect_head(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._idle_since = self.loop.time()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the first head. Where there are too many connections, the one that has been idle longest makes room."""
        super().connection_made(transport)
        self._expect_head(self._header_timeout)
        if len(self.connections) > self._most:
            idle = [
                each for each in self.connections if isinstance(each, HeadLimits) and each.idle and each is not self
            ]
            if idle:
                min(idle, key=lambda each: each._idle_since).transport.abort()  # noqa: SLF001  of this class
            else:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are in use; try again")

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, nor its body awaited."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more, and tell every request of it; uvicorn tells the last one that came."""
        self._expect_head(None)
        self._expect_reading(None)
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def _expect_reading(self, seconds: float | None) -> None:
        if self._unread is not None:
            self._unread.cancel()
        # Closing would wait until what is written has been read.
        self._unread = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def pause_writing(self) -> None:
        """Expect the client to read: what was written fills the buffers."""
        super().pause_writing()
        self._expect_reading(self._write_timeout)

    def resume_writing(self) -> None:
        """Expect nothing: it has read."""
        self._expect_reading(None)
        super().resume_writing()

    def on_message_begin(self) -> None:
        """Expect the rest of a head, unless a request is being answered; the first is expected already."""
        super().on_message_begin()
        self._in_head = self._heard = True
        self._told = self._held = 0
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head(self._header_timeout)

    def on_headers_complete(self) -> None:
        """Expect nothing: the body is the application's to wait for."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError  # as in _tell
            self._offered = True
            return
        self._in_head, self._heard = False, True
        self._expect_head(None)
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # its client would take the word to go on for the answer
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Hear that there is a body."""
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole, unless it is still to be read."""
        if not self._offered:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Expect the next head; what is left of a body that was not read has to be over by then, too."""
        self._unanswered.popleft()
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._expect_head(self._header_timeout if self._in_head else KEEP_ALIVE)

    def on_url(self, url: bytes) -> None:
        """Count a piece of the request line."""
        super().on_url(url)
        self._tell(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header. One that follows a body comes after all who look at headers have done so, and is left out."""
        if self._in_head:
            super().on_header(name, value)
        self._tell(len(name) + len(value) + len(": \r\n"))

    def _tell(self, size: int) -> None:
        self._told += size
        if self._told > MAX_HEAD:
            raise ValueError  # for the parser, which makes it the error that send_400_response answers

    def data_received(self, data: bytes) -> None:
        """Count what the parser holds back: it tells of a header when it is whole, and one may never end."""
        self._heard = False
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("what came is no HTTP/1.1 request")
            return
        self._held = 0 if self._heard else self._held + len(data)
        if self._held > MAX_HEAD:
            self.send_400_response("")

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offered:
                # Where a request offers to go on in another protocol, as the first one of Java's client does, the parser
                # takes its body and all that follows for that protocol. So it reads the head again without the offer.
                self._offered = False
                version = self.parser.get_http_version().encode()
                head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
                head += [b"%s: %s" % each for each in self.headers if each[0] != b"upgrade"]
                data = b"\r\n".join([*head, b"", b""]) + data[offered.args[0] :]
            else:
                return

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request with a problem (RFC 9457) and hang up."""
        status, detail = HTTPStatus.BAD_REQUEST, msg
        if max(self._told, self._held) > MAX_HEAD:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            detail = f"request line and headers are too large; allowed: at most {MAX_HEAD} bytes"
        self._refuse(status, detail)

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        if any(each.response_started or not each.more_body for each in self._unanswered):
            self.transport.close()  # a client would take this for an answer that is still to come, or for a part of it
            return
        body = problems.encoded(status, detail)
        self.transport.write(
            f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: {problems.MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.close()
