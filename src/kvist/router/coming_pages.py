"""The prompts that workers are computing now, so that a second request with the same prefix finds the same worker.

Page events report pages after they were computed. Until then a prompt is compared with those under way. Of the prompts
under way at one worker that begin with the same page, only the newest is remembered. PURE.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.request import RequestId

_FIRST_TOKENS = 16  # prompts that differ in these are different prompts
_BLOCK_TOKENS = 512

_Key = tuple[str, tuple[int, ...]]  # salt, first tokens


@dataclass(frozen=True, slots=True)
class _Coming:
    request_id: RequestId
    token_ids: tuple[int, ...]


class ComingPages:
    """The prompts under way at one worker. Mutable; owned by the worker. Has at most one entry for each request."""

    def __init__(self) -> None:
        self._newest: dict[_Key, _Coming] = {}
        self._keys: dict[RequestId, _Key] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def add(self, request_id: RequestId, token_ids: tuple[int, ...], salt: str) -> None:
        key = salt, token_ids[:_FIRST_TOKENS]
        self._newest[key] = _Coming(request_id, token_ids)
        self._keys[request_id] = key

    def remove(self, request_id: RequestId) -> None:
        """Forget the prompt of a request that has ended. An unknown id is ignored."""
        key = self._keys.pop(request_id, None)
        if key is not None and key in self._newest and self._newest[key].request_id == request_id:
            del self._newest[key]

    def num_common_tokens(self, token_ids: tuple[int, ...], salt: str) -> int:
        """Return how many leading tokens a prompt has in common with one under way."""
        coming = self._newest.get((salt, token_ids[:_FIRST_TOKENS]))
        if coming is None:
            return 0
        if coming.token_ids is token_ids:
            return len(token_ids)
        return _num_common(token_ids, coming.token_ids)


def _num_common(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int:
    """Return about how many leading tokens are equal. Most blocks are compared by their first tokens: this is a
    hint, and prompts of 100,000 tokens are compared with those of many workers."""
    end = min(len(ours), len(theirs))
    equal = next(
        (
            block
            for block in range(0, end, _BLOCK_TOKENS)
            if ours[block : block + _FIRST_TOKENS] != theirs[block : block + _FIRST_TOKENS]
        ),
        end,
    )
    start = max(0, equal - _BLOCK_TOKENS)
    return next((at for at in range(start, min(end, equal + _FIRST_TOKENS)) if ours[at] != theirs[at]), end)
