"""Checkpoints: one format for every mode, without pickles, never half-read.

Each rank writes the slices it owns as flat tensors `name::role` into one safetensors file; rank 0 then writes the
manifest (counters, fingerprints, which file holds which range, hashes), which makes the folder valid, and renames it.
A rank that loads reads only the ranges it holds, whatever mode and world size wrote them.
"""

import functools
import hashlib
import json
import math
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from serving import directory
from serving.directory import DirectoryError, NewerFormat
from trainer import shards
from trainer.distributed import World
from trainer.held import Held
from trainer.metrics import Terminal

_PREFIX = "step-"
_NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class Counters:
    """Where a run stands: everything besides tensors that a resumed run needs. Steps that were skipped count too."""

    step: int = 0
    total_tokens: int = 0
    elapsed_s: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    last_norm: float | None = None  # of the gradients, in the last step that was not skipped
    scores: dict[str, float] = field(default_factory=dict)  # by the step of their evaluation, that before step 0 apart
    feed: Any = None  # what the feed needs besides the number of steps: see `Feed.state_after`


def save(
    folder: Path,
    world: World,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: Counters,
    *,
    keep: int,
    fingerprints: dict[str, str],
    best: int | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX` on all ranks together; return its path.

    Removes the older ones beyond `keep` (but for that of step `best`), later ones (a run only goes back where they are
    damaged), and what a killed save left behind. `fingerprints` name what must be the same when the run goes on: see
    `load`.
    """
    final = step_folder(folder, counters.step)
    partial = folder / f".{final.name}.partial"
    held, steps = shards.held_by_rank(world, model, optimizer), shards.steps_taken(world, model, optimizer)

    def prepare() -> None:
        if world.is_main:
            for left_behind in folder.glob(f".{_PREFIX}*.partial"):
                _remove(left_behind)
            partial.mkdir(parents=True)

    def publish() -> None:
        if world.is_main:
            written_by = {"mode": world.mode, "zero_stage": world.zero_stage, "world_size": world.size}
            tensors = _merge_indices(partial, world.size)
            fields = {
                **asdict(counters),
                "loss_scale": world.scaler.state_dict() if world.scaler else None,
                "fingerprints": fingerprints,
                "written_by": written_by,
                "optimizer_steps": steps,
                "tensors": tensors,
            }
            directory.seal(partial, "checkpoint", **fields, digest=_digest(fields))
            directory.publish(partial, final)
            others = [path for path in _steps(folder) if path != final]
            later = [path for path in others if path.name > final.name]
            for path in later + others[len(later) + keep - 1 :]:
                if best is None or path != step_folder(folder, best):
                    _remove(path)

    for part in (prepare, lambda: _write_slices(partial, world, held), publish):
        _do_together(world, part, partial)
    return final


def _remove(path: Path) -> None:
    """Remove what is not needed any more; where it cannot be (NFS may hold a file), say so: what is needed is there."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        _warn(f"warning: {path}: cannot be removed ({error.strerror or error}); remove it yourself")


@functools.cache  # a text once: every save tries again
def _warn(text: str) -> None:
    Terminal.say_once(text)


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return folder / f"{_PREFIX}{step:08d}"


def _do_together(world: World, work: Callable[[], None], partial: Path) -> None:
    """Do `work` on all ranks and wait for each; where it fails on one, remove `partial` and raise on all of them.

    The ranks where it did not fail raise an OSError that says where it did, and why.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as its_own:
        error = its_own
    if world.any(error is not None):
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        reasons = gather_object([f"rank {world.rank}, host {socket.gethostname()}: {error}" if error else ""])
        raise error or OSError(next(filter(None, reasons)))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint in `folder`, or None, and why newer ones were skipped.

    Raises NewerFormat where a newer Trivet wrote one: what was trained since is not to be trained again, and lost.
    """
    skipped: list[str] = []
    for path in _steps(folder):
        try:
            _check(path)
            return path, skipped
        except NewerFormat:
            raise
        except DirectoryError as error:
            skipped.append(str(error))
    return None, skipped


def load(
    path: Path,
    world: World,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    fingerprints: dict[str, str],
) -> Counters:
    """Write the checkpoint's values into the model and optimizer; return its counters.

    Raises DirectoryError, and changes nothing, if it was saved with other `fingerprints`, or holds other tensors than
    this model learns, or other shapes.
    """
    manifest = directory.read_manifest(path, "checkpoint")
    for name, value in manifest["fingerprints"].items():
        if fingerprints.get(name) != value:
            raise DirectoryError(f"{path}: the {name} changed since it was saved; restore it, or start a new run.name")
    tensors = manifest["tensors"]
    _check_tensors(path, manifest, shards.layout(world, model, optimizer))
    # Format 2 began without steps by weight: each had taken all steps of the run.
    started = {name: manifest["step"] for name, entry in tensors.items() if "weight" in entry["roles"]}
    shards.begin(world, model, optimizer, manifest.get("optimizer_steps", started))
    with torch.no_grad():
        for part in shards.held_by_rank(world, model, optimizer):
            _read_slice(path, tensors, part)
    shards.refresh_weights(world, optimizer)
    if world.scaler and manifest.get("loss_scale"):
        world.scaler.load_state_dict(manifest["loss_scale"])
    known = Counters.__dataclass_fields__.keys() & manifest.keys()
    return Counters(**{name: manifest[name] for name in known})


def verify(path: Path) -> str:
    """Return why the checkpoint cannot be used; nothing where it is as it was written."""
    try:
        _check(path)
    except DirectoryError as error:
        return str(error)
    return ""


def check_part(path: Path, world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise DirectoryError unless the manifest, and every file that this rank will read, is as it was written."""
    files, tensors = _checked_manifest(path)["files"], directory.read_manifest(path, "checkpoint")["tensors"]
    for part in shards.held_by_rank(world, model, optimizer):
        for file, *_ in part.overlaps(tensors[part.name]["slices"]) if part.name in tensors else ():
            expected = files.pop(file, None)  # each once
            if expected is not None and directory.sha256(path / file) != expected:
                raise DirectoryError(f"{path / file}: altered since it was written (sha256 differs)")


def _check(path: Path) -> None:
    """Raise DirectoryError unless every file, the manifest too, is as it was written."""
    directory.check_files(path, _checked_manifest(path))


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = directory.read_manifest(path, "checkpoint", as_written=True)  # what the digest is of
    about_itself = ("format_version", "trivet", "kind", "files", "digest")
    fields = {name: value for name, value in manifest.items() if name not in about_itself}
    if manifest.get("digest") != _digest(fields) or not isinstance(manifest.get("files"), dict):
        raise DirectoryError(f"{path / directory.MANIFEST}: altered since it was written")
    return manifest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _steps(folder: Path) -> list[Path]:
    """Every checkpoint, whole or not, newest first; whatever else lies there is the user's own."""
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name)), reverse=True)


def _write_slices(folder: Path, world: World, held: list[Held]) -> None:
    tensors, index = {}, {}
    for part in held:
        start, stop = _owned(part, world)
        if start == stop:
            continue
        index[part.name] = {"shape": part.shape, "roles": sorted(part.views), "range": [start, stop]}
        for role, view in part.views.items():
            tensors[f"{part.name}::{role}"] = view[start - part.start : stop - part.start].detach().cpu().clone()
    save_file(tensors, folder / f"rank-{world.rank:05d}.safetensors")
    directory.write_json(folder / f"rank-{world.rank:05d}.json", index)


def _owned(part: Held, world: World) -> tuple[int, int]:
    """The range this rank writes: what it holds, or an equal share of what every rank holds."""
    if not part.replicated:
        return part.start, part.stop
    share = -(-part.stop // world.size)
    return min(world.rank * share, part.stop), min((world.rank + 1) * share, part.stop)


def _merge_indices(folder: Path, world_size: int) -> dict[str, Any]:
    """Fold the ranks' index files into one, and check that the slices tile every tensor."""
    tensors: dict[str, Any] = {}
    for rank in range(world_size):
        path = folder / f"rank-{rank:05d}.json"
        for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
            tensor = tensors.setdefault(name, {"shape": entry["shape"], "roles": entry["roles"], "slices": []})
            tensor["slices"].append([f"rank-{rank:05d}.safetensors", *entry["range"]])
        path.unlink()
    for name, tensor in tensors.items():
        tensor["slices"].sort(key=lambda piece: piece[1])
        bounds = [0, *(bound for _, *piece in tensor["slices"] for bound in piece), math.prod(tensor["shape"])]
        assert bounds[::2] == bounds[1::2], f"{name}: the ranks' slices do not tile it: {tensor['slices']}"
    return tensors


def _check_tensors(path: Path, manifest: dict[str, Any], layout: shards.Layout) -> None:
    """Raise DirectoryError unless a checkpoint has what this run needs. Weights may lack what the optimizer keeps."""
    tensors = manifest["tensors"]
    factors = {name for name, (_, roles) in layout.items() if roles == [shards.FACTOR]}
    if other := sorted((layout.keys() ^ tensors.keys()) - (factors - tensors.keys())):
        owner = "this run" if other[0] in layout else "the checkpoint"
        raise DirectoryError(f"{path}: only {owner} has {other[0]} ({len(other)} differ); start a new run.name")
    for name, found in tensors.items():
        shape, roles = layout[name]
        if found["shape"] != shape:
            raise DirectoryError(
                f"{path}: {name} has shape {found['shape']}, this run needs {shape}; start a new run.name"
            )
        if found["roles"] not in (roles, ["weight"]):
            raise DirectoryError(
                f"{path}: of {name} it holds {', '.join(found['roles'])}, this run's optimizer needs "
                f"{', '.join(roles)}; start a new run.name"
            )
        if unlisted := {file for file, *_ in found["slices"]} - manifest["files"].keys():
            raise DirectoryError(f"{path}: {name} points at {min(unlisted)}, which is no file of it; refused")


def _read_slice(path: Path, tensors: dict[str, Any], part: Held) -> None:
    entry = tensors[part.name]
    for file, start, low, high in part.overlaps(entry["slices"]):
        try:
            with safe_open(path / file, framework="pt") as tensors_file:
                for role in part.views.keys() & entry["roles"]:
                    values = tensors_file.get_slice(f"{part.name}::{role}")[low - start : high - start]
                    part.views[role][low - part.start : high - part.start].copy_(values)
        except SafetensorError as error:
            raise DirectoryError(f"{path / file}: cannot be read ({error}); remove the folder {path.name}") from None
