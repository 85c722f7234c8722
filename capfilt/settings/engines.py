"""Settings of the engines that carry work on shards out; they change no result."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings.checks import require

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """A Ray cluster and the workers on it."""

    address: str | None = None
    """Of the cluster: `auto`, HOST:PORT or ray://HOST:PORT; unset: $RAY_ADDRESS, or this machine alone."""
    num_workers: int | None = None
    """Worker processes; unset: as many as the cluster has room for, now and later."""
    cpus_per_worker: float | None = None
    """Cores of a worker; unset: 1 where tables are read or it has a GPU, else all of a machine's, 8 at most."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, fractions too; unset: 1 where the cluster has any and models compute, else 0."""
    max_deaths: int = 3
    """Workers that may end at a shard before it is set aside."""
    stall_seconds: float = 900.0
    """A worker that has done no image, row or shard for so long is ended, as if it had ended by itself."""

    def __post_init__(self) -> None:
        num_workers = self.num_workers
        require(num_workers is None or num_workers >= 1, "num_workers", num_workers, "at least 1")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "a number that is not negative")
        require(self.stall_seconds > 0, "stall_seconds", self.stall_seconds, "more than 0")
        require(self.max_deaths >= 1, "max_deaths", self.max_deaths, "at least 1")
