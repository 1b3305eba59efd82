"""Checks a document against the schema of its kind: RoleBasedGroup's own, and those of Kubernetes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any

from kvist.deploy.problem import Problem
from kvist.deploy.schemas.closed_sets import open_word_problems
from kvist.errors import ConfigError
from kvist.flags import nearest

Json = dict[str, Any]
_MAX_PROBLEMS = 20  # of one document
_UNTYPED = frozenset({"monitoring.coreos.com/v1"})  # API groups of operators whose schemas are not here


def schema_problems(document: Json) -> Iterator[Problem]:
    """Yield each violation: of a type, an unknown field, a closed set of words, or a rule between fields.

    Raises `ConfigError` if the libraries of the extra `deploy` are missing."""
    version, kind = document.get("apiVersion"), document.get("kind")
    for field, value in (("apiVersion", version), ("kind", kind)):
        if not isinstance(value, str):
            yield Problem(field, f"is not a text but {value!r}", "name the version and the kind of the object")
            return
    assert isinstance(version, str)
    assert isinstance(kind, str)
    if version in _UNTYPED:
        return
    if (schema := _rbg_schemas().get((version, kind))) is not None:
        yield from _violations(schema, document)
    elif version.startswith("workloads.x-k8s.io/"):
        known = ", ".join(sorted({kind for _, kind in _rbg_schemas()}))
        yield Problem("kind", f"is {kind}, unknown in {version}", f"use one of {known}, and a version that has it")
    else:
        yield from _kubernetes_problems(document, kind, version)
    yield from open_word_problems(document)


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


def _violations(schema: Json, document: Json) -> Iterator[Problem]:
    try:
        import jsonschema_rs
    except ImportError as error:
        raise _missing() from error
    own = {key: value for key, value in document.items() if key not in ("apiVersion", "kind", "metadata")}
    shape = {**schema, "properties": {key: value for key, value in schema["properties"].items() if key in ("spec",)}}
    is_valid = True
    for found in islice(jsonschema_rs.validator_for(shape).iter_errors(own), _MAX_PROBLEMS):
        is_valid = False
        keyword, parent = str(found.schema_path[-1]), _at(shape, found.schema_path[:-1])
        yield from _problems(found.instance_path, keyword, parent, found.instance, found.message)
    if is_valid:
        yield from _broken_rules(schema["properties"].get("spec", {}), document.get("spec"), "spec")


def _at(schema: Any, path: Sequence[str | int]) -> Json:
    """Return the part of a schema at a path."""
    for step in path:
        schema = schema[step]
    return dict(schema)


def _broken_rules(schema: Json, value: Any, path: str) -> Iterator[Problem]:
    """Yield the rules (CEL) of the schema that the value breaks. The value has the schema's types."""
    try:
        import cel
    except ImportError as error:
        raise _missing() from error
    for rule in schema.get("x-kubernetes-validations", ()):
        if cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield Problem(path, str(rule["message"]), "change the fields below it so that this holds")
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _broken_rules(inner, value[key], f"{path}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _broken_rules(schema["items"], item, f"{path}.{index}")


def _kubernetes_problems(document: Json, kind: str, version: str) -> Iterator[Problem]:
    try:
        import kubernetes_validate
    except ImportError as error:
        raise _missing() from error
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        yield Problem("kind", f"is {kind} of {version}, which Kubernetes does not have", "correct kind or apiVersion")
    except kubernetes_validate.ValidationError as error:
        yield from _problems(list(error.path), error.validator, error.schema, error.instance, error.message)
    else:
        yield from _impossible_counts(document.get("spec"))


def _impossible_counts(spec: Any) -> Iterator[Problem]:
    """Yield the numbers of pods that the API server refuses, and the published schemas allow."""
    counts = spec if isinstance(spec, dict) else {}
    for field in ("replicas", "minReplicas", "maxReplicas"):
        number = counts.get(field)
        if isinstance(number, int) and number < 0:
            yield Problem(f"spec.{field}", f"{number} is less than 0", "use 0 or more")
    least, most = counts.get("minReplicas"), counts.get("maxReplicas")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield Problem("spec.maxReplicas", f"{most} is below minReplicas ({least})", f"use {least} or more")


def _problems(path: Sequence[str | int], keyword: str, schema: Json, instance: Any, message: str) -> Iterator[Problem]:
    """Yield what is wrong with the value at a path. `schema`: of this value; it has the keyword."""
    if keyword == "additionalProperties":
        known = sorted(schema.get("properties", {}))
        for name in instance:
            if name not in known:
                similar = nearest(str(name), known).removeprefix("; ")
                yield Problem(_dotted(*path, name), "is an unknown field", similar or "correct its name, or remove it")
    elif keyword == "required":
        missing = next(name for name in schema["required"] if name not in instance and name in message)
        yield Problem(_dotted(*path, missing), "is missing", "add it")
    else:
        text = f"{instance!r} has none of the allowed types" if keyword in ("anyOf", "oneOf") else message
        if keyword == "pattern":
            text = f"{instance!r} does not have the form of this field"
        yield Problem(_dotted(*path), text, _remedy(keyword, schema[keyword]))


def _dotted(*path: str | int) -> str:
    return ".".join(map(str, path))


_HOW_TO_WRITE = {
    "integer": "a whole number without quotes",
    "number": "a number without quotes",
    "boolean": "true or false, without quotes",
    "string": "a text; numbers, yes and no in quotes",
    "array": "a list, each item after a dash",
    "object": "fields with values, each NAME: VALUE",
}
_REMEDIES = {
    "minimum": "use {} or more",
    "maximum": "use {} or less",
    "minLength": "use at least {} characters",
    "maxLength": "use at most {} characters",
    "minItems": "list at least {}",
    "maxItems": "list at most {}",
    "minProperties": "set at least {} of its fields",
    "maxProperties": "set at most {} of its fields",
    "pattern": "use a text of the form {}",
    "format": "use a value of the format {}",
}


def _remedy(keyword: str, limit: Any) -> str:
    """Return what to do about a value that breaks a keyword of JSON Schema."""
    if keyword in ("enum", "const"):
        return f"use {' or '.join(map(str, limit if keyword == 'enum' else [limit]))}"
    if keyword in ("type", "anyOf", "oneOf"):
        types = (
            [limit] if isinstance(limit, str) else [one.get("type") if isinstance(one, dict) else one for one in limit]
        )
        return f"write {', or '.join(_HOW_TO_WRITE[one] for one in types if one in _HOW_TO_WRITE) or 'another value'}"
    if keyword == "pattern" and "[KMGTPE]i" in limit:
        return "use a number and a unit, such as 512Mi or 2G"
    return _REMEDIES.get(keyword, "write a value that the schema allows").format(limit)


def _missing() -> ConfigError:
    return ConfigError("checking a manifest needs further packages: pip install 'kvist[deploy]'")
