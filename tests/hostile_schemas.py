"""Schemas that mean harm, or cannot be kept: each is refused, or is harmless to enforce. Data; several tests send them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
_LETTERS = "abcdefghijklmnop"


def _nested(depth: int) -> Schema:
    schema: Schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _doubling(length: int, keyword: str) -> Schema:
    """2 ** length schemas, were each reference to be written out."""
    defs: Schema = {"d0": {"type": "string"}}
    for i in range(1, length):
        defs[f"d{i}"] = {keyword: [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}"}]}
    return {"$defs": defs, "$ref": f"#/$defs/d{length - 1}"}


def _product(factors: int) -> Schema:
    """Every choice of every factor together is a schema of its own."""
    choices = ({"anyOf": [{"properties": {f"{c}{i}": {"type": "string"}}} for c in "ab"]} for i in range(factors))
    return {"allOf": list(choices)}


REFUSED: dict[str, Schema] = {
    "many optional properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2_000)}},
    "64 KiB of names": {"type": "object", "required": [f"name number {i}" for i in range(8_000)]},
    "refers to itself": {"$ref": "#"},
    "is all of itself": {"allOf": [{"$ref": "#"}]},
    "refers in a ring": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "contains itself for ever": {"type": "object", "properties": {"l": {"$ref": "#"}}, "required": ["l"]},
    "2^24 combinations": _product(24),
    "refers to a network": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "refers to a file": {"$ref": "file:///etc/passwd"},
    "a million repetitions": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "2,000 brackets": {"type": "string", "pattern": "(" * 400 + "a+" + ")" * 400},
    "thousand optional letters": {"type": "string", "pattern": "^" + "a?" * 450 + "[ab]{5000}{300}$"},
    "sixteen patterns at once": {"allOf": [{"type": "string", "pattern": f".*{c}.{{{i}}}$"} for i, c in enumerate(_LETTERS)]},
    "sixteen patterns in a row": {
        "$defs": {f"d{i}": {"pattern": f".*{c}.{{{i}}}$", "$ref": f"#/$defs/d{i + 1}"} for i, c in enumerate(_LETTERS)}
        | {"d16": {"type": "string"}},
        "$ref": "#/$defs/d0",
    },
    "looks ahead": {"type": "string", "pattern": "^(?=a)b"},
    "60,000 letters": {"const": "x" * 60_000},
    "multiple of a prime": {"type": "integer", "multipleOf": 999_999_937},
    "1,000 alternatives": {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(1_000)]},
    "overlapping names": {"type": "object", "patternProperties": {f"^(a|b)*{i}.*$": {"type": "string"} for i in range(200)}},
    "nothing fits": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "empty enum": {"enum": []},
    "not": {"not": {"type": "string"}},
    "unknown type": {"type": "strng"},
    "type is a number": {"type": 5},
    "properties are a list": {"properties": [1, 2]},
    "steers the compiler": {"type": "string", "x-guidance": {"whitespace_pattern": "(a+)+"}},
    "unique items": {"type": "array", "uniqueItems": True},
}  # fmt: skip
HARMLESS: dict[str, Schema] = {
    "depth 9": _nested(9),
    "2^60 references": _doubling(60, "allOf"),
    "2^40 alternatives": _doubling(40, "anyOf"),
    "a tree": {"type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}, "additionalProperties": False},
    "3,000 values": {"enum": [f"value number {i}" for i in range(3_000)]},
    "nested repetition": {"type": "string", "pattern": "^(((a+)+)+)+$"},
    "a billion letters": {"type": "string", "maxLength": 10**9},
    "a billion items": {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    "long memory": {"type": "string", "pattern": "^(.*a){20}.{200}$"},
    "letters of all scripts": {"type": "string", "pattern": "^(\\p{L}{1,200}\\p{N}){50}$"},
}
