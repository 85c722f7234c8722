"""Work on shards by a Ray cluster: actors hold the models, shards are handed to them one at a time.

In: a `Work` that can be pickled, and names of shards. Out: results in the order in which shards end. Ray places the
actors, notices when they die and carries the messages; what a shard's commit is, the commit protocol says. So a worker
that dies loses nothing but the shard it was at, which another one is given; one that does not get on is ended. A shard
that ends its worker several times is set aside, and named at the end. When this process dies, Ray ends its workers.

The run lies where every machine sees it under the same name, and every machine has this version of capfilt.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any

from capfilt import __version__
from capfilt.engines.base import SHARDS, Result, Work
from capfilt.engines.local import num_cores
from capfilt.errors import CapfiltError, MissingPackageError, UsageError
from capfilt.progress import NullProgress, Progress, counted
from capfilt.settings import RaySettings

LIGHT_CHUNK, HEAVY_CHUNK = 16, 1
"""Shards of a message: light work takes about as long as a message."""
MOST_CORES = 8
"""Cores of a worker whose models compute on a CPU."""
WAIT_SECONDS = 0.5
"""Between two looks at the counts of the workers."""
RECRUIT_SECONDS = 5.0
"""Between two looks at whether the cluster has grown."""
LONELY_SECONDS = 30.0
"""Without any worker, after which it is said."""
NAMED_SHARDS = 3
CONNECT_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"(?:ray://)?([^/:]+):([0-9]+)")


class RayEngine:
    """A Ray cluster."""

    def __init__(self, settings: RaySettings | None = None) -> None:
        self._settings = settings or RaySettings()

    def run(
        self, work: Work[Result], shards: Sequence[str], progress: Progress | None = None
    ) -> Iterator[tuple[str, Result]]:
        """(shard, result) of each shard, as they end. The first error of the work ends it.

        Raises MissingPackageError without Ray, UsageError for a cluster that cannot be reached or differs from this
        process in its versions, CapfiltError at the end where shards were set aside.
        """
        with _silent_stdout(), _connected(self._settings) as ray:
            crew = _Crew(ray, self._settings, work, progress or NullProgress())
            try:
                yield from crew.work_off(shards)
            finally:
                crew.dismiss()


@dataclass
class Counts(NullProgress):
    """Progress of one worker, read by another thread."""

    done: int = 0
    already: int = 0
    fields: dict[str, object] = field(default_factory=dict)

    def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
        """Count."""
        self.done += n
        self.already += n if already else 0
        self.fields |= fields


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself when it is ready."""

    title: str
    versions: tuple[str, str]
    """Of capfilt and of Python."""


class ShardActor:
    """The process that works; Ray makes it an actor. `counts` is answered beside the work."""

    def __init__(self, work: Work[Any]) -> None:
        self._work, self._counts = work, Counts()

    def open(self) -> Hello:
        """Load what the work needs."""
        self._worker = self._work.open()
        return Hello(self._worker.title, _versions())

    def work_off(self, shards: Sequence[str]) -> tuple[list[Any], Counts]:
        """Results of some shards, and the counts since the worker began."""
        return [self._worker(shard, self._counts) for shard in shards], self.counts()

    def counts(self) -> Counts:
        """A copy of the counts."""
        return Counts(self._counts.done, self._counts.already, dict(self._counts.fields))


@dataclass(eq=False)
class _Member:
    """One worker, as this process knows it."""

    actor: Any
    opening: Any
    """Future of its Hello."""
    hello: Hello | None = None
    shards: list[str] = field(default_factory=list)
    """That it works on."""
    moved: float = 0.0
    """When it was given them, or was last seen to get on."""
    result: Any = None
    asked: Any = None
    """Future of its counts."""
    counts: Counts = field(default_factory=Counts)
    """As they are part of the progress."""
    settled: Counts = field(default_factory=Counts)
    """Those of shards that have ended."""
    history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=60))

    def rate(self) -> float:
        """Units a second, lately; NaN where it is not known yet."""
        (first, before), (last, after) = self.history[0], self.history[-1]
        return (after - before) / (last - first) if last > first else float("nan")


class _Crew:
    """The workers, and the shards that are left."""

    def __init__(self, ray: Any, settings: RaySettings, work: Work[Any], progress: Progress) -> None:
        self._ray, self._settings, self._work, self._progress = ray, settings, work, progress
        self._members: list[_Member] = []
        self._left: deque[list[str]] = deque()
        self._deaths = Counter[str]()
        self._aside: dict[str, str] = {}
        """Shard → what its last worker ended with."""
        self._started = self._said_room = False
        self._recruited = self._seen_working = 0.0
        of_nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = min([MOST_CORES, *filter(None, of_nodes)])  # a head may have none
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        gpus = float(has_gpus) if settings.gpus_per_worker is None else settings.gpus_per_worker
        self._gpus = gpus if work.has_models else 0.0
        cpus = settings.cpus_per_worker
        self._cpus = (1 if work.is_light or self._gpus else max(1, cores)) if cpus is None else cpus
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_restarts": 0, "max_task_retries": 0}
        self._actor_class = ray.remote(concurrency_groups={"watch": 1}, **options)(ShardActor)
        self._packed = ray.put(work)

    def work_off(self, shards: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Have every shard worked on. Raises CapfiltError at the end where some were set aside."""
        size = LIGHT_CHUNK if self._work.is_light else HEAVY_CHUNK
        self._left = deque(list(shards[start : start + size]) for start in range(0, len(shards), size))
        self._seen_working = time.monotonic()
        while self._left or any(member.shards for member in self._members):
            self._recruit()
            self._hand_out()
            yield from self._take_what_ended()
            self._watch()
        if self._started:
            self._progress.finish()
        if self._aside:
            raise self._incomplete(len(shards))

    def dismiss(self) -> None:
        """End every worker."""
        for member in self._members:
            with suppress(Exception):  # it may be gone, and so may the cluster
                self._ray.kill(member.actor)
        self._members = []

    # --- workers ----------------------------------------------------------------------------------------------

    def _recruit(self) -> None:
        """Start workers while there is work for them, as many as the cluster holds; Ray places them when it can."""
        now = time.monotonic()
        if self._members and now - self._recruited < RECRUIT_SECONDS:
            return
        self._recruited = now
        all_of_it = self._ray.cluster_resources()
        rooms = [all_of_it.get(name, 0.0) // need for name, need in (("CPU", self._cpus), ("GPU", self._gpus)) if need]
        num_busy = sum(bool(member.shards) for member in self._members)
        room = max(int(min(rooms, default=num_cores())), 1)
        wanted = min(self._settings.num_workers or room, len(self._left) + num_busy)
        if wanted > room and not self._said_room:
            self._said_room = True
            self._progress.say(
                f"The cluster has room for {counted(room, 'worker')} of {self._need()}; {wanted} were asked for, "
                "and the others wait for room. --cpus-per-worker and --gpus-per-worker say how much one takes."
            )
        for _ in range(wanted - len(self._members)):
            actor = self._actor_class.remote(self._packed)
            self._members.append(_Member(actor, actor.open.remote()))

    def _num_ready(self) -> int:
        return sum(member.hello is not None for member in self._members)

    def _hand_out(self) -> None:
        for member in self._members:
            if member.hello is not None and not member.shards and self._left:
                member.shards, member.moved = self._left.popleft(), time.monotonic()
                member.result = member.actor.work_off.remote(member.shards)

    def _take_what_ended(self) -> Iterator[tuple[str, Any]]:
        """Results of shards that have ended; new workers are greeted, dead ones replaced."""
        waited = {m.result if m.shards else m.opening: m for m in self._members if m.shards or m.hello is None}
        if not waited:
            time.sleep(WAIT_SECONDS)
            return
        ended, _ = self._ray.wait(list(waited), num_returns=1, timeout=WAIT_SECONDS)
        if ended:  # and whatever else has ended by now
            ended, _ = self._ray.wait(list(waited), num_returns=len(waited), timeout=0)
        for future in ended:
            member = waited[future]
            try:
                answer = self._ray.get(future)
            except self._ray.exceptions.RayActorError as error:
                self._bury(member, error)
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, CapfiltError) else error) from None
            if member.hello is None:
                self._greet(member, answer)
                continue
            results, counts = answer
            names, member.shards = member.shards, []
            self._count(member, counts)
            member.settled = counts
            if self._work.unit == SHARDS:
                self._progress.advance(len(names), workers=self._num_ready())
            yield from zip(names, results, strict=True)

    def _greet(self, member: _Member, hello: Hello) -> None:
        if hello.versions != _versions():
            theirs, ours = (f"capfilt {one[0]} on Python {one[1]}" for one in (hello.versions, _versions()))
            raise UsageError(f"A machine of the cluster has {theirs}; expected {ours} as here. Install it there.")
        member.hello = hello
        if not self._started:
            self._started = True
            self._progress.start(hello.title, self._work.total, self._work.unit)

    def _bury(self, member: _Member, error: Exception) -> None:
        """A worker is dead: its shards go to another one, unless one of them is known for that."""
        self._members.remove(member)
        self._recruited = 0.0
        self._count(member, member.settled)  # what it did of its last shards is done again
        said = str(error).strip() or type(error).__name__
        why = "".join(filter(str.isprintable, said.splitlines()[0]))
        if member.hello is None and not member.shards:
            self._deaths[""] += 1
            if self._deaths[""] > self._settings.max_deaths:
                raise CapfiltError(f"The cluster's workers end before they are ready: {why}. See Ray's own logs there.")
            return
        for shard in member.shards:
            self._deaths[shard] += 1
        self._progress.say(f"A worker ended at {', '.join(member.shards)}: {why} Another one is given it.")
        again = [shard for shard in member.shards if self._deaths[shard] < self._settings.max_deaths]
        self._aside |= {shard: why for shard in member.shards if shard not in again}
        self._left.extendleft([shard] for shard in reversed(again))  # alone, so that one is found out

    def _incomplete(self, num_shards: int) -> CapfiltError:
        names = sorted(self._aside)
        named = ", ".join(names[:NAMED_SHARDS]) + (" and others" if len(names) > NAMED_SHARDS else "")
        return CapfiltError(
            f"{len(names)} of {num_shards} shards were set aside: each ended {self._settings.max_deaths} workers "
            f"({named}; the last: {self._aside[names[0]]}). The others are done. Repeat the command to try them again, "
            "or look at them with `--engine local`."
        )

    # --- progress -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Take in the workers' counts, and ask for new ones."""
        now = time.monotonic()
        if any(member.shards for member in self._members):
            self._seen_working = now
        elif now - self._seen_working > LONELY_SECONDS:
            self._seen_working = now
            self._progress.say(f"No worker yet: the cluster has no room for {self._need()}. Waiting.")
        stall = self._settings.stall_seconds
        for member in [one for one in self._members if one.shards and now - one.moved > stall * len(one.shards)]:
            with suppress(Exception):  # its machine may be gone
                self._ray.kill(member.actor)
            self._bury(member, CapfiltError(f"it did not get on for {stall * len(member.shards):g} s."))
        for member in self._members:
            if not member.shards or self._work.unit == SHARDS:
                continue
            if member.asked is None:
                member.asked = member.actor.counts.options(concurrency_group="watch").remote()
                continue
            if not self._ray.wait([member.asked], timeout=0)[0]:
                continue
            with suppress(self._ray.exceptions.RayError):  # a dead one is noticed by its shard
                counts = self._ray.get(member.asked)
                if counts.done >= member.counts.done:  # it may be older than the result of a shard
                    self._count(member, counts)
            member.asked = None

    def _need(self) -> str:
        return f"{self._cpus:g} CPUs" + (f" and {self._gpus:g} GPUs" if self._gpus else "")

    def _count(self, member: _Member, counts: Counts) -> None:
        """Bring the progress from what was known of a worker to `counts`."""
        before, member.counts = member.counts, counts
        if counts.done != before.done:
            member.moved = time.monotonic()
        member.history.append((time.monotonic(), counts.done))
        already = counts.already - before.already
        shown = self._shown_fields()
        if already:
            self._progress.advance(already, already=True, **shown)
        if num := counts.done - before.done - already:
            self._progress.advance(num, **shown)

    def _shown_fields(self) -> dict[str, Any]:
        """Sums of the workers' own fields, how many they are, and the rates of the slowest and the fastest."""
        totals = Counter[str]()
        for member in self._members:
            totals.update({name: value for name, value in member.counts.fields.items() if isinstance(value, int)})
        rates = sorted(rate for m in self._members if len(m.history) > 1 and (rate := m.rate()) == rate)
        each = {"each": f"{rates[0]:.1f}-{rates[-1]:.1f}/s"} if rates else {}
        return {**totals, "workers": self._num_ready(), **each}


def _versions() -> tuple[str, str]:
    return __version__, ".".join(platform.python_version_tuple()[:2])


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Ray writes of workers that ended to the standard output, which is for a command's result."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _connected(settings: RaySettings) -> Iterator[Any]:
    """Ray, connected to the cluster; one that was started for it here ends with it. It reports nothing to anyone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise MissingPackageError("ray", "ray", "--engine ray") from None
    if ray.is_initialized():
        yield ray
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    own = {} if address else {"num_cpus": num_cores(), "include_dashboard": False}
    try:
        if address and (found := _HOST_AND_PORT.fullmatch(address)):  # Ray itself tries for minutes
            socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"There is no Ray cluster at {address} ({error}). Start one (`ray start --head`), or leave --address out."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
