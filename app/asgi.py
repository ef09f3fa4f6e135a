"""The composition root: settings in, application out. The lifespan opens what handlers work with."""

import importlib.util
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, Response, Router
from litestar.di import Provide
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.static_files import create_static_files_router

from app import __version__, chat, embedding, rerank, spaces, telemetry, worker
from app import settings as environment
from app.api import admin, documents, erasure, guard, health, parameters, problems, queue, rag, schemas, search, stream
from app.api.body import BodyGuard, StrictRequest
from app.api.methods import Heads
from app.api.paths import RawIds
from app.api.request_id import RequestId
from app.api.service import Service
from app.database import Database
from app.errors import DatabaseUnavailable, SchemaTooOld, SetupError
from app.settings import Settings

log = logging.getLogger(__name__)

MAX_BODY = 16_000_000
DOCS = "/docs"
_ASSETS = f"{DOCS}/assets"
_DESCRIPTION = "Retrieval and RAG inside the PostgreSQL a team already runs. Errors are RFC 9457 problems."


def create_app(settings: Settings | None = None) -> Litestar:
    """The application. Reads the environment when no settings are given; connects only when it starts."""
    settings = settings or environment.read()
    if settings.database_url is None:
        raise SetupError(
            "DATABASE_URL is not set: set it, or start with `pgrecall serve`, which brings a database along"
        )
    telemetry.set_up(settings)
    handlers: list[HTTPRouteHandler] = [
        search.search_chunks,
        search.search_several,
        rag.answer_question,
        documents.put_document,
        documents.put_documents,
        stream.stream_documents,
        documents.get_document,
        documents.list_documents,
        documents.delete_document,
        documents.delete_documents,
        queue.status,
        queue.retry,
        erasure.erase_tenant,
        admin.put_tenant,
        admin.list_tenants,
        admin.delete_tenant,
        admin.create_key,
        admin.list_keys,
        admin.revoke_key,
    ]
    guard.check_routes(handlers)
    app = Litestar(
        route_handlers=[
            health.live,
            health.ready,
            Router("/", route_handlers=handlers, before_request=_require_ready),
            create_static_files_router(_ASSETS, directories=[_swagger_ui()], include_in_schema=False),
        ],
        dependencies={"service": Provide(_service, sync_to_thread=False)},
        lifespan=[partial(_opened, settings=settings)],
        plugins=[problems.plugin, schemas.Objects()],
        middleware=[guard.KeyGuard(), BodyGuard(settings.body_timeout)],
        before_send=[guard.tell_limit],
        request_class=StrictRequest,
        request_max_body_size=MAX_BODY,
        logging_config=None,  # Litestar's own would replace what telemetry set up: request ids and blotted secrets
        openapi_config=OpenAPIConfig(
            title="pgrecall",
            version=__version__,
            description=_DESCRIPTION,
            use_handler_docstrings=True,
            components=guard.COMPONENTS,
            path=DOCS,
            render_plugins=[
                SwaggerRenderPlugin(
                    path="/",
                    js_url=f"{_ASSETS}/swagger-ui-bundle.js",
                    css_url=f"{_ASSETS}/swagger-ui.css",
                    standalone_preset_js_url=f"{_ASSETS}/swagger-ui-standalone-preset.js",
                    favicon=f"<link rel='icon' href='{_ASSETS}/favicon-32x32.png'>",
                )
            ],
        ),
    )
    # Around the router: a request for a route that does not exist never reaches Litestar's own middleware.
    app.asgi_handler = RequestId(Heads(RawIds(app.asgi_handler)))
    return app


def _service(request: Request[Any, Any, Any]) -> Service:
    service: Service = request.app.state.service
    return service


async def _require_ready(request: Request[Any, Any, Any]) -> Response[None] | None:
    if request.method == HttpMethod.OPTIONS:
        # Litestar's own answer names the method of the first handler of a path only.
        route = next(r for r in request.app.routes if r.path_format == request.scope["path_template"])
        return Response(None, status_code=204, headers={"Allow": ", ".join(route.methods)})
    parameters.check(request)
    guard.check_tenant(request)
    await _service(request).require_ready()
    return None


@asynccontextmanager
async def _opened(app: Litestar, settings: Settings) -> AsyncIterator[None]:
    """Open everything; refuse to start on a database that holds another model or does not keep tenants apart."""
    async with AsyncExitStack() as stack:
        embedder = embedding.open_embedder(settings)
        stack.push_async_callback(embedder.aclose)
        chat_model = chat.open_chat(settings)
        if chat_model is not None:
            stack.push_async_callback(chat_model.aclose)
        reranker = await stack.enter_async_context(rerank.opened(settings))
        database = Database(settings, settings.database_url or "")
        stack.push_async_callback(database.close)
        stack.push_async_callback(spaces.close, database)
        app.state.service = service = Service(settings, database, embedder, chat_model, reranker)
        stack.push_async_callback(service.limits.close)
        try:
            await service.check()
            if not await service.keys.required():
                log.warning(
                    "open mode: the database has no keys, none is asked for, every caller may name every tenant"
                )
        except (SchemaTooOld, DatabaseUnavailable) as error:
            log.warning("not ready yet: %s", error)
        if settings.with_worker:
            await stack.enter_async_context(worker.beside(embedder, settings))
        yield


def _swagger_ui() -> Path:
    # Found, not imported: the package is only its files to us.
    spec = importlib.util.find_spec("swagger_ui")
    if spec is None or spec.origin is None:
        raise SetupError("the package swagger-ui-py is missing: install pgrecall with its dependencies")
    return Path(spec.origin).parent / "static"
