"""Keeping the embedded server up: a thread in each process that uses it starts it again when it has died.

Whoever notices first does it; the others find it running. Requests meanwhile are told that the database cannot be reached.
"""

import logging
import threading

from app.embedded import Server
from app.errors import SetupError

log = logging.getLogger(__name__)

EVERY = 0.25
"""Seconds between two looks."""

LONGEST = 30.0
"""Most seconds between two tries of a start that fails; each waits twice as long as the one before."""


class Keeper:
    """Looks after a server until it is told to stop, which must be before the server is closed."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="keeper of the embedded database", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more; waits for a start that is under way."""
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        wait = EVERY
        while not self._over.wait(wait):
            try:
                if self._server.revive():
                    log.warning("the embedded database had died and was started again")
                wait = EVERY
            except (SetupError, OSError) as error:
                wait = min(max(2 * wait, 1.0), LONGEST)
                log.error("the embedded database has died and does not start, next try in %.0f s: %s", wait, error)  # noqa: TRY400  the message ends with PostgreSQL's log
