"""What clients were told, and so what may be stored: the judge of a crash."""

import itertools
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

Key = tuple[str, str]
"""Tenant and document."""


@dataclass(eq=False)
class Attempt:
    """One write of one document: `content` None deletes it. `acknowledged` None: nobody was told how it ended."""

    key: Key
    content: str | None
    mark: int
    batch: int
    began: float
    settled: float | None = None
    acknowledged: bool = False


class Ledger:
    """Every attempt since the last look, by document. Safe for threads."""

    def __init__(self) -> None:
        self._attempts: dict[Key, list[Attempt]] = defaultdict(list)
        self._lock = threading.Lock()
        self._marks = itertools.count(1)
        self.acknowledged = 0
        self.in_doubt = 0

    def mark(self) -> int:
        """A number that no two writes share."""
        return next(self._marks)

    def begin(self, writes: dict[Key, tuple[str | None, int]]) -> list[Attempt]:
        """Writes that are about to be asked for together, all or none."""
        batch = self.mark()
        with self._lock:
            made = [Attempt(key, *write, batch, time.monotonic()) for key, write in writes.items()]
            for attempt in made:
                self._attempts[attempt.key].append(attempt)
        return made

    def settle(self, attempts: list[Attempt], *, acknowledged: bool) -> None:
        """The answer came, or will never come."""
        with self._lock:
            for attempt in attempts:
                attempt.settled = time.monotonic()
                attempt.acknowledged = acknowledged
            self.acknowledged += len(attempts) * acknowledged
            self.in_doubt += len(attempts) * (not acknowledged)

    def refuse(self, attempts: list[Attempt]) -> None:
        """It was refused as a matter of course: it did not happen."""
        with self._lock:
            for attempt in attempts:
                self._attempts[attempt.key].remove(attempt)

    def known(self, tenant: str | None = None) -> list[Key]:
        """Documents that were written at some time."""
        with self._lock:
            return [key for key in self._attempts if tenant in (None, key[0])]

    def latest(self, key: Key) -> str | None:
        """The text that was last sent."""
        with self._lock:
            attempts = self._attempts.get(key)
            return attempts[-1].content if attempts else None

    def possible(self, key: Key) -> list[Attempt]:
        """The attempts whose outcome may be what is stored: those that no acknowledged one came wholly after."""
        attempts = self._attempts[key]
        return [
            each
            for each in attempts
            if not any(
                later.acknowledged and each.settled is not None and later.began > each.settled for later in attempts
            )
        ]

    def judge(self, stored: dict[Key, tuple[str, int]]) -> list[str]:
        """What should not be, with the stored text and mark of every document. What is found becomes what is known."""
        faults = [f"{key} is stored and was never written" for key in stored.keys() - self._attempts.keys()]
        landed: dict[int, set[bool]] = defaultdict(set)
        for key, attempts in self._attempts.items():
            possible = self.possible(key)
            found = stored.get(key)
            fitting = [each for each in possible if (each.content, each.mark) == (found or (None, each.mark))]
            untouched = found is None and not any(each.acknowledged for each in attempts)
            if not fitting and not untouched:
                told = [(each.mark, each.acknowledged, each.content is None) for each in possible]
                faults.append(
                    f"{key} holds mark {found and found[1]}, possible are (mark, acknowledged, deletes) {told}"
                )
            for each in attempts:
                if each.content is not None and each is attempts[-1]:
                    landed[each.batch].add(found is not None and found[1] == each.mark)
        faults += [f"batch {batch} was stored in part" for batch, seen in landed.items() if len(seen) > 1]
        now = time.monotonic()
        self._attempts.clear()
        for key, (content, mark) in stored.items():
            self._attempts[key] = [Attempt(key, content, mark, self.mark(), now, now, acknowledged=True)]
        return faults
