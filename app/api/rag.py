"""`POST /rag`: an answer from the documents with `[Source N]` citations, whole or streamed."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import Response, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body
from litestar.response import Stream
from msgspec import Meta, Struct

from app import rag, search, tenants
from app.api.search import (
    FOUND,
    After,
    Before,
    DocType,
    Metadata,
    TenantId,
    Threshold,
    TopK,
    conditions,
    embedded,
)
from app.api.service import Service
