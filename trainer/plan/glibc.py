"""What a process on Linux takes for given blocks: more than they are, since glibc's malloc keeps some that are freed.

Blocks below 32 MiB lie in one heap. torch asks for them at multiples of 64 bytes, for which malloc takes up to 96 bytes
more and gives back what it cut off; where small objects lie there, a block which was freed is too small for the next
one of its size, and the heap grows. What comes of that depends on every call before. So nothing is computed here: a
small process of its own makes the same calls to malloc, without touching the memory, and asks malloc what it took.

Which small objects lie where is a guess, the same for every run: as many as fit what was cut off.
"""

import array
import ctypes
import subprocess
import sys

from trainer.plan.plan import Plan
from trainer.plan.recorder import NODE, Event

_SMALL_OBJECTS = (24, 40, 56, 72)  # bytes: of each tensor, and of each operation that autograd notes
_TIMEOUT_S = 600
_SMALL_BYTES = 32 * 2**20  # what malloc keeps of less is not worth a process
# What a training process has besides tensors, and a bare import has not: tokenizer, rows, code that is read late. Runs
# of a tiny model took 61 to 66 MiB in one process and with DDP. FSDP2 and DeepSpeed add their hooks, and what those
# leave in the heap: from the small runs of benchmarks/plan_error.py. In bf16 oneDNN keeps code and copies.
_BESIDE_BYTES, _FSDP_BYTES, _DEEPSPEED_BYTES, _BF16_BYTES = 62 * 2**20, 34 * 2**20, 117 * 2**20, 35 * 2**20


def taken_bytes(plan: Plan) -> int:
    """Return the most memory that a rank takes: of a GPU; on a CPU, beyond what importing the trainer takes."""
    if plan.on_gpu:
        return plan.total_bytes
    beside = _BESIDE_BYTES + (_DEEPSPEED_BYTES if plan.mode.startswith("zero") else 0)
    beside += _FSDP_BYTES if plan.mode == "fsdp2" else 0
    return beside + (_BF16_BYTES if plan.precision == "bf16" else 0) + tensor_bytes(plan)


def tensor_bytes(plan: Plan) -> int:
    """Return the most memory that malloc takes for a rank's tensors."""
    if plan.total_bytes < _SMALL_BYTES:
        return plan.total_bytes
    taken = footprint_bytes(plan.events) or 0
    return max(plan.total_bytes, taken + plan.batch_bytes + plan.beyond_bytes)


def footprint_bytes(events: list[Event]) -> int | None:
    """Return the most memory that malloc takes while the blocks come and go; None where nobody knows."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return None
    numbers = array.array("q", [number for event in events for number in event])
    done = subprocess.run(
        [sys.executable, "-S", "-c", _REPLAY], input=numbers.tobytes(), capture_output=True, timeout=_TIMEOUT_S
    )
    return int(done.stdout) if done.returncode == 0 else None


_REPLAY = f"""
import array, ctypes, sys

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]

def taken():
    info = libc.mallinfo2()
    return info.arena + info.hblkhd

def free(pointers):
    for pointer in pointers:
        libc.free(pointer)

numbers = array.array("q")
numbers.frombytes(sys.stdin.buffer.read())
before, most, blocks, nodes = taken(), 0, {{}}, []
for at in range(0, len(numbers), 2):
    block, size = numbers[at], numbers[at + 1]
    if block == {NODE}:
        if size:
            nodes += map(libc.malloc, {_SMALL_OBJECTS})
        else:
            free(nodes)
            nodes = []
    elif size:
        pointer = ctypes.c_void_p()
        if libc.posix_memalign(ctypes.byref(pointer), 64, size):
            sys.exit("no memory")
        blocks[block] = [pointer.value, *map(libc.malloc, {_SMALL_OBJECTS})]
        most = max(most, taken() - before)
    else:
        free(blocks.pop(block))
print(most)
"""
