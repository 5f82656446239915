"""HAProxy's settings: what is not the shop's own port stays on this machine, and strangers are told apart."""

from __future__ import annotations

import shutil
import subprocess
import types
from pathlib import Path

import pytest

from serve_app import front

CONFIGURATION = """\
defaults
    mode http
frontend prometheus
    bind :{figures}
frontend http_frontend
    bind {host}:{port}
    default_backend own
backend own
listen stats
  bind *:{stats}
  stats enable
"""


def test_what_is_no_frontend_listens_on_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        front.importlib,
        "import_module",
        lambda _: types.SimpleNamespace(get_haproxy_binary=lambda: "/bin/echo"),
    )
    found = front.environment(tmp_path, (18404, 19101, 18500))
    assert (found["RAY_SERVE_HAPROXY_STATS_PORT"], found["RAY_SERVE_HAPROXY_METRICS_PORT"]) == (
        "18404",
        "19101",
    )
    written = tmp_path / "haproxy.cfg"
    told = {"figures": 19101, "stats": 18404, "host": "*", "port": 8000}
    written.write_text(CONFIGURATION.format(**told))
    called = [found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(written), "-sf", "12"]
    assert subprocess.check_output(called, text=True) == f"-db -f {written} -sf 12\n"
    here = CONFIGURATION.replace("bind :{figures}", "bind 127.0.0.1:{figures}")
    here = here.replace("bind *:{stats}", "bind 127.0.0.1:{stats}")
    named = "http_frontend\n    option forwardfor except 127.0.0.0/8"
    assert written.read_text() == here.replace("http_frontend", named).format(**told)
    gone = subprocess.run([*called[:3], str(tmp_path / "none")], capture_output=True, check=False)
    assert (gone.returncode, gone.stdout) == (1, b"")  # not with every port open


def test_haproxy_takes_the_configuration(tmp_path: Path) -> None:
    found = front.environment(tmp_path, (8404, 9101, 8500))
    if not found:
        pytest.skip("no HAProxy for this machine")
    written = tmp_path / "haproxy.cfg"
    told = CONFIGURATION.format(figures=9101, stats=8404, host="127.0.0.1", port=8000)
    written.write_text(
        told.replace(
            "mode http", "mode http\n    timeout client 1s\n    timeout server 1s\n    timeout connect 1s"
        )
    )
    subprocess.check_output([found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(written), "-c"])


def test_without_a_binary_ray_serves_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(front.importlib, "import_module", missing)
    assert front.environment(tmp_path) == {}


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
        ("1", f"/tmp/front-1/{front.NAME}", True),
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
