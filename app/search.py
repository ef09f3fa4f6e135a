"""The repository's reading half: thresholded cosine similarity within one tenant."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Hit:
    """One chunk found. `similarity` is cosine similarity in [-1, 1]; `start_offset` counts characters in the document."""

    id: str
    chunk_index: int
    content: str
    similarity: float
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    start_offset: int
