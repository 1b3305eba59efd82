"""The commands of two terminals, one for prefill and one for decode, and of a third for the router, answer a curl, and
pages come back from the pool when no other tier has them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.cluster.ports import free_ports
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer
from kvist.testing.waits import wait_until
from tests.nodes.conftest import Pool, Server

START_TIMEOUT_S = 200.0
PAGE_SIZE = 16
EIGHT_TOKENS = {"max_tokens": 8, "ignore_eos": True}
QUESTION = "What is the capital of France? " * 40 + "Answer in one word."


def write_model(folder: Path) -> Path:
    """Write a tiny model whose chats are their texts."""
    folder.mkdir()
    write_tiny_model(folder, vocab_size=write_byte_tokenizer(folder), max_model_len=4096)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_two_workers_with_the_pool_and_a_router_answer_a_curl(pool: Pool, tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    prefill_port, decode_port, router_port = free_ports(3)

    def worker(name: str, port: int, *role: str) -> Server:
        argv = [
            "serve",
            "--model-path",
            model,
            "--load-format",
            "dummy",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--tp",
            "1",
        ]
        argv += ["--mem-fraction-static", "0.8", "--enable-hierarchical-cache", "--hicache-storage-backend", "mooncake"]
        argv += ["--hicache-mooncake-master-addr", pool.master_addr, *role]
        argv += ["--hicache-mooncake-master-url", pool.master.url, "--hicache-size", "0.2"]  # of this test
        argv += ["--max-total-tokens", "4096", "--num-threads", "1"]
        return Server(tmp_path / f"{name}.log", port, argv)

    prefill = worker("prefill", prefill_port, "--role", "prefill")
    decode = worker("decode", decode_port, "--decode-only")
    argv = ["router", "--model-path", model, "--port", str(router_port)]
    router = Server(tmp_path / "router.log", router_port, [*argv, "--prefill", prefill.url, "--decode", decode.url])
    servers = [prefill, decode, router]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(START_TIMEOUT_S)
        num_keys_before = pool.admin.pool_status().num_keys
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **EIGHT_TOKENS})
        curl = ["curl", "-s", f"{router.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]

        def answer() -> dict[str, Any]:
            return dict(json.loads(subprocess.run(curl, capture_output=True, check=True, timeout=120).stdout))

        first = answer()
        assert first["usage"]["completion_tokens"] == 8
        num_pages = first["usage"]["prompt_tokens"] // PAGE_SIZE
        wait_until(lambda: pool.admin.pool_status().num_keys >= num_keys_before + num_pages, prefill.log)
        httpx.post(f"{router.url}/flush_cache", timeout=60, trust_env=False).raise_for_status()
        again = answer()
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == num_pages * PAGE_SIZE
        state = router.get("/hicache/storage-backend").json()["workers"]
        assert {one["hicache_storage_backend"] for one in state.values()} == {"mooncake"}
        wait_until(lambda: "kvist:storage_pool_keys{" in router.get("/metrics").text, router.log)
    finally:
        for server in reversed(servers):
            server.kill()
