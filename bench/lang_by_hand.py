"""The workloads of examples/lang as a careful person writes them with asyncio and a client of OpenAI's API.

All requests that do not depend on one another are sent at once; choices are constrained answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

import msgspec

from lang_client import ChatClient, client_of

Work = Callable[["Chat", dict[str, Any]], Awaitable[object]]
Messages = list[dict[str, str]]


class Chat:
    """One server. `ask` returns the text of an answer."""

    def __init__(self, client: ChatClient, model: str) -> None:
        self._client, self._model = client, model

    async def ask(self, messages: Messages, max_tokens: int, **options: Any) -> str:
        extra = options.pop("extra_body", {})
        if messages[-1]["role"] == "assistant":
            extra = {**extra, "add_generation_prompt": False, "continue_final_message": True}
        fields: dict[str, Any] = {"temperature": 0, **options, "messages": messages}
        return await self._client.chat({"model": self._model, "max_tokens": max_tokens, **fields}, extra)

    async def choose(self, messages: Messages, choices: Sequence[str]) -> str:
        return await self.ask(messages, 16, extra_body={"structured_outputs": {"choice": list(choices)}})


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def _few_shot(chat: Chat, arguments: dict[str, Any]) -> str:
    messages = [_system(arguments["instructions"]), _user(f"Text: {arguments['question']}\nTopic:")]
    return await chat.ask(messages, 8, stop="\n")


async def _self_consistency(chat: Chat, arguments: dict[str, Any]) -> str:
    messages = [_system("Solve the task step by step. The last word is the answer."), _user(arguments["question"])]
    asked = (chat.ask(messages, 24, temperature=0.8, seed=seed) for seed in range(8))
    words = [text.split()[-1:] for text in await asyncio.gather(*asked)]
    counted = Counter(word[0] for word in words if word).most_common(1)
    return counted[0][0] if counted else ""


async def _judge(chat: Chat, arguments: dict[str, Any]) -> list[str]:
    prefix = [_system("You judge essays by one criterion at a time."), _user("Essay: " + arguments["essay"])]
    questions = [f"Is the essay {one}? Answer yes, no or partly." for one in arguments["criteria"]]
    asked = (chat.choose([*prefix, _user(each)], ["yes", "no", "partly"]) for each in questions)
    return await asyncio.gather(*asked)


async def _extract(chat: Chat, arguments: dict[str, Any]) -> str:
    from extract import Event

    instructions = "Extract the first event of a document as JSON: who did something, and in which year. " * 8
    schema = {"name": "event", "strict": True, "schema": msgspec.json.schema(Event)}
    messages = [_system(instructions), _user("Document: " + arguments["document"])]
    return await chat.ask(messages, 48, response_format={"type": "json_schema", "json_schema": schema})


async def _tree_of_thought(chat: Chat, arguments: dict[str, Any]) -> tuple[float, str]:
    start = [_system("You solve tasks in small steps."), _user(arguments["task"])]

    async def grow(messages: Messages, depth: int) -> tuple[float, str]:
        async def branch(seed: int) -> tuple[float, str]:
            asked = [*messages, _user("The next step of the solution?")]
            thought = await chat.ask(asked, 16, temperature=0.8, seed=seed, stop="\n")
            judged = [*asked, _assistant(thought), _user("Is this step right?")]
            verdict = await chat.choose(judged, ["yes", "no"])
            score = 1.0 if verdict == "yes" else 0.0
            if depth == 1:
                return score, thought
            below = await grow([*judged, _assistant(verdict)], depth - 1)
            return score + below[0], below[1]

        return max(await asyncio.gather(*(branch(seed) for seed in range(3))))

    return await grow(start, 3)


async def _chat_tools(chat: Chat, arguments: dict[str, Any]) -> Messages:
    from chat_tools import search

    messages = [_system("You answer from what a search has found. " * 6)]
    for question in arguments["questions"]:
        messages.append(_user(question))
        query = await chat.ask([*messages, _assistant("Search for: ")], 8, stop="\n")
        messages.append(_assistant("Search for: " + query))
        found = await asyncio.to_thread(search, query)
        text = "The search has found the following passages, of which some are useless. " + found
        messages.append(_user(text))
        messages.append(_assistant("Answer: " + await chat.ask([*messages, _assistant("Answer: ")], 16, stop="\n")))
    return messages


async def _rag(chat: Chat, arguments: dict[str, Any]) -> str:
    prefix = [_system("You answer questions from passages. " * 6), _user("The question: " + arguments["question"])]
    passages = arguments["passages"]
    asked = (chat.choose([*prefix, _user(f"Does this passage help? {one}")], ["yes", "no"]) for one in passages)
    verdicts = await asyncio.gather(*asked)
    ranked = sorted(range(len(passages)), key=lambda index: verdicts[index] != "yes")
    text = "Read these: " + " ".join(passages[index] for index in ranked[:4]) + " Now answer."
    return await chat.ask([*prefix, _user(text)], 32, stop="\n")


WORKS: dict[str, Work] = {
    "few_shot": _few_shot,
    "tree_of_thought": _tree_of_thought,
    "self_consistency": _self_consistency,
    "judge": _judge,
    "extract": _extract,
    "chat_tools": _chat_tools,
    "rag": _rag,
}


class ByHand:
    """One client and its event loop for all batches, as kvist.lang has: making it is not part of a batch. Use as a
    context manager."""

    def __init__(self, client_kind: str, url: str) -> None:
        self._runner = asyncio.Runner()
        self._client = client_of(client_kind, url)
        self._chat: Chat | None = None

    def __enter__(self) -> Self:
        self._chat = Chat(self._client, self._runner.run(self._client.model()))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def run(self, name: str, batch: Sequence[dict[str, Any]]) -> list[object]:
        """Run the work of that name for each of the arguments, all at once."""
        return self._runner.run(self._run(WORKS[name], batch))

    async def _run(self, work: Work, batch: Sequence[dict[str, Any]]) -> list[object]:
        assert self._chat is not None, "used outside of its `with`"
        return await asyncio.gather(*(work(self._chat, arguments) for arguments in batch))
