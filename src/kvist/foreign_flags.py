"""Flags that users of vLLM and SGLang type first and that Kvist has no option for, each with what to do instead.

A flag that means the same as one of ours is an alias of that option (`kvist.config.option`), and does not stand here.
"""

from __future__ import annotations

from collections.abc import Mapping

_ALWAYS_ON = "leave it out: Kvist always does this"
_NO_WEIGHTS = "Kvist serves float32 and bfloat16; use an unquantized checkpoint or a GGUF file"
_NO_TOOLS = "tool calls and reasoning are not parsed yet; the answer's text has them as the model wrote them"
_NO_LORA = "adapters are not supported yet: merge the adapter into its model and serve that folder"
_NO_SPECULATION = "speculative decoding is not supported yet; leave it out"
_NO_IMAGES = "only text is served; leave it out"
_ONE_WORKER = "one worker is one engine: start several behind a router with `kvist up --unified N`"
_ROLES = "say which part of a request this worker does with --role prefill or --role decode (docs/handoff.md)"

REMEDIES: Mapping[str, str] = {
    "--allowed-headers": "leave it out: pages of --allowed-origins may send every header",
    "--allowed-methods": "leave it out: pages of --allowed-origins may use every method",
    "--cpu-offload-gb": "weights stay on one device; for more KV cache use --enable-hierarchical-cache",
    "--data-parallel-size": _ONE_WORKER,
    "--disable-chunked-prefix-cache": "leave it out: prefixes are always shared, and /flush_cache empties the cache",
    "--disable-log-requests": "use --no-access-log",
    "--disable-radix-cache": "prefixes are always shared; give each request its own cache_salt to keep them apart",
    "--disaggregation-bootstrap-port": "leave it out: the router tells workers about each other",
    "--disaggregation-ib-device": "pages travel within one host for now; leave it out",
    "--disaggregation-transfer-backend": "leave it out: shared memory or CUDA IPC is chosen by the device",
    "--disable-uvicorn-access-log": "use --no-access-log",
    "--distributed-executor-backend": "leave it out: tensor-parallel ranks are processes of this host",
    "--download-dir": "nothing is downloaded: name a model folder or a GGUF file with --model-path",
    "--dp": _ONE_WORKER,
    "--dp-size": _ONE_WORKER,
    "--enable-auto-tool-choice": _NO_TOOLS,
    "--enable-chunked-prefill": _ALWAYS_ON,
    "--enable-lora": _NO_LORA,
    "--enable-metrics": "leave it out: /metrics is always there",
    "--enable-prefix-caching": _ALWAYS_ON,
    "--enable-tokenizer-info-endpoint": "leave it out: /tokenizer_info always answers",
    "--enable-torch-compile": "leave it out: steps run as CUDA graphs of hand-written kernels",
    "--kv-cache-dtype": "KV pages have the type of the weights (--dtype); leave it out",
    "--kv-transfer-config": _ROLES,
    "--limit-mm-per-prompt": _NO_IMAGES,
    "--lora-modules": _NO_LORA,
    "--lora-paths": _NO_LORA,
    "--max-lora-rank": _NO_LORA,
    "--nnodes": "a worker lives on one host; start workers on each host and one router over all of them",
    "--no-enable-prefix-caching": "prefixes are always shared; give each request its own cache_salt to keep them apart",
    "--num-gpu-blocks-override": "set the page pool in tokens with --max-total-tokens",
    "--override-generation-config": "write them into a generation_config.json and name its folder with "
    "--generation-config",
    "--pipeline-parallel-size": "layers are not split over workers; split them over GPUs with --tp N",
    "--quantization": _NO_WEIGHTS,
    "--reasoning-parser": _NO_TOOLS,
    "--revision": "nothing is downloaded: name the folder of that revision with --model-path",
    "--schedule-policy": "callers take turns, and a caller's requests are taken in the order of arrival; leave it out",
    "--skip-tokenizer-init": "send token ids instead of text: every endpoint takes them",
    "--speculative-algorithm": _NO_SPECULATION,
    "--speculative-config": _NO_SPECULATION,
    "--swap-space": "use --enable-hierarchical-cache with --hicache-size GB",
    "--task": "Kvist generates text only; leave it out",
    "--tokenizer": "the tokenizer comes with the model: put its files into the model folder",
    "--tokenizer-mode": "leave it out: there is one tokenizer implementation",
    "--tokenizer-path": "the tokenizer comes with the model: put its files into the model folder",
    "--tool-call-parser": _NO_TOOLS,
    "--trust-remote-code": "leave it out: Kvist never runs code from a model folder",
    "--uvicorn-log-level": "use --log-level",
    "--worker-use-ray": "leave it out: tensor-parallel ranks are processes of this host",
}
