from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from kvist.checkpoint import Checkpoint, CheckpointKind, find_checkpoint
from kvist.errors import ModelLoadError
from kvist.text import Tokenizer, load_tokenizer


def gguf_bytes(pairs: dict[str, str | list[str] | list[int] | int]) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(item: object) -> bytes:
        if isinstance(item, str):
            return struct.pack("<I", 8) + string(item)
        if isinstance(item, list) and isinstance(item[0], str):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
        if isinstance(item, list):
            return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)
        return struct.pack("<II", 4, item)

    body = b"".join(string(key) + value(item) for key, item in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body


def load_gguf(folder: Path, **changes: str | list[str] | list[int] | int) -> Tokenizer:
    pairs: dict[str, str | list[str] | list[int] | int] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<|end|>", "a", "b", "ab", "1", "Ġ", "ĠĠ", "Ġ1", "<tag>"],
        "token_type": [3, 1, 1, 1, 1, 1, 1, 1, 4],
        "merges": ["a b", "Ġ Ġ", "Ġ 1"],
        "eos_token_id": 0,
        **changes,
    }
    path = folder / "m.gguf"
    path.write_bytes(gguf_bytes({f"tokenizer.ggml.{key}": item for key, item in pairs.items()}))
    return load_tokenizer(Checkpoint(path=path, kind=CheckpointKind.GGUF, name="m"))


def test_gguf_special_and_user_defined_tokens(tmp_path: Path) -> None:
    tokenizer = load_gguf(tmp_path)
    assert tokenizer.encode("ab<tag>a<|end|>") == [3, 8, 1, 0]
    assert tokenizer.special_token_ids == {0}
    assert tokenizer.decode([3, 8, 0]) == "ab<tag>"


def test_smollm_splits_digits_before_spaces(tmp_path: Path) -> None:
    assert load_gguf(tmp_path).encode("a  11") == [1, 6, 4, 4]
    assert load_gguf(tmp_path, pre="gpt-2").encode("a  1") == [1, 5, 7]


def test_llama3_starts_with_bos_unless_the_file_disables_it(tmp_path: Path) -> None:
    assert load_gguf(tmp_path, pre="llama-bpe", bos_token_id=0).encode("ab") == [0, 3]
    tokenizer = load_gguf(tmp_path, pre="llama-bpe", bos_token_id=0)
    assert tokenizer.encode("ab", add_special_tokens=False) == [3]
    assert tokenizer.encode("<|end|>ab") == [0, 3]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"pre": "martian"}, "tokenizer.ggml.pre is 'martian'"),
        ({"merges": ["a z"]}, "the vocabulary does not fit the merges"),
        ({"token_type": [1]}, "broken"),
    ],
)
def test_the_error_for_an_unreadable_gguf_tokenizer_names_the_fault(
    tmp_path: Path, change: dict[str, str], expected: str
) -> None:
    with pytest.raises(ModelLoadError, match=expected):
        load_gguf(tmp_path, **change)


def write_folder(folder: Path, tokenizer: Tokenizer, **config: object) -> Checkpoint:
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Checkpoint(path=folder, kind=CheckpointKind.HF, name="m")


def test_a_folder_gives_tokens_and_template(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    checkpoint = write_folder(
        tmp_path,
        byte_tokenizer,
        eos_token={"content": "<|end|>"},
        chat_template="{{ eos_token }}{{ messages[0].content }}",
    )
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("hello wörld") == byte_tokenizer.encode("hello wörld")
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == "<|end|>x"


def test_a_jinja_file_wins_over_the_template_in_the_config(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file")
    template = load_tokenizer(write_folder(tmp_path, byte_tokenizer, chat_template="from the config")).chat_template
    assert template is not None
    assert template.render([]) == "from the file"


def test_the_error_for_a_missing_tokenizer_json_says_how_to_create_it(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="save_pretrained"):
        load_tokenizer(Checkpoint(path=tmp_path, kind=CheckpointKind.HF, name="m"))


def test_a_decoder_that_is_not_bytes_per_token_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelLoadError, match="WordPiece"):
        load_tokenizer(Checkpoint(path=tmp_path, kind=CheckpointKind.HF, name="m"))


def test_byte_fallback_tokens_stand_for_bytes(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁hi": 1, "<0xC3>": 2, "<0xA9>": 3}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(Checkpoint(path=tmp_path, kind=CheckpointKind.HF, name="m"))
    assert tokenizer.decode([1, 2, 3]) == " hié"


TEXTS = [
    "Hello, world!",
    "  leading and   inner    spaces  ",
    "tabs\tand\nnew\r\nlines\n\n\n  end ",
    "I'm you're we'll they've he'd it's DON'T",
    "naïve café Ångström Zürich façade",
    "Привет, как дела? こんにちは世界 你好，世界 안녕하세요 مرحبا שלום नमस्ते",
    "emoji 🎉👩‍👩‍👧‍👦🏳️‍🌈 ok",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 3]}  # done\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|endoftext|> c",
    "1234567890 3.14159 x=42;",
    "https://example.org/a?b=c&d=e#f <html><b>&amp;</b></html>",
    "zero\u200bwidth \u00a0nbsp e\u0301 combining \ufeff bom",
    "",
    " ",
    "\n",
    "x" * 300,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f600\U0010ffff",
]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return load_tokenizer(find_checkpoint(None))


@pytest.mark.model
def test_smollm2_equals_transformers(smollm: Tokenizer) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = find_checkpoint(None).path
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in TEXTS:
        assert smollm.encode(text) == theirs(text)["input_ids"], text
        assert smollm.decode(smollm.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    # transformers rebuilds a GGUF tokenizer without SmolLM2's rule that splits every digit. The difference shows where
    # spaces or numerals other than 0-9 are adjacent; with the published rule restored, these texts are equal too.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*TEXTS, "a   1  22", "x =  7\n\n  9", "½ ² Ⅷ ٣٤ \t1", "v1.2.3-rc4"]:
        assert smollm.encode(text) == theirs(text)["input_ids"], text
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "é"},
    ]
    assert smollm.chat_template is not None
    assert smollm.chat_template.render(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.model
def test_smollm2_loads_in_seconds() -> None:
    import time

    start_s = time.process_time()
    load_tokenizer(find_checkpoint(None))
    assert time.process_time() - start_s < 10  # 1 s on an idle machine
