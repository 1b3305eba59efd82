"""Every error Kvist raises on purpose.

    KvistError                      .code .retryable .http_status .remedy .param
    ├── RequestError                the caller can mend it (400)
    │   ├── UnsupportedField        a field we know but cannot honour
    │   ├── PromptTooLong           more tokens than the model or the pool holds
    │   ├── UnknownModel            a model name that is not served (404)
    │   ├── BodyTooLarge            the HTTP body is over the limit (413)
    │   ├── SlowBody                the HTTP body did not arrive in time (408)
    │   ├── Conflict                it contradicts what is so already (409)
    │   ├── Unauthorized            the API key is missing or wrong (401)
    │   ├── Forbidden               a web page asks that is not allowed to (403)
    │   ├── SlowHeader              the HTTP header did not arrive in time (408)
    │   ├── UnsupportedMediaType    the body's type or coding is not one we read (415)
    │   └── HeaderTooLarge          too many header lines or bytes (431)
    ├── Overloaded                  a bounded queue is full (429, retry later)
    ├── Unavailable                 no worker can take it now (503, retry later)
    │   ├── WorkerLost              the worker died or fell silent while it held the request
    │   ├── HandoffFailed           the pages did not reach the decode worker
    │   └── StoreError              the storage tier cannot be opened; once open it never raises
    ├── Timeout                     a bounded wait ran out (504)
    ├── EngineError                 our bug or a broken device (500)
    └── ConfigError                 a flag, a setting, a model folder: at start, never while serving
        ├── ModelLoadError          the checkpoint is missing, broken or of an unknown family
        └── WireError               the peer speaks another protocol version or sent what we cannot decode

Errors cross a process as (code, message): `error_from_wire` rebuilds the class from its code.
"""

from __future__ import annotations

import msgspec

# What msgspec raises for bytes that are not what they should be. A ValidationError is a DecodeError; the other two come
# with bytes that are no UTF-8, and with lists in lists without end.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class KvistError(Exception):
    """Base of all. `message` says what happened and what to do about it, in one or two sentences."""

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


class PromptTooLong(RequestError):
    code = "context_length_exceeded"


class UnknownModel(RequestError):
    code = "model_not_found"
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


class Timeout(KvistError):
    code = "timeout"
    http_status = 504
    retryable = True


class EngineError(KvistError):
    code = "engine_error"


class ConfigError(KvistError):
    code = "config_error"


class ModelLoadError(ConfigError):
    code = "model_load_error"


class WireError(ConfigError):
    code = "wire_error"


def _all_classes(root: type[KvistError]) -> list[type[KvistError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in _all_classes(child)]


def error_from_wire(code: str, message: str) -> KvistError:
    """Rebuild the error a peer reported; an unknown code becomes `EngineError` and keeps its message."""
    for cls in _all_classes(KvistError):
        if cls.code == code:
            return cls(message)
    return EngineError(f"{message} (peer's code: {code})")
