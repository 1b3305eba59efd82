"""The batch shapes that `kvist bench engine` times, as they are written on the command line. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.config import option
from kvist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One step: `num_decodes` requests that have `context` tokens each, and `num_prompts` new prompts of `prompt`."""

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
    """ "8@1024", "2x512", or both joined by "+". Raises `ConfigError`."""
    sizes: dict[str, tuple[int, int]] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term)
        if match is None or match[2] in sizes or int(match[1]) < 1 or int(match[3]) < 1:
            raise ConfigError(
                f"--shapes: {text!r} is not allowed; write 8@1024 for 8 decodes of 1024 tokens of context each, 2x512 "
                "for 2 prompts of 512, 8@1024+2x512 for both in one step",
                param="shapes",
            )
        sizes[match[2]] = int(match[1]), int(match[3])
    num_decodes, context = sizes.get("@", (0, 0))
    num_prompts, prompt = sizes.get("x", (0, 0))
    return Shape(text=text, num_decodes=num_decodes, context=context, num_prompts=num_prompts, prompt=prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsConfig:
    """Raises `ConfigError` for a shape that cannot be read."""

    shapes: tuple[str, ...] = option(
        ("1@128", "8@512", "1x512", "8@512+1x256"),
        "what a step computes: 8@1024 is 8 decodes with 1024 tokens of context each, 2x512 two prompts of 512 tokens, "
        "8@1024+2x512 both",
    )
    steps: int = option(20, "steps measured of each shape", minimum=1)
    warmup_steps: int = option(3, "steps before them", minimum=0)
    json_path: Path | None = option(None, "write every step's times here", flag="--json")

    def __post_init__(self) -> None:
        _ = self.parsed

    @property
    def parsed(self) -> Sequence[Shape]:
        return [parse_shape(text) for text in self.shapes]
