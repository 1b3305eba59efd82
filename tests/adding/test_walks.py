"""docs/adding.md works: its walks are followed in a copy of the repository, whose tests then run, and which serves."""

from __future__ import annotations

import re

import pytest

from kvist.testing.waits import wait_until
from tests.adding.conftest import Cluster, Followed
from tests.adding.walks import PAGE, ROOT, Block, read_walks

SUITES = (
    "tests/conformance",
    "tests/engine/test_engines.py",
    "tests/models/test_declarations.py",
    "tests/models/test_equals_transformers.py",
    "tests/runner/test_shaping.py",
    "tests/server/test_fields.py",
    "tests/testing/test_specs.py",
    "tests/cli/test_flag_names.py",
    "tests/test_docs.py",
)

NEW_CASES = ("power_of_d", "sqlite", "pwrite", "sdpa", "arcee", "ngrams")
CHOSEN = " or ".join(
    ("test_docs", "test_flag_names", "test_every_family", "test_shaping", "test_fields", "test_specs", *NEW_CASES)
)

pytestmark = pytest.mark.timeout(400)


@pytest.mark.model  # compares with transformers
def test_suites_of_the_repository_pass_after_every_walk(followed: Followed) -> None:
    output = followed.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--tb=short", "-k", CHOSEN, *SUITES)
    for name in NEW_CASES:
        assert re.search(rf"PASSED .*\[(\w+-)*{name}", output), f"no test of {name} ran"


def test_code_of_the_page_has_the_style_of_the_repository(followed: Followed) -> None:
    pytest.importorskip("ruff")
    followed.run("-m", "ruff", "check", "src", "tests", "scripts")
    followed.run("-m", "ruff", "format", "--check", "src", "tests", "scripts")


def test_new_options_are_new_lines_in_the_list_of_flags(followed: Followed) -> None:
    lists = [root / "tests/cli/flag_names.txt" for root in (ROOT, followed.root)]
    before, after = (set(path.read_text(encoding="utf-8").splitlines()) for path in lists)
    assert {line.split(" = ")[0] for line in after - before} == {
        "--compared-workers",
        "--hicache-storage-database",
        "--completion-tokens",
    }
    assert before <= after


PROMPT = "A prompt of more than one page"
PAGE_TOKENS = 16


@pytest.mark.e2e
def test_a_cluster_with_every_new_part_answers(cluster: Cluster) -> None:
    answer = cluster.post("/v1/completions", prompt=PROMPT, temperature=0, kvist={"report": True})
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["kvist"]["handoff"]["num_pages"] >= 1


@pytest.mark.e2e
def test_pages_come_back_from_the_new_store(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "kvist": {"usage": True}}
    first = cluster.post("/v1/completions", **body)
    wait_until(lambda: all(store["stored_bytes"] for store in cluster.stores()))
    cluster.post("/flush_cache")
    second = cluster.post("/v1/completions", **body)
    assert second["usage"]["kvist"]["cached_tokens"] == {"device": 0, "host": 0, "storage": PAGE_TOKENS}
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert {store["hicache_storage_backend"] for store in cluster.stores()} == {"sqlite"}


@pytest.mark.e2e
def test_no_token_of_an_answer_is_repeated(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "return_token_ids": True}
    [without] = cluster.post("/v1/completions", **body)["choices"]
    [with_feature] = cluster.post("/v1/completions", **body, no_repeat_ngram_size=1)["choices"]
    assert len(set(without["token_ids"])) < 40
    assert len(set(with_feature["token_ids"])) == 40


@pytest.mark.e2e
def test_the_new_endpoint_answers(cluster: Cluster) -> None:
    assert cluster.post("/count_tokens", text="twelve bytes") == {"count": 12}


def test_a_change_that_does_not_fit_the_file_names_the_file() -> None:
    block = Block(path="src/kvist/door.py", is_new=False, text=" no such line\n+another\n")
    with pytest.raises(AssertionError, match=r"src/kvist/door.py has these lines 0 times"):
        block.apply(ROOT)


def test_a_block_without_a_file_is_refused() -> None:
    with pytest.raises(AssertionError, match="no file above it"):
        read_walks("## A part\n\nSome text.\n\n```python\nx = 1\n```\n")


def test_the_page_has_a_walk_for_each_kind_of_part() -> None:
    titles = [walk.title for walk in read_walks(PAGE.read_text(encoding="utf-8"))]
    assert titles == [
        "A routing policy",
        "A store",
        "A transport",
        "An attention backend",
        "A model family",
        "A sampling feature",
        "An endpoint",
        "An option",
    ]
