"""Checks the sampling fields of a request and converts them to the engine's `SamplingParams`. Nothing is clamped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar, cast

from kvist.api.schemas import SamplingFields
from kvist.checking.kinds import check_equal
from kvist.errors import PromptTooLong, RequestError, Unavailable
from kvist.fit import Limit
from kvist.request import SamplingParams
from kvist.text import SamplingDefaults
from kvist.wording import amount

T = TypeVar("T")

MAX_SEED = 2**63
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_ID_CHARS = 256
DRAWN_SEED = -1  # asks the server to draw a seed, as in vLLM and SGLang
MAX_SALT_BYTES = 256
_SALT_DIGEST_BYTES = 32
_MAX_TEMPERATURE = 1e6  # the distribution is flat here; far larger temperatures leave the range of float32
_GREEDY_TEMPERATURE = 1e-5  # dividing by a smaller temperature leaves the range of float32; vLLM's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """The names that an endpoint gives to the fields, for errors."""

    prompt: str
    inside: str = ""  # prefix of the sampling fields: the object that contains them and a dot
    max_tokens: str = "max_tokens"
    min_tokens: str = "min_tokens"


def sampling_params(
    fields: SamplingFields,
    *,
    names: FieldNames,
    defaults: SamplingDefaults,
    max_tokens: int,
    min_tokens: int,
    stop_token_ids: tuple[int, ...],
) -> SamplingParams:
    """Return the sampling parameters without a seed, logprobs and changes of logits (shaping.py). The caller has
    checked `max_tokens` and the ids; this function checks the rest. Raises `RequestError`."""
    temperature = _first(fields.temperature, defaults.temperature, 1.0)
    top_p = _first(fields.top_p, defaults.top_p, 1.0)
    min_p = _first(fields.min_p, defaults.min_p, 0.0)
    top_k = _first(fields.top_k, defaults.top_k, 0)
    inside = names.inside
    wide = f"must be between 0 and {_MAX_TEMPERATURE:.0f}"
    require(0 <= temperature <= _MAX_TEMPERATURE, inside + "temperature", wide, temperature)
    require(0 <= top_p <= 1, inside + "top_p", "must be between 0 and 1", top_p)
    require(0 <= min_p <= 1, inside + "min_p", "must be between 0 and 1", min_p)
    require(-1 <= top_k < 2**31, inside + "top_k", f"must be positive and below {2**31}, or 0 or -1 for off", top_k)
    fits = f"must be between 0 and {names.max_tokens} ({max_tokens})"
    require(0 <= min_tokens <= max_tokens, inside + names.min_tokens, fits, min_tokens)
    greedy = temperature < _GREEDY_TEMPERATURE or top_p == 0  # only the likeliest token has any probability
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=max(top_k, 0),
        top_p=top_p or 1.0,
        min_p=min_p,
        min_tokens=min_tokens,
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=stop_token_ids,
    )


def _first(asked: T | None, default: T | None, otherwise: T) -> T:
    if asked is not None:
        return asked
    return otherwise if default is None else default


def require(holds: bool, param: str, rule: str, value: object) -> None:
    """Raise `RequestError` that names the field `param`, the rule and the value, unless the rule holds."""
    if not holds:
        raise RequestError(f"`{param}` {rule}, not {value}", param=param)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    # `min` and `max` loop in C: a Python loop over a long prompt would delay every other request.
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise RequestError(f"`{param}` contains {wrong}; token ids are 0 to {vocab_size - 1}", param=param)


def token_lists(items: Sequence[object]) -> list[list[int]] | None:
    """Return one list of token ids, or several; None for anything else. A typed decoder has checked `items`."""
    kinds = set(map(type, items))  # one pass in C, as above
    if kinds == {int}:
        return [cast(list[int], items)]
    return cast(list[list[int]], items) if kinds == {list} else None


def check_seed(seed: int | None, param: str = "seed") -> int | None:
    """Return the seed, or None when the server draws a seed. Raises `RequestError`."""
    rule = f"must be between 0 and {MAX_SEED - 1}, or -1 to let the server draw a seed"
    require(seed is None or -1 <= seed < MAX_SEED, param, rule, seed)
    return None if seed == DRAWN_SEED else seed


def check_shown_id(given: str | None, param: str) -> str | None:
    """Check an id that the client has chosen and the response repeats. Raises `RequestError`."""
    rule = f"must have 1 to {MAX_ID_CHARS} characters"
    require(given is None or 0 < len(given) <= MAX_ID_CHARS, param, rule, 0 if given is None else len(given))
    return given


def check_num_logprobs(count: int | None, param: str) -> int | None:
    require(count is None or 0 <= count <= MAX_TOP_LOGPROBS, param, f"must be 0 to {MAX_TOP_LOGPROBS}", count)
    return count


def stop_ids(fields: SamplingFields, vocab_size: int, names: FieldNames) -> tuple[int, ...]:
    """Return the stop token ids without duplicates. Raises `RequestError`."""
    asked = fields.stop_token_ids or []
    check_token_ids(asked, vocab_size, names.inside + "stop_token_ids")
    return tuple(dict.fromkeys(asked))


def session_digest(
    session_id: str | int | None, prompt_cache_key: str | int | None, salt: str, *, header: str = ""
) -> str:
    """Return the name of a session for routing; "" without one. `header`: of the request, if the fields name none.
    Equal names under different salts are different sessions. Raises `RequestError` for a long name."""
    for name, value in (("session_id", session_id), ("prompt_cache_key", prompt_cache_key), ("X-Session-Id", header)):
        key = "" if value is None else str(value)
        require(
            len(key.encode()) <= MAX_SALT_BYTES, name, f"may have at most {MAX_SALT_BYTES} bytes in UTF-8", len(key)
        )
        if key:
            return blake2b(key.encode(), digest_size=16, key=salt.encode()[:64], person=b"kvist session").hexdigest()
    return ""


def salt_digest(cache_salt: str | None, tenant: str = "") -> str:
    """Return a digest of fixed length that replaces the tenant and the client's salt in every tier; "" when both are
    empty. Digests of different tenants always differ."""
    if not cache_salt and not tenant:
        return ""
    salt = (cache_salt or "").encode()
    require(len(salt) <= MAX_SALT_BYTES, "cache_salt", f"may have at most {MAX_SALT_BYTES} bytes in UTF-8", len(salt))
    key = tenant.encode()
    return blake2b(salt, digest_size=_SALT_DIGEST_BYTES, key=key, person=b"kvist salt").hexdigest()


def stop_strings(stop: str | list[str] | None, names: FieldNames) -> tuple[str, ...]:
    param = names.inside + "stop"
    stops = [stop] if isinstance(stop, str) else stop or []
    require(len(stops) <= MAX_STOPS, param, f"may have at most {MAX_STOPS} strings", len(stops))
    for one in stops:
        require(0 < len(one) <= MAX_STOP_CHARS, param, f"strings must have 1 to {MAX_STOP_CHARS} characters", len(one))
    return tuple(stops)


def shows_stop(fields: SamplingFields, inside: str = "") -> bool:
    """Return whether the text ends with the stop string or token (vLLM's field or SGLang's field is set). Raises
    `RequestError` if the two fields differ."""
    check_equal(fields, "include_stop_str_in_output", "no_stop_trim", inside)
    return bool(fields.include_stop_str_in_output or fields.no_stop_trim)


def num_choices(n: int | None, num_prompts: int, limit: int, names: FieldNames) -> int:
    """Return the number of answers to each prompt. Raises `RequestError`."""
    count = 1 if n is None else n
    require(count >= 1, names.inside + "n", "must be at least 1", count)
    if count * num_prompts > limit:
        raise RequestError(
            f"{amount(num_prompts, 'prompt')} times n={count} exceeds the limit of {limit} answers (--max-choices)",
            param=names.prompt if count == 1 else names.inside + "n",
        )
    return count


def check_num_lists(num_lists: int, limit: int, param: str) -> None:
    """Check the number of lists or texts at an endpoint that does not generate. Raises `RequestError`."""
    if num_lists > limit:
        raise RequestError(f"`{param}` has {num_lists} lists or texts; the limit is {limit}", param=param)


def output_limit(
    num_prompt_tokens: int, limit: Limit, *, asked: int | None, default: int | None, param: str, prompt: str, least: int
) -> int:
    """Return the request's max_tokens: `asked`, else `default` limited to the room after the prompt, else that room.
    `least`: 0 if a request may compute its prompt alone, else 1.

    Raises `PromptTooLong` when prompt and answer together do not fit, `Unavailable` when they would fit on a worker
    that is lost or stopping.
    """
    room = limit.num_tokens - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise RequestError(f"`{prompt}` is empty: there is no token to continue from", param=prompt)
    wanted = 1 if asked is None else asked
    if room < wanted <= limit.num_tokens_offline - num_prompt_tokens:
        raise Unavailable(
            f"this request fits only on a worker that is lost or stopping ({limit.num_tokens_offline} tokens); the "
            f"other workers hold {limit.num_tokens} tokens: retry later, or send a shorter request"
        )
    if room < min(wanted, 1):
        raise PromptTooLong(
            f"the prompt has {amount(num_prompt_tokens, 'token')}; this server holds {limit.text}",
            param=prompt,
        )
    if asked is None:
        return room if default is None else min(default, room)
    require(asked >= least, param, f"must be at least {least}", asked)
    if asked > room:
        raise PromptTooLong(
            f"the prompt has {amount(num_prompt_tokens, 'token')} and `{param}` is {asked}, but only {room} more "
            f"tokens fit: this server holds {limit.text}",
            param=param,
        )
    return asked
