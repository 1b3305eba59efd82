"""Fills the tables that shape the logits of each slot (kernels/shaping.py), from the parameters of its request.

    open:    bans, bias, penalties, bad words ──► the slot's rows of the tables; counts and recent tokens by replay of
             all tokens so far
    choice:  the bans that depend on the position (min_tokens), or on tokens that only the host knows (long bad words,
             constraints: answers.py)
    chosen:  the device itself records the chosen tokens

A request that starts again is replayed, so its tables are those of an uninterrupted request. On a GPU the writes are
queued on the stream of the steps, and the host does not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.attention.pinned import PinnedRing
from kvist.grammar.compiler import GrammarCompiler
from kvist.kernels.operands import ANY_TOKEN, BANS, BIAS, NO_HISTORY, PENALTIES, WORDS, ShapedRows
from kvist.kernels.shaping import TableSizes, make_tables
from kvist.plan.batch import BatchItem, StartRequest
from kvist.request import (
    MAX_LOGIT_BIAS,
    TABLE_BAD_WORD_TOKENS,
    TABLE_BAD_WORDS,
    SamplingParams,
    SlotId,
)
from kvist.runner.answers import Answer, FollowedRows, SlotAnswers

Words = npt.NDArray[np.uint32]  # packed bits, one per token of the vocabulary


def table_sizes(num_slots: int, *, vocab_size: int, context_len: int) -> TableSizes:
    """Return the sizes of the tables. `context_len`: the most tokens of one request."""
    return TableSizes(
        num_slots=num_slots,
        vocab_size=vocab_size,
        context_len=context_len,
        max_biases=MAX_LOGIT_BIAS,
        max_words=TABLE_BAD_WORDS,
        max_word_tokens=TABLE_BAD_WORD_TOKENS,
    )


@dataclass(slots=True, kw_only=True)
class _ChangingBans:
    """The bans of a slot that may differ from step to step. Owned by `SlotShaping`."""

    fixed: Words
    suppressed: Sequence[int]  # banned below the position `suppress_until`
    suppress_until: int
    answer: Answer | None  # None: no ban depends on the tokens so far
    written: frozenset[int] = field(default_factory=frozenset)  # bans in the table beside `fixed`; not of a constraint


class SlotShaping:
    """A `SlotState`: the tables, and the bans that may change. Mutable; owned by the slot table of one rank."""

    def __init__(self, sizes: TableSizes, device: torch.device, grammars: GrammarCompiler | None = None) -> None:
        """`grammars` compiles the constraints of requests; None: constrained requests fail."""
        self.tables = make_tables(sizes, device)
        self.flags = np.zeros(sizes.num_slots, dtype=np.int32)
        self._vocab_size = sizes.vocab_size
        self._num_words = -(-sizes.vocab_size // 32)
        self.answers = SlotAnswers(sizes.vocab_size, grammars)
        self._ring = PinnedRing(device)
        self._changing: dict[SlotId, _ChangingBans] = {}

    def open(self, start: StartRequest) -> None:
        slot, params = start.slot, start.sampling
        self.answers.open(start)
        self.flags[slot] = 0
        self._open_bans(start)
        if params.logit_bias:
            self.flags[slot] |= BIAS
            self._write_bias(slot, params)
        if params.has_penalties:
            self.flags[slot] |= PENALTIES
            values = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            _write(self.tables.penalties[slot], np.array(values, dtype=np.float32))
            self._write_counts(slot, start)
        words = [word for word in params.bad_words if len(word) > 1]
        if words and self.answers.get(slot) is None:
            self.flags[slot] |= WORDS
            self._write_words(slot, words, start.token_ids)

    def close(self, slot: SlotId) -> None:
        self.answers.close(slot)
        self._changing.pop(slot, None)

    def rows(self, slots: Sequence[int]) -> ShapedRows:
        """Return the rows of `slots`, for a runner on a CPU."""
        return ShapedRows(
            tables=self.tables,
            slots=torch.tensor(slots, dtype=torch.int32),
            flags=torch.from_numpy(self.flags[list(slots)]),
        )

    def before_choice(self, items: Iterable[BatchItem], followed: FollowedRows) -> None:
        """Write the bans of the tokens that the step samples, if they differ from those of the previous step. Needs the
        items of every step; all tokens before the sampled ones are known to the answers of `followed`."""
        if not self._changing:
            return
        self.answers.fill(followed)
        changing = [(item, self._changing[item.slot]) for item in items if item.samples and item.slot in self._changing]
        if not changing:
            return
        # a row: the bans, then their slot
        rows = self._ring.next_buffer(len(changing) * (self._num_words + 1)).reshape(len(changing), -1)
        num_rows = 0
        for item, bans in changing:
            bits = self._bits_at(item, bans)
            if bits is not None:
                rows[num_rows, :-1], rows[num_rows, -1] = bits.view(np.int32), item.slot
                num_rows += 1
        if num_rows:
            table = self.tables.banned
            sent = torch.empty(rows.shape, dtype=torch.int32, device=table.device)
            self._ring.send(sent)
            table.index_copy_(0, sent[:num_rows, -1].long(), sent[:num_rows, :-1])

    def _open_bans(self, start: StartRequest) -> None:
        params = start.sampling
        single = [word[0] for word in params.bad_words if len(word) == 1]
        answer = self.answers.get(start.slot)
        suppressed = [token_id for token_id in start.suppressed_token_ids if 0 <= token_id < self._vocab_size]
        suppresses = start.suppress_until > 0 and bool(suppressed)
        if not (params.allowed_token_ids or single or suppresses or answer is not None):
            return
        self.flags[start.slot] |= BANS
        fixed = _bans_except(params.allowed_token_ids, self._vocab_size)
        _ban(fixed, single)
        if answer is None or not answer.has_constraint:  # the bans of a constraint are written before each choice
            _write(self.tables.banned[start.slot], fixed.view(np.int32))
        if suppresses or answer is not None:
            self._changing[start.slot] = _ChangingBans(
                fixed=fixed,
                suppressed=suppressed,
                suppress_until=start.suppress_until,
                answer=answer,
            )

    def _bits_at(self, item: BatchItem, bans: _ChangingBans) -> Words | None:
        """Return the bans of the token that the item samples; None if they are in the table already."""
        suppressed = bans.suppressed if item.end < bans.suppress_until else ()
        answer = bans.answer
        completing = set[int]() if answer is None else answer.completing()
        if answer is None or not answer.has_constraint:
            banned = completing.union(suppressed)
            if item.end >= bans.suppress_until and answer is None:
                del self._changing[item.slot]
            if banned == bans.written:
                return None
            bans.written = frozenset(banned)
            return _with_bans(bans.fixed, banned)
        bits = answer.bans_at(item.end) | bans.fixed
        if not completing and not suppressed:
            return bits
        bits = _with_bans(bits, completing)
        without_end = _with_bans(bits, suppressed)
        # A constraint that allows nothing but the end overrides `min_tokens`.
        return bits if self._bans_all(without_end) else without_end

    def _bans_all(self, bits: Words) -> bool:
        whole, rest = divmod(self._vocab_size, 32)
        if not bool((bits[:whole] == np.uint32(0xFFFFFFFF)).all()):
            return False
        return not rest or (int(bits[-1]) | (0xFFFFFFFF << rest)) & 0xFFFFFFFF == 0xFFFFFFFF

    def _write_bias(self, slot: SlotId, params: SamplingParams) -> None:
        ids = np.full(MAX_LOGIT_BIAS, -1, dtype=np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, dtype=np.float32)
        biases = dict(params.logit_bias)
        ids[: len(biases)] = list(biases)
        values[: len(biases)] = list(biases.values())
        _write(self.tables.bias_ids[slot], ids)
        _write(self.tables.bias_values[slot], values)

    def _write_counts(self, slot: SlotId, start: StartRequest) -> None:
        """Replay the tokens so far: count the output tokens, and mark the tokens of the prompt."""
        row = self.tables.counts[slot]
        token_ids = np.array(start.token_ids, dtype=np.int64)
        seen = np.unique(token_ids)
        marks = np.zeros(len(seen), dtype=np.int64)
        produced, times = np.unique(token_ids[start.num_prompt_tokens :], return_counts=True)
        marks[np.searchsorted(seen, produced)] = times
        marks[np.searchsorted(seen, token_ids[: start.num_prompt_tokens])] |= torch.iinfo(row.dtype).min
        row.zero_()
        row.index_copy_(0, _to_device(seen, row.device), _to_device(marks, row.device).to(row.dtype))

    def _write_words(self, slot: SlotId, sequences: Sequence[tuple[int, ...]], token_ids: Sequence[int]) -> None:
        words = np.full(self.tables.words.shape[1:], ANY_TOKEN, dtype=np.int32)
        for number, word in enumerate(sequences):
            words[: len(word), number] = word[::-1]
        recent = np.full(TABLE_BAD_WORD_TOKENS, NO_HISTORY, dtype=np.int32)
        newest = token_ids[-TABLE_BAD_WORD_TOKENS:]
        recent[: len(newest)] = newest[::-1]
        _write(self.tables.words[slot], words)
        _write(self.tables.recent[slot], recent)


def _bans_except(allowed: Sequence[int], vocab_size: int) -> Words:
    """Return bans of all tokens but `allowed`; () allows every token."""
    if not allowed:
        return np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    banned = np.ones(-(-vocab_size // 32) * 32, dtype=np.bool_)
    banned[np.fromiter(allowed, dtype=np.int64, count=len(allowed))] = False
    return np.packbits(banned, bitorder="little").view(np.uint32)


def _ban(bits: Words, token_ids: Iterable[int]) -> None:
    ids = np.array(list(token_ids), dtype=np.int64)
    np.bitwise_or.at(bits, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


def _with_bans(bits: Words, token_ids: Iterable[int]) -> Words:
    changed = bits.copy()
    _ban(changed, token_ids)
    return changed


def _write(row: Tensor, values: npt.NDArray[np.generic]) -> None:
    row.copy_(_staged(values, row.device), non_blocking=True)


def _to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return _staged(values, device).to(device, non_blocking=True)


def _staged(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor
