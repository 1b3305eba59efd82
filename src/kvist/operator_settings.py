"""The settings of the verbs by which operators deploy, check, watch and change servers."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.cluster.config import PairOptions, PoolNodesOptions, UnifiedOptions
from kvist.deploy.config import CheckedFile, OutputOptions
from kvist.deploy.description import ContainerOptions, Deployment, ManifestOptions, RoleCounts
from kvist.doctor.config import DoctorOptions
from kvist.doctor.facts import Wants
from kvist.engine.config import EndpointOptions, EngineOptions, RuntimeOptions
from kvist.flags import FileConfig
from kvist.log import LogConfig
from kvist.nodes.config import DrainOptions
from kvist.operate.config import OperatedServer, RoleOptions
from kvist.options import group
from kvist.server.config import ServerConfig
from kvist.store.file_options import FileStoreOptions
from kvist.store.mooncake_options import MooncakeStoreOptions
from kvist.top.config import TopOptions
from kvist.upgrade.config import UpgradeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSettings:
    operated: OperatedServer = group(OperatedServer)
    switch: RoleOptions = group(RoleOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeSettings:
    upgrade: UpgradeOptions = group(UpgradeOptions)
    runtime: RuntimeOptions = group(RuntimeOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainServerSettings:
    operated: OperatedServer = group(OperatedServer)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployCheckSettings:
    checked: CheckedFile = group(CheckedFile)
    log: LogConfig = group(LogConfig)
    config: FileConfig = group(FileConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSettings:
    manifest: ManifestOptions = group(ManifestOptions)
    counts: RoleCounts = group(RoleCounts)
    container: ContainerOptions = group(ContainerOptions)
    output: OutputOptions = group(OutputOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)

    def __post_init__(self) -> None:
        self.deployment()

    def deployment(self) -> Deployment:
        return Deployment(manifest=self.manifest, counts=self.counts, container=self.container)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainSettings:
    drain: DrainOptions = group(DrainOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)

    def __post_init__(self) -> None:
        if self.drain.store is not None:
            _ = self.drain.url


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """The options of the servers that the machine is checked for."""

    doctor: DoctorOptions = group(DoctorOptions)
    engine: EngineOptions = group(EngineOptions)
    endpoint: EndpointOptions = group(EndpointOptions)
    server: ServerConfig = group(ServerConfig)
    pair: PairOptions = group(PairOptions)
    alone: UnifiedOptions = group(UnifiedOptions)
    nodes: PoolNodesOptions = group(PoolNodesOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)

    def __post_init__(self) -> None:
        self.engine.storage.check_one_tier(self.nodes.storage)

    def wants(self) -> Wants:
        """Return what the settings need of the machine. Raises `ConfigError`."""
        engine, runner, storage = self.engine, self.engine.runner, self.engine.storage
        ports = {
            "--port": (self.server.host, self.server.port),
            "--engine-port": (self.endpoint.engine_host, self.endpoint.engine_port),
        }
        store, pool = None, None
        if storage.hicache_storage_backend == "file":
            store = FileStoreOptions(**storage.hicache_storage_options)  # type: ignore[arg-type]
        if storage.hicache_storage_backend == "mooncake":
            pool = MooncakeStoreOptions(**storage.hicache_storage_options).resolved()  # type: ignore[arg-type]
        users = {
            "--storage mooncake": self.nodes.storage == "mooncake",
            "--hicache-storage-backend mooncake": pool is not None,
            "--disaggregation-transfer-backend mooncake": "mooncake"
            in engine.transfer.disaggregation_transfer_backend.split(","),
        }
        return Wants(
            model_path=engine.model.model_path,
            has_dummy_weights=runner.load_format == "dummy",
            device=runner.device,
            tp=runner.tp,
            num_workers=max(1, self.pair.prefill + self.pair.decode + self.alone.unified),
            host_tier_bytes=round((engine.host_tier.hicache_size or 0) * 10**9),
            max_connections=self.server.max_connections,
            runtime_dir=engine.runtime.runtime_dir,
            ports={flag: address for flag, address in ports.items() if address[1]},
            store_folder=None if store is None else store.folder,
            store_bytes=0 if store is None else store.capacity_bytes,
            mooncake=next((flag for flag, needs in users.items() if needs), ""),
            mooncake_master=None if pool is None else pool.master,
            uses_rdma=pool is not None and pool.mooncake_protocol == "rdma",
            checks_torch=self.doctor.torch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopSettings:
    operated: OperatedServer = group(OperatedServer)
    top: TopOptions = group(TopOptions)
    log: LogConfig = group(LogConfig)
    file: FileConfig = group(FileConfig)
