"""`pgrecall demo`: the whole path on real prose, the Python language reference that ships inside CPython."""

import asyncio
import os
import pydoc_data.topics
import time
from argparse import Namespace

from app import chat, commands, ingest, questions, rag, schema, search, terminal
from app.drafts import Draft
from app.settings import Settings

TENANT = "python"
SEARCHES = (
    "How do I catch several exceptions at once?",
    "What is the difference between a list and a tuple?",
    "When is a generator's finally block run?",
)
QUESTION = "How are default parameter values evaluated?"


def drafts() -> list[Draft]:
    """The language reference, a document per topic, its heading as title."""
    return [
        Draft(f"reference/{name}", text, title=text.lstrip().split("\n", 1)[0][:200] or None, doc_type="reference")
        for name, text in sorted(pydoc_data.topics.topics.items())
        if text.strip()
    ]


def demo(arguments: Namespace, config: Settings) -> int:
    """Ingest, search and ask; then serve, unless that is not wanted."""
    begun = time.monotonic()
    terminal.say(
        "database: " + ("DATABASE_URL" if config.database_url else f"embedded PostgreSQL in {config.data_dir}/")
    )
    with schema.provided(config) as ready:
        terminal.say(f"schema: revision {schema.head()}; embedding model: {ready.model}")
        asyncio.run(_show(ready))
        terminal.say(f"done in {time.monotonic() - begun:.0f} seconds")
        if arguments.once:
            return 0
        os.environ["DATABASE_URL"] = ready.database_url or ""
        if arguments.with_worker is None and config.database_url is None:
            arguments.with_worker = True
        return commands.serve(arguments, ready)


async def _show(config: Settings) -> None:
    chat_model = chat.open_chat(config)
    try:
        async with commands.opened(config) as (database, embedder):
            counts = await ingest.store(database, embedder, config, TENANT, drafts())
            terminal.say(f"ingested: {ingest.summary(counts)}")
            for question in SEARCHES:
                vector = await questions.vector(embedder, question)
                found = await search.search(database, config, TENANT, vector, top_k=3)
                terminal.hits(question, found.hits)
            vector = await questions.vector(embedder, QUESTION)
            found = await search.search(database, config, TENANT, vector, top_k=5)
            answer = await rag.answer(chat_model, embedder, QUESTION, found.hits, settings=config)
            commands.show_answer(QUESTION, answer)
    finally:
        if chat_model is not None:
            await chat_model.aclose()
