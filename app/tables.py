"""The tables as SQLAlchemy sees them: what statements are built from and what `alembic check` compares migrations with.

`sources` is one row per document, `documents` one row per embedded chunk, `document_terms` its words; the migrations carry the COMMENTs, the views,
the policies and the grants. Reads go through the tenant views, writes to the tables (docs/schema.md).
"""

from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Date,
    DateTime,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    Uuid,
    cast,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import BIT, JSONB, TSVECTOR
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.sql.elements import Grouping
from sqlalchemy.types import Float, TypeEngine, UserDefinedType

INDEXED_AS_VECTOR = 2_000
"""Most dimensions pgvector's HNSW indexes as `vector`; above, up to 4,000, the index is half precision (pgvector README)."""


class Vector(UserDefinedType[Any]):
    """pgvector's `vector(n)`. Has no bind processor, so the driver's binary codec is the only encoder.

    `dimensions` None stands for "as many as this database's model has", which only the database knows.
    """

    cache_ok = True

    def __init__(self, dimensions: int | None = None) -> None:
        self.dimensions = dimensions

    def get_col_spec(self, **_: Any) -> str:
        """The type's name in DDL."""
        return "VECTOR" if self.dimensions is None else f"VECTOR({self.dimensions})"

    class comparator_factory(TypeEngine.Comparator[Any]):  # noqa: N801  SQLAlchemy's name
        """The operators of a vector column."""

        def cosine_distance(self, other: Any) -> Any:
            """1 - cosine similarity, in [0, 2]."""
            return self.op("<=>", return_type=Float())(other)


class HalfVector(Vector):
    """pgvector's `halfvec(n)`: half precision."""

    def get_col_spec(self, **_: Any) -> str:
        """The type's name in DDL."""
        return f"HALFVEC({self.dimensions})"


_reflected: dict[str, Callable[..., Any]] = ischema_names  # type: ignore[assignment]  # SQLAlchemy types it narrower
_reflected["vector"] = Vector
_reflected["halfvec"] = HalfVector

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(referred_table_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)


def _key(name: str, comment: str) -> Column[str]:
    # Collation C: keys compare by code point, the same on every platform and in every keyset page.
    return Column(name, Text(collation="C"), nullable=False, comment=comment)


def _moment(name: str, comment: str) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now(), comment=comment)


embedding_models = Table(
    "embedding_models",
    metadata,
    Column("name", Text, nullable=False, comment="Name of the model, as its maker writes it."),
    Column("dimensions", Integer, nullable=False, comment="Length of each of its vectors."),
    Column(
        "state",
        Text,
        nullable=False,
        server_default="active",
        comment="active: searched. filling: being prepared beside it. retired: searched until lately and kept in step, for a rollback. dropped: its vectors are gone.",
    ),
    _moment("created_at", comment="When the model was recorded here."),
    Column(
        "provider",
        Text,
        comment="local: the model inside the package. openai: a server that speaks OpenAI's protocol. Null until a change of the model records it.",
    ),
    Column(
        "base_url",
        Text,
        comment="The server's address where it is not OpenAI's; the key is in the environment of each process.",
    ),
    Column(
        "filled",
        BigInteger,
        comment="How many chunks had a vector of it when that was last counted; null for a model nothing was filled for.",
    ),
    _moment("changed_at", comment="When its state last changed."),
    PrimaryKeyConstraint("name", "dimensions"),
    CheckConstraint("state in ('active', 'filling', 'retired', 'dropped')", name="state"),
    CheckConstraint("provider in ('local', 'openai')", name="provider"),
    comment="The embedding models whose vectors this database holds. Exactly one is active.",
)
Index(
    "embedding_models_active_idx",
    embedding_models.c.state,
    unique=True,
    postgresql_where=text("state = 'active'"),
)

sources = Table(
    "sources",
    metadata,
    _key(
        "tenant_id", comment="Whose document this is. First in every key: the same id in two tenants is two documents."
    ),
    _key("id", comment="The document's id, chosen by the caller, unique within the tenant; 1 to 512 bytes."),
    Column("title", Text, comment="The document's title, if it has one. Not embedded."),
    Column(
        "content",
        Text,
        nullable=False,
        comment="The whole text. Once the document is ready, every chunk is an exact part of it.",
    ),
    Column(
        "content_sha256", LargeBinary, comment="SHA-256 of the text in UTF-8; null until the text has been chunked."
    ),
    Column("doc_type", Text, comment="A free label to filter by, such as faq or manual; null if none was given."),
    Column(
        "metadata",
        JSONB,
        nullable=False,
        server_default=text("'{}'"),
        comment="A JSON object of the caller's own keys to filter by.",
    ),
    _moment("created_at", comment="When the document came into being: as given by the caller, else when first stored."),
    _moment("updated_at", comment="When this row last changed."),
    Column(
        "version", BigInteger, nullable=False, server_default="1", comment="Counts the changes, from 1. The API's ETag."
    ),
    Column(
        "chunk_keys",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="The chunk_key of each chunk, in reading order. See the view document_chunks.",
    ),
    Column(
        "start_offsets",
        ARRAY(Integer),
        nullable=False,
        server_default=text("'{}'"),
        comment="Where each chunk starts in content, in characters from 0, in the order of chunk_keys.",
    ),
    Column(
        "state",
        Text,
        nullable=False,
        server_default="pending",
        comment="pending: text stored, chunks not yet. ready: searchable. failed: see error.",
    ),
    Column(
        "attempts",
        SmallInteger,
        nullable=False,
        server_default="0",
        comment="How often embedding this version was tried without success.",
    ),
    Column(
        "not_before",
        DateTime(timezone=True),
        comment="Not to be worked on before this moment: the next try, or the end of a worker's claim. Null for at once.",
    ),
    Column("error", Text, comment="Why the last attempt failed."),
    Column("chunker", Text, comment="How the text was cut: name of the rules, most tokens, overlap."),
    Column(
        "embedding_origin",
        Text,
        nullable=False,
        server_default="pgrecall",
        comment="pgrecall: embedded here. caller: the vector came with the document, which is one chunk.",
    ),
    Column("embedding_model", Text, comment="Name of the model whose space the vectors of this document belong to."),
    Column("claimed_by", Text, comment="The worker that has the document in hand until not_before; null for none."),
    Column(
        "ready_at",
        DateTime(timezone=True),
        comment="When the stored text became searchable; null until then, and where an older release stored it.",
    ),
    PrimaryKeyConstraint("tenant_id", "id"),
    CheckConstraint("state in ('pending', 'ready', 'failed')", name="state"),
    CheckConstraint("embedding_origin in ('pgrecall', 'caller')", name="embedding_origin"),
    CheckConstraint("tenant_id ~ '^[A-Za-z0-9_.:-]{1,128}$'", name="tenant_id"),
    CheckConstraint("octet_length(id) between 1 and 512", name="id"),
    CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata"),
    comment="One row per document: its whole text, its metadata and its state.",
)
DUE = func.coalesce(sources.c.not_before, text("'-infinity'::timestamp with time zone"))
"""From when on a pending document may be worked on."""

Index("sources_pending_idx", sources.c.tenant_id, DUE, postgresql_where=text("state = 'pending'"))
Index(
    "sources_state_idx",
    sources.c.tenant_id,
    sources.c.state,
    sources.c.id,
    postgresql_where=text("state <> 'ready'"),
)

documents = Table(
    "documents",
    metadata,
    _key("tenant_id", comment="Whose chunk this is."),
    _key("id", comment="The document it belongs to: sources.id."),
    _key(
        "chunk_key",
        comment="Names the chunk within its document by a hash of its text, so that a chunk that did not change keeps its row when others do.",
    ),
    Column("doc_type", Text, comment="As in sources; repeated so that a filter needs no join."),
    Column(
        "metadata",
        JSONB,
        nullable=False,
        server_default=text("'{}'"),
        comment="As in sources; repeated so that a filter needs no join.",
    ),
    _moment("created_at", comment="As in sources; repeated so that a filter needs no join."),
    Column("content", Text, nullable=False, comment="The chunk's text."),
    Column(
        "embedding",
        Vector(),
        nullable=False,
        comment="Its vector. Cosine similarity of two is 1 - (a <=> b), in [-1, 1].",
    ),
    PrimaryKeyConstraint("tenant_id", "id", "chunk_key"),
    ForeignKeyConstraint(["tenant_id", "id"], ["sources.tenant_id", "sources.id"], ondelete="CASCADE"),
    comment="One row per embedded chunk, always complete: text and vector. A short document has one row.",
)
Index("documents_tenant_id_idx", documents.c.tenant_id)
Index("documents_doc_type_idx", documents.c.tenant_id, documents.c.doc_type)
Index("documents_created_at_idx", documents.c.tenant_id, documents.c.created_at)
Index(
    "documents_labels_idx",
    documents.c.tenant_id,
    documents.c.doc_type,
    documents.c.metadata,
    postgresql_using="gin",
    postgresql_ops={"metadata": "jsonb_path_ops"},
)

Kind = Literal["full", "half", "binary"]
"""Precision of an HNSW index: of `embedding` as it is stored, as halfvec, or of the signs of its components."""

BUCKETS = 16
"""HNSW indexes that share the tenants among them: a tenant's rows are all in one."""


def bucket_of(tenant_id: ColumnElement[Any]) -> ColumnElement[int]:
    """Which of the BUCKETS a tenant is in. PostgreSQL keeps this hash the same for ever: hash partitions depend on it."""
    hashed = func.hashtextextended(tenant_id, literal_column("0"))
    return Grouping(hashed.op("&", return_type=BigInteger())(literal_column(str(BUCKETS - 1))))


def indexed(vector: ColumnElement[Any], kind: Kind, dimensions: int) -> ColumnElement[Any]:
    """What an index of this kind holds of a vector."""
    match kind:
        case "full":
            return vector
        case "half":
            return cast(vector, HalfVector(dimensions))
        case "binary":
            return cast(func.binary_quantize(vector), BIT(dimensions))


EF_CONSTRUCTION = 200
"""Breadth of the walk that places a row in the graph. With pgvector's 64 parts of clustered data cannot be reached."""

_OPERATORS: dict[Kind, str] = {"full": "vector_cosine_ops", "half": "halfvec_cosine_ops", "binary": "bit_hamming_ops"}


def embedding_indexes(kind: Kind) -> list[str]:
    """Names of the HNSW indexes of a kind, one a bucket."""
    return [f"documents_embedding_{kind}_{bucket:02}_idx" for bucket in range(BUCKETS)]


vector_indexes = Table(
    "vector_indexes",
    metadata,
    Column("kind", Text, nullable=False, comment="full, half (half precision) or binary (one bit a dimension)."),
    Column("state", Text, nullable=False, comment="active: searched. building: being made. retired: to be dropped."),
    Column(
        "oversampling",
        Float,
        nullable=False,
        comment="Candidates taken from the index for each hit, then measured by the stored vectors.",
    ),
    _moment("created_at", comment="When it was asked for."),
    PrimaryKeyConstraint("kind"),
    CheckConstraint("kind in ('full', 'half', 'binary')", name="kind"),
    CheckConstraint("state in ('active', 'building', 'retired')", name="state"),
    CheckConstraint("oversampling between 1 and 100", name="oversampling"),
    comment="The kinds of HNSW index over documents.embedding. Exactly one is active.",
)
Index("vector_indexes_active_idx", vector_indexes.c.state, unique=True, postgresql_where=text("state = 'active'"))

document_terms = Table(
    "document_terms",
    metadata,
    _key("tenant_id", comment="As in documents."),
    _key("id", comment="As in documents."),
    _key("chunk_key", comment="As in documents."),
    Column("terms", TSVECTOR, nullable=False, comment="chunk_terms(content): the chunk's words and where they stand."),
    Column("length", Integer, nullable=False, comment="How many words those are, repetitions counted."),
    PrimaryKeyConstraint("id", "chunk_key", "tenant_id"),
    ForeignKeyConstraint(
        ["tenant_id", "id", "chunk_key"],
        ["documents.tenant_id", "documents.id", "documents.chunk_key"],
        ondelete="CASCADE",
    ),
    comment="One row per chunk whose words can be searched: what BM25 needs of it. Written with the chunk.",
)
Index(
    "document_terms_tenant_terms_idx",
    func.tenant_terms(document_terms.c.tenant_id, document_terms.c.terms),
    postgresql_using="gin",
    postgresql_with={"fastupdate": "off"},
)

term_statistics = Table(
    "term_statistics",
    metadata,
    _key("tenant_id", comment="Whose chunks were counted."),
    _key("term", comment="The word, as in document_terms.terms."),
    Column("chunks", Integer, nullable=False, comment="How many more chunks hold it; negative for chunks that went."),
    Column(
        "peak",
        Integer,
        nullable=False,
        comment="The most times it stands in one of them; deletions do not lower it.",
    ),
    Column(
        "density",
        REAL,
        nullable=False,
        comment="The largest share of a chunk's words that it makes up; deletions do not lower it.",
    ),
    comment="In how many chunks of a tenant a word stands: the sum of its rows. Writers only add rows; fold_statistics makes one of several.",
)
Index(
    "term_statistics_tenant_id_term_idx",
    term_statistics.c.tenant_id,
    term_statistics.c.term,
    postgresql_include=["chunks", "peak", "density"],
)

collection_statistics = Table(
    "collection_statistics",
    metadata,
    _key("tenant_id", comment="Whose chunks were counted."),
    Column(
        "chunks", BigInteger, nullable=False, comment="How many more chunks there are; negative for chunks that went."
    ),
    Column("length", BigInteger, nullable=False, comment="How many words more there are, repetitions counted."),
    comment="How many chunks a tenant has and how long they are: the sum of its rows. Writers only add rows.",
)
Index(
    "collection_statistics_tenant_id_idx",
    collection_statistics.c.tenant_id,
    postgresql_include=["chunks", "length"],
)

embedding_cache = Table(
    "embedding_cache",
    metadata,
    _key("tenant_id", comment="Whose text it was; never shared between tenants."),
    Column("model", Text, nullable=False, comment="Name of the model."),
    Column("dimensions", Integer, nullable=False, comment="Length of the vector."),
    Column("input_type", Text, nullable=False, comment="document or query: some models embed them differently."),
    Column("content_sha256", LargeBinary, nullable=False, comment="SHA-256 of the text in UTF-8."),
    Column("embedding", Vector(), nullable=False, comment="The vector."),
    _moment("created_at", comment="When it was computed; the oldest go first."),
    Column(
        "left_by",
        Text(collation="C"),
        comment="Id of the document that had this text last and has it no more; its deletion takes the vector along.",
    ),
    PrimaryKeyConstraint("tenant_id", "model", "dimensions", "input_type", "content_sha256"),
    CheckConstraint("input_type in ('document', 'query')", name="input_type"),
    comment="Vectors already computed, so that the same text is not paid for twice. May be emptied at any time.",
)
Index("embedding_cache_age_idx", embedding_cache.c.tenant_id, embedding_cache.c.created_at)
Index(
    "embedding_cache_left_by_idx",
    embedding_cache.c.tenant_id,
    embedding_cache.c.left_by,
    postgresql_where=text("left_by is not null"),
)

embedding_claims = Table(
    "embedding_claims",
    metadata,
    _key("tenant_id", comment="Whose text it is."),
    Column("model", Text, nullable=False, comment="Name of the model."),
    Column("dimensions", Integer, nullable=False, comment="Length of the vector."),
    Column("input_type", Text, nullable=False, comment="document or query, as in embedding_cache."),
    Column("content_sha256", LargeBinary, nullable=False, comment="SHA-256 of the text in UTF-8."),
    Column("holder", Uuid, nullable=False, comment="The call that computes it; another one each time."),
    Column(
        "expires_at",
        DateTime(timezone=True),
        nullable=False,
        comment="From then on anyone may take it over. Its holder moves this on while it works.",
    ),
    PrimaryKeyConstraint("tenant_id", "model", "dimensions", "input_type", "content_sha256"),
    CheckConstraint("input_type in ('document', 'query')", name="input_type"),
    comment="Texts whose vectors are being computed. A row goes when the vector is in embedding_cache, or when its time is over. May be emptied at any time.",
)

analyst_tenants = Table(
    "analyst_tenants",
    metadata,
    Column("analyst", Text, nullable=False, comment="Name of the login."),
    Column("tenant_id", Text(collation="C"), nullable=False, comment="A tenant it may read, or * for all."),
    PrimaryKeyConstraint("analyst", "tenant_id"),
    comment="Which tenants' rows a login with the role pgrecall_analyst may read. Filled by the owner.",
)

tenants = Table(
    "tenants",
    metadata,
    _key("tenant_id", comment="The tenant's name, as in sources."),
    _moment("created_at", comment="When it was registered."),
    Column(
        "max_rows",
        BigInteger,
        comment="From so many chunks and pending documents on, keys store no more; null for no limit.",
    ),
    Column(
        "tokens_per_day",
        BigInteger,
        comment="Tokens that keys may have embedded and answered with in a day, by UTC; null for no limit.",
    ),
    Column("tokens_day", Date, comment="The day that tokens_taken counts."),
    Column(
        "tokens_taken",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="Tokens of that day that server processes have taken, in shares.",
    ),
    PrimaryKeyConstraint("tenant_id"),
    CheckConstraint("tenant_id ~ '^[A-Za-z0-9_.:-]{1,128}$'", name="tenant_id"),
    CheckConstraint("max_rows >= 0", name="max_rows"),
    CheckConstraint("tokens_per_day >= 0", name="tokens_per_day"),
    comment="Tenants that keys can be made for, and their limits. A tenant needs no row here where no keys are asked for.",
)

api_keys = Table(
    "api_keys",
    metadata,
    _key("prefix", comment="The part of the key that is no secret and names it: pgr_PREFIX_…."),
    Column("key_hash", LargeBinary, nullable=False, comment="SHA-256 of the whole key."),
    Column("name", Text, comment="What it is for, in its maker's words."),
    Column(
        "scopes",
        ARRAY(Text),
        nullable=False,
        comment="read: search, answer, read documents. write: store and delete them. admin: tenants and keys.",
    ),
    Column(
        "tenant_id",
        Text(collation="C"),
        comment="The only tenant it acts for; null for one that administers them all and reads no documents.",
    ),
    _moment("created_at", comment="When it was made."),
    Column("expires_at", DateTime(timezone=True), comment="From then on it is refused; null for never."),
    Column("revoked_at", DateTime(timezone=True), comment="When it was revoked; null while it is not."),
    Column("last_used_at", DateTime(timezone=True), comment="When it was used last, to about a minute."),
    Column("requests_per_minute", BigInteger, comment="Most requests in a minute of the clock; null for no limit."),
    Column("concurrent_streams", BigInteger, comment="Most streams at once; null for no limit."),
    Column("minute", DateTime(timezone=True), comment="The minute that requests_taken counts."),
    Column(
        "requests_taken",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="Requests of that minute that server processes have taken, in shares.",
    ),
    PrimaryKeyConstraint("prefix"),
    CheckConstraint("prefix ~ '^[a-z0-9]{8}$'", name="prefix"),
    CheckConstraint("octet_length(key_hash) = 32", name="key_hash"),
    CheckConstraint("cardinality(scopes) > 0 and scopes <@ array['read', 'write', 'admin']", name="scopes"),
    CheckConstraint("tenant_id is not null or scopes <@ array['admin']", name="tenant_id"),
    CheckConstraint("requests_per_minute > 0", name="requests_per_minute"),
    CheckConstraint("concurrent_streams >= 0", name="concurrent_streams"),
    comment="Keys of the HTTP API. The keys themselves are not here. Rows stay when a key is revoked, so that a database that ever had keys asks for them.",
)

key_streams = Table(
    "key_streams",
    metadata,
    _key("prefix", comment="The key."),
    Column("holder", Uuid, nullable=False, comment="The server process, by an id of its own."),
    Column("streams", BigInteger, nullable=False, comment="How many it has open."),
    Column(
        "expires_at",
        DateTime(timezone=True),
        nullable=False,
        comment="From then on they count no more. The process moves this on while it lives.",
    ),
    PrimaryKeyConstraint("prefix", "holder"),
    comment="How many streams each server process has open with a key that has a limit of them. May be emptied at any time.",
)

RUN_PREFIX = "pgrecall_run_"
"""What the names of tables begin with that an operation makes at run time, such as a change of the model."""

GRANTS = (analyst_tenants, tenants, api_keys)
"""Name tenants and hold nothing of theirs: an erasure leaves them to the owner."""


def bearing() -> list[Table]:
    """Every table here that holds tenants' rows, those first that refer to others."""
    held = [table for table in metadata.sorted_tables if "tenant_id" in table.c and table not in GRANTS]
    return held[::-1]


views = MetaData()
"""The tenant views: the only way the service reads. Their filter on the tenant cannot be forgotten."""

tenant_sources = Table("tenant_sources", views, *(Column(c.name, c.type) for c in sources.columns))
tenant_documents = Table("tenant_documents", views, *(Column(c.name, c.type) for c in documents.columns))
tenant_document_terms = Table("tenant_document_terms", views, *(Column(c.name, c.type) for c in document_terms.columns))

shadow = Table("pgrecall_run_documents", views, *(Column(c.name, c.type) for c in documents.columns))
"""The same chunks with the vectors of another model, while the model is being changed. Made and dropped at run time."""


def default_kind(dimensions: int) -> Kind:
    """The precision of a new database's index."""
    return "full" if dimensions <= INDEXED_AS_VECTOR else "half"


def metadata_for(dimensions: int, kind: Kind | None = None) -> MetaData:
    """The tables of a database whose embeddings have this many dimensions, HNSW indexes included."""
    target = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(target)
    documents = target.tables["documents"]
    documents.c.embedding.type = Vector(dimensions)
    kind = kind or default_kind(dimensions)
    for bucket, name in enumerate(embedding_indexes(kind)):
        Index(
            name,
            indexed(documents.c.embedding, kind, dimensions).label("embedding"),
            postgresql_using="hnsw",
            postgresql_with={"m": "16", "ef_construction": str(EF_CONSTRUCTION)},
            postgresql_ops={"embedding": _OPERATORS[kind]},
            postgresql_where=bucket_of(documents.c.tenant_id) == literal_column(str(bucket)),
        )
    return target
