"""One line per log record on stderr, `name=value` or JSON, with the id of its request; secrets blotted out."""

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

from msgspec import structs

from app.settings import SECRET, Settings, passwords

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request being answered, `-` outside of one."""

BLOT = "********"
SHORT = 3
"""Characters of a part of a password that is too short to be told from other text."""
CHATTY = ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "uvicorn", "alembic")
"""Libraries whose info records repeat what we say ourselves."""

_KEY = re.compile(r"(pgr_[a-z0-9]{8}_)[A-Za-z0-9]{32}")
"""A key of the API; its prefix is no secret."""
_DETAIL = re.compile(r"DETAIL: .*?(?=\n(?:HINT|CONTEXT|QUERY|\[SQL|\(Background|\n|Traceback| *File)|\Z)", re.DOTALL)
"""What PostgreSQL adds to an error: often the row at fault, with the text of a document in it."""
_PLAIN = re.compile(r"[\x21\x23-\x3c\x3e-\x7e]+")


def set_up(settings: Settings) -> None:
    """Log to stderr at the level of the settings; what was set up before is replaced."""
    handler = logging.StreamHandler()
    handler.setFormatter((Lines if settings.log_format == "lines" else Objects)(secrets(settings)))
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))


def secrets(settings: Settings) -> frozenset[str]:
    """The values that must not be seen: keys, and the passwords inside URLs as written and as meant."""
    return frozenset(_secrets(settings)) - {""}


def _secrets(settings: Settings) -> Iterator[str]:
    for name, value in structs.asdict(settings).items():
        if name in SECRET and value:
            yield value
        elif "url" in name and value:
            yield from written(value)


def written(url: str) -> Iterator[str]:
    """The password in a URL as written and as meant, and its parts: of a URL that is none, libpq names one in its complaint."""
    for password in passwords(url):
        yield from (password, unquote(password))
        yield from (part for part in re.split(r"[/?#@:\[\]]", password) if len(part) > SHORT)


def blotted(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets, and without what is secret of keys of the API. Longest first: a secret that holds another one must go as a whole."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, BLOT)
    return _KEY.sub(rf"\g<1>{BLOT}", text)


class Lines(logging.Formatter):
    """`time=… level=… logger=… request_id=… message=…`, what a record says besides, and, for an exception, `trace=…`.

    A record says more by `extra={"facts": {…}}`: values are texts, numbers, or how often something happened by its name.
    A value that is not plain stands as a JSON string in ASCII: a record is one line whatever it says.
    """

    def __init__(self, secrets: frozenset[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """One record as one line."""
        shown = ((name, _text(value)) for name, value in self._fields(record).items())
        return " ".join(f"{name}={value if _PLAIN.fullmatch(value) else json.dumps(value)}" for name, value in shown)

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        trace = _DETAIL.sub("DETAIL: left out", self.formatException(record.exc_info)) if record.exc_info else ""
        return {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id.get(),
            "message": self._blotted(record.getMessage()),
            **{name: self._blotted(value) for name, value in getattr(record, "facts", {}).items()},
            **({"trace": self._blotted(trace)} if trace else {}),
        }

    def _blotted(self, value: Any) -> Any:
        return blotted(value, self._secrets) if isinstance(value, str) else value


class Objects(Lines):
    """A JSON object a line, with the same names; numbers stay numbers."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as one line."""
        return json.dumps(self._fields(record))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return str(value)
