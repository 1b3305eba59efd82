"""The runner's settings. Does not import torch: processes without torch read the settings too.

`RunnerOptions` are the options that a user sets. resolve.py makes the `RunnerConfig` of a runner from them, once, when
the device and the model are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.attention import ATTENTION
from kvist.checkpoint import CheckpointKind
from kvist.config import option
from kvist.door import Given, choice_of, options_of_choice

LOAD_FORMATS = {"safetensors": CheckpointKind.HF, "gguf": CheckpointKind.GGUF}  # and "dummy", without a file


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    dtype: str = option(
        "auto",
        "type of weights and KV pages; auto is float32 on a CPU, bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16"),
    )
    load_format: str = option(
        "auto",
        "format of the weights; dummy generates random weights from the model's configuration alone",
        choices=("auto", *LOAD_FORMATS, "dummy"),
    )
    device: str = option(
        "auto", "device of the model; auto uses a GPU if one is present", choices=("auto", "cpu", "cuda")
    )
    base_gpu_id: int = option(
        0, "index of this worker's first GPU, from 0; with --tp N it uses N consecutive GPUs", minimum=0
    )
    tp: int = option(
        1,
        "tensor parallel size: the number of ranks that split each layer; on GPUs, one GPU per rank",
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
        "tokens in the page pool; by default as many as fit in memory, but on a CPU at most 32768 and at most an "
        "eighth of the free memory",
        unit="tokens",
        minimum=1,
    )
    page_size: int = option(
        16,
        "tokens per KV page; must be equal on all workers",
        unit="tokens",
        aliases=("block-size",),
        minimum=1,
        maximum=256,
    )
    attention_backend: str = choice_of(
        ATTENTION, "auto", "implementation of attention", auto="the fastest one that runs on this device"
    )
    attention_options: Given = options_of_choice(
        ATTENTION, chosen_by="attention_backend", title="attention backend", prefix="attention_"
    )
    disable_cuda_graph: bool = option(
        False,
        "on a GPU, launch each kernel of a step separately instead of replaying CUDA graphs",
        aliases=("enforce-eager",),
    )
    num_threads: int = option(
        0,
        "CPU threads of the engine; 0 divides the cores evenly among the workers running on this host",
        minimum=0,
    )
    random_seed: int = option(0, "seed of dummy weights", aliases=("seed",), minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """The sizes that GPU buffers and graphs are made for."""

    context_length: int | None = None  # limit of prompt plus answer; None: the model's own
    max_running_requests: int = 128
    max_batch_tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """The resolved settings of a runner, equal on all its ranks."""

    device: str  # "cpu" or "cuda"
    dtype: str  # "float32" or "bfloat16"
    base_gpu_id: int = 0
    tp: int = 1
    has_dummy_weights: bool = False
    random_seed: int = 0
    page_size: int = 16
    mem_fraction_static: float = 0.8
    max_total_tokens: int | None = None
    attention_backend: str = "torch"  # a name of attention.ATTENTION
    attention_options: Given = field(default_factory=dict)
    uses_graphs: bool = True  # on a GPU, if the attention backend can be captured
    num_threads: int = 0  # of one rank; 0: torch's default
    limits: RunnerLimits = field(default_factory=RunnerLimits)
