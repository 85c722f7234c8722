"""examples/ray_cluster.yaml is what Ray's launcher takes; examples/slurm.sh starts Ray, curates, and trains.

SLURM itself is not here: `srun` and `scontrol` are stand-ins that start the processes of two machines on this one. What
they start is real: Ray's head and worker, the command, and torchrun with a process for each machine.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from tests.curation.small_runs import make_run, save_models

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SRUN = """#!/usr/bin/env python3
# srun --nodes=N --ntasks=N [--nodelist=M] COMMAND…: the command N times, side by side.
import os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
num = next(int(word.partition("=")[2]) for word in options if word.startswith("--ntasks="))
print("srun", *sys.argv[1:], file=open(os.environ["SRUN_LOG"], "a"))
started = [subprocess.Popen(sys.argv[first:], env={**os.environ, "SLURM_PROCID": str(i)}) for i in range(num)]
def end(*_):
    for process in started:
        process.terminate()
signal.signal(signal.SIGTERM, end)
sys.exit(max(abs(process.wait()) for process in started))
"""
SCONTROL = "#!/bin/sh\n# scontrol show hostnames LIST\necho $3 | tr , '\\n'\n"
TRAINING = """
[train.stage1]
image_encoder = "embedded"
num_queries = 4
max_steps = 2
warmup_steps = 1
batch_size = 4
"""


def test_the_cluster_file_is_what_ray_takes() -> None:
    import jsonschema

    text = (EXAMPLES / "ray_cluster.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, schema)
    types = found["available_node_types"]
    assert found["head_node_type"] in types
    assert types[found["head_node_type"]]["resources"] == {"CPU": 0}
    assert sum(kind["max_workers"] for kind in types.values()) == found["max_workers"]
    for recipe in re.findall(r"capfilt run (\S+)", text):
        assert (EXAMPLES.parent / "pipelines" / f"{recipe}.toml").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_slurm_script_curates_and_trains(tmp_path: Path) -> None:
    models, run = save_models(tmp_path / "models"), make_run(tmp_path / "run", num_shards=2, num_samples=8)
    (tmp_path / "small.toml").write_text(models.recipe(num_captions=2, threshold=0.0) + TRAINING)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},  # other clusters'
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SRUN_LOG": str(tmp_path / "srun.log"), "OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "one,two", "SLURM_JOB_ID": str(random.randrange(3_000, 9_000)),
    }  # fmt: skip
    command = [EXAMPLES / "slurm.sh", tmp_path / "small.toml", run.path]
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # names of sockets have a hundred characters at most
        environment["RAY_TMPDIR"] = short  # which cluster is this machine's is noted there: other tests have theirs
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    started = (tmp_path / "srun.log").read_text()
    assert re.search(r"--nodelist=one ray start --head --node-ip-address=\d+\.\d+\.\d+\.\d+ ", started)
    assert re.search(r"--nodelist=two ray start --address=\d+\.\d+\.\d+\.\d+:", started)
    assert re.search(r"--ntasks=2 torchrun --nnodes=2 --nproc-per-node=1", started)
    assert verify_run(RunDir.open(run.path), deep=True).exit_code == 0
    assert read_manifest([run])["kept"].to_pylist().count(True) > 16
    trained = json.loads((run.path / "stage1" / "training.json").read_text(encoding="utf-8"))
    assert trained["summary"]["steps"] == 2
