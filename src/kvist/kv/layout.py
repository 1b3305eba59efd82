"""The layout of a page's bytes, and the namespace, which distinguishes pages of different models and layouts.

A page holds `page_size` tokens of every layer: `[num_kv_heads, num_layers, 2, page_size, head_dim]`, contiguous, with
K at index 0 and V at index 1. The bytes are the same in every tier and on the wire. Heads come first, so a
tensor-parallel slice of a page is one contiguous piece.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvist.errors import ConfigError

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """The layout of one rank's pages. Raises `ConfigError` for sizes below one and for an unknown dtype."""

    num_kv_heads: int  # this tensor-parallel rank's share
    num_layers: int
    page_size: int  # tokens
    head_dim: int
    dtype: str  # torch's name without the "torch."

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "num_layers", "page_size", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"page layout: {name} must be at least 1, not {getattr(self, name)}", param=name)
        if self.dtype not in _DTYPE_BYTES:
            raise ConfigError(
                f"page layout: unknown dtype {self.dtype!r}; use one of {', '.join(_DTYPE_BYTES)}", param="dtype"
            )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_kv_heads, self.num_layers, 2, self.page_size, self.head_dim)

    @property
    def num_page_elements(self) -> int:
        return self.num_kv_heads * self.num_layers * 2 * self.page_size * self.head_dim

    @property
    def page_bytes(self) -> int:
        return self.num_page_elements * _DTYPE_BYTES[self.dtype]

    def describe(self) -> str:
        """Describe the layout: if two descriptions are equal, a page's bytes mean the same on both sides."""
        return (
            f"kv_heads={self.num_kv_heads},layers={self.num_layers},kv=2,page={self.page_size},"
            f"head_dim={self.head_dim},dtype={self.dtype},little_endian"
        )


def namespace(fingerprint: str, layout: PageLayout) -> str:
    """Return a string of everything besides tokens and salt that a page's content depends on. Every page digest starts
    from the namespace. `fingerprint`: of the model (weights and config)."""
    # JSON quotes strings, so no fingerprint can look like another field. The last two fields are constant; without
    # them, pages stored by earlier versions would not be found.
    return json.dumps([fingerprint, layout.describe(), "tp=0/1", ""], separators=(",", ":"))
