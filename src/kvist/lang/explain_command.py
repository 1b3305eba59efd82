"""`kvist lang explain FILE:FUNCTION`: shows the plan of a program before it runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.config import option
from kvist.errors import ConfigError
from kvist.lang.endpoint import RuntimeEndpoint
from kvist.lang.function import Function
from kvist.planning.fleet import Fleet, Native, Role, Worker

_MODULE = "kvist_explained_program"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    program: str | None = option(None, "the program, as FILE:FUNCTION", unset="none: it has to be given")
    arguments: str = option(
        "{}", "the function's arguments: a JSON object, or a list of objects, which is planned as a batch"
    )
    url: str | None = option(
        None,
        "URL of the server to plan for; by default the plan is for one prefill and one decode worker with rates that "
        "are not measured",
        unset="none",
    )
    api_key: str | None = option(None, "API key of that server", secret=True)
    html: Path | None = option(None, "also write a page with a timeline to this file", unset="none")


def run_explain(options: ExplainOptions) -> int:
    """Print the plan; return 0. Raises `ConfigError` for a wrong FILE:FUNCTION or wrong arguments, `KvistError`, and
    what the program raises while it is traced."""
    function = load_function(options.program)
    arguments = _arguments(options.arguments)
    for each in arguments if isinstance(arguments, list) else [arguments]:
        try:
            function.checked((), each)
        except ValueError as error:
            raise ConfigError(f"--arguments: {error}", param="arguments") from error
    endpoint = None if options.url is None else RuntimeEndpoint(options.url, options.api_key)
    fleet = _pair() if endpoint is None else None
    try:
        if isinstance(arguments, list):
            explanation = function.explain(batch=arguments, backend=endpoint, fleet=fleet)
        else:
            explanation = function.explain(backend=endpoint, fleet=fleet, **arguments)
    finally:
        if endpoint is not None:
            endpoint.close()
    print(explanation, flush=True)
    if options.html is not None:
        try:
            options.html.write_text(explanation.html(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html {options.html} cannot be written: {error.strerror}", param="html") from error
    return 0


def load_function(program: str | None) -> Function:
    """Return the program that FILE:FUNCTION names. Its file is run. Raises `ConfigError`."""
    file, _, name = (program or "").rpartition(":")
    if not file or not name:
        raise ConfigError("name a program, as in kvist lang explain essay.py:review", param="program")
    path = Path(file).resolve()
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file", param="program")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # for dataclasses and other code that looks its module up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file} cannot be imported: {type(error).__name__}: {error}", param="program") from error
    finally:
        sys.path.remove(str(path.parent))
    found = getattr(module, name, None)
    if isinstance(found, Function):
        return found
    programs = [each for each, value in vars(module).items() if isinstance(value, Function)]
    raise ConfigError(
        f"{file} has no program {name!r} (a function with @kv.function); it has {', '.join(programs) or 'none'}",
        param="program",
    )


def _arguments(text: str) -> dict[str, Any] | list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--arguments is not JSON: {error}", param="arguments") from error
    if isinstance(found, dict) or (isinstance(found, list) and found and all(isinstance(one, dict) for one in found)):
        return found
    raise ConfigError("--arguments must be a JSON object, or a list of objects", param="arguments")


def _pair() -> Fleet:
    workers = (Worker(name="prefill-0", role=Role.PREFILL), Worker(name="decode-0", role=Role.DECODE))
    return Fleet(workers=workers, native=frozenset(Native), num_lease_tokens=workers[0].num_cache_tokens // 2)
