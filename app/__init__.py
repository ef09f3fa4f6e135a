"""pgrecall: retrieval and RAG inside the PostgreSQL a team already runs."""

__version__ = "0.1.0"
