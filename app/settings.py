"""Every setting, typed and read once; the only reader of the environment."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from app.errors import WrongSetting

LOCAL_MODEL = "all-MiniLM-L6-v2-int8"
LOCAL_DIMENSIONS = 384
OPENAI_DIMENSIONS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}

Url = Annotated[str, Meta(pattern=r"^postgres(ql)?(\+psycopg)?://", description="postgresql://…")]
HttpUrl = Annotated[
    str, Meta(pattern=r"^https?://[^/ ?#]+(/[^ ?#]*)?$", description="http(s)://… without a query (?…) behind the path")
]
Dimensions = Annotated[
    int,
    Meta(
        ge=1,
        le=4000,
        description="a whole number from 1 to 4000, because pgvector's index takes no longer vectors (above 2000 as "
        "halfvec); many models of more dimensions give fewer when asked",
    ),
]
_HOST = r" *(\*|[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?) *"
Hosts = Annotated[
    str, Meta(pattern=f"^{_HOST}(,{_HOST})*$", description="names and addresses without port, commas between; or *")
]
CONFIGURATION = "the name of a text search configuration of PostgreSQL, such as english, german or simple"


def variable(field: str) -> str:
    """The environment variable a field is read from."""
    return field.upper() if field in UNPREFIXED else f"PGRECALL_{field.upper()}"


UNPREFIXED = frozenset({"database_url", "database_read_url", "openai_api_key", "openai_base_url"})
SECRET = frozenset({"openai_api_key", "other_api_key", "rerank_key"})


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator decides. docs/settings.md says what each one is for."""

    database_url: Url | None = None
    database_read_url: Url | None = None
    replica_lag: Annotated[float, Meta(gt=0, le=86_400)] = 10.0
    migration_url: Url | None = None
    listen_url: Url | None = None
    analyst_url: Url | None = None
    data_dir: Annotated[str, Meta(min_length=1)] = ".pgrecall"

    openai_api_key: Annotated[str, Meta(min_length=1)] | None = None
    openai_base_url: HttpUrl | None = None
    embedder: Literal["auto", "local", "openai"] = "auto"
    embedding_model: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    embedding_dimensions: Dimensions | None = None
    other_api_key: Annotated[str, Meta(min_length=1)] | None = None
    embedding_concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
    embedding_timeout: Annotated[float, Meta(gt=0, le=600)] = 30.0
    embedding_retries: Annotated[int, Meta(ge=0, le=10)] = 4
    embedding_patience: Annotated[float, Meta(gt=0, le=3600)] = 120.0
    embedding_price: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    cache_rows: Annotated[int, Meta(ge=0, le=100_000_000)] = 100_000
    cache_days: Annotated[float, Meta(gt=0, le=36_500)] = 90.0

    text_language: Annotated[str, Meta(pattern=r"^[a-z_][a-z0-9_]{0,62}$", description=CONFIGURATION)] = "english"
    chunk_max_tokens: Annotated[int, Meta(ge=16, le=8000)] = 250
    chunk_overlap_tokens: Annotated[int, Meta(ge=0, le=4000)] = 100
    request_tokens: Annotated[int, Meta(ge=1_000, le=100_000_000)] = 250_000

    with_worker: bool = False
    worker_concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
    worker_poll: Annotated[float, Meta(ge=0.1, le=3600)] = 5.0
    worker_lease: Annotated[float, Meta(ge=1, le=3600)] = 60.0
    worker_attempts: Annotated[int, Meta(ge=1, le=1000)] = 5

    rerank_url: HttpUrl | None = None
    rerank_model: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    rerank_key: Annotated[str, Meta(min_length=1)] | None = None

    chat_model: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    chat_timeout: Annotated[float, Meta(gt=0, le=600)] = 60.0
    rag_context_tokens: Annotated[int, Meta(ge=200, le=1_000_000)] = 3_000
    rag_answer_tokens: Annotated[int, Meta(ge=16, le=100_000)] = 800
    extractive_threshold: Annotated[float, Meta(ge=-1, le=1)] = 0.35

    exact_rows: Annotated[int, Meta(ge=100, le=10_000_000)] | None = None
    ef_search: Annotated[int, Meta(ge=10, le=1000)] = 250
    statement_timeout: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    erasure_timeout: Annotated[float, Meta(gt=0, le=86_400)] = 3600.0
    pool_size: Annotated[int, Meta(ge=1, le=1000)] = 10
    pool_timeout: Annotated[float, Meta(gt=0, le=300)] = 5.0
    prepared_statements: bool = True

    auth: Literal["auto", "keys", "insecure"] = "auto"
    key_cache: Annotated[float, Meta(ge=0, le=60)] = 5.0
    allowed_hosts: Hosts | None = None
    body_timeout: Annotated[float, Meta(gt=0, le=3600)] = 60.0
    header_timeout: Annotated[float, Meta(gt=0, le=60)] = 10.0
    shutdown_timeout: Annotated[int, Meta(ge=1, le=1800)] = 30
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["lines", "json"] = "lines"

    def __repr__(self) -> str:
        """Without its secrets: it may stand in a traceback, or in what a debugger prints."""
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """The same for rich."""
        return [(field.name, masked(field.name, getattr(self, field.name))) for field in msgspec.structs.fields(self)]

    @property
    def uses_openai(self) -> bool:
        """Whether texts are embedded by an OpenAI-compatible server rather than by the local model."""
        if self.embedder == "auto":
            return self.openai_api_key is not None or self.openai_base_url is not None
        return self.embedder == "openai"

    @property
    def model(self) -> str:
        """Name of the embedding model in use."""
        return self.embedding_model or ("text-embedding-3-small" if self.uses_openai else LOCAL_MODEL)

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        if self.embedding_dimensions is not None:
            return self.embedding_dimensions
        return OPENAI_DIMENSIONS[self.model] if self.uses_openai else LOCAL_DIMENSIONS

    @property
    def chat(self) -> str | None:
        """Name of the chat model, None where answers are extractive."""
        if self.chat_model is None and self.openai_api_key is not None and self.openai_base_url is None:
            return "gpt-4o-mini"
        return self.chat_model

    @property
    def data_path(self) -> Path:
        """Where the embedded database lives, absolute."""
        return Path(self.data_dir).expanduser().absolute()


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process.

    Raises WrongSetting naming the variable, what is wrong with its value and what is allowed. A variable that is set
    but empty counts as absent; an unknown PGRECALL_* variable is refused, because a misspelt limit is no limit.
    """
    environ = os.environ if environ is None else environ
    fields = {variable(field.name): field for field in msgspec.structs.fields(Settings)}
    unknown = sorted(n for n in environ if n.startswith("PGRECALL_") and n not in fields and n not in FOREIGN)
    if unknown:
        raise WrongSetting(f"{unknown[0]}: there is no such setting; `pgrecall settings` lists them all")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        text = environ.get(name, "").strip()
        if not text:
            continue
        if field.name in {"database_url", "database_read_url", "migration_url", "listen_url", "analyst_url"}:
            text = text.replace("+psycopg://", "://", 1)  # as SQLAlchemy writes it; libpq does not know it
        try:
            values[field.name] = msgspec.convert(text, field.type, strict=False)
        except msgspec.ValidationError as error:
            shown = "its value" if field.name in SECRET or "url" in field.name else repr(text)
            raise WrongSetting(f"{name}: {shown} is not allowed; {allowed(field.type)} ({error})") from None
    if "chunk_max_tokens" in values:
        # Smaller chunks repeat less, unless told otherwise.
        values.setdefault(
            "chunk_overlap_tokens", min(Settings().chunk_overlap_tokens, values["chunk_max_tokens"] * 2 // 5)
        )
    settings = Settings(**values)
    _check_together(settings)
    return settings


FOREIGN = frozenset({"PGRECALL_TEST_POSTGRES", "PGRECALL_TEST_PGBOUNCER", "PGRECALL_TEST_PGBOUNCER_PREPARED"})
"""Variables with our prefix that belong to the test suite."""


def _check_together(settings: Settings) -> None:
    if settings.chunk_overlap_tokens * 2 > settings.chunk_max_tokens:
        raise WrongSetting(
            f"PGRECALL_CHUNK_OVERLAP_TOKENS: {settings.chunk_overlap_tokens} is too much; "
            f"allowed: at most half of PGRECALL_CHUNK_MAX_TOKENS ({settings.chunk_max_tokens})"
        )
    if settings.rerank_url is not None and settings.rerank_model is None:
        raise WrongSetting("PGRECALL_RERANK_MODEL: is not set; allowed: the name of a model of PGRECALL_RERANK_URL")
    if settings.rerank_url is None and (settings.rerank_model or settings.rerank_key) is not None:
        raise WrongSetting("PGRECALL_RERANK_URL: is not set; allowed: the address to which /rerank is added")
    if settings.uses_openai and settings.embedding_model == LOCAL_MODEL:
        raise WrongSetting(
            f"PGRECALL_EMBEDDING_MODEL: {LOCAL_MODEL!r} is the model inside the package; allowed with a server: one of its "
            "models, or set PGRECALL_EMBEDDER=local"
        )
    if settings.uses_openai and settings.embedding_dimensions is None and settings.model not in OPENAI_DIMENSIONS:
        raise WrongSetting(
            f"PGRECALL_EMBEDDING_DIMENSIONS: is not set, and {settings.model!r} is not known here; allowed: the length of "
            "this model's vectors"
        )
    if not settings.uses_openai:
        if settings.embedding_dimensions not in (None, LOCAL_DIMENSIONS):
            raise WrongSetting(
                f"PGRECALL_EMBEDDING_DIMENSIONS: {settings.embedding_dimensions} does not fit the local model; "
                f"allowed: {LOCAL_DIMENSIONS}, or set OPENAI_API_KEY or OPENAI_BASE_URL to use another model"
            )
        if settings.embedding_model not in (None, LOCAL_MODEL):
            raise WrongSetting(
                f"PGRECALL_EMBEDDING_MODEL: {settings.embedding_model!r} needs a server; allowed without one: "
                f"{LOCAL_MODEL}; set OPENAI_API_KEY or OPENAI_BASE_URL to use another model"
            )
        if settings.chunk_max_tokens > 254:
            raise WrongSetting(
                f"PGRECALL_CHUNK_MAX_TOKENS: {settings.chunk_max_tokens} is more than the local model reads; "
                "allowed: 16 to 254"
            )


def allowed(kind: Any) -> str:
    """What a field accepts, in words."""
    info = msgspec.inspect.type_info(kind)
    types = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    return "allowed: " + " or ".join(_describe(t) for t in types if not isinstance(t, msgspec.inspect.NoneType))


def _describe(info: Any) -> str:
    extra = ""
    if isinstance(info, msgspec.inspect.Metadata):
        extra = (info.extra_json_schema or {}).get("description", "")
        info = info.type
    if extra:
        return str(extra)
    match info:
        case msgspec.inspect.LiteralType(values=values):
            return ", ".join(map(str, values))
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"a whole number from {low} to {high}"
        case msgspec.inspect.FloatType(ge=low, gt=above, le=high):
            return f"a number {'above' if low is None else 'from'} {above if low is None else low} to {high}"
        case _:
            return "a text that is not empty"


def source(field: str, environ: Mapping[str, str] | None = None) -> str:
    """Where a field's value comes from: `environment` or `default`."""
    return "environment" if (os.environ if environ is None else environ).get(variable(field), "").strip() else "default"


_PASSWORD = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://[^:/?#@]*:)(.+)@", re.DOTALL)
_PARAMETER = re.compile(r"((?:^|[?&\s])(?:ssl)?password\s*=\s*)([^&]+)")
"""Passwords in a URL, also in one that is none: whoever writes one wrongly still wrote a password."""


def passwords(url: str) -> list[str]:
    """The passwords in a URL, as they are written."""
    return [found[2] for pattern in (_PASSWORD, _PARAMETER) for found in pattern.finditer(url)]


def masked(field: str, value: Any) -> Any:
    """The value as it may be shown: keys and the passwords inside URLs hidden."""
    if value is None or not isinstance(value, str):
        return value
    if field in SECRET:
        return "********"
    if "url" in field:
        return _PASSWORD.sub(r"\1********@", _PARAMETER.sub(r"\1********", value))
    return value
