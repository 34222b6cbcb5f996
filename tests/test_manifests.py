"""Manifests carry what recovery depends on, to the letter, and are what their readers expect."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.local import ENVIRONMENT

ROOT = Path(__file__).parent.parent
MANIFESTS = ROOT / "cluster" / "manifests"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


def assigned(pattern: str, text: str) -> dict[str, str]:
    """Name and value of everything that a pattern finds."""
    found = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == len(dict(found)), "a name is set twice"
    return dict(found)


def settings_of(name: str) -> dict[str, str]:
    """What a manifest has in the environment of Ray."""
    text = (MANIFESTS / name).read_text()
    if name == "Dockerfile":
        return assigned(r"^ENV (RAY_\w+)=(\S+)$", text)
    if name == "slurm.sh":
        return assigned(r"^export (RAY_\w+)=(\S+)$", text)
    if name == "cluster-launcher.yaml":
        (launcher,) = documents(name)
        return assigned(r"^--env=(RAY_\w+)=(\S+)$", "\n".join(launcher["docker"]["run_options"]))
    return dict(of_kind(name, "ConfigMap")["data"])


# What a manifest sets besides: the token, and folders of its own.
OWN = {
    "Dockerfile": {"RAY_AUTH_MODE"},
    "slurm.sh": {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"},
    "cluster-launcher.yaml": {"RAY_AUTH_MODE"},
    "raycluster.yaml": set[str](),
}


@pytest.mark.parametrize("name", OWN)
def test_every_manifest_carries_exactly_the_settings_that_recovery_depends_on(name: str) -> None:
    found = settings_of(name)
    assert {n: value for n, value in found.items() if n not in OWN[name]} == ENVIRONMENT
    assert found.keys() - ENVIRONMENT.keys() == OWN[name]
    if "RAY_AUTH_MODE" in OWN[name]:
        assert found["RAY_AUTH_MODE"] == "token"


def test_every_container_of_the_kubernetes_cluster_gets_them_and_a_token() -> None:
    cluster, settings = (
        of_kind("raycluster.yaml", "RayCluster"),
        of_kind("raycluster.yaml", "ConfigMap"),
    )
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["workerGroupSpecs"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        name = settings["metadata"]["name"]
        assert container["envFrom"] == [{"configMapRef": {"name": name}}]
        assert "env" not in container, "it would come before what is shared"
        # A limit that is not what was asked for would have Ray count cores that are not there.
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (job,) = documents("rayjob.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_the_manifests_name_the_ray_that_is_pinned() -> None:
    version = re.search(r'"ray\[[^"]*==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert version
    assert of_kind("raycluster.yaml", "RayCluster")["spec"]["rayVersion"] == version[1]


def test_the_launcher_file_is_what_the_launcher_of_ray_takes() -> None:
    schema = json.loads(files("ray").joinpath("autoscaler/ray-schema.json").read_text())
    (launcher,) = documents("cluster-launcher.yaml")
    jsonschema.validate(launcher, schema)
    assert launcher["head_node_type"] in launcher["available_node_types"]
    assert "/home/restage/.ray/auth_token" in launcher["file_mounts"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "head_nodes": 1}, schema)


def test_no_manifest_holds_a_token() -> None:
    names = [path.name for path in MANIFESTS.iterdir()]
    assert len(names) == 6
    for name in names:
        assert not re.search(r"[0-9a-f]{32}|AUTH_TOKEN=", (MANIFESTS / name).read_text()), name


# What Slurm gives to a batch file, for nodes that are all this machine.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$SCONTROL_LOG"; fi
"""
# In place of our command line: it looks at the cluster, and waits to be told to stop.
ELASTIC = """
import os, sys, time
import ray
from cluster.local import join
from elastic.journal import Journal

verb, storage = sys.argv[1], os.environ["STORAGE"]
asked = storage + "/asked"
if verb == "stop":
    open(asked, "w").write(" ".join(sys.argv[2:]))
    sys.exit()
join(sys.argv[sys.argv.index("--ray-address") + 1])
while len(ray.nodes()) < 2:
    time.sleep(0.1)
open(storage + "/up", "w").write(str(len(ray.nodes())))
while not os.path.exists(asked):
    time.sleep(0.1)
sys.exit(130)
"""


@pytest.mark.ray
def test_the_slurm_batch_file_starts_a_raylet_a_node_and_is_queued_again_after_a_save(
    tmp_path: Path,
) -> None:
    """Under plain bash, with its own `srun` and `scontrol`, and a driver that only looks."""
    import signal
    import stat

    from test_ray import wait_until

    tools, storage = tmp_path / "tools", tmp_path / "runs"
    tools.mkdir()
    storage.mkdir()
    python = (
        f'#!/bin/bash\nif [ "$1" = -m ]; then shift 2; exec {sys.executable} "$DRIVER" "$@"; fi\n'
    )
    python += f'exec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "driver.py").write_text(ELASTIC)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "STORAGE": str(storage),
        "DRIVER": str(tmp_path / "driver.py"),
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "two",
        "SLURM_CPUS_ON_NODE": "1",
    }
    command = ["bash", str(MANIFESTS / "slurm.sh"), "my_plan.py", str(storage), "mine"]
    with (tmp_path / "log").open("wb") as log:
        batch = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(
            lambda: (storage / "up").exists() or batch.poll() is not None, "two raylets", 120
        )
        assert batch.poll() is None, (tmp_path / "log").read_text()[-4000:]
        (token,) = storage.glob(".token-*")
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(60) == 130, (tmp_path / "log").read_text()[-4000:]
    finally:
        if batch.poll() is None:
            os.killpg(batch.pid, signal.SIGKILL)
            batch.wait()
    assert (storage / "asked").read_text() == f"{storage}/mine --save"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    assert not token.exists()
