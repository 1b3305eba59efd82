"""Checks a document against the schema of its kind: RoleBasedGroup's own, and those of Kubernetes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from kvist.errors import ConfigError

Json = dict[str, Any]
_MAX_PROBLEMS = 20  # of one document
_UNTYPED = frozenset({"monitoring.coreos.com/v1"})  # API groups of operators whose schemas are not here


def schema_problems(document: Json) -> Iterator[tuple[str, str]]:
    """Yield (path, problem) of each violation: of a type, an unknown field, or a rule between fields.

    Raises `ConfigError` if the libraries of the extra `deploy` are missing."""
    version, kind = document.get("apiVersion"), document.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str):
        yield "", "has no `apiVersion` or no `kind`"
    elif version in _UNTYPED:
        return
    elif (schema := _rbg_schemas().get((version, kind))) is not None:
        yield from _violations(schema, document)
    elif version.startswith("workloads.x-k8s.io/"):
        known = sorted(kind for _, kind in _rbg_schemas())
        yield "kind", f"is {kind}, unknown in {version}: the known kinds are {', '.join(dict.fromkeys(known))}"
    else:
        yield from _kubernetes_problems(document, kind, version)


@cache
def _rbg_schemas() -> dict[tuple[str, str], Json]:
    packed = resources.files(__name__).joinpath("rbg.json.gz").read_bytes()
    return {
        (f"{kind['group']}/{version}", kind["kind"]): _strict(schema)
        for kind in json.loads(gzip.decompress(packed))
        for version, schema in kind["versions"].items()
    }


def _strict(schema: Any) -> Any:
    """Return the schema with unknown fields forbidden, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and not free:
        strict["additionalProperties"] = False
    return strict


def _violations(schema: Json, document: Json) -> Iterator[tuple[str, str]]:
    try:
        import jsonschema_rs
    except ImportError as error:
        raise _missing() from error
    own = {key: value for key, value in document.items() if key not in ("apiVersion", "kind", "metadata")}
    shape = {**schema, "properties": {key: value for key, value in schema["properties"].items() if key in ("spec",)}}
    found = 0
    for problem in jsonschema_rs.validator_for(shape).iter_errors(own):
        found += 1
        if found <= _MAX_PROBLEMS:
            yield ".".join(map(str, problem.instance_path)), _with_remedy(problem.message)
    if not found:
        yield from _broken_rules(schema["properties"].get("spec", {}), document.get("spec"), "spec")


def _broken_rules(schema: Json, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the rules (CEL) of the schema that the value breaks. The value has the schema's types."""
    try:
        import cel
    except ImportError as error:
        raise _missing() from error
    for rule in schema.get("x-kubernetes-validations", ()):
        if cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield path, str(rule["message"])
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _broken_rules(inner, value[key], f"{path}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _broken_rules(schema["items"], item, f"{path}.{index}")


def _kubernetes_problems(document: Json, kind: str, version: str) -> Iterator[tuple[str, str]]:
    try:
        import kubernetes_validate
    except ImportError as error:
        raise _missing() from error
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        yield "kind", f"is {kind} of {version}, which Kubernetes does not have"
    except kubernetes_validate.ValidationError as error:
        yield ".".join(map(str, error.path)), _with_remedy(str(error.message))


def _with_remedy(problem: str) -> str:
    """Return the problem with its remedy; those of types and limits name what is allowed."""
    unknown = "Additional properties are not allowed" in problem
    return f"{problem}: correct the name of the field, or remove it" if unknown else problem


def _missing() -> ConfigError:
    return ConfigError("checking a manifest needs further packages: pip install 'kvist[deploy]'")
