"""Bodies read strictly: what is refused, and whether the message says where."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Annotated

import pytest
from google.protobuf import struct_pb2
from pydantic import Field

from svc_kit.errors import InvalidRequest
from svc_kit.strict_json import Integer, StrictBody, message_to_object, parse_json_object, validate
from tunery.job.v1 import fine_tuning_service_pb2


class Inner(StrictBody):
    count: Annotated[Integer, Field(ge=1, le=9)] = 3
    share: Annotated[float, Field(ge=0, le=1)] = 0.0


class Outer(StrictBody):
    name: str
    flag: bool = False
    inner: Inner = Inner()
    items: list[Inner] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"[]", "list"),
        (b'"x"', "string"),
        (b"null", "null"),
        (b"1", "number"),
        (b"{", "line 1, column 2"),
        (b'{"a": 1,}', "line 1"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "`c` is there twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "finite"),
        (b'{"a": [1, 9007199254740993]}', "`a[1]`"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has 5,000 digits; send it as a string"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": "b"}'.encode("utf-16"), "UTF-8"),
        ('{"a": "b"}'.encode("utf-16-le"), "not JSON"),
        ('{"a": "b"}'.encode("utf-32"), "UTF-8"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deep"),
        (b'{"a":' * 100_000, "deep"),
    ],
)
def test_bodies_that_are_no_plain_object_are_refused(body: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json_object(body)
    assert told in caught.value.message


def test_a_plain_object_is_read_as_it_is() -> None:
    body = '{"a": [1, 2.5, true, null, "é\\u0000"], "b": {}}'.encode()
    assert parse_json_object(body) == {"a": [1, 2.5, True, None, "é\0"], "b": {}}


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_json_object('{"a": 1}'.encode("utf-8-sig")) == {"a": 1}


@pytest.mark.parametrize(
    "body",
    [
        "{" + ",".join(f'"{number}": 0' for number in [*range(60_000), 59_999]) + "}",
        '{"' + "k" * 500_000 + '": [' + ",".join(["0"] * 270_000) + "]}",
        '{"a": "' + "x" * 900_000 + '"}',
    ],
    ids=["a key of many is there twice", "a long key of a long list", "a long text"],
)
def test_no_body_takes_long(body: str) -> None:
    started = time.process_time()
    with contextlib.suppress(InvalidRequest):
        parse_json_object(body.encode())
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "name"),
        ({"name": 1}, "name"),
        ({"name": "x", "nmae": 1}, "nmae"),
        ({"name": "x", "flag": 1}, "flag"),
        ({"name": "x", "flag": "true"}, "flag"),
        ({"name": "x", "inner": []}, "inner"),
        ({"name": "x", "inner": {"count": "3"}}, "inner.count"),
        ({"name": "x", "inner": {"count": True}}, "inner.count"),
        ({"name": "x", "inner": {"count": 3.5}}, "inner.count"),
        ({"name": "x", "inner": {"count": 0}}, "inner.count"),
        ({"name": "x", "inner": {"other": 0}}, "inner.other"),
        ({"name": "x", "inner": {"share": "0.5"}}, "inner.share"),
        ({"name": "x", "items": [{}, {"count": 99}]}, "items[1].count"),
    ],
)
def test_what_is_wrong_is_named(value: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(Outer, value)
    assert f"`{field}`" in caught.value.message
    assert caught.value.details["field"] == field


@pytest.mark.parametrize("inner", [[], "x", 1])
def test_no_text_is_about_python(inner: object) -> None:
    with pytest.raises(InvalidRequest, match="`inner`: an object was expected, but it is"):
        validate(Outer, {"name": "x", "inner": inner})


@pytest.mark.parametrize("value", [{"name": None}, {"name": "x", "inner": None}])
def test_nulls_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="is null; leave it out"):
        validate(Outer, value)


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert validate(Outer, {"name": "x", "inner": {"count": 3.0, "share": 1}}).inner.count == 3


def test_only_the_first_errors_are_shown() -> None:
    with pytest.raises(InvalidRequest, match="and 2 more"):
        validate(Outer, {"name": "x", **{f"field{number}": 1 for number in range(5)}})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_native_number_that_json_cannot_carry_is_refused(number: float) -> None:
    metadata = struct_pb2.Struct()
    metadata.fields["a"].number_value = number
    with pytest.raises(InvalidRequest, match="finite"):
        message_to_object(fine_tuning_service_pb2.Config(metadata=metadata))
