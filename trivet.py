"""The door of the command line: sees to it that Trivet's three packages are Trivet's, then lets `launch.cli` run.

Their names are plain words, so another distribution, or a folder where you stand, may have one of them too, and
Python takes whichever comes first. Standard library only, since nothing else is known to be right yet.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = ("launch", "serving", "trainer")
HOME = Path(__file__).resolve().parent


def main() -> None:
    """Run the command line; without our own packages, one line on stderr and exit code 2."""
    refuse_foreign_packages()
    from launch.cli import main

    main()


def refuse_foreign_packages() -> None:
    """End the process with exit code 2, saying which folder or distribution shadows which package, if one does."""
    if message := foreign_package():
        if os.environ.get("RANK", "0") == "0":  # once for all ranks
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def foreign_package() -> str:
    """Return a line about the first package that is not ours and how to mend that; nothing if all three are ours.

    Imports none of them. A package is ours if it lies beside this file and is as it was installed.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return f"{name}: Trivet's own package is missing in {HOME}; install Trivet again"
        found = Path(spec.origin).resolve()
        if found != HOME / name / "__init__.py":
            return f"{name}: {_folder(found)} comes before Trivet's own {HOME / name}; {_mend(name, found)}"
        if _was_overwritten(f"{name}/__init__.py"):
            owners = " and ".join(_foreign_owners(name)) or "another package"
            return (
                f"{name}: files of {owners} lie in Trivet's {HOME / name}; "
                f"uninstall {owners}, then install Trivet again, in an environment of its own"
            )
    return ""


def _folder(found: Path) -> Path:
    return found.parent if found.name == "__init__.py" else found


def _mend(name: str, found: Path) -> str:
    """What to do about the foreign `found`: take its distribution away, or else keep its folder off the path."""
    owners = _foreign_owners(name)
    if owners and "site-packages" in found.parts:
        return f"run: {sys.executable} -m pip uninstall {' '.join(owners)} (or install Trivet in another environment)"
    folder = _folder(found).parent
    if folder == Path.cwd():
        return "rename it, stand elsewhere, or set PYTHONSAFEPATH=1"
    return f"rename it, or take {folder} off PYTHONPATH"


def _foreign_owners(name: str) -> list[str]:
    """The other distributions that install a package of this name."""
    return sorted({owner for owner in importlib.metadata.packages_distributions().get(name, ()) if owner != "trivet"})


def _was_overwritten(file: str) -> bool:
    """Whether a file that our wheel installed has another hash now: two wheels may own one path, the later one wins."""
    try:
        installed = importlib.metadata.files("trivet") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    for entry in installed:
        if entry.as_posix() == file and entry.hash is not None and (path := HOME / file).samefile(entry.locate()):
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=")
            return digest.decode() != entry.hash.value
    return False


if __name__ == "__main__":
    main()
