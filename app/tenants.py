"""Tenants: who a document belongs to. They come into being by use; keys are made for those that are registered."""

import re

from app.errors import BadInput

PATTERN = "^[A-Za-z0-9_.:-]{1,128}$"
_ALLOWED = re.compile(PATTERN)


class LeftOut(str):
    """Stands where a request names no tenant, which it need not where its key does."""

    __slots__ = ()


def check(tenant_id: str, field: str = "tenant_id") -> str:
    """The tenant's name as it is. Raises BadInput unless it is 1 to 128 letters, digits, `_`, `.`, `:` or `-`."""
    if not _ALLOWED.fullmatch(tenant_id):
        raise BadInput(
            field, f"{tenant_id[:140]!r} is not allowed; allowed: 1 to 128 letters, digits, '_', '.', ':' or '-'"
        )
    return tenant_id
