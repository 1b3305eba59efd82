"""The parts that a program adds to a state: texts, roles, generations and choices. `+` joins them; none has a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvist.errors import ProgramError
from kvist.execution.choices import ChoicesMethod
from kvist.execution.sampling import Sampling
from kvist.lang.answer_types import AnswerType, Scalar
from kvist.lang.positions import here
from kvist.planning.prompt import unsendable


class Expression(ABC):
    """Anything but a text that can be added to a state."""

    def __add__(self, other: object) -> Expression:
        return joined((self, other))

    def __radd__(self, other: object) -> Expression:
        return joined((other, self))

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """Yield texts, role marks, generations and choices in their order."""


@dataclass(frozen=True, slots=True)
class RoleBegin(Expression):
    role: str

    def parts(self) -> Iterator[Part]:
        yield self


@dataclass(frozen=True, slots=True)
class RoleEnd(Expression):
    role: str

    def parts(self) -> Iterator[Part]:
        yield self


@dataclass(frozen=True, slots=True)
class Joined(Expression):
    items: tuple[Expression | str, ...]

    def parts(self) -> Iterator[Part]:
        for item in self.items:
            if isinstance(item, str):
                yield item
            else:
                yield from item.parts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gen(Expression):
    """A generation, whose result is the variable `name`."""

    name: str
    sampling: Sampling
    answer_type: AnswerType

    def parts(self) -> Iterator[Part]:
        yield self


@dataclass(frozen=True, slots=True, kw_only=True)
class Select(Expression):
    """A choice, whose result is the variable `name`."""

    name: str
    choices: tuple[str, ...]
    method: ChoicesMethod
    temperature: float | None = None
    seed: int | None = None

    def parts(self) -> Iterator[Part]:
        yield self


Part: TypeAlias = str | RoleBegin | RoleEnd | Gen | Select


def joined(items: Sequence[object]) -> Expression:
    """Return one expression. Raises `ProgramError` for an item that is neither a text nor an expression."""
    found: list[Expression | str] = []
    for item in items:
        if not isinstance(item, str | Expression):
            raise ProgramError(
                f"{here()}: a state takes texts and expressions such as gen(), not {type(item).__name__}: use str(...)"
            )
        found.append(str.__str__(item) if isinstance(item, str) else item)  # a plain text, also of a trace's results
    return Joined(tuple(found))


def role(name: str, content: object) -> Expression:
    """Return a whole message of the role."""
    return joined((RoleBegin(name), content, RoleEnd(name)))


def system(content: str | Expression) -> Expression:
    return role("system", content)


def user(content: str | Expression) -> Expression:
    return role("user", content)


def assistant(content: str | Expression) -> Expression:
    return role("assistant", content)


def system_begin() -> Expression:
    return RoleBegin("system")


def system_end() -> Expression:
    return RoleEnd("system")


def user_begin() -> Expression:
    return RoleBegin("user")


def user_end() -> Expression:
    return RoleEnd("user")


def assistant_begin() -> Expression:
    return RoleBegin("assistant")


def assistant_end() -> Expression:
    return RoleEnd("assistant")


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    dtype: type[Scalar] | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod = ChoicesMethod.TOKEN_LENGTH_NORMALIZED,
    regex: str | None = None,
    json_schema: str | Mapping[str, object] | None = None,
    type: type[object] | None = None,
    seed: int | None = None,
) -> Expression:
    """Generate text; the state has it as `state[name]`.

    `max_tokens` is 128 unless the run or the call says otherwise. `stop_regex` ends the answer before the first match
    of a pattern. `n` answers make the variable a list, and the first of them continues the state. At most one of these
    gives the answer's form: `regex`; `json_schema`, an object or its JSON; `type`, a dataclass, a msgspec Struct, a
    TypedDict or a pydantic model, and then `state[name]` has that type; `dtype`, one of int, float, bool and str (in
    quotes). With `choices` this is `select`. Raises `ProgramError` naming the program's line.
    """
    if choices is not None:
        if any(one is not None for one in (regex, json_schema, type, dtype)):
            raise ProgramError(f"{here()}: `choices` is a form of the answer by itself: give no second one")
        return select(name, choices, temperature=temperature, choices_method=choices_method, seed=seed)
    sampling = Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        n=n,
        stop=stop,
        stop_token_ids=stop_token_ids,
        stop_regex=stop_regex,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        ignore_eos=ignore_eos,
        return_logprob=return_logprob,
        logprob_start_len=logprob_start_len,
        top_logprobs_num=top_logprobs_num,
        seed=seed,
    )
    _check(sampling)
    answer_type = AnswerType.of(regex=regex, json_schema=json_schema, python_type=type, dtype=dtype)
    return Gen(name=_name(name), sampling=sampling, answer_type=answer_type)


def gen_int(name: str | None = None, max_tokens: int | None = None, *, temperature: float | None = None) -> Expression:
    """Generate a whole number; `state[name]` is an int."""
    return gen(name, max_tokens, temperature=temperature, dtype=int)


def gen_string(
    name: str | None = None, max_tokens: int | None = None, *, temperature: float | None = None
) -> Expression:
    """Generate a text in double quotes; `state[name]` is the text without them."""
    return gen(name, max_tokens, temperature=temperature, dtype=str)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float | None = None,
    choices_method: ChoicesMethod = ChoicesMethod.TOKEN_LENGTH_NORMALIZED,
    seed: int | None = None,
) -> Expression:
    """Choose one of the texts by their probabilities after the prompt; nothing is generated.

    With a `temperature`, the choice is drawn with probabilities proportional to exp(score / temperature). Raises
    `ProgramError` naming the program's line.
    """
    if not choices or isinstance(choices, str) or not all(isinstance(each, str) and each for each in choices):
        raise ProgramError(f"{here()}: select() needs `choices`, a list of texts that are not empty, not {choices!r}")
    if bad := unsendable("".join(choices)):
        raise ProgramError(f"{here()}: `choices` contain {bad!r}, which UTF-8 cannot encode: remove it")
    if len(set(choices)) != len(choices):
        raise ProgramError(f"{here()}: two choices of select() are equal")
    if not isinstance(choices_method, ChoicesMethod):
        methods = ", ".join(f"kv.{each}" for each in ChoicesMethod)
        raise ProgramError(f"{here()}: `choices_method` must be one of {methods}, not {choices_method!r}")
    _check(Sampling(temperature=temperature))
    return Select(name=_name(name), choices=tuple(choices), method=choices_method, temperature=temperature, seed=seed)


def _check(sampling: Sampling) -> None:
    if problem := sampling.problem():
        raise ProgramError(f"{here()}: {problem}")


def _name(name: str | None) -> str:
    """Return the name, or "" for a result that only becomes part of the text."""
    if name is not None and not isinstance(name, str):
        raise ProgramError(f"{here()}: the name of a variable must be a text, not {type(name).__name__}")
    return name or ""
