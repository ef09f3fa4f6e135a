"""Fields of requests, each with what it means and its range, for the OpenAPI document.

Ranges are checked in the handlers, whose messages name both ends; msgspec's name the one that was passed. What stands in `extra` is
for the document, and for the message about another type.
"""

from datetime import datetime
from typing import Annotated, Any

from msgspec import Meta

from app import filters, scans, search, tenants
from app.drafts import (
    LENGTHS,
    MAX_DOC_TYPE_BYTES,
    MAX_DOC_TYPES,
    MAX_ID_BYTES,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    MAX_OWN_TEXT_BYTES,
    MAX_QUERY_BYTES,
    MAX_TEXT_BYTES,
    MAX_TITLE_BYTES,
    YEARS,
)

# Limits in bytes stand in words: JSON Schema counts characters.
SOME = {"extra": {"minLength": 1}}

TenantId = Annotated[
    str,
    Meta(
        description="Whose documents: 1 to 128 letters, digits, '_', '.', ':' or '-'. May be left out with a key, which names it.",
        extra_json_schema={"extra": {"pattern": tenants.PATTERN}},
    ),
]
TopK = Annotated[
    int,
    Meta(
        description="At most this many chunks.",
        extra_json_schema={"extra": {"minimum": 1, "maximum": search.MAX_TOP_K}},
    ),
]
Threshold = Annotated[
    float,
    Meta(
        description="Least cosine similarity, in [-1, 1].", extra_json_schema={"extra": {"minimum": -1, "maximum": 1}}
    ),
]
DocType = Annotated[
    str | list[str] | None,
    Meta(description=f"This type, or one of these, at most {MAX_DOC_TYPES:,}; an empty list matches nothing."),
]
Metadata = Annotated[
    dict[str, Any],
    Meta(
        description="Conditions on metadata: equality, $in, $ne, $gt, $gte, $lt, $lte, $exists, $and, $or, $not; at most "
        f"{filters.MAX_CONDITIONS}, {filters.MAX_DEPTH} deep (docs/filters.md)."
    ),
]
After = Annotated[
    datetime | None, Meta(description=f"created_at at or after this moment (with time zone; years {YEARS}).")
]
Before = Annotated[datetime | None, Meta(description=f"created_at before this moment (with time zone; years {YEARS}).")]
EfSearch = Annotated[
    int | None,
    Meta(
        description="Breadth of the index walk; more finds more and takes longer. The server's setting where left out.",
        extra_json_schema={"extra": {"minimum": 10, "maximum": scans.MAX_EF_SEARCH}},
    ),
]
Oversampling = Annotated[
    float | None,
    Meta(
        description="Candidates taken from the index for each hit, then measured by the stored vectors.",
        extra_json_schema={"extra": {"minimum": 1, "maximum": search.MAX_OVERSAMPLING}},
    ),
]
Weight = Annotated[
    float, Meta(description="Weight of a leg in hybrid.", extra_json_schema={"extra": {"minimum": 0, "maximum": 100}})
]
Query = Annotated[
    str | None,
    Meta(
        description=f"The question, 1 to {MAX_QUERY_BYTES:,} bytes in UTF-8. Either it or an embedding; in text and hybrid it "
        "has to be there, and where a reranker reads it.",
        extra_json_schema=SOME,
    ),
]
QueryEmbedding = Annotated[
    list[float] | None,
    Meta(description=f"A vector of the database's model (/health/ready names it and its dimensions); {LENGTHS}."),
]
Id = Annotated[str, Meta(description=f"1 to {MAX_ID_BYTES} bytes in UTF-8, without NUL.", extra_json_schema=SOME)]
Content = Annotated[
    str,
    Meta(
        description=f"The text, 1 to {MAX_TEXT_BYTES:,} bytes in UTF-8, {MAX_OWN_TEXT_BYTES:,} with an embedding of its own; "
        "more than white space, without NUL.",
        extra_json_schema=SOME,
    ),
]
Type = Annotated[
    str | None,
    Meta(description=f"A label to filter by, 1 to {MAX_DOC_TYPE_BYTES} bytes in UTF-8.", extra_json_schema=SOME),
]
Title = Annotated[
    str | None,
    Meta(
        description=f"Shown with the document, not embedded: 1 to {MAX_TITLE_BYTES:,} bytes in UTF-8.",
        extra_json_schema=SOME,
    ),
]
Labels = Annotated[
    dict[str, Any],
    Meta(description=f"JSON to filter by: up to {MAX_METADATA_BYTES:,} bytes, {MAX_METADATA_DEPTH} levels deep."),
]
CreatedAt = Annotated[
    datetime | None, Meta(description=f"With time zone, years {YEARS}. Left out: now, or what it was.")
]
Embedding = Annotated[
    list[float] | None,
    Meta(
        description="A vector of the database's model (/health/ready names it and its dimensions), "
        f"{LENGTHS}; the text is then one chunk."
    ),
]
EmbeddingModel = Annotated[
    str | None,
    Meta(
        description="Name of the model `embedding` is of; refused unless it is the one that is searched. While the model "
        "is being changed, the other one's, for a document that is stored with this text and a vector of its own."
    ),
]
