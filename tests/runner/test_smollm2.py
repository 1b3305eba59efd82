"""The embedded model through pages, attention and sampler gives the tokens of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvist.checkpoint import find_checkpoint
from kvist.models import load_model_config
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions
from kvist.runner.runner import AnyRunner
from kvist.text import load_tokenizer

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "Translate to German: The weather is nice today, and the children are playing in the garden behind the house.",
]
NUM_TOKENS = 32
EOS = (2,)  # suppressed, so that answers are long
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyRunner]:
    checkpoint = find_checkpoint(None)
    config = RunnerOptions(device="cpu", dtype="float32", max_total_tokens=4096)
    built = build_runner(
        checkpoint, load_model_config(checkpoint), config, runtime_dir=tmp_path_factory.mktemp("runtime")
    )
    yield built
    built.close()


def generate(runner: AnyRunner, prompts: list[list[int]]) -> list[list[int]]:
    """Run all requests at once: prompts in chunks of 8 tokens, together with the decodes of other requests."""
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    started = tuple(
        StartRequest(
            slot=SlotId(index),
            request_id=RequestId(str(index)),
            sampling=GREEDY,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            suppressed_token_ids=EOS,
            suppress_until=len(prompt) + NUM_TOKENS,
        )
        for index, prompt in enumerate(prompts)
    )
    runner.launch(Batch(step_id=0, started=started, items=())).result()
    goals = [len(prompt) + NUM_TOKENS for prompt in prompts]
    step = 0
    while any(len(known) < goal for known, goal in zip(tokens, goals, strict=True)):
        step += 1
        items = []
        for index, known in enumerate(tokens):
            if len(known) == goals[index]:
                continue
            end = min(computed[index] + 8, len(known))
            items.append(
                BatchItem(
                    slot=SlotId(index),
                    token_ids=known[computed[index] : end],
                    start=computed[index],
                    page_ids=range(index * 20, index * 20 + 20),
                    samples=end == len(known),
                )
            )
            computed[index] = end
        items.sort(key=lambda item: len(item.token_ids))
        slots = [item.slot for item in items if item.samples]
        sampled = runner.launch(Batch(step_id=step, items=tuple(items))).result()
        for slot, token_id in zip(slots, sampled.token_ids, strict=True):
            tokens[slot].append(token_id)
    runner.launch(Batch(step_id=0, ended=tuple(start.slot for start in started), items=())).result()
    return [known[-NUM_TOKENS:] for known in tokens]


def greedy_after_each(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """Return the greedy token after the prompt and the answer's first 0, 1, 2 … tokens. When these tokens equal the
    answer, the answer is the one that the model generates: one pass replaces many steps."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logits[:, list(EOS)] = float("-inf")
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def test_greedy_tokens_equal_transformers_alone_and_in_a_batch(runner: AnyRunner, transformers_smollm2: Any) -> None:
    tokenizer = load_tokenizer(find_checkpoint(None))
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    answers = generate(runner, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == greedy_after_each(transformers_smollm2, prompt, answer)
    for prompt, answer in zip(prompts[:2], answers, strict=False):
        assert generate(runner, [prompt]) == [answer]
