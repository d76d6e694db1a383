"""Grammars: whatever is drawn follows them, resuming is exact, and a hostile one harms nobody."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from gpu_daemon.engine.grammar import Grammar, GrammarCompiler
from gpu_daemon.errors import InvalidGrammar
from tests.gpu_daemon.conftest import make_runner
from tests.gpu_daemon.driver import make_sequence, run_all
from tests.hostile_schemas import HARMLESS, REFUSED

VOCABULARY, EOS = 49_152, 2
LEAVES = ["string", "integer", "number", "boolean", "null", "enum"]
BRANCHES = ["object", "array", "anyOf"] * 2
SOURCES = ["", "start: nothing", "start: %json {", 'start: "x', "x" * 300_000]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def lark(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps({'x-guidance': {'whitespace_flexible': False}, **schema})}"


@pytest.fixture(scope="module")
def compiler(smollm2) -> GrammarCompiler:
    return GrammarCompiler(smollm2 / "tokenizer.json", VOCABULARY, {EOS})


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="module")
def runner(smollm2):
    return make_runner(smollm2)


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kind = rng.choice([*LEAVES, *(BRANCHES if depth else [])])
    if kind == "string":
        return {"type": "string", **rng.choice([{"maxLength": rng.randint(0, 9)}, {"pattern": "^[a-c]{1,4}-\\d{2}$"}])}
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
    if kind == "number":
        return {"type": "number", "minimum": -3, "maximum": 99.5}
    if kind == "enum":
        return {"enum": rng.sample(["a", 'é\n"', 1, 2.5, None, True, {"k": [1]}], rng.randint(1, 4))}
    if kind == "object":
        names = rng.sample(["a", "b c", 'q"', "né", "d\\", "e"], rng.randint(0, 4))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = rng.sample(names, rng.randint(0, len(names)))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randint(0, 2), "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}


def draw_to_the_end(grammar: Grammar, rng: random.Random, limit: int = 500) -> list[int]:
    """Any allowed tokens until the end of text is drawn."""
    drawn: list[int] = []
    while len(drawn) < limit:
        choices = np.flatnonzero(grammar.allowed())
        drawn.append(int(rng.choice(choices)))
        if drawn[-1] == EOS:
            return drawn[:-1]
        grammar.advance(drawn[-1])
        assert not grammar.failed
    raise AssertionError("no end in sight")


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_drawn_parses_and_validates(compiler, tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    (grammar,) = compiler.compile(lark(schema), [[]])
    text = tokenizer.decode(draw_to_the_end(grammar, rng), skip_special_tokens=False)
    jsonschema.validate(json.loads(text), schema)


def test_complete_allows_the_end_alone(compiler, tokenizer) -> None:
    (grammar,) = compiler.compile(lark(PERSON), [tokenizer.encode('{"name":"a","age":7', add_special_tokens=False).ids])
    assert not grammar.complete
    grammar.advance(tokenizer.token_to_id("}"))
    assert grammar.complete
    assert np.flatnonzero(grammar.allowed()).tolist() == [EOS]


def test_a_resumed_state_allows_what_the_first_one_did(compiler, tokenizer) -> None:
    ids = tokenizer.encode('{"name":"Zoë","age":41}', add_special_tokens=False).ids
    for taken in range(len(ids) + 1):
        (first,), (resumed,) = compiler.compile(lark(PERSON), [[]]), compiler.compile(lark(PERSON), [ids[:taken]])
        for token_id in ids[:taken]:
            first.advance(token_id)
        assert (first.allowed() == resumed.allowed()).all()


def test_choices_do_not_share_a_state(compiler, tokenizer) -> None:
    one, other = compiler.compile(lark(PERSON), [[], []])
    before = other.allowed().copy()
    one.advance(tokenizer.token_to_id("{"))
    assert (other.allowed() == before).all()


def test_a_token_against_the_grammar_fails_it_and_raises_nothing(compiler, tokenizer) -> None:
    (grammar,) = compiler.compile(lark(PERSON), [[]])
    grammar.advance(tokenizer.token_to_id("}"))
    assert grammar.failed
    assert not grammar.complete
    grammar.allowed()


@pytest.mark.parametrize("source", [*SOURCES, lark(REFUSED["refers to a file"])], ids=range(len(SOURCES) + 1))
def test_what_cannot_be_compiled_is_refused(compiler, source: str) -> None:
    with pytest.raises(InvalidGrammar):
        compiler.compile(source, [[]])


def test_tokens_that_do_not_follow_are_refused(compiler) -> None:
    with pytest.raises(InvalidGrammar):
        compiler.compile(lark(PERSON), [[5, 6, 7]])


@pytest.mark.parametrize("name", [*REFUSED, *HARMLESS])
def test_a_hostile_grammar_ends_or_goes_on_soon(compiler, name: str) -> None:
    """Even those that the site refuses: a daemon does not rely on it."""
    rng = random.Random(1)
    started = time.process_time()
    try:
        (grammar,) = compiler.compile(lark(REFUSED.get(name) or HARMLESS[name]), [[]])
        for _ in range(10):
            grammar.advance(int(rng.choice(np.flatnonzero(grammar.allowed()).tolist() or [EOS])))
    except InvalidGrammar:
        pass
    assert time.process_time() - started < 4


def test_a_model_keeps_to_its_grammar_beside_others_that_have_none(runner, compiler, tokenizer) -> None:
    prompt = tokenizer.encode("Describe a person as JSON: ").ids
    options = {"max_tokens": 40, "ignore_eos": False, "temperature": 1.5}
    (alone,) = run_all(runner, [make_sequence(prompt, **options)])
    bound = [make_sequence(prompt, seed=seed, **options) for seed in range(2)]
    for sequence, grammar in zip(bound, compiler.compile(lark(PERSON), [[], []]), strict=True):
        sequence.grammar = grammar
    free, *together = run_all(runner, [make_sequence(prompt, **options), *bound])
    assert free == alone
    for ids in together:
        jsonschema.validate(json.loads(tokenizer.decode(ids)), PERSON)
