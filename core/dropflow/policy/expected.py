"""What an option of a stage may hold, in words for error messages."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, WithJsonSchema

PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
"""Types of single values."""


def expected(model: type[BaseModel], path: Sequence[int | str]) -> str:
    """What `model` expects at `path` in a mapping, such as "a mapping {boundary: tokens}"; "" if unknown.

    `path` is that of a pydantic error: field names, mapping keys, list indices.
    """
    field = model.model_fields.get(str(path[0])) if path else None
    if field is None or field.annotation is None:
        return "" if path else _mapping_of(model)
    names = [name for name in map(_title, field.metadata) if name]
    return names[0] if names and len(path) == 1 else _inside(field.annotation, path[1:])


def _inside(annotation: Any, path: Sequence[int | str]) -> str:
    """What is expected at `path` inside a value of this type."""
    origin, args = get_origin(annotation), get_args(annotation)
    if not path:
        return _told(annotation)
    if origin in (Union, types.UnionType):
        return next(filter(None, (_inside(one, path) for one in args)), "")
    if origin is Annotated:
        return _inside(args[0], path)
    if origin is not None and issubclass(origin, Mapping):
        return _inside(args[1], path[1:])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return expected(annotation, path)
    return ""


def _told(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next(filter(None, map(_title, args[1:])), "") or _told(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(filter(None, (_told(one) for one in args if one is not type(None))))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        return _mapping_of(annotation) if is_model else PLAIN.get(annotation, "")
    if issubclass(origin, Mapping):
        key, value = map(_told, args)
        return f"a mapping {{{key}: {value}}}" if key and value else "a mapping"
    if issubclass(origin, Sequence):
        return f"a list [{', '.join('...' if one is Ellipsis else _told(one) for one in args)}]"
    return ""


def _mapping_of(model: type[BaseModel]) -> str:
    return f"a mapping {{{', '.join(model.model_fields)}}}"


def _title(metadata: Any) -> str:
    """The short name that a kind of number has in the schema, such as "boundary"."""
    schema = metadata.json_schema if isinstance(metadata, WithJsonSchema) else None
    return str((schema or {}).get("title", ""))
