"""What embedding took, counted while it goes on; and how much of it is allowed."""

import math
from dataclasses import dataclass, field

from app.errors import BudgetSpent


@dataclass
class Meter:
    """Counters of embedding work. Give one to as many calls as belong together and read it at any time.

    With `max_tokens` it is a budget too: a request that could take more than is left of it is not sent. What a request
    will take is an estimate before the answer, so the estimate is charged until then, times the most the server's own
    count was ever over it.
    """

    max_tokens: int | None = None
    texts: int = 0
    """Embedded by the model."""
    tokens: int = 0
    """That the model read, as its server counts them; as estimated where it does not say."""
    cache_hits: int = 0
    """Texts whose vector was kept from another time."""
    deduplicated: int = 0
    """Texts that came more than once, in a call or in several at the same time, and were embedded for one of them."""
    requests: int = 0
    """Sent to the server, each try counted."""
    retries: int = 0
    rate_limited: int = 0
    """Requests that were answered with 429."""
    _reserved: int = field(default=0, repr=False)
    _underestimate: float = field(default=1.0, repr=False)

    def reserve(self, estimate: int) -> int:
        """Set aside what a request may take; the amount is for `settle`. Raises BudgetSpent where it is not left."""
        amount = math.ceil(estimate * self._underestimate)
        if self.max_tokens is not None and self.tokens + self._reserved + amount > self.max_tokens:
            raise BudgetSpent(self.tokens, self.max_tokens)
        self._reserved += amount
        return amount

    def settle(self, reserved: int, estimate: int = 0, spent: int = 0) -> None:
        """Give back what was set aside; count what was really spent of it."""
        self._reserved -= reserved
        self.tokens += spent
        if estimate:
            self._underestimate = max(self._underestimate, spent / estimate)

    def cost(self, price: float | None) -> float | None:
        """What the tokens cost at a price per million of them, None where there is no price."""
        return None if price is None else self.tokens * price / 1_000_000
