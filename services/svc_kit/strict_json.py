"""Request bodies read strictly: nothing is accepted and ignored.

Envoy's transcoder drops unknown JSON fields, takes "3" for a number and the last of two equal keys. So
REST bodies reach the services as raw bytes and are read here, and native messages take the same way.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from google.protobuf import json_format, message
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from svc_kit.errors import InvalidRequest

MAX_DEPTH = 32
MAX_DIGITS = 1000
LARGEST_EXACT_INT = 2**53
_MAX_ERRORS_SHOWN = 3
_SURROGATE = re.compile("[\ud800-\udfff]")


def _integral(value: Any) -> Any:
    """JSON knows no integers: 3.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]


class StrictBody(BaseModel):
    """A body, or an object in one: no unknown field, no value of another type, no null."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key, item in value.items():
                if item is None:
                    raise ValueError(f"`{key}` is null; leave it out instead")
        return value


Body = TypeVar("Body", bound=BaseModel)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InvalidRequest: the body is no JSON object, repeats a key, is nested over `MAX_DEPTH` deep, or
            holds what JSON or a database can't carry (NaN, a lone surrogate).
    """
    if not body.strip():
        raise InvalidRequest("The body is empty; a JSON object was expected.")
    try:
        # Decoded here, since `json` would take UTF-16 and UTF-32 too.
        text = body.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_without_repeats, parse_constant=_no_constant, parse_int=_short_int
        )
        check_json_value(value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: byte {error.start} can't be read.") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise InvalidRequest(f"The body is nested over {MAX_DEPTH} levels deep.") from error
    except ValueError as error:
        raise InvalidRequest(f"The body can't be taken: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body is a JSON {_json_type(value)}; an object was expected.")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key `{key}` is there twice")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _short_int(digits: str) -> int:
    # Python refuses more than 4,300 by itself, in words about itself.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits; send it as a string")
    return int(digits)


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def check_json_value(value: Any, path: tuple[int | str, ...] = ()) -> None:
    """Checks that a value comes back unchanged from where it is kept.

    Raises:
        ValueError: it is nested too deep, or holds a number or a text that can't be kept exactly.
    """
    if len(path) > MAX_DEPTH:
        raise ValueError(f"`{_written(path)}` is nested over {MAX_DEPTH} levels deep")
    match value:
        case dict():
            for key, item in value.items():
                _check_text(key, path)
                check_json_value(item, (*path, key))
        case list():
            for index, item in enumerate(value):
                check_json_value(item, (*path, index))
        case str():
            _check_text(value, path)
        case bool():
            pass
        case int() if abs(value) > LARGEST_EXACT_INT:
            raise ValueError(
                f"`{_written(path)}` is a number too large to be kept exactly; send it as a string"
            )
        case float() if not math.isfinite(value):
            raise ValueError(f"`{_written(path)}` is not a finite number")


def _check_text(text: str, path: tuple[int | str, ...]) -> None:
    if _SURROGATE.search(text):
        raise ValueError(f"`{_written(path)}` holds half of a surrogate pair, which is no text")


def _written(path: Iterable[int | str]) -> str:
    """A path as a user would write it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def validate(body_type: type[Body], value: dict[str, Any]) -> Body:
    """Builds a body from a parsed object.

    Raises:
        InvalidRequest: names each wrong field, what was expected and what was found.
    """
    try:
        return body_type.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        shown = "; ".join(_describe(item, value) for item in found[:_MAX_ERRORS_SHOWN])
        more = f"; and {len(found) - _MAX_ERRORS_SHOWN} more" if len(found) > _MAX_ERRORS_SHOWN else ""
        field = _path(found[0]["loc"], value)
        raise InvalidRequest(f"{shown}{more}.", **({"field": field} if field else {})) from error


def _path(location: tuple[int | str, ...], value: Any) -> str:
    """The field's path as a user would write it; pydantic's names of union members are left out."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(part, int):
            path.append(part)
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif is_last or (isinstance(value, dict) and part in value):
            path.append(part)
            value = value.get(part) if isinstance(value, dict) else None
    return _written(path)


def _describe(item: Any, value: dict[str, Any]) -> str:
    path = _path(item["loc"], value)
    match item["type"]:
        case "extra_forbidden":
            return f"`{path}` is not a known field"
        case "missing":
            return f"`{path}` is missing"
        case "value_error":
            message_text = str(item["ctx"]["error"])
            return f"`{path}`: {message_text}" if path else message_text
        case "model_type" | "dict_type":  # whose texts are about Python
            text = "an object was expected"
        case _:
            text = item["msg"][:1].lower() + item["msg"][1:]
    found = json.dumps(item["input"], default=str, ensure_ascii=False)
    return f"`{path}`: {text}, but it is {found if len(found) <= 80 else found[:77] + '...'}"


def nearest(name: str, known: list[str]) -> str:
    """Returns ` (did you mean X?)`, or nothing where no known name is like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def message_to_object(native: message.Message) -> dict[str, Any]:
    """Returns a native message as the object that its REST twin would have sent; unset fields are absent.

    Raises:
        InvalidRequest: a `Struct` in it holds what JSON can't carry: NaN or infinity.
    """
    try:
        return json_format.MessageToDict(native, preserving_proto_field_name=True)
    except json_format.SerializeToJsonError as error:
        raise InvalidRequest(
            "A number in the message is infinite or not a number, and can't be kept; send a finite one."
        ) from error
