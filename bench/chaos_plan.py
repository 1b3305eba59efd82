"""Plans a chaos run, from the options of bench/chaos.py: the processes, and how long the load may last."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from chaos_cluster import ChaosFailure, with_gateways
from chaos_load import Comparison
from kvist.cluster.config import ClusterConfig
from kvist.cluster.plan import ClusterShape, plan_on_free_ports, visible_gpus
from kvist.supervisor.child import ChildPlan
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer

CHECKS_S = 60.0  # after the load, usually: faults end, workers start again, pages are released, processes stop
_DEFAULT_FLAGS = (
    ("--max-total-tokens", "4096"),
    ("--gateway-timeout-s", "5"),
    ("--stall-restart-s", "10"),
    ("--shutdown-timeout-s", "30"),
)


def check_gpus(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> None:
    """Raise `ChaosFailure` if the run cannot use the GPUs that it asks for."""
    if not args.gpus:
        return
    if args.model_path is None:
        raise ChaosFailure("--gpus needs --model-path: the tiny model is computed on the CPU")
    if Comparison(args.compare) is not Comparison.LENGTHS:
        raise ChaosFailure("--gpus needs --compare lengths: tokens depend on the shape of a batch there")
    if (num_visible := visible_gpus(environ)) < args.gpus:
        raise ChaosFailure(f"--gpus {args.gpus}, but {num_visible} are visible here: give --gpus {num_visible}")


def seconds_of_load(seconds: float, within_s: float | None, gone_s: float) -> float:
    """Return how long the load lasts in a run that began `gone_s` ago. Raises `ChaosFailure` if no time is left."""
    left_s = seconds if within_s is None else min(seconds, within_s - CHECKS_S - gone_s)
    if left_s <= 0:
        raise ChaosFailure(f"the start took {gone_s:.0f} s, and --within-s {within_s:g} leaves no time for the load")
    return left_s


def plans_of(args: argparse.Namespace, folder: Path) -> tuple[list[ChildPlan], ChildPlan | None]:
    """Return the plans of the cluster, and of the worker that computes the twins; None: the cluster computes them,
    before its first fault."""
    model = args.model_path
    flags = list(args.worker_flags)
    if model is None:
        (folder / "model").mkdir()
        vocab_size = write_byte_tokenizer(folder / "model")
        model = str(write_tiny_model(folder / "model", vocab_size=vocab_size, max_model_len=1024))
        flags += ["--load-format=dummy", "--device=cpu"]
    for name, value in _DEFAULT_FLAGS:
        if not any(flag.partition("=")[0] == name for flag in flags):
            flags.append(f"{name}={value}")
    common = (f"--model-path={model}",)
    tiers: tuple[str, ...] = ()
    if args.tiers:
        store = ("--hicache-storage-backend=file", f"--hicache-storage-path={folder / 'store'}")
        tiers = ("--enable-hierarchical-cache", *store, "--hicache-storage-size=1", "--hicache-ratio=1")
    shape = ClusterShape(
        config=ClusterConfig(prefill=args.prefill, decode=args.decode, unified=args.unified),
        router_port=0,
        worker_argv=(*common, *flags, *tiers, "--no-access-log"),
        router_argv=(*common, "--no-access-log", "--shutdown-timeout-s=30"),
        num_gpus=args.gpus,
        memory_share=0.8 if args.gpus else None,
    )
    plans = with_gateways(plan_on_free_ports(shape), count=args.gateways)
    if Comparison(args.compare) is Comparison.LENGTHS:
        return plans, None
    alone = ClusterShape(
        config=ClusterConfig(prefill=0, decode=0, unified=1), worker_argv=(*common, *flags, "--no-access-log")
    )
    (reference, _router) = plan_on_free_ports(alone)
    return plans, reference
