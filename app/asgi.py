"""The composition root: settings in, application out. The lifespan opens what handlers work with."""

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from litestar import Litestar, Request
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.static_files import create_static_files_router

from app import __version__, errors, rag, settings as settings_module, telemetry
from app.api import documents, health, problems, search
from app.api import rag as rag_route
