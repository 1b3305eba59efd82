"""The data of one generation request, shared by the gateway and every worker that serves it.

A stream is a pure function of (prompt, sampling, seed, position): an `EngineRequest` holds all four, and any
engine can start the request, or continue it from `output_token_ids`, and produce the same tokens.
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

RequestId = NewType("RequestId", str)
HandoffId = NewType("HandoffId", str)  # one attempt to move one request's pages; never reused
EpochId = NewType("EpochId", str)  # one run of an engine process; a restart gets a new id
SlotId = NewType("SlotId", int)  # index into the table of running requests that every rank of a runner keeps
WorkerId = NewType("WorkerId", str)  # "127.0.0.1:30001": the worker's public name


# Limits of one request; the gateway refuses more.
MAX_LOGIT_BIAS = 1024  # entries
MAX_BAD_WORDS = 1024
MAX_PRIORITY = (1 << 31) - 1
BACKGROUND_PRIORITY = MAX_PRIORITY + 1  # of requests that are served after all others
MAX_LEASE_TTL_S = 600.0
MAX_SHORT_ANSWER = 16  # output tokens that a prefill engine may generate while there is a decode engine
MAX_BAD_WORD_TOKENS = 4096  # of all bad words of a request together
# Limits of the runner's tables. Of a request with more or longer bad words, the host checks them (`needs_known_token`).
TABLE_BAD_WORDS = 256  # of two tokens or more
TABLE_BAD_WORD_TOKENS = 8  # of one bad word


# Scheduling policies of engines: without and with the priorities of requests.
FCFS, PRIORITY = "fcfs", "priority"


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence or stop token (kept as the last token), or a stop string
    LENGTH = "length"  # max_tokens or the context length


class Outcome(enum.Enum):
    """How a request ended at one engine."""

    FINISHED = "finished"  # all tokens were produced, or (mode PREFILL) the pages were handed off
    FAILED = "failed"
    ABORTED = "aborted"


class Mode(enum.Enum):
    """Part of a request that one engine runs."""

    FULL = "full"  # prefill and decode
    PREFILL = "prefill"  # prefill, sample the first token, write the pages to the decode engine
    DECODE = "decode"  # grant pages, wait for them and the first token, decode the rest


class Role(enum.Enum):
    """The set of modes that an engine admits. An engine of any role holds both sides of a handoff."""

    UNIFIED = "unified"  # computes whole requests, and prompts for decode engines
    # computes prompts for decode engines; and whole requests with a short answer, or without a decode engine
    PREFILL = "prefill"
    DECODE = "decode"  # generates answers: to prompts that another engine has computed, and to whole requests

    def __str__(self) -> str:
        return self.value

    @property
    def modes(self) -> frozenset[Mode]:
        """The modes in which an engine of this role accepts requests."""
        return _ADMITTED_MODES[self]

    @property
    def serves_alone(self) -> bool:
        """Whether an engine of this role generates answers of any length without another engine."""
        return self is Role.UNIFIED


_ADMITTED_MODES: dict[Role, frozenset[Mode]] = {
    Role.UNIFIED: frozenset({Mode.FULL, Mode.PREFILL}),
    Role.PREFILL: frozenset({Mode.PREFILL, Mode.FULL}),
    Role.DECODE: frozenset({Mode.DECODE, Mode.FULL}),
}


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form that an answer must have. Every process that needs it compiles it into a grammar."""

    kind: str  # of CONSTRAINT_KINDS
    text: str = ""  # JSON of a schema, of a list of choices or of a structural tag; a regular expression; a grammar
    strict: bool = True  # False: parts of a schema that the backend does not know are ignored
    whitespace: str | None = None  # regular expression between the tokens of JSON; None: up to 40 blanks; "": none


AFTER_REASONING = "after_reasoning"
CONSTRAINT_KINDS = ("json_schema", "json_object", "regex", "choice", "grammar", "structural_tag", AFTER_REASONING)


class AfterReasoning(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An answer that may begin with reasoning, as the text of a constraint of the kind `AFTER_REASONING`."""

    begin: str  # the mark before the reasoning; "": every answer begins with reasoning
    end: str  # the mark after it
    closing: str  # written when the budget is used up; has `end`
    is_open: bool = False  # the prompt has written `begin`
    max_tokens: int | None = None  # the budget: tokens of the reasoning before `closing`; None: any number
    then: Constraint | None = None  # the form of the rest; None: any

    def as_constraint(self) -> Constraint:
        return Constraint(kind=AFTER_REASONING, text=msgspec.json.encode(self).decode())


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters for sampling each token, validated by the gateway.

    The gateway always sets `seed`, at random if the client gave none. `temperature == 0` is greedy.
    """

    max_tokens: int  # output tokens, >= 0; 0: only the prompt is computed
    temperature: float = 1.0  # >= 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    seed: int = 0  # [0, 2**63)
    min_tokens: int = 0  # output tokens before which no end-of-sequence or stop token is sampled
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # None: no logprobs; k >= 0: of the sampled token and the k most likely ones
    frequency_penalty: float = 0.0  # [-2, 2]; subtracted for each earlier occurrence in the output (OpenAI's formula)
    presence_penalty: float = 0.0  # [-2, 2]; subtracted once from a token that the output contains
    # > 0; tokens of prompt and output: positive logits are divided by it, negative ones multiplied (arXiv:1909.05858)
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), at most MAX_LOGIT_BIAS
    allowed_token_ids: tuple[int, ...] = ()  # empty: every token is allowed
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never completed, at most MAX_BAD_WORDS
    prompt_logprobs: int | None = None  # None: off; k >= 0: of each prompt token and the k most likely ones
    prompt_logprobs_start: int = 0  # first prompt position that is scored; position 0 has no logprob
    logprob_token_ids: tuple[int, ...] = ()  # tokens whose logprobs are reported at every scored or sampled position
    constraint: Constraint | None = None  # None: the answer may have any form

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the earlier tokens affect the choice of a token other than through the model's logits."""
        has_words = any(len(word) > 1 for word in self.bad_words)
        return self.has_penalties or has_words or self.constraint is not None

    @property
    def may_exclude_all(self) -> bool:
        """Whether fields of the request may exclude every token together, which a gateway cannot see."""
        return bool(self.allowed_token_ids or (self.bad_words and self.constraint))

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


def needs_known_token(sampling: SamplingParams) -> bool:
    """Return whether the host must know all tokens so far before the next one can be sampled."""
    if sampling.constraint is not None:
        return True
    lengths = [len(word) for word in sampling.bad_words if len(word) > 1]
    return len(lengths) > TABLE_BAD_WORDS or max(lengths, default=0) > TABLE_BAD_WORD_TOKENS


class LeaseTerms(msgspec.Struct, frozen=True, kw_only=True):
    """The lease that a request takes of its prompt's pages (kv/prefix_leases.py)."""

    lease_id: str
    ttl_s: float  # from the end of the request on, at most MAX_LEASE_TTL_S


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request as the gateway sends it to an engine."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()  # produced earlier by another engine; generation continues after them
    cache_salt: str = ""  # prompts with different salts share no pages
    priority: int = 0  # a lower value is served earlier, by engines with the scheduling policy "priority"
    client: str = ""  # caller path for fair queueing (fairness.py): "KEY/HOST/CONNECTION", all opaque
    background: bool = False  # served after all requests that are not, under every scheduling policy
    # > 0: other requests begin with the same tokens and arrive at the same time. The engine computes these tokens once,
    # also where they are few, and keeps no page behind them. 0: there are none.
    num_shared_tokens: int = 0
    lease: LeaseTerms | None = None  # None: the pages of the prompt are cached like all others

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


REQUEST_FIELDS = (*EngineRequest.__struct_fields__, *SamplingParams.__struct_fields__)


def fields_in_use(request: EngineRequest) -> frozenset[str]:
    """Return the fields of the request, and of its sampling parameters, that differ from their defaults."""
    return frozenset(
        field.name
        for struct in (request, request.sampling)
        for field in msgspec.structs.fields(struct)
        if getattr(struct, field.name) != field.default
    )


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Natural-log probabilities under the model's own distribution: before penalties, temperature and truncation."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    requested_logprobs: tuple[float, ...] = ()  # of `SamplingParams.logprob_token_ids`, in their order
    rank: int | None = None  # 1: the most likely token; only for prompt tokens


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    token_id: int
    logprobs: TokenLogprobs | None = None
