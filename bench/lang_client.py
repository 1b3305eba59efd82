"""The client of the programs written by hand: `openai`, or httpx on machines without that package.

Both send the same bodies over connections that stay open. httpx alone spends less time on a request, so it is the
harder comparison.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import httpx

CLIENTS = ("openai", "httpx")
TIMEOUT_S = 1800.0
_MAX_CONNECTIONS = 1000
Fields = dict[str, Any]


class ChatClient(Protocol):
    """One server, in one event loop."""

    async def model(self) -> str:
        """Return the name of the server's model."""

    async def chat(self, fields: Fields, extra: Fields) -> str:
        """Return the text of a chat completion. `extra` are the fields that OpenAI's API does not have."""

    async def close(self) -> None: ...


def usual_client() -> str:
    return "httpx" if importlib.util.find_spec("openai") is None else "openai"


def client_of(kind: str, url: str) -> ChatClient:
    return _OpenAIClient(url) if kind == "openai" else _HttpxClient(url)


class _OpenAIClient:
    def __init__(self, url: str) -> None:
        from openai import AsyncOpenAI

        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S)

    async def close(self) -> None:
        await self._client.close()

    async def model(self) -> str:
        return str((await self._client.models.list()).data[0].id)

    async def chat(self, fields: Fields, extra: Fields) -> str:
        found = await self._client.chat.completions.create(**fields, extra_body=extra)
        return str(found.choices[0].message.content or "")


class _HttpxClient:
    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(base_url=f"{url}/v1", timeout=TIMEOUT_S, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def model(self) -> str:
        return str((await self._client.get("/models")).raise_for_status().json()["data"][0]["id"])

    async def chat(self, fields: Fields, extra: Fields) -> str:
        found = await self._client.post("/chat/completions", json={**fields, **extra})
        return str(found.raise_for_status().json()["choices"][0]["message"]["content"] or "")
