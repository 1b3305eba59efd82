"""Every fault found in the field has a test that shows its fix: `pytest -m case`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "cases"  # next to the repository, where the inputs are

_NAMES = """
assistant-null-content burst-on-idle cancel-in-prefill compressed-body continuous-usage cors cross-site digest-collision
drain-timeout empty-key fairness forged-grant header-limits heartbeat-not-option host-header http-1.0 large-bodies
limit-named logprobs-quadratic memory-by-length message-bad-utf8 message-bad-values message-deep message-other-role
min-tokens-stop nan-logits neutral-fields pool-file-left port-of-another ready-before-close router-other-tokenizer
salt-length shutdown-timeout-of-up signal-to-all small-shm special-token-as-stop stolen-identity stop-ids-amplified
stopped-engine store-path template-generation-tag template-kwargs-hint template-tojson template-tools-none text-offset
tokenise-unbounded tokenizer-eos top-logprobs-collapse two-models-one-name two-models-one-store unequal-pools
unread-output up-workers-without-key wrong-hints
"""
CASES = _NAMES.split()


def named_in_tests() -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in HERE.parent.rglob("test_*.py")]
    return {name for source in sources for name in re.findall(r'mark\.case\(\s*"([^"]+)"', source)}


def test_every_case_has_a_test_and_every_marked_test_a_case() -> None:
    assert named_in_tests() == set(CASES)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the inputs of the cases are not beside this checkout")
def test_the_list_of_cases_is_that_of_the_inputs() -> None:
    lines = [line for path in SHARED.glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(json.loads(line)["id"] for line in lines) == CASES
