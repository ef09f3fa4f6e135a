"""The command line: arguments in, exit status out."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

if os.getpid() == 1:
    # The first process of a container ignores what it does not handle, and the imports below take a second or two.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from app import settings, telemetry, terminal
from app.arguments import Command, parser
from app.errors import DatabaseUnavailable, PgrecallError

log = logging.getLogger("app")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0 done, 1 done in part, 2 refused, 3 migrations pending (`migrate --check`), 130 interrupted."""
    asked = parser().parse_args(arguments)
    refuse: Callable[[str], object] = terminal.say
    # SIGTERM ends like Ctrl-C does: the embedded database is stopped, not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hidden = set(telemetry.written(getattr(asked, "url", None) or ""))
    try:
        config = settings.read()
        hidden |= telemetry.secrets(config)
        telemetry.set_up(config)
        refuse = log.error if config.log_format == "json" else terminal.say
        run: Command = asked.run
        return run(asked, config)
    except PgrecallError as error:
        cause = str(error.__cause__ or "").strip().splitlines() if isinstance(error, DatabaseUnavailable) else []
        said, status = f"pgrecall: {error}" + (f" ({cause[-1].strip()})" if cause else ""), 2
    except (psycopg.Error, SQLAlchemyError) as error:
        said, status = f"pgrecall: the database refused: {(str(error).strip().splitlines() or [''])[0]}", 2
    except KeyboardInterrupt:
        terminal.say("interrupted")
        return 130
    except Exception:  # noqa: BLE001  told whole, but for what is secret in the words of others
        said, status = traceback.format_exc().rstrip(), 1
    refuse(telemetry.blotted(said, hidden))
    return status


if __name__ == "__main__":
    sys.exit(main())
