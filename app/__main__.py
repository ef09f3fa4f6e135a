"""The command line: arguments in, exit status out."""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

if os.getpid() == 1:
    # The first process of a container ignores what it does not handle, and the imports below take a second or two.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback of them

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from app import settings, stopping, telemetry, terminal
from app.arguments import Command, parser
from app.errors import DatabaseUnavailable, PgrecallError

if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
log = logging.getLogger("app")

FULL = {errno.ENOSPC, errno.EDQUOT}
"""There is no room for what was to be written."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0 done, 1 done in part, 2 refused, 3 migrations pending (`migrate --check`), 130 interrupted."""
    asked = parser().parse_args(arguments)
    refuse: Callable[[str], object] = terminal.say
    # SIGTERM and a terminal that is closed end like Ctrl-C does: the embedded database is stopped, not left behind.
    for number in set(stopping.signals()) - {signal.SIGINT}:
        signal.signal(number, signal.default_int_handler)
    hidden = set(telemetry.written(getattr(asked, "url", None) or ""))
    try:
        config = settings.read()
        hidden |= telemetry.secrets(config)
        telemetry.set_up(config)
        refuse = log.error if config.log_format == "json" else terminal.say
        run: Command = asked.run
        status = run(asked, config)
        if sys.stdout is not None:
            sys.stdout.flush()  # not at the interpreter's end, where nobody tells what is wrong with it
        return status  # noqa: TRY300  what is wrong with the flush is told below, too
    except PgrecallError as error:
        cause = str(error.__cause__ or "").strip().splitlines() if isinstance(error, DatabaseUnavailable) else []
        said, status = f"pgrecall: {error}" + (f" ({cause[-1].strip()})" if cause else ""), 2
    except (psycopg.Error, SQLAlchemyError) as error:
        said, status = f"pgrecall: the database refused: {(str(error).strip().splitlines() or [''])[0]}", 2
    except KeyboardInterrupt:
        terminal.say("interrupted")
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read it has what they wanted
        return 1
    except Exception as error:  # noqa: BLE001  told whole, but for what is secret in the words of others
        if isinstance(error, OSError) and error.errno in FULL:
            _drop_output()
            said, status = f"pgrecall: {error.strerror}: {error.filename or 'where the output goes'}", 1
        else:
            said, status = traceback.format_exc().rstrip(), 1
    refuse(telemetry.blotted(said, hidden))
    return status


def _drop_output() -> None:
    """What could not be written would be tried again, and complained of, when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
