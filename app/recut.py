"""Documents cut anew because the new model reads less: into chunks that both models read whole."""

from collections.abc import Callable, Iterable

from app import documents, upsert
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder
from app.errors import NotFound, VersionConflict
from app.meter import Meter
from app.settings import Settings
from app.tags import tag


async def run(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    meter: Meter,
    which: Iterable[tuple[str, str]],
    advance: Callable[[], object],
) -> int:
    """Put these documents (tenant, id) again as they are stored. How many were; those written meanwhile are left alone.

    `embedder` is the active model's: chunks that change are embedded with both. While a model is being changed `upsert`
    cuts so that both read every chunk whole.
    """
    count = 0
    for tenant_id, document_id in which:
        try:
            stored = await documents.get(database, tenant_id, document_id)
            draft = Draft(
                document_id,
                stored.content or "",
                title=stored.title,
                doc_type=stored.doc_type,
                metadata=stored.metadata,
                created_at=stored.created_at,
            )
            expected = {tag(stored.version, stored.updated_at)}
            await upsert.put(database, embedder, settings, tenant_id, [draft], expected=expected, meter=meter)
            count += 1
        except (NotFound, VersionConflict):
            pass
        advance()
    return count
