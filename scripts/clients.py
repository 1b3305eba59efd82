"""Runs client libraries against a gateway, each in an environment of its own, and records their requests.

    python scripts/clients.py --environments FOLDER [NAME ...]

For each client of tests/clients/programs: installs its package into FOLDER/NAME (needs the network, once), runs the
program against a gateway without engines (tests/clients/agent_server.py), and writes its requests to
tests/clients/recorded/NAME.json, which `make test` replays. Fails if the program fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "clients"
HEADERS = ("content-type", "x-api-key", "anthropic-version", "anthropic-beta")  # that the server reads or may read
IDS = re.compile(r"\b(?:resp|msg|fc|rs|call|chatcmpl)[_-][0-9a-f]{24,32}\b")
INSTALL_TIMEOUT_S, RUN_TIMEOUT_S = 1200, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    package: str  # its version is recorded
    program: str
    install: str = ""  # the requirement, if it is not the package alone


CLIENTS = {
    "openai": Client(package="openai", program="openai_python.py"),
    "anthropic": Client(package="anthropic", program="anthropic_python.py"),
    "openai-node": Client(package="openai", program="openai_node.mjs"),
    "openai-agents": Client(package="openai-agents", program="openai_agents.py"),
    "langchain-openai": Client(package="langchain-openai", program="langchain_openai.py"),
    "instructor": Client(package="instructor", program="instructor_client.py"),
    "pydantic-ai": Client(
        package="pydantic-ai-slim", program="pydantic_ai_agent.py", install="pydantic-ai-slim[openai]"
    ),
    "litellm": Client(package="litellm", program="litellm_client.py"),
    "llama-index": Client(package="llama-index-llms-openai-like", program="llama_index_llm.py"),
    "lm-eval": Client(package="lm-eval", program="lm_eval_task.py", install="lm-eval[api]"),
}


class Recorder:
    """An ASGI application that passes requests on, and keeps each with the ids in its response."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.exchanges: list[dict[str, object]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, sent = b"", b""
        ignored = ""
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}

        async def keep_body() -> Any:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def keep_sent(message: Any) -> None:
            nonlocal sent, ignored
            sent += message.get("body", b"")
            for name, value in message.get("headers", ()):
                ignored = value.decode() if name == b"x-kvist-ignored" else ignored
            await send(message)

        await self._inner(scope, keep_body, keep_sent)
        query = scope["query_string"].decode()
        self.exchanges.append(
            {
                "method": scope["method"],
                "path": scope["path"] + (f"?{query}" if query else ""),
                "headers": {name: headers[name] for name in HEADERS if name in headers},
                "body": body.decode(),
                "ignored": ignored,
                "ids": list(dict.fromkeys(IDS.findall(sent.decode()))),
            }
        )


@contextmanager
def recording() -> Iterator[tuple[str, Recorder]]:
    """Serve a gateway on a free port; yield its URL and the recorder."""
    sys.path.insert(0, str(ROOT))
    from tests.clients.agent_server import agent_bench

    recorder = Recorder(agent_bench().app)
    server = uvicorn.Server(uvicorn.Config(recorder, port=0, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", recorder
    finally:
        server.should_exit = True
        thread.join()


def run(name: str, client: Client, environments: Path) -> dict[str, object]:
    """Run one client, and return its record."""
    place = environments / name
    command = install_node(client, place) if client.program.endswith(".mjs") else install_python(client, place)
    with recording() as (url, recorder):
        environment = {**os.environ, "KVIST_URL": url, "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
        environment.pop("PYTHONPATH", None)
        subprocess.run(command, check=True, cwd=place, env=environment, timeout=RUN_TIMEOUT_S)
    return {"client": f"{name} {version_of(client, place)}", "exchanges": recorder.exchanges}


def install_python(client: Client, place: Path) -> list[str]:
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", client.install or client.package]
        subprocess.run(install, check=True, timeout=INSTALL_TIMEOUT_S)
    # -P: the folder of the program, whose files have names of libraries, is not searched for modules
    return [str(python), "-P", str(FOLDER / "programs" / client.program)]


def install_node(client: Client, place: Path) -> list[str]:
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "node_modules").exists():
        subprocess.run(["npm", "install", "--silent", client.package], check=True, cwd=place, timeout=INSTALL_TIMEOUT_S)
    program = place / client.program  # node looks for packages beside the program
    program.write_bytes((FOLDER / "programs" / client.program).read_bytes())
    return ["node", str(program)]


def version_of(client: Client, place: Path) -> str:
    if client.program.endswith(".mjs"):
        package = json.loads((place / "node_modules" / client.package / "package.json").read_text())
        return str(package["version"])
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    shown = subprocess.run([str(place / "bin" / "python"), "-c", code], check=True, capture_output=True, text=True)
    return shown.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="run client libraries, and record their requests")
    parser.add_argument("--environments", type=Path, required=True, help="folder for the environments of the clients")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"clients; by default all: {', '.join(CLIENTS)}")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(CLIENTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CLIENTS)}")
    failed = []
    for name in arguments.names or CLIENTS:
        try:
            record = run(name, CLIENTS[name], arguments.environments.resolve())
        except (subprocess.SubprocessError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        path = FOLDER / "recorded" / f"{name}.json"
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{record['client']}: {len(record['exchanges'])} requests")  # type: ignore[arg-type]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
