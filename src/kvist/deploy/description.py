"""The description of a cluster, from which every manifest is rendered.

Its fields are the options of `kvist deploy render`: flags, environment variables, or a TOML file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvist.config import option
from kvist.errors import ConfigError

FORMATS = ("rbg", "kubernetes", "compose")
RBG_VERSIONS = ("v1alpha2", "v1alpha1")
STOP_MARGIN_S = 30.0  # beside the drain: the engine frees its pool, and the process ends
MAX_POD_NAME = 63  # a DNS label: of a pod's name, which is also its host name
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_SUFFIX = len("-mooncake-master-99")


def _check_name(key: str, value: str | None) -> None:
    if value is not None and not _LABEL.fullmatch(value):
        raise ConfigError(
            f"--{key.replace('_', '-')} {value!r} is not a valid name in Kubernetes: use lower-case letters, digits "
            "and '-', with a letter first and no '-' at the end",
            param=key,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestOptions:
    """Which documents are written."""

    format: str = option(
        "rbg",
        "rbg: a RoleBasedGroup, upgraded in place; kubernetes: plain StatefulSets and Deployments; compose: one host",
        choices=FORMATS,
    )
    rbg_version: str = option("v1alpha2", "API version of the RoleBasedGroup", choices=RBG_VERSIONS)
    name: str = option("kvist", "name of the cluster, and the beginning of the names of all its objects")
    namespace: str | None = option(None, "Kubernetes namespace of all objects", unset="that of kubectl")
    secret: str = option(
        "kvist-keys", "name of the Secret with the keys `api-key` and `cluster-key` (and, with stores, `pages-secret`)"
    )
    network_policy: bool = option(True, "let only pods of this cluster connect to anything but the router")
    monitoring_namespace: str | None = option(
        None,
        "namespace of Prometheus: add a PodMonitor, and let pods of this namespace read /metrics",
        unset="none",
    )

    def __post_init__(self) -> None:
        for key in ("name", "namespace", "secret", "monitoring_namespace"):
            _check_name(key, getattr(self, key))
        if len(self.name) > MAX_POD_NAME - _LONGEST_SUFFIX:
            raise ConfigError(
                f"--name {self.name} has {len(self.name)} characters, and the host names of its pods at most "
                f"{MAX_POD_NAME}: use at most {MAX_POD_NAME - _LONGEST_SUFFIX}",
                param="name",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleCounts:
    prefill: int = option(1, "number of prefill workers", minimum=0, maximum=99)
    decode: int = option(1, "number of decode workers", minimum=0, maximum=99)
    unified: int = option(0, "number of workers that do both", minimum=0, maximum=99)
    stores: int = option(0, "number of Mooncake stores; more than 0 adds a master", minimum=0, maximum=99)
    max_replicas: int = option(
        0,
        "highest number of workers of each role that an autoscaler may start; 0: no autoscaler",
        minimum=0,
        maximum=99,
    )

    def __post_init__(self) -> None:
        if not (self.unified or (self.prefill and self.decode)):
            raise ConfigError(
                f"--prefill {self.prefill} --decode {self.decode} --unified {self.unified} cannot answer a request: "
                "use at least one prefill and one decode worker, or one unified worker",
                param="prefill",
            )
        most = max(self.prefill, self.decode, self.unified)
        if 0 < self.max_replicas < most:
            raise ConfigError(
                f"--max-replicas {self.max_replicas} is below the number of workers of a role ({most})",
                param="max_replicas",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerOptions:
    """The program of the containers, and their resources."""

    image: str = option("kvist:latest", "image of all containers; it has `kvist` and, for stores, Mooncake")
    model_path: str | None = option(
        None,
        "folder or file of the model inside the containers; by default the embedded model",
        aliases=("model",),
    )
    model_claim: str | None = option(
        None, "PersistentVolumeClaim with the models, mounted read-only at /models", unset="none"
    )
    model_folder: str | None = option(
        None, "folder of the host with the models, mounted read-only at /models", unset="none"
    )
    device: str = option("cpu", "cpu, or cuda: each worker then gets --tp GPUs", choices=("cpu", "cuda"))
    tp: int = option(1, "tensor parallel size of each worker", minimum=1, maximum=64, aliases=("tp-size",))
    worker_cpus: float = option(4.0, "CPUs of each worker", minimum=0.1)
    worker_memory: float = option(
        16.0, "host memory of each worker, without its host tier: weights and pages on a CPU", unit="GB", minimum=0.5
    )
    hicache_size: float = option(
        0.0, "host tier of each worker; it survives a restart of the container; 0: none", unit="GB", minimum=0
    )
    segment_size: float = option(4.0, "memory for pages of each store", unit="GB", minimum=0.1)
    ssd_size: float = option(0.0, "pages that each store also keeps on disk; 0: none", unit="GB", minimum=0)
    hicache_mooncake_replica_num: int = option(
        2, "copies of each page in the pool", minimum=1, maximum=99, aliases=("replica-num",)
    )
    worker_args: tuple[str, ...] = option(
        (), "further options of every worker, as for kvist serve: --worker-args=--page-size=32"
    )
    router_args: tuple[str, ...] = option((), "further options of the router, as for kvist router")
    drain_timeout_s: float = option(
        60.0, "on shutdown, how long open requests may continue before they go on at other workers", unit="s", minimum=0
    )

    def __post_init__(self) -> None:
        if self.model_claim is not None:
            _check_name("model_claim", self.model_claim.replace(".", "-"))  # the name of a claim may have dots
        for key, value in (("image", self.image), ("model_path", self.model_path)):
            if value is not None and (not value or value != "".join(value.split())):
                flag = f"--{key.replace('_', '-')}"
                raise ConfigError(f"{flag} {value!r} is empty or has a space in it: correct it", param=key)
        if self.model_folder is not None and not self.model_folder.startswith("/"):
            raise ConfigError(
                f"--model-folder {self.model_folder} is not an absolute path, as /srv/models is", param="model_folder"
            )
        if self.model_claim is not None and self.model_folder is not None:
            raise ConfigError(
                "--model-claim and --model-folder are both set: the models are in one of them", param="model_claim"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A cluster to be deployed."""

    manifest: ManifestOptions
    counts: RoleCounts
    container: ContainerOptions

    def __post_init__(self) -> None:
        counts, container = self.counts, self.container
        if counts.stores and container.hicache_mooncake_replica_num > counts.stores:
            raise ConfigError(
                f"--hicache-mooncake-replica-num {container.hicache_mooncake_replica_num} is more than --stores "
                f"{counts.stores}: each copy of a page needs a store of its own",
                param="hicache_mooncake_replica_num",
            )
        if counts.stores and not container.hicache_size:
            raise ConfigError(
                "--stores needs a host tier in front of the pool: add --hicache-size, in GB", param="hicache_size"
            )
        if self.manifest.format == "compose" and counts.max_replicas:
            raise ConfigError("compose has no autoscaler: leave out --max-replicas", param="max_replicas")
        if self.manifest.format == "compose" and container.model_claim is not None:
            raise ConfigError("compose has no PersistentVolumeClaim: use --model-folder", param="model_claim")

    @property
    def grace_s(self) -> int:
        """The time from the signal to stop to the kill, of workers and router."""
        return round(self.container.drain_timeout_s + STOP_MARGIN_S)
