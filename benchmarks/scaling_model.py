"""Predict the time of a training step on N devices from FLOPs, bandwidth, latency and the traffic of the mode.

`scaling_fit.py` fits it on one and two processes and holds it against two machines whose cable is throttled.
"""

import math
from dataclasses import dataclass, replace

# Times the bytes of the whole model that each rank sends in a step, over (N - 1) / N: what a ring sends. One all-reduce
# is a reduce-scatter and an all-gather; a divided model is gathered for the forward and for the backward pass.
PASSES = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 3, "fsdp2": 3}
# gloo makes a reduce-scatter of a whole all-reduce: one pass more, as the bytes on the cable show.
PASSES_OVER_GLOO = {mode: passes + (mode != "ddp") for mode, passes in PASSES.items()}
MODES = tuple(PASSES)


@dataclass(frozen=True)
class Link:
    """What joins ranks: bytes a second that each can send, and seconds that a message takes however short."""

    bytes_per_s: float
    latency_s: float = 0.0

    def ring_s(self, num_bytes: float, world: int, messages: int) -> float:
        """Return how long `num_bytes`, summed over the passes, in so many messages take around the ring."""
        if world == 1:
            return 0.0
        return (world - 1) / world * num_bytes / self.bytes_per_s + messages * (world - 1) * self.latency_s


@dataclass(frozen=True)
class Job:
    """What one step of the whole run is: of these tokens, with these weights, of which each pass sends `bytes_each`."""

    mode: str
    weights: float
    tokens: float  # of a step, over all ranks
    bytes_each: float = 4.0  # of a weight or gradient on its way: 4 in fp32, 2 in bf16
    messages: int = 1  # that each pass is cut into
    over_gloo: bool = False

    @property
    def passes(self) -> int:
        return (PASSES_OVER_GLOO if self.over_gloo else PASSES)[self.mode]

    @property
    def num_bytes(self) -> float:
        """Bytes of all passes of a step, before the (N - 1) / N of a ring."""
        return self.passes * self.bytes_each * self.weights


@dataclass(frozen=True)
class Device:
    """One rank: seconds for a token and for a step whatever its tokens; what it hides of the traffic behind work."""

    s_per_token: float
    s_per_step: float = 0.0
    overlap: float = 0.0  # 0: traffic and work one after the other; 1: as much at once as there is work

    @classmethod
    def of_flops(cls, weights: float, flops_per_s: float, *, overlap: float) -> "Device":
        """Return one that does 6 operations for each weight and token, attention left out."""
        return cls(6 * weights / flops_per_s, overlap=overlap)


def step_s(job: Job, world: int, device: Device, link: Link, inner: Link | None = None, node: int = 1) -> float:
    """Return the seconds of one step on `world` ranks.

    With `inner` the ranks of one `node` are joined by it: a pass goes around inside each node, and what one rank holds
    then goes around between the nodes, over `link`.
    """
    work_s = device.s_per_token * job.tokens / world
    messages = job.passes * job.messages
    if inner is None or world <= node:
        traffic_s = (inner or link).ring_s(job.num_bytes, world, messages)
    else:
        inside_s = inner.ring_s(job.num_bytes, node, messages)
        traffic_s = inside_s + link.ring_s(job.num_bytes / node, math.ceil(world / node), messages)
    hidden_s = device.overlap * min(work_s, traffic_s)
    return device.s_per_step + work_s + traffic_s - hidden_s


def efficiency(job: Job, world: int, device: Device, link: Link, inner: Link | None = None, node: int = 1) -> float:
    """Return how much of one device's speed each of `world` reaches, with as many tokens a rank as `job` has in all."""
    grown = replace(job, tokens=job.tokens * world)
    return step_s(job, 1, device, link) / step_s(grown, world, device, link, inner, node)
