"""Where pre-trained models come from: a folder here or a name on the hub, told apart before anything is loaded."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

from serving.directory import BadInput

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_CONNECT_TIMEOUT_S = 5.0


def check_reachable(path: str, setting: str) -> None:
    """Raise BadInput, within seconds, if `path` is no folder and cannot be a hub name that this machine reaches.

    Left alone, the hub client retries an unreachable host for most of a minute per file.
    """
    if Path(path).is_dir():
        return
    if Path(path).is_file():
        raise BadInput(f"{setting}: {path}: is a file; give the folder that holds it")
    if not _HUB_NAME.fullmatch(path):
        raise BadInput(f"{setting}: {path}: no such folder; check the path (it is relative to where you stand)")
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise BadInput(
            f"{setting}: {path}: no such folder, and as a hub name it is not in the cache {constants.HF_HUB_CACHE}, "
            f"while HF_HUB_OFFLINE is set; check the path, or unset HF_HUB_OFFLINE to download it"
        )
    if _hub_answers():
        return
    raise BadInput(
        f"{setting}: {path}: no such folder, and as a hub name it needs {constants.ENDPOINT}, which does not answer; "
        f"check the path or the network"
    )


def _hub_answers() -> bool:
    if getproxies() or os.environ.get("ALL_PROXY"):
        return True  # only the proxy knows
    address = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), _CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
