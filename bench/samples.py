"""How hard are sampled queries for the index? recall@10 against exact search of judged questions and of stored vectors.

    pgrecall evaluate beir/scifact && python -m bench.samples beir/scifact

The folder must have been evaluated before: its documents are searched, nothing is stored.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from app import ann, commands, judgements, questions, schema, settings

QUERIES = 200
EF_SEARCH = (10, 20, 40, 100)
LIKENESSES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


async def main(config: settings.Settings, folder: Path) -> None:
    collection = judgements.read(folder)
    tenant = collection.questions[0].tenant_id
    async with commands.opened(config) as (database, embedder):
        asked = [await questions.vector(embedder, one.text) for one in collection.questions[:QUERIES]]
        drawn = ann.SAMPLE.with_values("sampled vectors", {"tenant_id": tenant, "sample": QUERIES})
        (rows,) = await database.fetch(tenant, [drawn])
        stored = np.array([row["embedding"].to_numpy() for row in rows], np.float64)
        kinds = {"judged questions": asked, "stored as they are": list(stored.astype(np.float32))}
        kinds |= {f"turned to {likeness}": list(ann.turned(stored, likeness)) for likeness in LIKENESSES}
        print("queries", *(f"ef_search {width}" for width in EF_SEARCH), sep="\t")
        for kind, vectors in kinds.items():
            recalls = []
            for width in EF_SEARCH:
                indexed = replace(config, exact_rows=0, ef_search=width)
                recalls.append([one.recall async for one in ann.run(database, indexed, tenant, vectors, 10)])
            print(kind, *(f"{np.mean(each):.3f}" for each in recalls), sep="\t", flush=True)


if __name__ == "__main__":
    with schema.provided(settings.read()) as ready:
        asyncio.run(main(ready, Path(sys.argv[1])))
