"""What Ray left or runs on this machine, read from its files and the process table: Ray itself is not imported."""

import json
import os
import shlex
import sys
from pathlib import Path

from launch.doctor.findings import Finding

RAY = shlex.join([sys.executable, "-m", "ray.scripts.scripts"])
DAEMONS = ("raylet", "gcs_server")
LONGEST_SOCKET_PATH = 107  # Linux, for a Unix socket
MOST_FILES = 50_000  # sizes are counted up to here: sessions may hold very many


def ray_state(processes: Path = Path("/proc")) -> list[Finding]:
    """Return whether a cluster runs here, what dead sessions hold, and what Ray reports to its makers."""
    running = _command_lines(processes)
    return [*cluster(running), *socket_path(), *dead_sessions(running), *usage_statistics(), *token()]


def folder() -> Path:
    """Return where Ray keeps its sessions."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


def cluster(running: list[str]) -> list[Finding]:
    """Clusters that are named or run here. `trivet sweep` joins none of them; they share this machine with it."""
    subject, file = "Ray cluster", folder() / "ray_current_cluster"
    num_daemons = sum(_program(line) in DAEMONS for line in running)
    stop = f"{RAY} stop  # ends every Ray of yours on this machine"
    if address := os.environ.get("RAY_ADDRESS"):
        found = f"RAY_ADDRESS is {address}; `trivet sweep` does not join it, and starts a Ray on this machine"
        return [Finding(subject, found, "note", "unset RAY_ADDRESS")]
    if file.exists() and num_daemons:
        found = f"{file.read_text().strip()} (by `ray start`) shares this machine with `trivet sweep`"
        return [Finding(subject, found, "note", stop)]
    if file.exists():
        found = f"{file} names one that does not run; programs that look for it fail, `trivet sweep` does not"
        return [Finding(subject, found, "note", f"rm {shlex.quote(str(file))}")]
    if num_daemons:
        return [Finding(subject, f"{num_daemons} processes of a sweep or another program", fix=stop)]
    return [Finding(subject, "none runs")]


def socket_path() -> list[Finding]:
    """Whether Ray's sockets have a short enough path: a long TMPDIR, as clusters set it, keeps Ray from starting."""
    path = str(folder() / "session_2026-01-01_00-00-00_000000_1234567" / "sockets" / "plasma_store")
    too_long = len(os.fsencode(path)) - LONGEST_SOCKET_PATH
    if too_long <= 0:
        return []
    found = f"the path of its folder {folder()} is {too_long} bytes too long for sockets: Ray does not start"
    return [Finding("Ray folder", found, "problem", "export RAY_TMPDIR=/tmp")]


def dead_sessions(running: list[str]) -> list[Finding]:
    """Session folders that no process names, with their size and the command that removes them."""
    sessions = sorted(path for path in folder().glob("session_*") if path.is_dir() and not path.is_symlink())
    dead = [path for path in sessions if not any(path.name in line for line in running)]
    if not dead:
        return []
    size, whole = _size_bytes(dead)
    mib = round(size / 1024**2, 1)
    found = f"{len(dead)} that no process uses, {'' if whole else 'over '}{mib:,.1f} MiB in {folder()}"
    # One pattern is copied easily, but it would also take a session that is in use.
    paths = (
        [f"{shlex.quote(str(folder()))}/session_*"]
        if len(dead) == len(sessions)
        else [shlex.quote(str(p)) for p in dead]
    )
    return [Finding("Ray sessions", found, "note", f"rm -r {' '.join(paths)}", value=mib, unit="MiB")]


def usage_statistics() -> list[Finding]:
    """Whether Ray reports to its makers: what Trivet starts does not, unless the user's own variable says so."""
    subject = "Ray usage reports"
    if os.environ.get("RAY_USAGE_STATS_ENABLED") == "1":
        return [Finding(subject, "on, by RAY_USAGE_STATS_ENABLED", "note", "unset RAY_USAGE_STATS_ENABLED")]
    path = Path(os.environ.get("RAY_USAGE_STATS_CONFIG_PATH") or Path.home() / ".ray" / "config.json")
    try:
        off = json.loads(path.read_text())["usage_stats"] is False
    except (OSError, ValueError, KeyError, TypeError):
        off = False
    if off:
        return [Finding(subject, "off")]
    found = "none from what Trivet starts; clusters that you start with `ray start` do report"
    return [Finding(subject, found, fix=f"{RAY} disable-usage-stats")]


def token() -> list[Finding]:
    """Whether Ray asks for its token, and whether only its owner can read that."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        found = "off: whoever reaches the cluster's ports can run code as you"
        return [Finding("Ray token", found, "note", "unset RAY_AUTH_MODE")]
    if not path.exists():
        return [Finding("Ray token", "Ray makes one with the first cluster")]
    if path.stat().st_mode & 0o077:
        return [Finding("Ray token", f"{path} can be read by others", "note", f"chmod 600 {shlex.quote(str(path))}")]
    return [Finding("Ray token", f"in {path}")]


def _command_lines(processes: Path) -> list[str]:
    """The command lines of every process that this user may see."""
    lines = []
    for path in processes.glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return lines


def _program(command_line: str) -> str:
    return Path(command_line.split(" ", 1)[0]).name


def _size_bytes(folders: list[Path]) -> tuple[int, bool]:
    """Return the bytes of the files in `folders`, and whether that is all of them."""
    size = num_files = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                num_files += 1
                if num_files > MOST_FILES:
                    return size, False
                path = os.path.join(parent, name)
                if os.path.exists(path) and not os.path.islink(path):
                    size += os.stat(path).st_blocks * 512
    return size, True
