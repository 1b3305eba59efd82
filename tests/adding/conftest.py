"""A copy of the repository in which docs/adding.md has been followed, and a cluster of processes that run the copy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.adding.walks import PAGE, copy_repository, read_walks

TINY_MODEL = {
    "architectures": ["ArceeForCausalLM"],
    "model_type": "arcee",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "relu2",
    "eos_token_id": 0,
}
CLUSTER_FLAGS = (
    "--routing-aggregate=never",
    "--policy=power_of_d",
    "--compared-workers=2",
    "--completion-tokens=5",
    "--disaggregation-transfer-backend=pwrite",
    "--attention-backend=sdpa",
    "--enable-hierarchical-cache",
    "--hicache-size=0.005",
    "--hicache-storage-backend=sqlite",
    "--hicache-storage-size=1",
    "--hicache-storage-prefetch-policy=wait_complete",
    "--hicache-storage-prefetch-threshold=16",
)


@dataclass(frozen=True)
class Followed:
    """The copy, after every walk."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root / "src")}

    def run(self, *arguments: str) -> str:
        """Run `python arguments` in the copy, and return its output."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    root = tmp_path_factory.mktemp("followed")
    copy_repository(root)
    for walk in read_walks(PAGE.read_text(encoding="utf-8")):
        for block in walk.blocks:
            block.apply(root)
    made = Followed(root)
    for script in ("scripts/api_fields.py", "scripts/door_table.py", "-mtests.cli.test_flag_names"):
        made.run(script)
    return made


@dataclass(frozen=True)
class Cluster:
    """A router, a prefill and a decode worker."""

    url: str

    def post(self, path: str, **body: object) -> Any:
        answer = httpx.post(self.url + path, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stores(self) -> list[dict[str, Any]]:
        """Return the status of each worker's store."""
        answer = httpx.get(f"{self.url}/hicache/storage-backend", timeout=60)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["workers"].values())


@pytest.fixture(scope="module")
def cluster(followed: Followed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = write_model(tmp_path_factory.mktemp("model"))
    database = f"--hicache-storage-database={tmp_path_factory.mktemp('store') / 'pages.sqlite'}"
    flags = (str(model), "--load-format=dummy", "--max-total-tokens=4096", *CLUSTER_FLAGS, database)
    arguments = ("-m", "kvist", "up", *flags, "--port=0", "--stop-with-stdin")
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=followed.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                lines.append(line)
                if ready := re.match(r"kvist +\| ready at (\S+)", line):
                    yield Cluster(ready[1])
                    break
            else:
                pytest.fail("the cluster did not start:\n" + "".join(lines))
        finally:
            process.stdin.close()
            process.stdout.read()


def write_model(folder: Path) -> Path:
    """Write a tiny model without weights, and a tokenizer with one token for each byte."""
    (folder / "config.json").write_text(json.dumps(TINY_MODEL))
    alphabet: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
