"""Finds the private dialect in prose and test names: sentences without a subject, and words that are not the field's.

    python scripts/plain_english.py [PATH ...]

The script reads the docstrings, comments, help texts, errors and log lines of src/kvist, bench and scripts; the names,
docstrings and comments of tests; and the prose of README.md, CONTRIBUTING.md, SECURITY.md and docs. Each hit is a line
"file:line: rule: excerpt"; the number of hits for each room follows. Hits fail the run (exit status 1) only in the
rooms of CLEAN: add a room once it has no hits.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

# fmt: off
CLEAN = {
    "CONTRIBUTING.md", "README.md", "SECURITY.md", "bench", "docs/adding.md", "docs/adr", "docs/api.md",
    "docs/architecture.md",
    "docs/bench.md", "docs/cache.md", "docs/chat-templates.md", "docs/clients.md", "docs/failure-modes.md",
    "docs/follow-one-request.md", "docs/glossary.md", "docs/handoff.md", "docs/language.md", "docs/metrics.md",
    "docs/operations.md", "docs/performance.md", "docs/routing.md", "docs/scaling.md", "docs/security.md",
    "docs/testing.md", "docs/tools.md", "scripts", "src/kvist/__init__.py", "src/kvist/__main__.py",
    "src/kvist/api", "src/kvist/attention", "src/kvist/bench", "src/kvist/bounded_log.py", "src/kvist/channel",
    "src/kvist/checkpoint.py", "src/kvist/cli.py", "src/kvist/clock.py", "src/kvist/cluster", "src/kvist/config.py",
    "src/kvist/cores.py", "src/kvist/counter.py", "src/kvist/door.py", "src/kvist/engine",
    "src/kvist/demo_program.py", "src/kvist/demo_schema.py", "src/kvist/errors.py", "src/kvist/event_loop.py",
    "src/kvist/execution",
    "src/kvist/fairness.py", "src/kvist/fingerprint.py", "src/kvist/fit.py", "src/kvist/flag_help.py",
    "src/kvist/flight",
    "src/kvist/flags.py", "src/kvist/foreign_flags.py", "src/kvist/http", "src/kvist/http_client.py",
    "src/kvist/kernels", "src/kvist/kv",
    "src/kvist/lang", "src/kvist/log.py",
    "src/kvist/memory", "src/kvist/metrics.py", "src/kvist/models", "src/kvist/options.py", "src/kvist/output.py",
    "src/kvist/own_files.py",
    "src/kvist/parent.py", "src/kvist/plan", "src/kvist/planning", "src/kvist/request.py", "src/kvist/router",
    "src/kvist/runner",
    "src/kvist/scheduler", "src/kvist/server", "src/kvist/service_time.py", "src/kvist/settings.py",
    "src/kvist/simulation", "src/kvist/store",
    "src/kvist/supervisor", "src/kvist/testing", "src/kvist/text", "src/kvist/tracing",
    "src/kvist/transfer", "src/kvist/wire.py",
    "tests/adding", "tests/api", "tests/attention", "tests/bench", "tests/broken_disk.py",
    "tests/channel", "tests/cli", "tests/cluster", "tests/conformance", "tests/conftest.py",
    "tests/e2e", "tests/engine", "tests/field", "tests/http", "tests/kernels", "tests/kv", "tests/lang", "tests/memory",
    "tests/execution", "tests/flight", "tests/tracing", "tests/models", "tests/planning",
    "tests/router", "tests/runner", "tests/scheduler", "tests/server", "tests/store", "tests/supervisor",
    "tests/test_audit.py",
    "tests/test_cores.py", "tests/test_docs.py", "tests/test_fairness.py", "tests/test_gpu_tests.py",

    "tests/test_sizes.py", "tests/test_testing_docs.py",
    "tests/test_log.py", "tests/test_output.py", "tests/test_plain_english.py", "tests/testing",
    "tests/text",
    "tests/transfer",
}
# fmt: on

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("src/kvist", "bench", "scripts", "tests", "README.md", "CONTRIBUTING.md", "SECURITY.md", "docs")
NOT_READ = {"docs/log.md", "docs/benchmarks.md", "scripts/plain_english.py"}  # logs of their day; the words themselves

_VERB = r"(?:is|are|was|were|has|have|had|do|does|did|can|cannot|could|may|must|need|needs|will|would|should|means?)\b"
_START = re.compile(
    r"(?:^\s*|[.!?;]\s+)[\"'(]?(?P<start>"
    r"(?<![.!?;] )(?:who|whose|those|nobody)\b|"  # a comment or help text may begin in lower case
    rf"(?:Who|Whose|Whoever|Whatever|Those|It|So|Nobody)\b|What\b(?!'s new)|(?:This|These) {_VERB}"
    rf"|One (?:{_VERB}|that\b|which\b|who\b))"
)
_TEST_START = re.compile(r"test (?:who|whose|whoever|what|whatever|nobody|it|those|so|one that)\b")
_PHRASES = re.compile(
    r"\b(?:nobody|told|tells?|telling|anew|to be had|so many|so long|wish\w*|whoever|whatever|mend(?:s|ed|ing)?"
    r"|affairs?|hears?|heard|of those|the former|as far as|in its stead|goes about|go about|asks? after|asked after"
    r"|have to go|has to go|to speak of|lies? about)\b"
    r"|(?<!there )(?<!There )\b(?:is|are|was|were) no (?!longer\b|other\b|more\b|less\b|later\b|matter\b)\w+",
    re.IGNORECASE,
)
MAX_TEST_NAME = 95
_CODE = re.compile(r"``[^`]*``|`[^`]*`|\]\([^)]*\)|https?://\S+")
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)

Text = tuple[int, str]  # line of its start; prose, with its newlines


def comments(source: str) -> Iterator[Text]:
    """Comments, with neighbouring lines joined."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        alone = token.line.strip() == token.string
        if block and (not alone or token.start[0] != last + 1):
            yield start, "\n".join(block)
            block = []
        if not block:
            start = token.start[0]
        block.append(token.string.lstrip("# "))
        last = token.start[0] if alone else 0
    if block:
        yield start, "\n".join(block)


def strings(source: str) -> Iterator[Text]:
    """Every string that holds at least three words, an f-string with X for its values."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        if len(re.findall(r"[A-Za-z]+", text)) >= 3 and isinstance(node, ast.expr):
            yield node.lineno, text


def texts_of_tests(source: str) -> Iterator[Text]:
    """Names, docstrings and comments; other strings are data."""
    yield from comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.body[0].lineno if node.body else 1, ast.get_docstring(node) or ""


def texts_of_markdown(source: str) -> Iterator[Text]:
    """Paragraphs, list items, table cells and headings, without code."""
    source = _FENCED.sub(lambda fenced: "\n" * fenced.group().count("\n"), source)
    line = 1
    for paragraph in re.split(r"(\n(?=\s*(?:[-*|#>]|\d+\.)\s)|\n\s*\n|(?<=\s)\|(?=\s))", source):
        yield line, re.sub(r"^\s*(?:[-*#>]+|\d+\.)\s+", "", paragraph).lstrip("| ")
        line += paragraph.count("\n")


def texts_of(path: Path, source: str) -> Iterator[Text]:
    if path.suffix == ".md":
        return texts_of_markdown(source)
    if path.suffix == ".cu":
        return ((number, line.partition("//")[2]) for number, line in enumerate(source.splitlines(), 1))
    return texts_of_tests(source) if path.parts[0] == "tests" else chain(comments(source), strings(source))


def hits_of(text: str) -> Iterator[tuple[int, str, str]]:
    """Offset of a line, rule and excerpt for each hit of one text."""
    if text.startswith("test "):
        name = text.replace(" ", "_")
        if _TEST_START.match(text):
            yield 0, "a test's name begins with the component", name
        if len(name) > MAX_TEST_NAME:
            yield 0, f"a test's name has at most {MAX_TEST_NAME} characters", name
    prose = _CODE.sub(lambda code: "X" + "\n" * code.group().count("\n"), text)
    flat = re.sub(r"\s", " ", prose)
    for found in _START.finditer(flat):
        start = found.start("start")
        sentence = re.split(r"(?<=[.!?])\s", flat[start:], maxsplit=1)[0]
        if not sentence.endswith("?"):
            yield prose.count("\n", 0, start), "a sentence begins with its subject", re.sub(" +", " ", sentence)[:80]
    for found in _PHRASES.finditer(flat):
        excerpt = flat[max(0, found.start() - 30) : found.end() + 30].strip()
        yield prose.count("\n", 0, found.start()), f'"{found.group()}"', excerpt


def room_of(path: Path) -> str:
    """The folder below src/kvist or tests; else the file, or the folder at the root."""
    depth = {"src": 3, "tests": 2, "docs": 2}.get(path.parts[0], 1)
    return "/".join(path.parts[:depth])


def files(places: list[Path]) -> Iterator[Path]:
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            relative = path.resolve().relative_to(ROOT)
            if path.suffix in (".py", ".md", ".cu") and str(relative) not in NOT_READ:
                yield relative


def main(arguments: list[str]) -> int:
    rooms: Counter[str] = Counter()
    for path in files([Path(one) for one in arguments] or [ROOT / place for place in PLACES]):
        for line, text in texts_of(path, (ROOT / path).read_text(encoding="utf-8")):
            for offset, rule, excerpt in hits_of(text):
                rooms[room_of(path)] += 1
                print(f"{path}:{line + offset}: {rule}: {excerpt}")
    for room, num_hits in sorted(rooms.items()):
        print(f"{num_hits:5}  {room}{' (was clean)' if room in CLEAN else ''}")
    print(f"{rooms.total():5}  places that are not plain English")
    return 1 if CLEAN & rooms.keys() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
