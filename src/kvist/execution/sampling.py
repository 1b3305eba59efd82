"""How the tokens of a generation are chosen: the language's parameters, as a value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from kvist.planning.prompt import unsendable

DEFAULT_MAX_TOKENS = 128
MAX_SEED = 2**63  # of Kvist's API; a server with a smaller limit says so
_RANGES = (  # of numbers; None: servers have a limit of their own
    ("temperature", 0, None),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. None: as the run says, else as the server does. Names are OpenAI's and SGLang's."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_regex: str | Sequence[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    seed: int | None = None

    def over(self, defaults: Sampling) -> Sampling:
        """Return these values, and those of `defaults` where these are None."""
        pairs = ((one.name, getattr(self, one.name), getattr(defaults, one.name)) for one in fields(self))
        return Sampling(**{name: default if own is None else own for name, own, default in pairs})

    def given(self) -> frozenset[str]:
        """Return the names of the values that are not None."""
        return frozenset(one.name for one in fields(self) if getattr(self, one.name) is not None)

    def problem(self) -> str | None:
        """Return what is wrong with a value that no server accepts; None if nothing is."""
        for name, least in (("max_tokens", 1), ("min_tokens", 0), ("n", 1), ("top_logprobs_num", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                return f"`{name}` must be a whole number of at least {least}, not {value!r}"
        if (token_ids := self.stop_token_ids) is not None and not (
            isinstance(token_ids, list | tuple) and all(isinstance(each, int) for each in token_ids)
        ):
            return f"`stop_token_ids` must be a list of whole numbers, not {token_ids!r}"
        for name in ("ignore_eos", "return_logprob"):
            if (value := getattr(self, name)) is not None and not isinstance(value, bool):
                return f"`{name}` must be True or False, not {value!r}"
        for name in ("top_k", "seed", "logprob_start_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                return f"`{name}` must be a whole number, not {value!r}"
        if self.seed is not None and not 0 <= self.seed < MAX_SEED:
            return f"`seed` must be between 0 and {MAX_SEED - 1}, not {self.seed}"
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and least <= value <= (value if most is None else most)):
                bound = f"a number of at least {least}" if most is None else f"a number between {least} and {most}"
                return f"`{name}` must be {bound}, not {value!r}"
        for name in ("stop", "stop_regex"):
            if (texts := getattr(self, name)) is not None and not _are_texts(texts):
                return f"`{name}` must be a text or a list of texts that are not empty, not {texts!r}"
            if bad := unsendable("".join(_texts(texts))):
                return f"`{name}` contains {bad!r}, which UTF-8 cannot encode: remove it"
        for name in ("logprob_start_len", "top_logprobs_num"):
            if getattr(self, name) is not None and not self.return_logprob:
                return f"`{name}` has no effect without `return_logprob=True`"
        for pattern in self.stop_patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                return f"`stop_regex` {pattern!r} is not a regular expression: {error}"
        if self.stop_regex is not None and (self.n or 1) > 1:
            return "`stop_regex` needs a single answer: use fork() instead of `n`"
        return None

    def stops(self) -> tuple[str, ...]:
        return _texts(self.stop)

    def stop_patterns(self) -> tuple[str, ...]:
        return _texts(self.stop_regex)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_texts(value: object) -> bool:
    found = [value] if isinstance(value, str) else value
    return isinstance(found, list | tuple) and all(isinstance(each, str) and each for each in found)


def _texts(value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
