"""What the OpenAPI document says of an object beyond its fields: what it is, and which of them have to be there."""

import inspect
from typing import Any

from litestar.openapi.spec import Schema
from litestar.plugins import OpenAPISchemaPlugin
from litestar.typing import FieldDefinition
from msgspec import UNSET, Struct, structs


class Objects(OpenAPISchemaPlugin):
    """Structs and dataclasses as Litestar describes them, with their docstrings.

    A request may have no other fields than those of its object. An answer has all of them, also those with a default.
    """

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        """Whether it is one of ours."""
        return not field_definition.is_union and (
            field_definition.is_dataclass_type or field_definition.is_subclass_of(Struct)
        )

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        """The object's schema."""
        litestars = next(
            each
            for each in schema_creator.plugins
            if each is not self
            and isinstance(each, OpenAPISchemaPlugin)
            and each.is_plugin_supported_field(field_definition)
        )
        schema: Schema = litestars.to_openapi_schema(field_definition, schema_creator)
        kind = field_definition.type_
        schema.description = inspect.getdoc(kind)
        config = getattr(kind, "__struct_config__", None)
        if config is not None and config.forbid_unknown_fields:
            schema.additional_properties = False
        elif config is None or not config.omit_defaults:
            absent = {each.encode_name for each in structs.fields(kind) if each.default is UNSET} if config else set()
            schema.required = sorted((schema.properties or {}).keys() - absent)
        return schema
