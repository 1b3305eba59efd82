"""The requirements on every grammar backend. Backends whose package is not installed are skipped."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import ConfigError, InvalidConstraint
from kvist.grammar import llguidance as llguidance_backend
from kvist.grammar.backend import Grammar, GrammarBackend, Matcher, Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.reasoning import ReasoningBackend
from kvist.request import CONSTRAINT_KINDS, AfterReasoning, Constraint
from kvist.testing.tokenizers import END, byte_tokenizer
from tests.budget import budget

TOKENS = byte_tokenizer(special_tokens=(END, "<call>"), merges=[("t", "r"), ("u", "e"), ("tr", "ue"), ("{", '"')])
END_ID = TOKENS.special_tokens[END]
VOCABULARY = Vocabulary(tokens=TOKENS, size=TOKENS.vocab_size + 5, end_token_ids=(END_ID,))
# Calendars, lengths of names and the like, which no grammar of this kind expresses; docs/structured-output.md has them.
APPROXIMATE_FORMATS = {"date-time", "date", "time", "hostname"}
SUITE: dict[str, Any] = json.loads((Path(__file__).parent / "json_schema_suite.json").read_text())

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
    "triggers": ["<f="],
}
REASONING = AfterReasoning(
    begin="<think>",
    end="</think>",
    closing="\n</think>\n",
    max_tokens=12,
    then=Constraint(kind="regex", text="[x<][0-9]"),  # may begin like the reasoning
)

Example = tuple[str, str, list[str], list[str]]  # kind, text, texts in the language, texts that are not
EXAMPLES: list[Example] = [
    ("json_schema", json.dumps(PERSON), ['{"name":"x","age":7,"tags":[]}'], ['{"name":"x","age":151,"tags":[]}', "{}"]),
    ("json_object", "", ["{}", '{"a":[1,true]}', '{ "a" : null }'], ["[]", "1", '{"a"}']),
    ("regex", r"(ab|c){2,3}\d", ["abc1", "ccc9"], ["ab1", "cccc1", "abc"]),
    ("choice", '["yes", "no", "no way", "\\"/\\n"]', ["yes", "no", "no way", '"/\n'], ["y", "no w", ""]),
    ("grammar", 'root ::= "a" item+\nitem ::= [0-9] | "," item', ["a1", "a1,2"], ["a", "a,"]),
    ("structural_tag", json.dumps(TAG), ["hi <f=a>12</f> there", "no tag"], ["<f=a>x</f>", "<f=b>1</f>"]),
    (
        "after_reasoning",
        REASONING.as_constraint().text,
        ["x1", "<2", "<think>so</think>x1", "<think></think>\n\nx2", "<think>123456789012\n</think>\nx3"],
        [
            "",
            "x",
            "<think>so",
            "<think>so</think>",
            "<think>1234567890123</think>x1",
            "<think>a</think>\n\n\nx1",
            "<think",
        ],
    ),
]
BY_KIND = pytest.mark.parametrize("example", EXAMPLES, ids=[one[0] for one in EXAMPLES])


@pytest.fixture(scope="module", params=GRAMMAR_BACKENDS)
def backend(request: pytest.FixtureRequest) -> GrammarBackend:
    try:
        return ReasoningBackend(GRAMMAR_BACKENDS[request.param].make({}, VOCABULARY))
    except ConfigError as error:
        pytest.skip(error.message)


def schema(value: object, *, strict: bool = True, whitespace: str | None = None) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(value), strict=strict, whitespace=whitespace)


def ids(text: str) -> list[int]:
    return TOKENS.encode(text, add_special_tokens=False)


def takes(grammar: Grammar, text: str) -> bool:
    """Return whether the text is a whole answer."""
    return grammar.matcher().accept([*ids(text), END_ID])


def allowed(matcher: Matcher) -> set[int]:
    words = np.full(VOCABULARY.num_words, 0x55555555, dtype=np.int32)  # every bit must be written
    matcher.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_the_examples_have_every_kind() -> None:
    assert {example[0] for example in EXAMPLES} == set(CONSTRAINT_KINDS)


@BY_KIND
def test_texts_of_the_language_are_taken_and_others_are_not(backend: GrammarBackend, example: Example) -> None:
    kind, text, inside, outside = example
    grammar = backend.compile(Constraint(kind=kind, text=text))
    for one in inside:
        assert takes(grammar, one), one
    for one in outside:
        assert not takes(grammar, one), one


@BY_KIND
def test_the_mask_has_exactly_the_tokens_that_are_accepted(backend: GrammarBackend, example: Example) -> None:
    kind, text, inside, _ = example
    grammar = backend.compile(Constraint(kind=kind, text=text))
    tokens = [*ids(inside[0]), END_ID]
    for place in sorted({*range(0, len(tokens), max(1, len(tokens) // budget(10, long=1000))), len(tokens) - 1}):
        matcher = grammar.matcher()
        assert matcher.accept(tokens[:place])
        accepted = set()
        for token_id in range(TOKENS.vocab_size):
            other = grammar.matcher()
            if other.accept([*tokens[:place], token_id]):
                accepted.add(token_id)
        assert allowed(matcher) == accepted


@BY_KIND
def test_after_the_end_only_end_tokens_follow(backend: GrammarBackend, example: Example) -> None:
    kind, text, inside, _ = example
    matcher = backend.compile(Constraint(kind=kind, text=text)).matcher()
    assert not matcher.is_terminated
    assert matcher.accept([*ids(inside[0]), END_ID])
    for _ in range(2):
        assert matcher.is_terminated
        assert allowed(matcher) == {END_ID}
        assert matcher.accept([END_ID])
    assert not matcher.accept(ids("a"))


@BY_KIND
@settings(max_examples=budget(5, long=200))
@given(data=st.data())
def test_a_replayed_matcher_has_the_same_mask(backend: GrammarBackend, example: Example, data: st.DataObject) -> None:
    kind, text, *_ = example
    grammar = backend.compile(Constraint(kind=kind, text=text))
    generator = random.Random(data.draw(st.integers(0, 2**32)))
    matcher, tokens = grammar.matcher(), list[int]()
    for _ in range(data.draw(st.integers(0, 30))):
        tokens.append(generator.choice(sorted(allowed(matcher))))
        assert matcher.accept(tokens[-1:])
    again = grammar.matcher()
    assert again.accept(tokens)
    assert allowed(again) == allowed(matcher)
    assert again.is_terminated == matcher.is_terminated


@pytest.mark.parametrize("count", [1, 3, 40])
def test_masks_that_are_filled_together_equal_those_filled_alone(
    backend: GrammarBackend, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With answers that are whole, and some that are over."""
    monkeypatch.setattr(llguidance_backend, "_NUM_MASK_THREADS", 2)  # also where few cores are
    grammars = [backend.compile(Constraint(kind=kind, text=text)) for kind, text, *_ in EXAMPLES]
    dice = random.Random(count)
    together, alone = list[Matcher](), list[Matcher]()
    for number in range(count):
        tokens = [*ids(EXAMPLES[number % len(EXAMPLES)][2][0]), END_ID]
        tokens = tokens[: dice.choice([0, len(tokens) // 2, len(tokens) - 1, len(tokens)])]
        for matchers in (together, alone):
            matchers.append(grammars[number % len(EXAMPLES)].matcher())
            assert matchers[-1].accept(tokens)
    words = np.full((count, VOCABULARY.num_words), 0x55555555, dtype=np.int32)
    assert backend.fill(together, words) == {}
    found = [set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()) for row in words]
    assert found == [allowed(matcher) for matcher in alone]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_tokens_that_are_accepted_together_are_accepted_or_refused_as_alone(
    backend: GrammarBackend, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With answers of which the next token is right, wrong, or an end token after the end."""
    monkeypatch.setattr(llguidance_backend, "_NUM_MASK_THREADS", num_threads)
    grammars = [backend.compile(Constraint(kind=kind, text=text)) for kind, text, *_ in EXAMPLES]
    dice = random.Random(num_threads)
    together, alone, token_ids = list[Matcher](), list[Matcher](), list[int]()
    for number in range(60):
        tokens = [*ids(EXAMPLES[number % len(EXAMPLES)][2][0]), END_ID, END_ID]
        place = dice.randrange(len(tokens))
        token_ids.append(tokens[place] if number % 3 else dice.choice([*ids('a0"}'), END_ID]))
        for matchers in (together, alone):
            matchers.append(grammars[number % len(EXAMPLES)].matcher())
            assert matchers[-1].accept(tokens[:place])
    errors = backend.accept(together, token_ids)
    refused = [place for place, matcher in enumerate(alone) if not matcher.accept(token_ids[place : place + 1])]
    assert sorted(errors) == refused
    assert 0 < len(refused) < 20
    left = [place for place in range(60) if place not in refused]
    assert [allowed(together[place]) for place in left] == [allowed(alone[place]) for place in left]


@BY_KIND
def test_forced_tokens_are_those_that_masks_allow_alone(backend: GrammarBackend, example: Example) -> None:
    kind, text, *_ = example
    grammar = backend.compile(Constraint(kind=kind, text=text))
    for seed in range(20):
        dice, matcher = random.Random(seed), grammar.matcher()
        for _ in range(12):
            for token_id in matcher.forced():
                assert allowed(matcher) == {token_id}
                assert matcher.accept([token_id])
            if matcher.is_terminated:
                break
            assert matcher.accept([dice.choice(sorted(allowed(matcher)))])


def test_llguidance_knows_the_tokens_of_a_forced_text_without_masks() -> None:
    backend = GRAMMAR_BACKENDS["llguidance"].make({}, VOCABULARY)
    matcher = backend.compile(schema(PERSON, whitespace="")).matcher()
    assert list(matcher.forced()) == ids('{"name":"')
    assert matcher.accept(ids('{"name":"x'))
    assert list(matcher.forced()) == []


def test_end_tokens_of_answers_that_are_all_over_are_accepted_together(
    backend: GrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llguidance_backend, "_NUM_MASK_THREADS", 2)
    kind, text, (whole, *_), *_ = EXAMPLES[0]
    matchers = [backend.compile(Constraint(kind=kind, text=text)).matcher() for _ in range(6)]
    assert all(matcher.accept([*ids(whole), END_ID]) for matcher in matchers)
    assert backend.accept(matchers, [END_ID] * 6) == {}


def test_the_choice_of_blanks_in_json(backend: GrammarBackend) -> None:
    value = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    free, compact = backend.compile(schema(value)), backend.compile(schema(value, whitespace=""))
    assert takes(free, '{\n  "a": 1\n}')
    assert takes(compact, '{"a":1}')
    assert not takes(compact, '{"a": 1}')
    assert not takes(free, "{" + " " * 41 + '"a":1}'), "a model may not write blanks for ever"


def generate(grammar: Grammar, generator: random.Random, most: int) -> str | None:
    """Return a random answer, or None if it is not complete after `most` tokens. Tokens that go on with the structure
    are as likely as all others together: else a string would have hundreds of characters."""
    structure = set(ids('"}],:0123456789tfn{['))
    matcher, tokens = grammar.matcher(), list[int]()
    while len(tokens) < most:
        choices = sorted(allowed(matcher))
        if END_ID in choices and (len(choices) == 1 or generator.random() < 0.5):
            return TOKENS.decode(tokens)
        preferred = [each for each in choices if each in structure]
        tokens.append(generator.choice(preferred if preferred and generator.random() < 0.5 else choices))
        assert matcher.accept(tokens[-1:]), "a token of the mask is accepted"
    return None


def test_every_random_answer_satisfies_its_schema(backend: GrammarBackend) -> None:
    generator, num_complete = random.Random(1), 0
    validator = jsonschema_rs.validator_for(PERSON)
    grammar = backend.compile(schema(PERSON))
    for _ in range(60):
        answer = generate(grammar, generator, 150)
        if answer is not None:
            num_complete += 1
            assert validator.is_valid(json.loads(answer)), answer
    assert num_complete > 30


# ---------------------------------------------------------------- the default backend alone


@pytest.fixture(scope="module")
def default() -> GrammarBackend:
    return GRAMMAR_BACKENDS["llguidance"].make({}, VOCABULARY)


@pytest.mark.parametrize("name", SUITE["supported"])
def test_no_invalid_document_of_the_official_suite_is_possible(default: GrammarBackend, name: str) -> None:
    for description, document, cases in SUITE["supported"][name]:
        grammar = default.compile(schema(document))
        for what, instance, is_valid in cases:
            text = json.dumps(instance, ensure_ascii=False, separators=(",", ":"))
            if not is_valid and Path(name).stem not in APPROXIMATE_FORMATS:
                assert not takes(grammar, text), (description, what)


def test_random_answers_to_the_schemas_of_the_official_suite_are_valid(default: GrammarBackend) -> None:
    generator, num_complete = random.Random(2), 0
    for name, groups in SUITE["supported"].items():
        if Path(name).stem in APPROXIMATE_FORMATS:
            continue
        for description, document, _ in groups:
            answer = generate(default.compile(schema(document)), generator, 60)
            if answer is not None:
                num_complete += 1
                validator = jsonschema_rs.validator_for(document, validate_formats=False)
                assert validator.is_valid(json.loads(answer)), (name, description, answer)
    assert num_complete > 100


def test_schemas_that_cannot_be_enforced_are_refused_and_never_guessed(default: GrammarBackend) -> None:
    num_refused = 0
    for documents in SUITE["refused"].values():
        for document in documents:
            with pytest.raises(InvalidConstraint):
                default.compile(schema(document))
            num_refused += 1
    assert num_refused > 100


def test_without_strict_unknown_parts_of_a_schema_are_ignored_and_named(default: GrammarBackend) -> None:
    value = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}, "required": ["a"]}
    with pytest.raises(InvalidConstraint) as refused:
        default.compile(schema(value))
    assert refused.value.param == "properties.a"
    assert "not" in refused.value.message
    grammar = default.compile(schema(value, strict=False))
    assert takes(grammar, '{"a":3}')
    assert not takes(grammar, '{"a":"x"}')
    assert any("not" in each for each in grammar.ignored)


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        ({"properties": {"a": {"items": {"type": "strin"}}}}, "properties.a.items", "strin"),
        ({"items": {"$ref": "#/$defs/b"}, "$defs": {"b": {"pattern": "(", "type": "string"}}}, "$defs.b", "regex"),
        ({"properties": {"x": False, "a": {"anyOf": [{}, {"uniqueItems": True}]}}}, "properties.a.anyOf[1]", "unique"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "properties.a", "nowhere"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "", "greater"),
        ({"properties": {"a": {"$ref": "https://example.com/x"}}}, "properties.a", "example.com"),
        ({"$ref": "#"}, "", "no finite answer"),
        (
            {**PERSON, "required": ["x"], "properties": {"x": {"type": "integer", "minimum": 2, "maximum": 1}}},
            "properties.x",
            "greater",
        ),
        (
            {**PERSON, "required": ["x"], "properties": {"x": {"type": "string", "minLength": 2, "maxLength": 1}}},
            "properties.x",
            "Unsat",
        ),
        (
            {
                "properties": {"x": {**PERSON, "properties": {"x": {"$ref": "#/properties/x"}}, "required": ["x"]}},
                "type": "object",
                "required": ["x"],
            },
            "properties.x.properties.x",
            "no finite answer",
        ),
        ({"properties": {"a": {"type": "string", "format": "what"}}}, "properties.a", "what"),
    ],
)
def test_an_error_names_the_path_of_the_faulty_part(
    default: GrammarBackend, value: object, path: str, reason: str
) -> None:
    with pytest.raises(InvalidConstraint) as refused:
        default.compile(schema(value))
    assert refused.value.param == path
    assert reason in refused.value.message


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        ("json_schema", "[" * 200_000),
        ("regex", "(a"),
        ("regex", r"(a)\1"),
        ("choice", "[]"),
        ("choice", "[1]"),
        ("choice", '{"a": 1}'),
        ("grammar", "start: nowhere"),
        ("grammar", "root ::= nowhere"),
        ("grammar", "root ::= ("),
        ("grammar", "x"),
        ("structural_tag", "{}"),
        ("structural_tag", '{"format": {"type": "any"}}'),
    ],
)
def test_faulty_constraints_are_refused(default: GrammarBackend, kind: str, text: str) -> None:
    with pytest.raises(InvalidConstraint) as refused:
        default.compile(Constraint(kind=kind, text=text))
    assert 0 < len(refused.value.message) < 600


TEXT, END_TEXT = {"type": "any_text"}, {"type": "const_string", "value": "END"}
CALL = {
    "type": "tag",
    "begin": "<call>",
    "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
    "end": ";",
}
NAMED = {**CALL, "begin": "f="}


@pytest.mark.parametrize(
    ("form", "inside", "outside"),
    [
        ({"type": "const_string", "value": 'a"<call>\n'}, ['a"<call>\n'], ["a"]),
        (
            {"type": "sequence", "elements": [NAMED, {"type": "regex", "pattern": "[/x]+\n?"}]},
            ["f=1;/x/"],
            ["f=1;", "f=;x"],
        ),
        ({"type": "sequence", "elements": [TEXT, END_TEXT]}, ["so END"], ["so"]),
        ({"type": "or", "elements": [NAMED, CALL]}, ["f=1;", "<call>22;"], ["<call>f=1;"]),
        ({"type": "tag", "begin": "(", "content": {"type": "any_text"}, "end": ")"}, ["(a b)"], ["(a", "(a)b"]),
        ({"type": "triggered_tags", "triggers": ["<call>"], "tags": [CALL]}, ["a <call>1;<call>2; b", ""], ["<call>x"]),
        (
            {
                "type": "triggered_tags",
                "triggers": ["f"],
                "tags": [NAMED],
                "at_least_one": True,
                "stop_after_first": True,
            },
            ["so f=1;"],
            ["so", "f=1;more"],
        ),
        ({"type": "tags_with_separator", "tags": [NAMED], "separator": ", "}, ["", "f=1;, f=2;"], ["f=1;f=2;"]),
    ],
)
def test_every_type_of_structural_tags(
    default: GrammarBackend, form: object, inside: list[str], outside: list[str]
) -> None:
    grammar = default.compile(Constraint(kind="structural_tag", text=json.dumps({"format": form})))
    for text in inside:
        assert takes(grammar, text), text
    for text in outside:
        assert not takes(grammar, text), text


@pytest.mark.parametrize(
    ("tag", "path"),
    [
        ({"structures": [], "triggers": ["a"]}, "structures"),
        ({"structures": [{"begin": "a", "end": "b"}], "triggers": ["a"]}, "structures[0].schema"),
        ({"structures": [{"begin": "a", "end": "b", "schema": {}}], "triggers": ["x"]}, "triggers[0]"),
        ({"format": {"type": "or", "elements": [{"type": "tag", "begin": 1}]}}, "format.elements[0].begin"),
        ({"format": {"type": "sequence", "elements": [TEXT, TEXT]}}, "format.elements[0]"),
    ],
)
def test_a_faulty_structural_tag_is_refused_with_the_path(default: GrammarBackend, tag: object, path: str) -> None:
    with pytest.raises(InvalidConstraint) as refused:
        default.compile(Constraint(kind="structural_tag", text=json.dumps(tag)))
    assert refused.value.param == path


WORST = [
    Constraint(kind="regex", text="((a{1,1000}){1,1000}){1,1000}"),
    Constraint(kind="regex", text="(.*a){500}"),
    Constraint(kind="regex", text="((a|b)*a(a|b){20})"),
    Constraint(kind="regex", text="(" * 20_000 + "a" + ")" * 20_000),
    schema({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    schema({"enum": [f"value {number}" for number in range(10_000)]}),
    schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    schema({"type": "array", "items": {}, "minItems": 10**6}),
    Constraint(kind="grammar", text="root ::= " + " | ".join(f'"{number}"' for number in range(5_000))),
    Constraint(kind="grammar", text='start: a\na: a a | "x" |'),
]


@pytest.mark.parametrize("number", range(len(WORST)))
def test_catastrophic_constraints_cost_a_bounded_time(default: GrammarBackend, number: int) -> None:
    start_s = time.process_time()
    try:
        matcher = default.compile(WORST[number]).matcher()
        for _ in range(5):
            choices = sorted(allowed(matcher))
            assert matcher.accept(choices[-1:])
    except InvalidConstraint:
        pass  # refused, or given up, within the time
    assert time.process_time() - start_s < 20
