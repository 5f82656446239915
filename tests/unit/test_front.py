"""HAProxy's settings: what is not the shop's own port stays on this machine, and strangers are told apart."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

from serve_app import front

PORTS = 18404, 19101, 18500


def written_by_ray(folder: Path, host: str) -> Path:
    """The configuration that the pinned Ray gives HAProxy."""
    path = folder / "haproxy.cfg"
    settings = haproxy.HAProxyConfig(
        http_options=HTTPOptions(host=host, port=8000),
        socket_path=str(folder / "admin.sock"),
        stats_port=PORTS[0],
        metrics_port=PORTS[1],
    )
    haproxy.HAProxyApi(cfg=settings, config_file_path=str(path))._generate_config_file_internal()
    return path


def started(script: str, configuration: Path) -> subprocess.CompletedProcess[str]:
    """What Ray does, but that HAProxy only checks the configuration."""
    called = [script, "-db", "-f", str(configuration), "-dR", "-c"]
    return subprocess.run(called, capture_output=True, text=True, check=False)


@pytest.fixture
def script(tmp_path: Path) -> str:
    found = front.environment(tmp_path, PORTS)
    if sys.platform != "linux":
        pytest.skip("no HAProxy for this machine")
    told = [found[f"RAY_SERVE_{name}"] for name in ("HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT")]
    assert [*told, found["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]] == [str(port) for port in PORTS]
    return found["RAY_SERVE_HAPROXY_BINARY_PATH"]


@pytest.mark.parametrize(("host", "bound"), [("127.0.0.1", "127.0.0.1:8000"), ("0.0.0.0", "*:8000")])
def test_what_is_no_frontend_listens_on_this_machine_alone(
    tmp_path: Path, script: str, host: str, bound: str
) -> None:
    path = written_by_ray(tmp_path, host)
    before = path.read_text()
    # Else this script has done its duty.
    assert f"bind *:{PORTS[0]}" in before
    assert f"bind :{PORTS[1]}" in before
    found = started(script, path)
    assert found.returncode == 0, found.stderr
    lines = [line.strip() for line in path.read_text().splitlines()]
    binds = [line.removeprefix("bind ") for line in lines if line.startswith("bind ")]
    assert binds == [f"127.0.0.1:{PORTS[1]}", bound, f"127.0.0.1:{PORTS[0]}"]
    at = lines.index("frontend http_frontend")
    added = ["option forwardfor except 127.0.0.0/8", "timeout http-request 10s"]
    assert lines[at + 1 : at + 3] == added
    same = [line for line in lines if line not in added and not line.startswith("bind ")]
    assert same == [one for line in before.splitlines() if not (one := line.strip()).startswith("bind ")]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("listen stats", "listen statistics"),
        lambda text: text.replace("frontend http_frontend", "frontend http"),
        lambda text: text + "listen more\n  bind :9999\n  mode http\n",
    ],
)
def test_with_a_configuration_that_it_does_not_know_nothing_listens(
    tmp_path: Path, script: str, change: Callable[[str], str]
) -> None:
    path = written_by_ray(tmp_path, "0.0.0.0")
    path.write_text(change(path.read_text()))
    found = started(script, path)
    assert (found.returncode, found.stdout) == (1, "")
    assert "is not the one that this script knows" in found.stderr
    assert started(script, tmp_path / "none").returncode == 1


def test_without_a_binary_ray_serves_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(front.importlib, "import_module", missing)
    assert front.environment(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_the_lines_for_a_shell_are_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main() == 0
    lines = capsys.readouterr().out
    if not lines:
        pytest.skip("no HAProxy for this machine")
    script = f'{lines}\nprintf "%s %s" "$RAY_SERVE_ENABLE_HA_PROXY" "$RAY_SERVE_HAPROXY_BINARY_PATH"'
    switched, path = subprocess.check_output(["sh", "-c", script], text=True).split()
    assert (switched, Path(path).name) == ("1", front.NAME)
    shutil.rmtree(Path(path).parent)


@pytest.mark.parametrize(
    ("switched", "binary", "good"),
    [
        ("0", "", True),
        ("1", f"front/{front.NAME}", True),
        ("1", "", False),
        ("1", "/bin/haproxy", False),
    ],
)
def test_an_ingress_without_keys_answers_behind_no_other_haproxy(
    monkeypatch: pytest.MonkeyPatch, switched: str, binary: str, good: bool
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", switched)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", binary)
    assert front.tells_strangers() is good
