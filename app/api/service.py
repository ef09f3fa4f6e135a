"""What every handler works with, opened in the lifespan and given to handlers as `service`."""

from dataclasses import dataclass, field

from app import schema
from app.chat import ChatModel
from app.database import Database
from app.embedding import Embedder
from app.keys import Keys
from app.limits import Limits
from app.rerank import Reranker
from app.schema import Readiness
from app.settings import Settings


@dataclass
class Service:
    """The opened parts. Until `check` has passed once, no route but health is served."""

    settings: Settings
    database: Database
    embedder: Embedder
    chat: ChatModel | None
    reranker: Reranker | None = None
    keys: Keys = field(init=False)
    limits: Limits = field(init=False)
    _passed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.keys = Keys(self.database, self.settings)
        self.limits = Limits(self.database)

    async def check(self) -> Readiness:
        """Look at the database. Raises SchemaTooOld, ModelMismatch, Unsafe or DatabaseUnavailable."""
        readiness = await schema.check(self.database, self.embedder)
        self._passed = True
        return readiness

    async def require_ready(self) -> None:
        """Pass at once when the check has passed before; otherwise check now."""
        if not self._passed:
            await self.check()
