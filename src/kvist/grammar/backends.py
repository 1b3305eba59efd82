"""The grammar backends: one file each, and one row here."""

from __future__ import annotations

from kvist.door import Door, backend
from kvist.grammar.backend import GrammarBackend, Vocabulary


def _llguidance(vocabulary: Vocabulary) -> GrammarBackend:
    from kvist.grammar.llguidance import LlguidanceBackend

    return LlguidanceBackend(vocabulary)


def _xgrammar(vocabulary: Vocabulary) -> GrammarBackend:
    from kvist.grammar.xgrammar import XgrammarBackend

    return XgrammarBackend(vocabulary)


GRAMMAR_BACKENDS: Door[[Vocabulary], GrammarBackend] = {
    "llguidance": backend(_llguidance, text="compiles in milliseconds, within limits"),
    "xgrammar": backend(_xgrammar, text="has cheaper masks and slow compilation; needs the extra `xgrammar`"),
}
