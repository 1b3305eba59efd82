"""SentencePiece vocabularies of GGUF files, compared with a reference that merges as SentencePiece specifies."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.checkpoint import Checkpoint, CheckpointKind
from kvist.errors import ModelLoadError
from kvist.text import Tokenizer, load_tokenizer
from tests.budget import budget

PIECES = ["▁", "a", "b", "c", "d", "é", "ab", "bc", "cd", "abc", "bcd", "▁a", "▁ab", "▁abc", "▁▁", "▁c", "abcd", "▁▁a"]
SCORES = [-100.0, -90.0, -91.0, -92.0, -93.0, -94.0, -3.0, -1.0, -2.0, -7.0, -5.0, -6.0, -4.0, -9.0, -8.0, -11.0, -10.0]
SCORES.append(-12.0)
CONTROLS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = [*CONTROLS, *BYTES, *PIECES, "<|tool|>"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
ALL_SCORES = [*[0.0] * 259, *SCORES, 0.0]


def load(folder: Path, **flags: bool) -> Tokenizer:
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores(ALL_SCORES)
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(1)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(Checkpoint(path=path, kind=CheckpointKind.GGUF, name="m"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("spm"))


def merged(text: str) -> list[int]:
    """Merge the two neighbours with the best joined piece until none is left; then split unknown pieces into bytes."""
    score_of = dict(zip(PIECES, SCORES, strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(score_of[a + b], -place) for place, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score_of]  # noqa: B905, RUF007
        if not joined:
            break
        place = -max(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    ids = [[TOKENS.index(part)] if part in score_of else [3 + byte for byte in part.encode()] for part in parts]
    return [token_id for each in ids for token_id in each]


@settings(max_examples=budget(60, long=2000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="abcdé xΩ", min_size=1, max_size=14))
def test_merges_equal_those_of_sentencepiece(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == [1, *merged(text)]
    assert tokenizer.decode(ids) == " " + text


def test_tokens_of_the_file_are_recognised_and_bos_follows_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tool, end = TOKENS.index("<|tool|>"), 2
    assert tokenizer.encode("ab<|tool|></s>") == [1, TOKENS.index("▁ab"), tool, end]
    assert tokenizer.special_token_ids == {0, 1, 2}
    bare = load(tmp_path, add_bos_token=False, add_space_prefix=False)
    assert bare.encode("ab") == [TOKENS.index("ab")]


def test_the_error_for_an_unsupported_vocabulary_names_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("t5")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.model is 't5'"):
        load_tokenizer(Checkpoint(path=path, kind=CheckpointKind.GGUF, name="m"))
