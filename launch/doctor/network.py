"""Names, addresses, speed and reach of the network. Being offline is never a problem: Trivet works without the hub."""

import os
import shlex
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from launch.doctor.findings import Finding
from trainer.machines import addresses

CONNECT_TIMEOUT_S = 4.0
LOOPBACK_BYTES = 128 * 1024**2
LOOPBACK_LIMIT_S = 1.0
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_CHUNK_BYTES = 1024**2


def host_name() -> list[Finding]:
    """Whether this machine's own name resolves, and to an address that other machines could reach.

    gloo announces that address to the other ranks; where it is a loopback one, ranks on two machines never meet.
    """
    name, wanted = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    interfaces = [interface for interface in addresses() if interface != "lo"]
    if wanted and not set(wanted.split(",")) & set(addresses()):
        found = f"GLOO_SOCKET_IFNAME={wanted} is no interface with an address; there are {', '.join(addresses())}"
        return [Finding("host name", found, "problem", "unset GLOO_SOCKET_IFNAME")]
    try:
        resolved = sorted({info[4][0] for info in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError as error:
        found = f"{name} does not resolve ({error.strerror or error})"
        fix = f"echo 127.0.0.1 {shlex.quote(name)} | sudo tee -a /etc/hosts"
        return [Finding("host name", found, "problem", fix)]
    found = f"{name} is {', '.join(map(str, resolved))}"
    if wanted:
        return [Finding("host name", f"{found}; collectives use {wanted} (GLOO_SOCKET_IFNAME)")]
    if interfaces and all(str(address).startswith("127.") for address in resolved):
        found = f"{found}: fine on one machine; on several, ranks announce an address that reaches only themselves"
        return [Finding("host name", found, "note", f"export GLOO_SOCKET_IFNAME={_way_out() or interfaces[0]}")]
    return [Finding("host name", found)]


def _way_out(routes: Path = Path("/proc/net/route")) -> str | None:
    """Return the interface of the default route, None without one."""
    rows = [line.split() for line in routes.read_text().splitlines()[1:]] if routes.exists() else []
    return next((row[0] for row in rows if row[1] == "00000000"), None)


def loopback() -> list[Finding]:
    """How fast two sockets of this machine talk: an upper bound for collectives between its processes."""
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except OSError as error:
        found = f"127.0.0.1 cannot be used ({error.strerror}): no server, no training on several processes"
        return [Finding("loopback", found, "problem", "sudo ip link set lo up")]
    with listener, socket.create_connection(listener.getsockname(), CONNECT_TIMEOUT_S) as near:
        far, _ = listener.accept()
        with far:
            started = time.perf_counter()
            threading.Thread(target=_send, args=(far,), daemon=True).start()
            received = 0
            while data := near.recv(_CHUNK_BYTES):
                received += len(data)
            mb_per_s = round(received / (time.perf_counter() - started) / 1e6)
    return [Finding("loopback", f"{mb_per_s:,} MB/s over one TCP connection", value=mb_per_s, unit="MB/s")]


def _send(to: socket.socket) -> None:
    """Send until the bytes or the time are used up, then close that direction."""
    chunk, stop = bytes(_CHUNK_BYTES), time.perf_counter() + LOOPBACK_LIMIT_S
    for _ in range(LOOPBACK_BYTES // _CHUNK_BYTES):
        if time.perf_counter() > stop:
            break
        to.sendall(chunk)
    to.shutdown(socket.SHUT_WR)


def hub() -> list[Finding]:
    """Whether models can be fetched: offline by choice, reachable, or not, and then the variable that saves waiting."""
    chosen = [name for name in OFFLINE_VARIABLES if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if chosen:
        return [Finding("model hub", f"offline by {chosen[0]}: only what is on this machine is used")]
    endpoint = _endpoint()
    if endpoint is None:
        return []
    address, started = urlsplit(endpoint), time.perf_counter()  # without user and password, in case it has them
    shown = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
    try:
        urllib.request.urlopen(
            urllib.request.Request(shown + address.path, method="HEAD"), timeout=CONNECT_TIMEOUT_S
        ).close()
    except urllib.error.HTTPError:  # it answers, which is what we asked
        pass
    except (OSError, ValueError) as error:
        found = f"{shown} does not answer ({getattr(error, 'reason', error)}): only models on this machine can be used"
        return [Finding("model hub", found, "note", "export HF_HUB_OFFLINE=1  # so that nothing waits for it")]
    ms = round((time.perf_counter() - started) * 1e3)
    return [Finding("model hub", f"{shown} answers in {ms} ms", value=ms, unit="ms")]


def _endpoint() -> str | None:
    """The hub's address: the user's, else the one that the installed client has, None without a client."""
    if endpoint := os.environ.get("HF_ENDPOINT"):
        return endpoint
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return constants.ENDPOINT


def proxies() -> list[Finding]:
    """Which proxy is used, and whether requests to one's own `trivet serve` would take it too."""
    found = urllib.request.getproxies()
    used = {kind: found[kind] for kind in ("http", "https", "all") if found.get(kind)}
    if not used:
        return []
    shown = ", ".join(f"{kind} through {_without_user(url)}" for kind, url in used.items())
    if not urllib.request.proxy_bypass("127.0.0.1"):
        found_text = f"{shown}; requests to a server on this machine would take it too"
        return [Finding("proxy", found_text, "note", "export NO_PROXY=localhost,127.0.0.1")]
    return [Finding("proxy", shown)]


def _without_user(url: str) -> str:
    return url.rpartition("@")[2].split("://")[-1].rstrip("/")
