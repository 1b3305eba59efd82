"""What one generation request is, from the gateway to the last worker that touches it.

A stream is a pure function of (prompt, sampling, seed, position): an `EngineRequest` holds all of it, so any engine
can start it, or continue it from `output_token_ids`, and produce the same tokens.
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

RequestId = NewType("RequestId", str)
HandoffId = NewType("HandoffId", str)  # one attempt to move one request's pages; never reused
EpochId = NewType("EpochId", str)  # one life of one engine process; a restart gets a new one
WorkerId = NewType("WorkerId", str)  # "127.0.0.1:30001": the worker's public name


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence or stop token, which is the last token; or a stop string
    LENGTH = "length"  # max_tokens or the context length


class Outcome(enum.Enum):
    """How a request ends at one engine: exactly one of these."""

    FINISHED = "finished"  # all its tokens were produced, or (mode PREFILL) its pages were handed over
    FAILED = "failed"
    ABORTED = "aborted"


class Mode(enum.Enum):
    """What an engine is asked to do with a request."""

    FULL = "full"  # read the prompt and write the answer
    PREFILL = "prefill"  # read the prompt, write the first token, push the pages to the decode engine
    DECODE = "decode"  # grant pages, wait for them and the first token, write the rest


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How each next token is chosen. Validated at the gateway; engines trust it.

    `seed` is always set by the gateway (drawn there when the client gave none). `temperature == 0` is greedy.
    """

    max_tokens: int  # output tokens, >= 1
    temperature: float = 1.0  # >= 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    seed: int = 0  # [0, 2**63)
    min_tokens: int = 0  # end-of-sequence and stop tokens are impossible before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # None: none; k >= 0: the chosen token's and the k likeliest

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()  # already produced elsewhere: generation continues after them
    cache_salt: str = ""  # prompts with different salts share no page
    client: str = ""  # whose it is, for turns among callers (fairness.py): "KEY/HOST/CONNECTION", all opaque

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Natural-log probabilities under the model's own distribution (before temperature and truncation)."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    token_id: int
    logprobs: TokenLogprobs | None = None
