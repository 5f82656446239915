"""cluster.yaml is a file that Ray and EC2 accept, and it keeps its promises on cost and on access."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER_YAML = Path(__file__).resolve().parents[2] / "cluster.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(CLUSTER_YAML.read_text(encoding="utf-8"))
NODE_TYPES: dict[str, dict[str, Any]] = CONFIG["available_node_types"]
HEAD: dict[str, Any] = NODE_TYPES[CONFIG["head_node_type"]]
WORKERS = {name: node for name, node in NODE_TYPES.items() if name != CONFIG["head_node_type"]}
START_COMMANDS: dict[str, list[str]] = {
    role: CONFIG[f"{role}_start_ray_commands"] for role in ("head", "worker")
}

CREDENTIALS = {
    "AWS access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "AWS secret key": r"(?<![0-9A-Za-z/+])[0-9A-Za-z/+]{40}(?![0-9A-Za-z/+])",
    "Ray token": r"\b[0-9a-f]{32,}\b",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "value of a secret setting": r"(?i)(secret_access_key|session_token|password|ray_auth_token)\s*[=:]\s*\S",
}


def credentials_in(text: str) -> list[str]:
    return [name for name, pattern in CREDENTIALS.items() if re.search(pattern, text)]


def ray_start(role: str) -> str:
    """The one command of a role that starts Ray, everything before it in its shell included."""
    (command,) = [command for command in START_COMMANDS[role] if "ray start" in command]
    return command


def flags(role: str) -> dict[str, str]:
    """The options of a role's `ray start`; one without a value maps to an empty string."""
    words = shlex.split(ray_start(role).partition("ray start")[2])
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def environment_of_ray(role: str, home: Path) -> dict[str, str]:
    """What `ray start` finds in its environment when its command runs as Ray's launcher runs it."""
    bin_dir = home / "mlray-env" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "activate").write_text('export PATH="$HOME/mlray-env/bin:$PATH"\n', encoding="utf-8")
    (bin_dir / "ray").write_text("#!/bin/sh\nenv\n", encoding="utf-8")
    (bin_dir / "ray").chmod(0o700)
    launched = f"export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore RAY_HEAD_IP=192.0.2.1 && ({ray_start(role)})"
    done = subprocess.run(
        ["bash", "-c", launched],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_ray_accepts_the_file_and_adds_no_command_of_its_own() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(CONFIG)
    validate_config(prepared)
    assert prepared["head_setup_commands"] == CONFIG["setup_commands"]
    assert prepared["worker_setup_commands"] == CONFIG["setup_commands"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_start_knows_every_flag(role: str) -> None:
    from ray.scripts.scripts import start

    assert flags(role).keys() <= {name for parameter in start.params for name in parameter.opts}


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ec2_knows_every_setting_of_a_node(name: str) -> None:
    import botocore.session
    from botocore.validate import validate_parameters

    ec2 = botocore.session.get_session().get_service_model("ec2")
    request = NODE_TYPES[name]["node_config"] | {"MinCount": 1, "MaxCount": 1}
    validate_parameters(request, ec2.operation_model("RunInstances").input_shape)


def test_no_credential_is_written_in_the_file() -> None:
    assert credentials_in(CLUSTER_YAML.read_text(encoding="utf-8")) == []
    assert "aws_credentials" not in CONFIG["provider"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("AWS access key", "key: " + "AKIA" + "Z" * 16),
        ("AWS secret key", "key: " + "aB3/" * 10),
        ("Ray token", "token: " + "0f" * 32),
        ("private key", "-----BEGIN " + "RSA PRIVATE KEY-----"),
        ("value of a secret setting", "export RAY_AUTH_TOKEN" + "=hunter2"),
    ],
)
def test_a_credential_would_be_found(kind: str, text: str) -> None:
    assert kind in credentials_in(text)


def test_head_is_on_demand_and_takes_no_task() -> None:
    assert "InstanceMarketOptions" not in HEAD["node_config"]
    assert HEAD["resources"]["CPU"] == 0


def test_one_worker_type_has_gpus_and_one_has_not() -> None:
    families = sorted(node["node_config"]["InstanceType"].partition(".")[0] for node in WORKERS.values())
    assert [bool(re.match(r"[gp]\d", family)) for family in families] == [True, False]


@pytest.mark.parametrize("name", WORKERS)
def test_workers_are_spot_and_cost_nothing_when_idle(name: str) -> None:
    assert WORKERS[name]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert WORKERS[name]["min_workers"] == 0
    assert WORKERS[name]["max_workers"] > 0


def test_max_workers_lets_every_type_reach_its_own_limit() -> None:
    assert HEAD["max_workers"] == 0
    assert CONFIG["max_workers"] == sum(node["max_workers"] for node in WORKERS.values())


@pytest.mark.parametrize("name", NODE_TYPES)
def test_every_node_reaches_s3_by_its_role(name: str) -> None:
    assert NODE_TYPES[name]["node_config"]["IamInstanceProfile"].keys() & {"Name", "Arn"}
    assert NODE_TYPES[name]["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_only_the_head_may_start_instances() -> None:
    head_profile = HEAD["node_config"]["IamInstanceProfile"]
    assert all(node["node_config"]["IamInstanceProfile"] != head_profile for node in WORKERS.values())


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ray_makes_no_security_group_open_to_the_world(name: str) -> None:
    assert NODE_TYPES[name]["node_config"]["SecurityGroupIds"]
    assert "security_group" not in CONFIG["provider"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_start_demands_the_token(role: str, tmp_path: Path) -> None:
    environment = environment_of_ray(role, tmp_path)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in environment


def test_the_token_comes_from_the_operator_and_is_private() -> None:
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert CONFIG["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_start_drops_the_single_thread_of_the_launcher(role: str, tmp_path: Path) -> None:
    assert environment_of_ray(role, tmp_path).keys().isdisjoint({"OMP_NUM_THREADS", "PYTHONWARNINGS"})


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_start_follows_a_stop_and_raises_the_file_limit(role: str) -> None:
    assert START_COMMANDS[role][0].endswith("ray stop || true")
    assert "ulimit -n 65536;" in ray_start(role).partition("ray start")[0]


def test_dashboard_listens_on_loopback_only() -> None:
    assert flags("head")["--dashboard-host"] == "127.0.0.1"
    assert "--ray-debugger-external" not in flags("head")


def test_metrics_have_one_port_on_all_nodes() -> None:
    assert flags("head")["--metrics-export-port"] == flags("worker")["--metrics-export-port"] == "8080"


def test_nodes_install_the_locked_versions() -> None:
    (install,) = [command for command in CONFIG["setup_commands"] if "pip install" in command]
    assert "-c requirements.lock ." in install
    assert CONFIG["file_mounts"]["~/mlray"] == "."
    assert install.startswith("cd ~/mlray ")
