"""The runner's settings. No torch here: processes without torch read them, too.

`RunnerOptions` are the options that a user sets. `RunnerConfig` is the input of a runner; build.py resolves its "auto"
values once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    dtype: str = option(
        "auto",
        "type of weights and KV pages; auto is float32 on a CPU, bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16"),
    )
    load_format: str = option(
        "auto",
        "where weights come from; dummy makes random ones from the config alone",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    device: str = option(
        "auto", "where the model runs; auto takes the GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    base_gpu_id: int = option(0, "the first GPU of this worker, counted from 0; --tp N takes N in a row", minimum=0)
    context_length: int | None = option(
        None,
        "longest prompt and answer together; by default the length that the model was trained for",
        unit="tokens",
        aliases=("max-model-len",),
        minimum=2,
    )
    tp: int = option(
        1,
        "tensor parallel size: how many ranks share each layer; on GPUs each rank has its own",
        aliases=("tp-size", "tensor-parallel-size", "-tp"),
        minimum=1,
    )
    mem_fraction_static: float = option(
        0.8,
        "share of the memory for weights and KV pages together: of a GPU's total memory, of a CPU's free memory; "
        "kvist up divides the default among the workers of one GPU",
        aliases=("gpu-memory-utilization",),
        minimum=0.01,
        maximum=1.0,
    )
    max_total_tokens: int | None = option(
        None,
        "tokens in the page pool; by default as many as the memory holds, but on a CPU at most 32768, and at most an "
        "eighth of the free memory",
        unit="tokens",
        minimum=1,
    )
    page_size: int = option(
        16,
        "tokens in one KV page; equal on all workers",
        unit="tokens",
        aliases=("block-size",),
        minimum=1,
        maximum=256,
    )
    attention_backend: str = option(
        "auto",
        "implementation of attention; auto takes the fastest that this machine has",
        choices=("auto", "torch", "fa3", "flashinfer"),
    )
    disable_cuda_graph: bool = option(
        False,
        "on a GPU, launch a step kernel by kernel instead of replaying a CUDA graph",
        aliases=("enforce-eager",),
    )
    num_threads: int = option(
        0,
        "CPU threads of the engine; 0 takes an even share of the cores, with the workers already running on this host",
        minimum=0,
    )
    random_seed: int = option(0, "seed of dummy weights", aliases=("seed",), minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig(RunnerOptions):
    """`num_threads` are those of the whole engine, divided among its ranks; 0: torch's default."""

    max_running_requests: int = 128  # the size of GPU buffers and graphs
    max_batch_tokens: int = 1024
