"""How fast an ONNX directory answers and what memory it takes: a process for each, which measures when it is told to.

`python -m launch.speed ONNX_DIR` says "ready", then for every line that it reads a line of JSON: figures by name.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

PROMPT_TOKENS, NEW_TOKENS = 32, 32
TEXTS = 16
BATCHES = (1, 8)
PEAK = "peak MB"

Measure = Callable[[], float]


def main() -> None:
    """Open the directory and measure for every line of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this process ends it
    folder = Path(sys.argv[1])
    measures = measures_of(folder)
    for measure in measures.values():
        measure()  # the first run allocates what later ones use again
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps({name: measure() for name, measure in measures.items()} | {PEAK: peak_mb()}), flush=True)


def measures_of(folder: Path) -> dict[str, Measure]:
    """Return what is measured of a directory, by name; each returns how many a second."""
    from serving.directory import read_manifest

    if read_manifest(folder, "onnx")["task"] == "causal_lm":
        return _of_decoder(folder)
    return _of_texts(folder)


def _of_decoder(folder: Path) -> dict[str, Measure]:
    """Greedy tokens a second of the engine, prompts included."""
    from serving.engine import Engine
    from serving.request import Request, Sampling

    engine = Engine.open(folder, slots=max(BATCHES))
    random = Random(0)

    def generate(batch: int) -> float:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_end=True)
        tokens = range(engine.manifest["vocab_size"])
        requests = [Request(str(each), random.choices(tokens, k=PROMPT_TOKENS), sampling) for each in range(batch)]
        started = time.perf_counter()
        for request in requests:
            engine.add(request)
        engine.run()
        return batch * NEW_TOKENS / (time.perf_counter() - started)

    return {f"tokens/s, batch {batch}": lambda batch=batch: generate(batch) for batch in BATCHES}  # type: ignore[misc]


def _of_texts(folder: Path) -> dict[str, Measure]:
    """Texts a second, one by one as they are served: rows of the tokens of held-out text, or of some others."""
    from serving.directory import read_manifest
    from serving.quality import HeldOut
    from serving.session import Session
    from serving.tasks import Row, run_rows

    manifest, session = read_manifest(folder, "onnx"), Session.open(folder)
    rows = HeldOut.load(folder).rows[:TEXTS] or [Row([1], False)]

    def answer() -> float:
        started = time.perf_counter()
        for row in rows:
            run_rows(session, manifest, [row])
        return len(rows) / (time.perf_counter() - started)

    return {"texts/s": answer}


def peak_mb() -> float:
    """Return the most memory that this process has held, as Linux counts it (its parent's is not in it)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
