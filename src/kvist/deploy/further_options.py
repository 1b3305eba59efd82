"""Checks `--worker-args` and `--router-args`: options that a description passes on to its containers."""

from __future__ import annotations

from kvist.deploy.description import ContainerOptions
from kvist.deploy.finding import ReadOptions
from kvist.deploy.manifest import Manifest
from kvist.deploy.workloads import Container
from kvist.errors import ConfigError

# Set by the renderer, and nothing else in a manifest depends on them.
_FREE = frozenset({"log_format", "drain_grace_s"})


def check_further_options(described: ContainerOptions, manifest: Manifest, read_options: ReadOptions) -> None:
    """Raise `ConfigError` for an option that the container would refuse, and for one whose value the manifest has
    already: ports, probes, volumes and Secrets depend on these."""
    passed_on = {"serve": ("--worker-args", described.worker_args), "router": ("--router-args", described.router_args)}
    checked = set()
    for container in (one for workload in manifest.workloads for one in workload.containers):
        flag, further = passed_on.get(container.verb, ("", ()))
        if further and container.args not in checked:
            checked.add(container.args)
            _check(flag, container, len(container.args) - len(further), read_options)


def _check(flag: str, container: Container, num_own: int, read_options: ReadOptions) -> None:
    environ = {name: value for name, value in container.env.items() if name.startswith("KVIST_")}
    own_args = container.args[:num_own]
    own = read_options(container.verb, own_args, environ)
    try:
        values = read_options(container.verb, container.args, environ)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error.message}", param=_key(flag)) from error
    if (word := values.get("model_path")) != own.get("model_path") and word in container.args:
        raise ConfigError(f"{flag}: {word} is not an option: give each value after a flag of its own", param=_key(flag))
    secrets = {name.removeprefix("KVIST_").lower() for name in environ}
    for key in sorted({"model_path", *secrets, *map(_key, own_args)}):
        before, now = own.get(key), values.get(key)
        if before != now and key not in _FREE and not _is_longer(now, before):
            how = "itself" if key in secrets or before is None else f"to {before}"
            raise ConfigError(
                f"{flag} sets --{key.replace('_', '-')}, which the manifest sets {how}: omit it "
                "(`kvist deploy render --help-all` shows the options of the whole cluster)",
                param=_key(flag),
            )


def _key(arg: str) -> str:
    """Return the key of the option that an argument sets."""
    return arg.partition("=")[0].removeprefix("--").replace("-", "_")


def _is_longer(now: object, before: object) -> bool:
    """Return whether a list has further items, as of another `--discovery`."""
    return isinstance(now, tuple) and isinstance(before, tuple) and now[: len(before)] == before
