"""The plan of bench_scaling.py: which clusters are started, which loads each one gets, in which order. Pure.

A cell is one load on one fleet, named FLEET/LOAD. Cells of one fleet follow one another, so that it starts once. The
order is by priority: with a short budget the first cells are measured, and the others are left for --resume.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BYTES_PER_WEIGHT = 2  # bfloat16
MAX_WEIGHT_SHARE = 0.75  # of a GPU's memory; the rest is for KV pages and activations
START_S = {"7b": 36.0, "72b": 90.0}
WARM_UP_S = 7.0
S_PER_HOST_GB = 0.4  # a virtual machine gets its memory at the first touch
SHAPES: dict[str, dict[str, object]] = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "layers": 28, "heads": 28, "kv_heads": 4},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "layers": 80, "heads": 64, "kv_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 8, "kv_heads": 2},
    "tiny72b": {"hidden_size": 64, "intermediate_size": 128, "layers": 4, "heads": 8, "kv_heads": 4},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths in tokens, and numbers of requests, of all loads. The rates are for one GPU."""

    chat: tuple[int, int]  # prompt, answer
    long: tuple[int, int]
    stream: tuple[int, int]
    book: tuple[int, int]
    offline: str
    turn: tuple[int, int]
    seconds: float  # of a load with arrivals
    search_s: float  # of one step of a search
    start_rate: float  # requests a second for one GPU: the first step of a search
    search_steps: int  # at most
    goodput: str  # limits of a good request
    num_offline: int  # requests for one GPU
    num_clients: int  # conversations for one GPU
    num_rounds: int
    device_tokens: int  # limit of the device pool where the host tier is measured
    host_gb: float  # host tier of one worker


FULL = Sizes(
    chat=(512, 256),
    long=(8192, 128),
    stream=(2048, 128),
    book=(16_000, 500),
    offline="100-1024",
    turn=(2048, 64),
    seconds=25.0,
    search_s=12.0,
    start_rate=3.0,
    search_steps=6,
    goodput="chat.ttft:500 itl:25",
    num_offline=256,
    num_clients=80,
    num_rounds=4,
    device_tokens=150_000,
    host_gb=42.0,
)
TINY = Sizes(
    chat=(24, 8),
    long=(120, 4),
    stream=(40, 8),
    book=(200, 10),
    offline="8-24",
    turn=(32, 4),
    seconds=1.5,
    search_s=1.0,
    start_rate=1.0,
    search_steps=2,
    goodput="chat.ttft:20000 itl:20000",  # a busy machine does not change which cells run
    num_offline=4,
    num_clients=2,
    num_rounds=2,
    device_tokens=2_048,
    host_gb=0.01,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    name: str
    prefill: int = 0
    decode: int = 0
    unified: int = 0
    tp: int = 1
    model: str = "7b"
    policy: str | None = None  # None: the policy of the command line
    aggregate: str = "never"
    with_host_tier: bool = False
    places: int = 1  # GPUs that it is made for

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.unified

    def start_s(self, sizes: Sizes) -> float:
        """Return about how long a start takes, the warm-up included, in seconds; with compiled kernels less."""
        host_gb = sizes.host_gb * self.num_workers if self.with_host_tier else 0.0
        return START_S[self.model] + WARM_UP_S + host_gb * S_PER_HOST_GB

    def flags(self, sizes: Sizes, policy: str) -> list[str]:
        """Return the options of `kvist up`."""
        found = [f"--prefill={self.prefill}", f"--decode={self.decode}", f"--unified={self.unified}", f"--tp={self.tp}"]
        found += [f"--policy={self.policy or policy}", f"--routing-aggregate={self.aggregate}"]
        if self.with_host_tier:
            found += ["--enable-hierarchical-cache", f"--hicache-size={sizes.host_gb}"]
            found += [f"--max-total-tokens={sizes.device_tokens}"]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    name: str
    kind: str  # scenario of kvist bench; "search" and "climb" are several runs of mixed; "handoff", "all_reduce"
    share: float | None = None  # of the best goodput
    rate: float | None = None  # requests a second, given
    stretch: float = 1.0  # factor of the time in which requests arrive

    @property
    def needs_reference(self) -> bool:
        """Whether the rate depends on the best goodput."""
        return self.share is not None or self.kind == "climb"

    def estimate_s(self, sizes: Sizes) -> float:
        """Return about how long the load takes, the start of its client included."""
        client_s = 4.0
        seconds = {
            "search": 4 * (sizes.search_s + client_s),
            "climb": 2 * (sizes.search_s + client_s),
            "single": 6.0,
            "offline": 16.0,
            "multiturn": 20.0,
            "handoff": 30.0,
            "all_reduce": 40.0,
        }
        return client_s + seconds.get(self.kind, self.stretch * sizes.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    fleet: Fleet | None  # None: measures the links between the GPUs, without a server
    load: Load

    @property
    def name(self) -> str:
        return f"{'links' if self.fleet is None else self.fleet.name}/{self.load.name}"


SEARCH, CLIMB = Load(name="search", kind="search"), Load(name="climb", kind="climb")
SHARES = tuple(Load(name=f"mixed@{percent}%", kind="mixed", share=percent / 100) for percent in (40, 80, 100))
SINGLE, OFFLINE = Load(name="single", kind="single"), Load(name="offline", kind="offline")
MULTITURN = Load(name="multiturn", kind="multiturn")
LINKS = (Load(name="handoff", kind="handoff"), Load(name="all_reduce", kind="all_reduce"))
PAIR = (
    Load(name="mixed-12", kind="mixed", rate=12.0),
    Load(name="mixed-6", kind="mixed", rate=6.0, stretch=1.2),
    Load(name="rate-8", kind="rate", rate=8.0, stretch=0.6),
    Load(name="single", kind="single"),
    Load(name="16000+500", kind="book", rate=2.0, stretch=0.8),
)
WARM_UP = Load(name="warm-up", kind="mixed", rate=4.0, stretch=0.12)  # not measured: kernels are compiled


def splits(num_places: int) -> list[tuple[int, int]]:
    """Return (prefill, decode): of 2 places 1:1, of 4 1:3, 2:2 and 3:1, of 8 2:6, 4:4 and 6:2; the even one first."""
    quarter = num_places // 4
    if not quarter:
        return [(1, 1)]
    return [
        (2 * quarter, num_places - 2 * quarter),
        (quarter, num_places - quarter),
        (3 * quarter, num_places - 3 * quarter),
    ]


def split_fleet(prefill: int, decode: int) -> Fleet:
    return Fleet(name=f"split-{prefill}:{decode}", prefill=prefill, decode=decode, places=prefill + decode)


def auto_fleet(prefill: int, decode: int, *, suffix: str = "", with_host_tier: bool = False) -> Fleet:
    return Fleet(
        name=f"auto-{prefill}:{decode}{suffix}",
        prefill=prefill,
        decode=decode,
        policy="cost",
        aggregate="auto",
        with_host_tier=with_host_tier,
        places=prefill + decode,
    )


def unified_fleet(count: int, *, suffix: str = "", with_host_tier: bool = False, policy: str | None = None) -> Fleet:
    return Fleet(
        name=f"unified-x{count}{suffix}", unified=count, places=count, policy=policy, with_host_tier=with_host_tier
    )


def tensor_parallel_fleet(tp: int, num_places: int, model: str) -> Fleet:
    count = num_places // tp
    return Fleet(name=f"tp{tp}-x{count}-{model}", unified=count, tp=tp, model=model, places=num_places)


def cells_of(fleet: Fleet, loads: Sequence[Load]) -> list[Cell]:
    return [Cell(fleet=fleet, load=load) for load in loads]


def all_cells(num_places: int) -> list[Cell]:
    """Return the cells of issue 18 for this number of GPUs, by priority."""
    even, *others = splits(num_places)
    auto, unified = auto_fleet(*even), unified_fleet(num_places)
    found = cells_of(auto, (SEARCH, *SHARES, OFFLINE))
    found += cells_of(unified, (*reversed(SHARES), OFFLINE, SINGLE, CLIMB))
    found += [Cell(fleet=None, load=load) for load in LINKS]
    if num_places > 1:
        found += cells_of(unified_fleet(1), (SHARES[-1], OFFLINE, SINGLE, CLIMB))
    for split in (even, *others):
        found += cells_of(split_fleet(*split), (*reversed(SHARES), CLIMB, OFFLINE))
    for with_tier in (unified_fleet(num_places, suffix="+host", with_host_tier=True),
                      auto_fleet(*even, suffix="+host", with_host_tier=True)):  # fmt: skip
        found += cells_of(with_tier, (MULTITURN,))
    for tp in (2, 4, 8):
        if tp <= num_places:
            found += cells_of(tensor_parallel_fleet(tp, num_places, "7b"), (SINGLE, *reversed(SHARES), OFFLINE))
    for tp in (8, 4, 2, 1):
        if tp <= num_places:
            found += cells_of(tensor_parallel_fleet(tp, num_places, "72b"), (SEARCH, SINGLE, *SHARES, OFFLINE))
    return found + cells_of(unified_fleet(num_places, suffix="+cost", policy="cost"), (*reversed(SHARES), CLIMB))


def pair_cells() -> list[Cell]:
    """Return the columns of two GPUs: prefill and decode apart, two unified workers, and aggregate or split by cost."""
    return [cell for fleet in (split_fleet(1, 1), unified_fleet(2), auto_fleet(1, 1)) for cell in cells_of(fleet, PAIR)]


def choose(patterns: Sequence[str], num_places: int) -> list[Cell]:
    """Return the cells named by `patterns` (`all`, `pair`, a fleet, or a pattern such as `tp*/single`), each once.

    Raises `ValueError` for a pattern that names no cell."""
    known = {cell.name: cell for cell in (*all_cells(num_places), *pair_cells())}
    found: dict[str, Cell] = {}
    for pattern in patterns:
        if pattern in ("all", "pair"):
            chosen = all_cells(num_places) if pattern == "all" else pair_cells()
        else:
            whole = pattern if "/" in pattern else f"{pattern}/*"
            chosen = [cell for name, cell in known.items() if fnmatch.fnmatchcase(name, whole)]
        if not chosen:
            raise ValueError(f"--cells {pattern!r} names no cell; there are {', '.join(known)}")
        found |= {cell.name: cell for cell in chosen}
    return list(found.values())


# ---------------------------------------------------------------- models


def weight_bytes(config: dict[str, object]) -> int:
    """Return the bytes of a Qwen2 or Llama model's weights in bfloat16, from its config.json."""
    number = {key: int(value) for key, value in config.items() if isinstance(value, int)}
    hidden, heads = number["hidden_size"], number["num_attention_heads"]
    kv_width = hidden // heads * number["num_key_value_heads"]
    layer = 2 * hidden * (hidden + kv_width) + 3 * hidden * number["intermediate_size"]
    embeddings = (1 if config.get("tie_word_embeddings") else 2) * number["vocab_size"] * hidden
    return BYTES_PER_WEIGHT * (number["num_hidden_layers"] * layer + embeddings)


def obstacle(fleet: Fleet, config: dict[str, object], *, num_places: int, place_bytes: int | None) -> str | None:
    """Return why the fleet cannot run here, or None. `place_bytes` is the memory of one GPU, None on a CPU."""
    if fleet.num_workers == 0:
        return f"--tp {fleet.tp} needs {fleet.tp} GPUs, {num_places} are there"
    if place_bytes is None:
        return None
    shared_by = max(1, -(-fleet.num_workers * fleet.tp // num_places))
    needed, room = weight_bytes(config) // fleet.tp * shared_by, int(MAX_WEIGHT_SHARE * place_bytes)
    if needed <= room:
        return None
    return f"weights of {needed / 1e9:.0f} GB a GPU; {room / 1e9:.0f} of {place_bytes / 1e9:.0f} GB are for weights"


def write_shape(folder: Path, shape: str, tokenizer_of: Path | None = None) -> Path:
    """Write a Qwen2 model without weights into `folder`, which is created, and return it.

    The tokenizer is that of `tokenizer_of`, or one with a token for each byte."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, is_tiny = SHAPES[shape], shape.startswith("tiny")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "vocab_size": 256 if is_tiny else 152_064,
        "max_position_embeddings": 2_048 if is_tiny else 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if tokenizer_of is None:
        _write_byte_tokenizer(folder)
    else:
        for file in tokenizer_of.glob("*token*"):
            shutil.copy(file, folder)
        for name in ("vocab.json", "merges.txt"):
            if (tokenizer_of / name).exists():
                shutil.copy(tokenizer_of / name, folder)
    return folder


def _write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------- command lines


def bench_argv(load: Load, sizes: Sizes, *, places: int, rate: float | None, seconds: float) -> list[str]:
    """Return the scenario and options of `kvist bench`. `rate` is in requests a second, of loads with arrivals."""
    if load.kind in ("mixed", "search", "climb"):
        return [
            *("mixed", f"--rate={rate}", f"--seconds={seconds}", "--handoff-parts", f"--goodput={sizes.goodput}"),
            *(f"--input-tokens={sizes.chat[0]}", f"--output-tokens={sizes.chat[1]}"),
            *(f"--long-input-tokens={sizes.long[0]}", f"--long-output-tokens={sizes.long[1]}"),
        ]
    if load.kind in ("rate", "book"):
        lengths = sizes.stream if load.kind == "rate" else sizes.book
        return [
            *("mixed", f"--rate={rate}", f"--seconds={seconds}", "--handoff-parts", f"--goodput={sizes.goodput}"),
            "--long-every=0",
            *(f"--input-tokens={lengths[0]}", f"--output-tokens={lengths[1]}"),
        ]
    if load.kind == "single":
        lengths = sizes.stream
        return [
            *("single", "--requests=6", "--warmup=2", "--handoff-parts"),
            *(f"--input-tokens={lengths[0]}", f"--output-tokens={lengths[1]}"),
        ]
    if load.kind == "offline":
        count = sizes.num_offline * places
        lengths_flags = (f"--input-tokens={sizes.offline}", f"--output-tokens={sizes.offline}")
        return ["offline", f"--requests={count}", *lengths_flags, "--warmup=8"]
    assert load.kind == "multiturn"
    return [
        *("multiturn", f"--clients={sizes.num_clients * places}", f"--rounds={sizes.num_rounds}"),
        *(f"--parallel={max(1, sizes.num_clients * places // 5)}", f"--input-tokens={sizes.turn[0]}"),
        f"--output-tokens={sizes.turn[1]}",
    ]
