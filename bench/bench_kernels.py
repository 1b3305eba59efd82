"""How long do the GPU kernels of a decode step take, compared with torch's and cuBLAS's? Needs a CUDA device.

Shapes of Qwen2-7B, random numbers (seed 0); every time is the median of replays of a CUDA graph. Weights are
read from memory, never from the cache: each layer has its own. `--json FILE` writes all rows.

    python bench/bench_kernels.py [--layers 28] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from json_report import write_report
from kvist.attention import build_attention, choose_attention
from kvist.attention.backend import GraphPlan, Span
from kvist.kernels import activation, norm, rotary, sampling
from kvist.kernels.operands import Rotary, SamplingColumns
from kvist.models.formats import PlainWeight
from kvist.models.linear import Linear, make_gated_linear, make_linear

HIDDEN, INNER, VOCAB, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 3584, 18_944, 152_064, 28, 4, 128, 16
QKV = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
EPS = 1e-6
MAX_PAGES = 1024  # of one request
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
Row = dict[str, str | int | float]


def time_us(work: Callable[[], object], *, num_calls: int = 1, repeats: int = 9) -> float:
    """Return the median microseconds of the kernels of one call of `work`, from a replay of `num_calls` in a row."""
    for _ in range(2):  # compiles kernels, which capture cannot
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_calls):
            work()
    times: list[float] = []
    for _ in range(repeats + 1):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[1:]) / num_calls


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=BF16) * scale


def small_kernels() -> list[Row]:
    """Measure one kernel 50 times in a row: its share of a chain of small kernels."""
    weight, frequencies = random(HIDDEN), torch.rand(HEAD_DIM // 2, device=CUDA)
    pages = random(2048, KV_HEADS, 1, 2, PAGE_SIZE, HEAD_DIM)[:, :, 0]
    rows: list[Row] = []
    for m in (1, 64, 256, 2048):
        x, residual, gate_up, heads = random(m, HIDDEN), random(m, HIDDEN), random(m, 2 * INNER), random(m, QKV)
        heads = heads.view(m, -1, HEAD_DIM)
        positions, slots = torch.arange(m, device=CUDA), torch.arange(m, dtype=torch.int32, device=CUDA)
        cos, sin = rotary.rotation_torch(positions, frequencies)
        rotation = Rotary(cos=cos, sin=sin)
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "add_rms_norm": (
                partial(norm.add_rms_norm, x, residual, weight, EPS),
                partial(norm.add_rms_norm_torch, x, residual, weight, EPS),
            ),
            "silu_mul": (
                partial(activation.silu_mul, gate_up),
                partial(activation.silu_mul_torch, gate_up),
            ),
            "rotation": (
                partial(rotary.rotation, positions, frequencies),
                partial(rotary.rotation_torch, positions, frequencies),
            ),
            "rotate_and_write": (
                partial(rotary.rotate_and_write, heads, rotation, pages, slots),
                partial(_rotate_and_write_in_torch, heads, rotation, pages, slots),
            ),
        }
        if m <= 256:
            logits, temperatures = torch.randn(m, VOCAB, device=CUDA), torch.ones(m, device=CUDA)
            keys = torch.randint(0, 2**31 - 1, (m, 2), dtype=torch.int32, device=CUDA)
            plain = SamplingColumns.untruncated(temperatures, keys)
            for name, columns in {
                "greedy": replace(plain, temperatures=torch.zeros_like(temperatures)),
                "temperature": plain,
                "top_p 0.95": replace(plain, top_p=torch.full_like(temperatures, 0.95)),
                "top_k 50, top_p 0.95": replace(
                    plain, top_k=torch.full_like(plain.top_k, 50), top_p=torch.full_like(temperatures, 0.95)
                ),
            }.items():
                pairs[f"choose_tokens, {name}"] = (
                    partial(sampling.choose_tokens, logits, columns),
                    partial(sampling.choose_tokens_torch, logits, columns),
                )
        for name, (kernel, twin) in pairs.items():
            times = [time_us(work, num_calls=50) for work in (kernel, twin)]
            rows.append({"kernel": name, "rows": m, "us": round(times[0], 2), "torch_us": round(times[1], 2)})
    return rows


def _rotate_and_write_in_torch(heads: Tensor, rotation: Rotary, pages: Tensor, slots: Tensor) -> Tensor:
    """Run the torch twin without padding rows; their number cannot be known inside a graph."""
    qk = rotary.norm_and_rotate(heads[:, : Q_HEADS + KV_HEADS], rotation)
    page_ids, offsets = (slots // PAGE_SIZE).long(), (slots % PAGE_SIZE).long()
    pages[page_ids, :, 0, offsets] = qk[:, Q_HEADS:]
    pages[page_ids, :, 1, offsets] = heads[:, Q_HEADS + KV_HEADS :]
    return qk[:, :Q_HEADS]


@dataclass
class Weights:
    """The matrices of a model, plain and in the layout that the model runs with."""

    plain: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # qkv, o, gate over up, down of each layer
    head: Tensor

    @classmethod
    def make(cls, num_layers: int) -> Weights:
        shapes = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
        layers = []
        for _ in range(num_layers):
            qkv, o, gate_up, down = (random(*shape, scale=shape[1] ** -0.5) for shape in shapes)
            layers.append((qkv, o, gate_up, down))
        return cls(plain=layers, head=random(VOCAB, HIDDEN, scale=HIDDEN**-0.5))

    @property
    def num_bytes(self) -> int:
        return sum(w.nbytes for layer in self.plain for w in layer) + self.head.nbytes

    def ours(self) -> tuple[list[tuple[Linear, Linear, Linear, Linear]], Linear]:
        layers = []
        for qkv, o, gate_up, down in (map(PlainWeight, layer) for layer in self.plain):
            layers.append((make_linear(qkv), make_linear(o), make_gated_linear(gate_up), make_linear(down)))
        return layers, make_linear(PlainWeight(self.head), out_dtype=torch.float32)


def matrices_of_a_step(weights: Weights) -> list[Row]:
    """Measure all products of one step and nothing else. Ours include SiLU x up, cuBLAS's do not."""
    layers, head = weights.ours()
    rows: list[Row] = []
    for m in (1, 2, 4, 8, 16, 64, 128, 256):
        x, inner = random(m, HIDDEN), random(m, INNER)

        def cublas(x: Tensor = x, inner: Tensor = inner) -> None:
            for qkv, o, gate_up, down in weights.plain:
                for weight, value in ((qkv, x), (o, x), (gate_up, x), (down, inner)):
                    F.linear(value, weight)
            F.linear(x, weights.head)

        def ours(x: Tensor = x) -> None:
            for qkv, o, gated, down in layers:
                qkv(x), o(x), down(gated(x))
            head(x)

        times = [time_us(cublas) / 1e3, time_us(ours) / 1e3]
        rate = weights.num_bytes / times[1] / 1e9
        rows.append({"rows": m, "cublas_ms": round(times[0], 3), "ours_ms": round(times[1], 3), "tb_s": round(rate, 2)})
    return rows


def whole_steps(weights: Weights) -> list[Row]:
    """Measure a decode step from hidden states to chosen tokens, attention over `context` tokens included."""
    choice = choose_attention("auto", CUDA, BF16)
    backend = build_attention(choice.name, CUDA)
    layers, head = weights.ours()
    num_layers = len(layers)
    pool = torch.zeros(16_384, KV_HEADS, num_layers, 2, PAGE_SIZE, HEAD_DIM, device=CUDA, dtype=BF16)
    backend.bind(pool)
    scale, frequencies = random(HIDDEN), torch.rand(HEAD_DIM // 2, device=CUDA)
    rows: list[Row] = []
    cases = ((1, 256), (1, 4096), (8, 2048), (64, 1024), (128, 600), (256, 600))
    plan = backend.plan_decode_graph(max(m for m, _ in cases), MAX_PAGES)  # one plan for all sizes, as in a server
    if plan is None:
        print(f"attention backend {choice.name} ({choice.reason}) cannot be captured: no whole steps")
        return rows
    for m, context in cases:
        num_pages = -(-context // PAGE_SIZE)
        spans = [
            Span(start=context - 1, num_tokens=1, page_ids=list(range(i * num_pages, (i + 1) * num_pages)))
            for i in range(m)
        ]
        hidden, positions = random(m, HIDDEN), torch.full((m,), context - 1, device=CUDA)
        columns = SamplingColumns.untruncated(
            torch.ones(m, device=CUDA), torch.zeros(m, 2, dtype=torch.int32, device=CUDA)
        )

        def step(
            m: int = m,
            x: Tensor = hidden,
            positions: Tensor = positions,
            columns: SamplingColumns = columns,
            plan: GraphPlan = plan,
            parts: str = "all",
        ) -> None:
            attend = plan.attend(m)
            cos, sin = rotary.rotation(positions, frequencies)
            rotation, residual = Rotary(cos=cos, sin=sin), None
            for layer, (qkv, o, gated, down) in enumerate(layers):
                x, residual = norm.add_rms_norm(x, residual, scale, EPS)
                heads = qkv(x).view(m, -1, HEAD_DIM)
                attended = attend(layer, heads, rotation) if parts == "all" else heads[:, :Q_HEADS]
                x, residual = norm.add_rms_norm(o(attended.reshape(m, -1)), residual, scale, EPS)
                x = down(gated(x))
            logits = head(norm.add_rms_norm(x, residual, scale, EPS)[0])
            sampling.choose_tokens(logits, columns)

        plan.fill([])
        step()  # a plan accepts spans only for sizes that have run once
        plan.fill(spans)
        whole = time_us(step) / 1e3
        without = time_us(partial(step, parts="no attention")) / 1e3
        rows.append({"batch": m, "context": context, "step_ms": round(whole, 3), "no_attention_ms": round(without, 3)})
    return rows


def print_table(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    if rows:
        print("  ".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>16}" for value in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels needs a CUDA device, and torch sees none: nothing measured")
        return
    torch.manual_seed(0)
    results: dict[str, list[Row]] = {"small kernels, microseconds": small_kernels()}
    weights = Weights.make(args.layers)
    results[f"matrices of one step, {args.layers} layers, {weights.num_bytes / 1e9:.2f} GB"] = matrices_of_a_step(
        weights
    )
    results["decode steps under a graph"] = whole_steps(weights)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for title, rows in results.items():
        print_table(title, rows)
    if args.json:
        write_report(args.json, args, rows=results)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
