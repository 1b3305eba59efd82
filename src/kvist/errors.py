"""All errors that Kvist raises on purpose.

    KvistError                      .code .retryable .http_status .message .param .retry_after_s
    ├── RequestError                the caller can correct it (400)
    │   ├── UnsupportedField        a known field that is not supported
    │   ├── InvalidConstraint       a schema, pattern or grammar that cannot be compiled or enforced
    │   ├── PromptTooLong           the request has more tokens than the model or the page pool can hold
    │   ├── UnknownModel            a model name that is not served (404)
    │   ├── UnknownWorker           no worker has this URL or name (404)
    │   ├── LeaseNotFound           the lease of a prompt has ended, or its worker has restarted (404)
    │   ├── UnknownResponse         no stored response has this id (404)
    │   ├── RequestNotFound         no request with this id is recorded (404)
    │   ├── BodyTooLarge            the HTTP body is over the limit (413)
    │   ├── SlowBody                the HTTP body did not arrive in time (408)
    │   ├── Conflict                the request conflicts with the current state (409)
    │   ├── Unauthorized            the API key is missing or wrong (401)
    │   ├── Forbidden               a web page of another origin sent the request (403)
    │   ├── SlowHeader              the HTTP header did not arrive in time (408)
    │   ├── UnsupportedMediaType    the type or coding of the body is not supported (415)
    │   └── HeaderTooLarge          too many header lines or bytes (431)
    ├── Overloaded                  a bounded queue is full (429, retry later)
    ├── Unavailable                 no worker can serve the request now (503, retry later)
    │   ├── WorkerLost              the worker died or became silent while it had the request
    │   ├── HandoffFailed           the pages did not reach the decode worker
    │   └── StoreError              a store cannot be opened, or broke its interface
    │       └── StoreUnreachable    an opened store, or its master, does not answer
    ├── Timeout                     a time limit expired (504)
    ├── EngineError                 a bug in Kvist or a broken device (500)
    │   ├── StepFailed              a step failed on the device, perhaps because of another request in it (retryable)
    │   └── PoisonousRequest        every worker that computed the request died
    ├── ProgramError                a program of kvist.lang is wrong, or one of its operations failed; names its line
    │   └── ProgramTimeout          an operation or a tool of a program took too long
    └── ConfigError                 a wrong flag, setting, address or model folder
        ├── ModelLoadError          the checkpoint is missing, broken or of an unknown model family
        └── WireError               the peer has another protocol version or sent undecodable bytes

Errors cross a process as (code, message): `error_from_wire` rebuilds the class from its code.
"""

from __future__ import annotations

import msgspec

# msgspec raises these for invalid input. ValidationError is a DecodeError; UnicodeDecodeError comes from bytes that are
# not UTF-8, RecursionError from very deep nesting.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class KvistError(Exception):
    """Base class. `message` gives the problem and its remedy in one or two sentences."""

    code = "internal_error"
    http_status = 500
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request field or flag at fault
        self.retry_after_s = retry_after_s


class RequestError(KvistError):
    code = "invalid_request"
    http_status = 400


class UnsupportedField(RequestError):
    code = "unsupported_field"


class InvalidConstraint(RequestError):
    code = "invalid_constraint"

    @classmethod
    def too_slow(cls, timeout_s: float) -> InvalidConstraint:
        return cls(
            f"compiling the constraint takes more than {timeout_s:g} s (--grammar-compile-timeout-s): simplify it"
        )


class PromptTooLong(RequestError):
    code = "context_length_exceeded"


class UnknownModel(RequestError):
    code = "model_not_found"
    http_status = 404


class UnknownWorker(RequestError):
    code = "worker_not_found"
    http_status = 404


class LeaseNotFound(RequestError):
    code = "lease_not_found"
    http_status = 404


class UnknownResponse(RequestError):
    code = "response_not_found"
    http_status = 404


class RequestNotFound(RequestError):
    code = "request_not_found"
    http_status = 404


class BodyTooLarge(RequestError):
    code = "body_too_large"
    http_status = 413


class SlowBody(RequestError):
    code = "body_timeout"
    http_status = 408


class Conflict(RequestError):
    code = "conflict"
    http_status = 409


class Unauthorized(RequestError):
    code = "invalid_api_key"
    http_status = 401


class Forbidden(RequestError):
    code = "forbidden"
    http_status = 403


class SlowHeader(RequestError):
    code = "header_timeout"
    http_status = 408


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    http_status = 415


class HeaderTooLarge(RequestError):
    code = "header_too_large"
    http_status = 431


class Overloaded(KvistError):
    code = "overloaded"
    http_status = 429
    retryable = True


class Unavailable(KvistError):
    code = "unavailable"
    http_status = 503
    retryable = True


class WorkerLost(Unavailable):
    code = "worker_lost"


class HandoffFailed(Unavailable):
    code = "handoff_failed"


class StoreError(Unavailable):
    code = "store_unavailable"


class StoreUnreachable(StoreError):
    code = "store_unreachable"


class Timeout(KvistError):
    code = "timeout"
    http_status = 504
    retryable = True


class EngineError(KvistError):
    code = "engine_error"


class StepFailed(EngineError):
    code = "step_failed"
    retryable = True


class PoisonousRequest(EngineError):
    code = "poisonous_request"


class ProgramError(KvistError):
    code = "program_error"
    http_status = 400


class ProgramTimeout(ProgramError):
    code = "program_timeout"
    http_status = 504


class ConfigError(KvistError):
    code = "config_error"


class ModelLoadError(ConfigError):
    code = "model_load_error"


class WireError(ConfigError):
    code = "wire_error"


def _all_classes(root: type[KvistError]) -> list[type[KvistError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in _all_classes(child)]


def error_from_wire(code: str, message: str) -> KvistError:
    """Rebuild an error reported by a peer. An unknown code becomes an `EngineError` whose message names the code."""
    for cls in _all_classes(KvistError):
        if cls.code == code:
            return cls(message)
    return EngineError(f"{message} (peer's code: {code})")
