"""The `kvist` command. Its verbs start a worker, the router, the nodes of a page pool, a local cluster, the chat,
the demo and the benchmarks.

No heavy module is imported before a verb runs: `--help`, `--version` and errors in flags appear at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvist import __version__
from kvist.errors import ConfigError, KvistError

VERBS = {
    "serve": "start one worker: an engine and its HTTP server",
    "router": "start a gateway that routes requests to workers",
    "master": "start the master of a Mooncake pool, which knows where the pages of the storage tier are",
    "store": "start a store of a Mooncake pool, which keeps pages in memory and on an SSD",
    "store drain": "move the pages of a store to the other stores, so that it can be stopped",
    "role": "switch a running worker to another role",
    "drain": "let a router or worker refuse new requests, and stop after the open ones",
    "deploy render": "write the manifest of a cluster, for Kubernetes or Compose",
    "deploy check": "check a manifest: its schema, its options, and what would hurt in production",
    "deploy run": "run the pods of a manifest as local processes, and upgrade them when the images in the file change",
    "up": "start a router, prefill workers and decode workers on this machine",
    "upgrade": "replace the processes of a running kvist up by those of another version, one by one, without a break",
    "doctor": "check this machine: GPU, libraries, memory, limits, ports, store, model; with the remedy of each fault",
    "top": "show what a router or worker does now: workers, queues, pages, hit rates, latencies, slowest requests",
    "chat": "chat at the terminal with a running server, or with one that is started for the chat",
    "demo": "start a small cluster, run a short chat, show its handoffs and cache hits, and stop the cluster",
    "lang explain": "show the plan of a program of kvist.lang before it runs",
    "bench single": "measure a server: one stream at a time",
    "bench offline": "measure a server: all requests at once",
    "bench rate": "measure a server: requests that arrive at random times",
    "bench mixed": "measure a server: chats with long prompts among them",
    "bench multiturn": "measure a server: conversations of several turns",
    "bench custom": "measure a server: the scenarios of a JSON file",
    "bench engine": "time the steps of an engine in this process, without HTTP",
}
BENCH = "bench"  # its verbs are two words

USAGE_ERROR = 2  # exit status, as of argparse and most commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 for a failure while running, 2 for a mistake in the settings."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version", "version"):
        print(f"kvist {__version__}")
        return 0
    verb, rest = _split(words)
    try:
        return _complete(rest) if verb == "completion" else _run(verb, rest)
    except ConfigError as error:
        print(f"kvist {verb}: {error.message}", file=sys.stderr)
        return USAGE_ERROR
    except KvistError as error:
        print(f"kvist {verb}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `kvist serve --help | head`; the flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split(words: list[str]) -> tuple[str, list[str]]:
    """Return the verb and its arguments."""
    verb, *rest = words
    if f"{verb} {' '.join(rest[:1])}" in VERBS or (verb == BENCH and rest and not rest[0].startswith("-")):
        return f"{verb} {rest[0]}", rest[1:]
    return verb, rest


def _complete(words: list[str]) -> int:
    """Print the script that completes this command in a shell."""
    from kvist.completion import USAGE, completion

    asked = {"-h", "--help", "--help-all"}.intersection(words)
    _show(USAGE if asked else completion(words[0] if len(words) == 1 else None, VERBS))
    return 0


def _overview() -> str:
    width = max(len(verb) for verb in VERBS)
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: kvist COMMAND [options]\n\n"
        "Serves large language models with separate prefill and decode workers and a shared prefix cache.\n\n"
        f"{verbs}\n\n"
        "kvist COMMAND --help shows the common options, --help-all shows all options; kvist --version prints the\n"
        "version; kvist completion SHELL prints a script that completes commands and options in bash, zsh or fish."
    )


def _run(verb: str, argv: list[str]) -> int:
    if verb == BENCH:
        named = ", ".join(name.removeprefix(f"{BENCH} ") for name in VERBS if name.startswith(f"{BENCH} "))
        if "-h" in argv or "--help" in argv:
            _show(_overview())
            return 0
        raise ConfigError(f"the scenario is missing: use kvist bench SCENARIO, where SCENARIO is one of {named}")
    if verb not in VERBS:
        from kvist.flags import nearest

        known = [each for each in VERBS if each.startswith(f"{verb} ")] or list(VERBS)
        raise ConfigError(f"unknown command{nearest(verb, known) or '.'} Known: {', '.join(known)}")
    from kvist import settings, verbs

    if asked := {"-h", "--help", "--help-all"}.intersection(argv):
        bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        _show(settings.help_for(verb, VERBS[verb], everything="--help-all" in asked, bold=bold))
        return 0
    read = settings.read(verb, argv, os.environ)
    from kvist.log import setup_logging

    setup_logging(read.log)
    return verbs.run(read)
