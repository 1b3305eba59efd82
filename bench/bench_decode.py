"""How fast does our runner decode SmolLM2 on this CPU: compared with transformers, and 8 streams with one?

    python bench/bench_decode.py [--threads 2] [--repetitions 5] [--tokens 64] [--json FILE]

Two ratios, each from interleaved repetitions in one run, on the same machine, dtype (fp32) and dequantised weights:

    transformers: tokens per second of our runner, one stream, over `transformers.generate`    (bar: 1.3)
    batch:        tokens per second of 8 concurrent streams over one                           (bar: 3)

Every repetition decodes greedily the same number of tokens after the same prompt; the time of the
prompt is excluded for both (the time of a one-token generation is subtracted). The exit status is 1 when a ratio is
below its bar.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from json_report import write_report
from kvist.checkpoint import find_checkpoint
from kvist.models import ModelConfig, load_model_config
from kvist.models.load import declare_model
from kvist.models.parallel import TensorParallel
from kvist.models.weights_gguf import GgufSource
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import RequestId, SamplingParams, SlotId
from kvist.runner.build import build_runner
from kvist.runner.config import RunnerOptions
from kvist.runner.runner import AnyRunner

NUM_STREAMS = 8
BARS = {"transformers": 1.3, "batch": 3.0}
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def transformers_model(config: ModelConfig) -> Any:
    """Return transformers' Llama with the weights that our reader dequantises (its own reader takes half a minute)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype="float32",
    )
    model = LlamaForCausalLM(hf_config).eval()  # type: ignore[no-untyped-call]
    source, alone = GgufSource(find_checkpoint(None)), TensorParallel()
    weights = {tensor.hf.name: source.read(tensor, tensor.part(alone)) for tensor in declare_model(config).tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.generation_config.eos_token_id = None  # it must not stop early
    model.generation_config.pad_token_id = 0
    return model


def transformers_decode(model: Any, prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
    """Return the seconds for `num_tokens` after the first one, and all tokens."""

    def generate(count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
        )
        return time.perf_counter() - start, out[0, len(prompt) :].tolist()

    first_s, _ = generate(1)
    whole_s, tokens = generate(num_tokens + 1)
    return whole_s - first_s, tokens


def our_decode(runner: AnyRunner, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[list[int]]]:
    """Return the seconds for `num_tokens` of each stream after its first one, and all tokens of each stream."""
    num_pages = -(-(len(prompts[0]) + num_tokens + 1) // runner.pool.layout.page_size)
    tokens = [list(prompt) for prompt in prompts]
    pages = [range(index * num_pages, (index + 1) * num_pages) for index in range(len(prompts))]

    started = tuple(
        StartRequest(
            slot=SlotId(index),
            request_id=RequestId(str(index)),
            sampling=GREEDY,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
        )
        for index, prompt in enumerate(prompts)
    )

    def step(computed: int) -> None:
        items = tuple(
            BatchItem(
                slot=SlotId(index),
                token_ids=known[computed:],
                start=computed,
                page_ids=pages[index],
                samples=True,
            )
            for index, known in enumerate(tokens)
        )
        sampled = runner.launch(Batch(step_id=computed, started=() if computed else started, items=items)).result()
        for known, token_id in zip(tokens, sampled.token_ids, strict=True):
            known.append(token_id)

    step(0)
    start = time.perf_counter()
    for computed in range(len(prompts[0]), len(prompts[0]) + num_tokens):
        step(computed)
    seconds = time.perf_counter() - start
    runner.launch(Batch(step_id=0, ended=tuple(each.slot for each in started), items=())).result()
    return seconds, [known[len(prompts[0]) :] for known in tokens]


def measure(runner: AnyRunner, reference: Any, args: argparse.Namespace) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(100, 40_000, (NUM_STREAMS, args.prompt), generator=generator).tolist()
    answers: dict[str, list[int]] = {}
    rows: list[dict[str, object]] = []

    def record(case: str, streams: int, run: Callable[[], tuple[float, list[int]]]) -> None:
        seconds, answers[case] = run()
        rows.append({"case": case, "streams": streams, "seconds": seconds, "tokens": streams * args.tokens})

    def ours(count: int) -> tuple[float, list[int]]:
        seconds, tokens = our_decode(runner, prompts[:count], args.tokens)
        return seconds, tokens[0]

    for repetition in range(args.repetitions + 1):
        record("transformers", 1, lambda: transformers_decode(reference, prompts[0], args.tokens))
        record("kvist, 1 stream", 1, lambda: ours(1))
        record(f"kvist, {NUM_STREAMS} streams", NUM_STREAMS, lambda: ours(NUM_STREAMS))
        if repetition == 0:
            rows.clear()  # warm-up
            print(f"same tokens: {len({tuple(answer) for answer in answers.values()}) == 1}")
    return rows


def rates(rows: list[dict[str, Any]], case: str) -> list[float]:
    return [row["tokens"] / row["seconds"] for row in rows if row["case"] == case]


def report(rows: list[dict[str, Any]]) -> dict[str, float]:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    print(f"{'case':<20}{'tokens/s p50':>14}{'p10':>9}{'p90':>9}{'ms/step p50':>14}")
    for case in cases:
        values = rates(rows, case)
        tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        streams = next(row["streams"] for row in rows if row["case"] == case)
        middle = statistics.median(values)
        print(f"{case:<20}{middle:>14.1f}{tenths[0]:>9.1f}{tenths[-1]:>9.1f}{1000 * streams / middle:>14.1f}")
    theirs, one, many = (rates(rows, case) for case in cases)
    ratios = {
        "transformers": statistics.median(ours / other for ours, other in zip(one, theirs, strict=True)),
        "batch": statistics.median(batch / single for batch, single in zip(many, one, strict=True)),
    }
    for name, ratio in ratios.items():
        print(f"ratio {name:<13}{ratio:>6.2f}  (bar {BARS[name]}, {'met' if ratio >= BARS[name] else 'MISSED'})")
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded per stream and repetition")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = find_checkpoint(None)
    config = load_model_config(checkpoint)
    with tempfile.TemporaryDirectory() as runtime_dir, torch.inference_mode():
        settings = RunnerOptions(device="cpu", dtype="float32", max_total_tokens=16_384, num_threads=args.threads)
        runner = build_runner(checkpoint, config, settings, runtime_dir=Path(runtime_dir))
        rows = measure(runner, transformers_model(config), args)
        runner.close()
    ratios = report(rows)
    if args.json:
        write_report(args.json, args, ratios=ratios, rows=rows)
    return 0 if all(ratios[name] >= bar for name, bar in BARS.items()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
