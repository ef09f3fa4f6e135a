"""What the OpenAPI document says of an object beyond its fields: what it is, and which of them have to be there."""

import inspect
from dataclasses import fields, replace
from typing import Any

from litestar.openapi.spec import Reference, Schema
from litestar.plugins import OpenAPISchemaPlugin
from litestar.typing import FieldDefinition
from msgspec import UNSET, Struct, structs


def sole(schema: Schema | Reference) -> Schema | Reference:
    """What is one of one thing as that thing: generators of clients make a type of its own of such a choice."""
    if isinstance(schema, Reference) or not schema.one_of or len(schema.one_of) > 1:
        return schema
    (only,) = schema.one_of
    if isinstance(only, Reference):
        return only
    given = {each.name: value for each in fields(schema) if (value := getattr(schema, each.name)) is not None}
    return replace(only, **{name: value for name, value in given.items() if name != "one_of"})


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
        schema.properties = {name: sole(each) for name, each in (schema.properties or {}).items()}
        kind = field_definition.type_
        schema.description = inspect.getdoc(kind)
        config = getattr(kind, "__struct_config__", None)
        if config is not None and config.forbid_unknown_fields:
            schema.additional_properties = False
        elif config is None or not config.omit_defaults:
            absent = {each.encode_name for each in structs.fields(kind) if each.default is UNSET} if config else set()
            schema.required = sorted((schema.properties or {}).keys() - absent)
        return schema
