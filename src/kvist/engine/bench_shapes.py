"""The batch shapes of `kvist bench engine`, as written on the command line. This module does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.config import option
from kvist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One step: `num_decodes` requests of `context` tokens each, and `num_prompts` new prompts of `prompt` tokens."""

    text: str
    num_decodes: int = 0
    context: int = 0
    num_prompts: int = 0
    prompt: int = 0

    @property
    def num_step_tokens(self) -> int:
        return self.num_decodes + self.num_prompts * self.prompt


_TERM = re.compile(r"(\d+)([@x])(\d+)")


def parse_shape(text: str) -> Shape:
    """Parse "8@1024", "2x512", or both joined by "+". Raises `ConfigError`."""
    sizes: dict[str, tuple[int, int]] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term)
        if match is None or match[2] in sizes or int(match[1]) < 1 or int(match[3]) < 1:
            raise ConfigError(
                f"--shapes: {text!r} is not a batch shape; use 8@1024 for 8 decodes with 1024 tokens of context each, "
                "2x512 for 2 prompts of 512 tokens, 8@1024+2x512 for both in one step",
                param="shapes",
            )
        sizes[match[2]] = int(match[1]), int(match[3])
    num_decodes, context = sizes.get("@", (0, 0))
    num_prompts, prompt = sizes.get("x", (0, 0))
    return Shape(text=text, num_decodes=num_decodes, context=context, num_prompts=num_prompts, prompt=prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsConfig:
    """The options of `kvist bench engine`. Raises `ConfigError` for an invalid shape."""

    shapes: tuple[str, ...] = option(
        ("1@128", "8@512", "1x512", "8@512+1x256"),
        "contents of a step: 8@1024 is 8 decodes with 1024 tokens of context each, 2x512 is 2 prompts of 512 tokens, "
        "8@1024+2x512 is both",
    )
    steps: int = option(20, "measured steps of each shape", minimum=1)
    warmup_steps: int = option(3, "steps of each shape before the measured ones", minimum=0)
    json_path: Path | None = option(None, "file for the times of every step, as JSON", flag="--json")

    def __post_init__(self) -> None:
        _ = self.parsed

    @property
    def parsed(self) -> Sequence[Shape]:
        return [parse_shape(text) for text in self.shapes]
