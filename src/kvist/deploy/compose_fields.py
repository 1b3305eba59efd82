"""The fields of a project of Compose, as its specification names them (https://github.com/compose-spec/compose-spec)."""

from __future__ import annotations

from collections.abc import Iterator

from kvist.deploy.problem import Problem
from kvist.deploy.workloads import Json, as_dict, as_list
from kvist.flags import nearest

_PROJECT = frozenset({"name", "version", "services", "networks", "volumes", "secrets", "configs", "include", "models"})
_FIELDS_OF_SERVICE = (
    "annotations attach blkio_config build cap_add cap_drop cgroup cgroup_parent command configs container_name "
    "cpu_count cpu_percent cpu_period cpu_quota cpu_rt_period cpu_rt_runtime cpu_shares cpus cpuset credential_spec "
    "depends_on deploy develop device_cgroup_rules devices dns dns_opt dns_search domainname driver_opts entrypoint "
    "env_file environment expose extends external_links extra_hosts gpus group_add healthcheck hostname image init ipc "
    "isolation label_file labels links logging mac_address mem_limit mem_reservation mem_swappiness memswap_limit "
    "models network_mode networks oom_kill_disable oom_score_adj pid pids_limit platform ports post_start pre_stop "
    "privileged profiles provider pull_policy pull_refresh_after read_only restart runtime scale secrets security_opt "
    "shm_size stdin_open stop_grace_period stop_signal storage_opt sysctls tmpfs tty ulimits use_api_socket user "
    "userns_mode uts volumes volumes_from working_dir"
)
_SERVICE = frozenset(_FIELDS_OF_SERVICE.split())


def compose_problems(project: Json) -> Iterator[Problem]:
    """Yield each unknown field, each impossible count, and each port that is published twice."""
    yield from _unknown("", project, _PROJECT)
    published: dict[str, str] = {}
    for name, value in as_dict(project.get("services")).items():
        service, path = as_dict(value), f"services.{name}"
        yield from _unknown(path, service, _SERVICE)
        for key, count in (
            ("scale", service.get("scale", 1)),
            ("deploy.replicas", as_dict(service.get("deploy")).get("replicas", 1)),
        ):
            if isinstance(count, str) and "${" in count:  # a variable of Compose's own environment
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                yield Problem(f"{path}.{key}", f"{count!r} is not a number of containers", "use 0 or more")
        for port in _published(service):
            if port in published:
                text = f"publishes {port}, which {published[port]} publishes, too"
                yield Problem(f"{path}.ports", text, "give one of them another port")
            published.setdefault(port, f"services.{name}")


def _unknown(path: str, fields: Json, known: frozenset[str]) -> Iterator[Problem]:
    for name in fields:
        if name not in known and not str(name).startswith("x-"):
            remedy = nearest(str(name), sorted(known)).removeprefix("; ") or "remove it, or begin its name with x-"
            yield Problem(".".join(filter(None, (path, str(name)))), "is a field that Compose does not have", remedy)


def _published(service: Json) -> Iterator[str]:
    """Yield the ports of the host, as [ADDRESS:]PORT."""
    for port in as_list(service.get("ports")):
        if isinstance(port, dict):
            if published := port.get("published"):
                yield ":".join(filter(None, (port.get("host_ip"), str(published))))
        elif ":" in str(port):
            yield str(port).partition("/")[0].rpartition(":")[0]
