"""The door of the command line: sees to it that Trivet's three packages are Trivet's, then lets `launch.cli` run.

Their names are plain words, so another distribution, or a folder where you stand, may have one of them too, and
Python takes whichever comes first. Standard library only, since nothing else is known to be right yet.
"""

import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("launch", "serving", "trainer")
HOME = Path(__file__).resolve().parent
INSTALLED = {"site-packages", "dist-packages"}  # where pip puts distributions; the second on Debian


class Foreign(NamedTuple):
    """One of our packages that is another's: what is `found` and how to `mend` that, in words.

    `owners` are the distributions it belongs to, `first` is what comes before ours, None if ours was overwritten or
    is missing.
    """

    name: str
    found: str
    mend: str
    owners: tuple[str, ...] = ()
    first: Path | None = None


def main() -> None:
    """Run the command line; without our own packages, one line on stderr and exit code 2."""
    refuse_foreign_packages()
    from launch.cli import main

    main()


@functools.cache  # `main` asks, and then `launch` when it is imported
def refuse_foreign_packages() -> None:
    """End the process with exit code 2, saying which folder or distribution shadows which package, if one does."""
    if message := foreign_package():
        if os.environ.get("RANK", "0") == "0":  # once for all ranks
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def foreign_package() -> str:
    """Return a line about the first package that is not ours and how to mend that; nothing if all three are ours."""
    return next((f"{each.name}: {each.found}; {each.mend}" for each in foreign_packages()), "")


def foreign_packages() -> list[Foreign]:
    """Return those of the three packages that are not ours. Imports none of them.

    A package is ours if it lies beside this file and is as it was installed.
    """
    return [foreign for name in PACKAGES if (foreign := _foreign(name))]


def foreign_owners(name: str) -> list[str]:
    """Return the other distributions that install a package of this name. Slow: it reads what every one installed."""
    return sorted({owner for owner in importlib.metadata.packages_distributions().get(name, ()) if owner != "trivet"})


def _foreign(name: str) -> Foreign | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return Foreign(name, f"Trivet's own package is missing in {HOME}", "install Trivet again")
    found = Path(spec.origin).resolve()
    if found != HOME / name / "__init__.py":
        first = found.parent if found.name == "__init__.py" else found
        owners = tuple(foreign_owners(name)) if INSTALLED.intersection(found.parts) else ()
        return Foreign(name, f"{first} comes before Trivet's own {HOME / name}", _mend(first, owners), owners, first)
    if _was_overwritten(f"{name}/__init__.py"):
        owners = tuple(foreign_owners(name))
        whose = " and ".join(owners) or "another package"
        mend = f"uninstall {whose}, then install Trivet again, in an environment of its own"
        return Foreign(name, f"files of {whose} lie in Trivet's {HOME / name}", mend, owners)
    return None


def _mend(first: Path, owners: tuple[str, ...]) -> str:
    """What to do about what comes first: take its distributions away, or else keep its folder off the path."""
    if owners:
        return f"run: {sys.executable} -m pip uninstall {' '.join(owners)} (or install Trivet in another environment)"
    if first.parent == Path.cwd():
        return "rename it, stand elsewhere, or set PYTHONSAFEPATH=1"
    return f"rename it, or take {first.parent} off PYTHONPATH"


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
