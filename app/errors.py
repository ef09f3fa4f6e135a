"""Every error pgrecall raises on purpose; knows no framework, carries no driver text.

PgrecallError
├── BadInput              the request is at fault: names the field, the fault and what is allowed
│   └── TooLarge          over a limit that is stated
├── NotAuthenticated      no key, or none that is valid
├── NotAllowed            the key does not allow this: its scopes, its tenant
├── LimitReached          a limit of the key or of its tenant; free again after `retry_after` seconds
├── NotFound              no such document in this tenant
│   └── NotRegistered     no such tenant or key
├── VersionConflict       If-Match or If-None-Match does not allow what is stored
├── Unavailable           cannot be done now; retry after `retry_after` seconds
│   ├── DatabaseUnavailable
│   ├── BeingErased       the tenant is being erased
│   ├── StorageFull       the database's disk is full
│   ├── PoolExhausted
│   └── SpaceChanged      the embedding model was changed meanwhile; done again with the other one
├── TimedOut              the statement ran into its time limit
├── BudgetSpent           the tokens that embedding was allowed are spent
├── UpstreamFailed        a model server failed, after the retries it deserved
│   ├── EmbeddingFailed
│   ├── RerankFailed
│   └── ChatFailed
└── SetupError            the program cannot start like this; the message says what to run or set
    ├── WrongSetting
    ├── SchemaTooOld
    ├── ModelMismatch
    └── Unsafe            the login could reach another tenant's rows
"""

from collections.abc import Mapping


class PgrecallError(Exception):
    """Something pgrecall was asked for cannot be done."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class BadInput(PgrecallError):
    """The request is at fault.

    `field` is the path of the faulty value as the caller wrote it (`documents[3].metadata`), empty for the whole request.
    """

    def __init__(self, field: str, fault: str) -> None:
        super().__init__(f"{field}: {fault}" if field else fault)
        self.field = field
        self.fault = fault

    def under(self, prefix: str) -> "BadInput":
        """The same fault seen from outside: `content` becomes `documents[3].content`."""
        return type(self)(f"{prefix}.{self.field}" if self.field else prefix, self.fault)


class TooLarge(BadInput):
    """A value is over a stated limit."""


class NotAuthenticated(PgrecallError):
    """A valid key is required."""


class NotAllowed(PgrecallError):
    """The key does not allow this."""


class LimitReached(PgrecallError):
    """A limit is reached."""

    def __init__(self, message: str = "", retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFound(PgrecallError):
    """There is no such document in this tenant."""


class NotRegistered(NotFound):
    """There is no such tenant or key."""


class VersionConflict(PgrecallError):
    """The stored document is not in the state the request asks for."""


class Unavailable(PgrecallError):
    """This cannot be done now; try again later."""

    def __init__(self, message: str = "", retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DatabaseUnavailable(Unavailable):
    """The database cannot be reached."""


class BeingErased(Unavailable):
    """The tenant is being erased; what is put afterwards stays."""

    def __init__(self, message: str = "", retry_after: int = 5) -> None:
        super().__init__(message, retry_after)


class StorageFull(Unavailable):
    """The database's disk is full."""

    def __init__(self, message: str = "", retry_after: int = 60) -> None:
        super().__init__(message, retry_after)


class PoolExhausted(Unavailable):
    """Every database connection is in use."""


class SpaceChanged(Unavailable):
    """The embedding model has just been changed; try again.

    `model` is the name and the dimensions of the one whose vectors are searched now, None where only a refusal was seen.
    """

    def __init__(self, model: tuple[str, int] | None = None) -> None:
        super().__init__("the embedding model has just been changed; try again")
        self.model = model


class TimedOut(PgrecallError):
    """The statement ran into its time limit."""


class BudgetSpent(PgrecallError):
    """The tokens that embedding was allowed are spent, or the next request could take more than are left."""

    def __init__(self, spent: int, allowed: int) -> None:
        super().__init__(
            f"{spent:,} tokens of {allowed:,} are spent, and the next request could take more than the rest"
        )
        self.spent = spent
        self.allowed = allowed


class UpstreamFailed(PgrecallError):
    """A model server failed."""


class EmbeddingFailed(UpstreamFailed):
    """The embedding model's server failed.

    `faults` has the reason for each item of the call that is itself at fault, by position: texts in a call that embeds,
    documents in one that stores. It is empty where the server is. `index` is the first of them.
    """

    def __init__(self, message: str = "", index: int | None = None, faults: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.faults = dict(faults or ({} if index is None else {index: message}))
        self.index = min(self.faults, default=None)


class RerankFailed(UpstreamFailed):
    """The reranker's server failed."""


class ChatFailed(UpstreamFailed):
    """The chat model's server failed."""


class SetupError(PgrecallError):
    """The program cannot start like this."""


class WrongSetting(SetupError):
    """A setting has a value that is not allowed."""


class SchemaTooOld(SetupError):
    """The database's schema is older than this release needs."""


class ModelMismatch(SetupError):
    """The database holds another embedding model than is configured."""


class Unsafe(SetupError):
    """The login could reach another tenant's rows."""
