"""The rules by which byte-level tokenizers in GGUF files (`tokenizer.ggml.pre`) split a text before merging.

GGUF names a set of rules by one word. The rules for each known word are those of the published tokenizer.json of that
model family. An unknown word is an error: wrong rules would not crash, but would make every answer slightly worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

PreTokenizer = pre_tokenizers.PreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
# Words that end in lower-case letters, or have capitals only.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}"
)
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _PUNCTUATION + _SPACES
_GPT4O = _CASED.replace("{0}", f"{_ENDINGS}?") + r"|\p{N}{1,3}" + _PUNCTUATION + _SPACES
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_LETTERS = (  # cased letters; escaped where editors would normalise them
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ\u1f5f-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄ"
    "ῆ-ῌ\u1fd0-\u1fd3\u1fd6-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲"
    "𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    pre_tokenizer: Callable[[], PreTokenizer]
    ignores_merges: bool = False  # a piece that is a whole token needs no merges
    nfc: bool = False  # texts are first normalised to NFC
    adds_bos: bool = False  # unless the file decides otherwise


def _split(*patterns: str) -> Callable[[], PreTokenizer]:
    """Split by each pattern in order, every pattern within the pieces of the previous one; then map bytes to GPT-2's
    printable alphabet."""

    def make() -> PreTokenizer:
        steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


def _falcon() -> PreTokenizer:
    steps: list[PreTokenizer] = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    return pre_tokenizers.Sequence(steps)


_BY_RULES: tuple[tuple[Rules, str], ...] = (
    (Rules(pre_tokenizer=_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
    (Rules(pre_tokenizer=_split(_GPT2)), "gpt-2 phi-2 jais exaone4 mellum a.x-4.0"),
    (Rules(pre_tokenizer=_split(_GPT2), nfc=True), "mpt olmo"),
    (Rules(pre_tokenizer=_split(r"\p{N}", _GPT2)), "smollm starcoder refact codeshell exaone minerva-7b"),
    (Rules(pre_tokenizer=_split(r"\p{N}", _GPT2), nfc=True), "command-r"),
    (
        Rules(pre_tokenizer=_split(_LLAMA3), ignores_merges=True, adds_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 smaug-bpe",
    ),
    (Rules(pre_tokenizer=_split(_LLAMA3)), "dbrx"),
    (Rules(pre_tokenizer=_split(_QWEN2), nfc=True), "qwen2"),
    (Rules(pre_tokenizer=_split(_QWEN2)), "deepseek-r1-qwen megrez stablelm2"),
    (Rules(pre_tokenizer=_split(_QWEN35), nfc=True), "qwen35"),
    (Rules(pre_tokenizer=_split(_TEKKEN), ignores_merges=True), "tekken"),
    (Rules(pre_tokenizer=_split(_GPT4O)), "gpt-4o llama4"),
    (Rules(pre_tokenizer=_falcon), "falcon"),
    (Rules(pre_tokenizer=_split(_BLOOM)), "bloom poro-chat gpt3-finnish"),
    (Rules(pre_tokenizer=_split(_BLOOM, r"\p{N}")), "viking"),
    (
        Rules(
            pre_tokenizer=_split(
                r"[\r\n]", r"\s?" + _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+"
            )
        ),
        "deepseek-llm",
    ),
    (Rules(pre_tokenizer=_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")), "deepseek-coder"),
    (Rules(pre_tokenizer=_split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)), "deepseek-v3 hunyuan-dense"),
)
RULES = {name: rules for rules, names in _BY_RULES for name in names.split()}
