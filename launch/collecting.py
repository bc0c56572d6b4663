"""Python's collector of cyclic garbage, called less often: what an import or a trace makes lives on, and is no garbage.

By default it walks again and again through the millions of objects that torch and transformers make as they are
imported and trace a model, and once more at the end: a third of the time of an export's graph.
"""

import atexit
import gc

_OBJECTS = 50_000  # Python's own: 700, or 2000


def rarely() -> None:
    """Let the collector run after so many new objects, and not at all when this process ends.

    Not for training: tensors in cycles would stay in memory for longer.
    """
    gc.set_threshold(_OBJECTS)
    atexit.register(gc.freeze)
