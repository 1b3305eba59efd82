"""Common flags of vLLM and SGLang that Kvist does not have, each with what to do instead.

A flag with the same meaning as one of Kvist's is an alias of that option (`kvist.config.option`) and not listed here.
"""

from __future__ import annotations

from collections.abc import Mapping

_ALWAYS_ON = "leave it out: Kvist always does this"
_NO_WEIGHTS = "Kvist serves float32 and bfloat16; use an unquantized checkpoint or a GGUF file"
_NO_LORA = "adapters are not supported yet: merge the adapter into the model and serve the merged model"
_NO_SPECULATION = "speculative decoding is not supported yet; leave it out"
_NO_IMAGES = "only text models are supported; leave it out"
_ONE_WORKER = "a worker has one engine: start several workers behind a router with `kvist up --unified N`"
_PRIORITIES = "use --scheduling-policy priority: a lower `priority` is then served first"
_ROLES = "set the role of this worker with --role prefill or --role decode (docs/handoff.md)"

REMEDIES: Mapping[str, str] = {
    "--allowed-headers": "leave it out: pages of --allowed-origins may send every header",
    "--allowed-methods": "leave it out: pages of --allowed-origins may use every method",
    "--collect-detailed-traces": "leave it out: every request is traced with all its stages (GET /requests)",
    "--cpu-offload-gb": "weights are not offloaded; for a larger KV cache use --enable-hierarchical-cache",
    "--data-parallel-size": _ONE_WORKER,
    "--disable-chunked-prefix-cache": "leave it out: prefixes are always shared, and /flush_cache empties the cache",
    "--disable-log-requests": "use --no-access-log",
    "--disable-radix-cache": "prefixes are always shared; give each request its own cache_salt to keep them apart",
    "--disaggregation-bootstrap-port": "leave it out: the router gives each worker the address of its peer",
    "--disaggregation-ib-device": "pages are transferred within one host only; leave it out",
    "--disable-uvicorn-access-log": "use --no-access-log",
    "--distributed-executor-backend": "leave it out: tensor-parallel ranks are processes of this host",
    "--download-dir": "set the environment variable HF_HOME: models of the Hugging Face Hub are kept there",
    "--dp": _ONE_WORKER,
    "--dp-size": _ONE_WORKER,
    "--enable-chunked-prefill": _ALWAYS_ON,
    "--enable-lora": _NO_LORA,
    "--enable-metrics": "leave it out: /metrics is always served",
    "--enable-prefix-caching": _ALWAYS_ON,
    "--enable-trace": "set --otlp-traces-endpoint: every request is then exported as spans",
    "--enable-tokenizer-info-endpoint": "leave it out: /tokenizer_info is always served",
    "--enable-torch-compile": "leave it out: steps run as CUDA graphs of hand-written kernels",
    "--kv-cache-dtype": "KV pages have the type of the weights (--dtype); leave it out",
    "--kv-transfer-config": _ROLES,
    "--limit-mm-per-prompt": _NO_IMAGES,
    "--lora-modules": _NO_LORA,
    "--lora-paths": _NO_LORA,
    "--max-lora-rank": _NO_LORA,
    "--nnodes": "a worker runs on one host; start workers on each host, and one router for all",
    "--no-enable-prefix-caching": "prefixes are always shared; give each request its own cache_salt to keep them apart",
    "--num-gpu-blocks-override": "set the page pool in tokens with --max-total-tokens",
    "--override-generation-config": "write the values to a generation_config.json and give its folder with "
    "--generation-config",
    "--pipeline-parallel-size": "layers are not split into stages; split them over GPUs with --tp N",
    "--quantization": _NO_WEIGHTS,
    "--enable-priority-scheduling": _PRIORITIES,
    "--priority-scheduling-preemption-threshold": "any lower value takes the place of a higher one; leave it out",
    "--schedule-low-priority-values-first": _PRIORITIES,
    "--schedule-policy": "callers are served in turn, and requests of one caller in order of arrival, or by "
    "`priority` with --scheduling-policy priority",
    "--skip-tokenizer-init": "send token ids instead of text: every endpoint accepts them",
    "--speculative-algorithm": _NO_SPECULATION,
    "--speculative-config": _NO_SPECULATION,
    "--swap-space": "use --enable-hierarchical-cache with --hicache-size GB",
    "--task": "Kvist generates text only; leave it out",
    "--tokenizer": "the tokenizer belongs to the model: put its files into the model folder",
    "--tokenizer-mode": "leave it out: there is one tokenizer implementation",
    "--tokenizer-path": "the tokenizer belongs to the model: put its files into the model folder",
    "--trust-remote-code": "leave it out: Kvist never runs code from a model folder",
    "--uvicorn-log-level": "use --log-level",
    "--worker-use-ray": "leave it out: tensor-parallel ranks are processes of this host",
}
