"""What the goodput model is fed with: each number with its unit and where it comes from.

What a benchmark measured names its JSON and the path in there; a test compares the two wherever the
JSON is kept, so that whoever runs a benchmark again brings this table along. What no benchmark has
measured yet is provisional, and `plan` says so.
"""

from typing import NamedTuple

RESULTS = "tests/bench/results"


class Measured(NamedTuple):
    """A number that a benchmark measures; medians, where it kept a spread."""

    value: float
    unit: str
    bench: str  # script in tests/bench, and JSON of that name in RESULTS
    path: str  # keys in that JSON, with dots
    is_provisional: bool = False


class Published(NamedTuple):
    """A number that others published, or that is assumed; `source` says which."""

    value: float
    unit: str
    source: str


# A save of STATE_BYTES by each worker: how long the loop stands still, how long the save goes on
# beside it, and what both take from the training, the slow-down of the updates beside counted in.
STATE_BYTES = Measured(177342464, "B a worker", "checkpoint", "figures.state_bytes")
STALL_S = Measured(0.0209, "s", "checkpoint", "figures.stall_s")
BACKGROUND_S = Measured(0.7176, "s", "checkpoint", "figures.background_s")
SAVE_LOST_S = Measured(0.2257, "s", "checkpoint", "figures.lost_s")

# Seconds without an update, from the last before to the first new one, less work done again.
PLANNED_S = Measured(11.3, "s", "resize", "figures.planned_s")
CRASH_S = Measured(0.929, "s", "resize", "figures.crash_s")
NODE_S = Measured(10.723, "s", "resize", "figures.node_s")

MEASURED = {
    "STATE_BYTES": STATE_BYTES,
    "STALL_S": STALL_S,
    "BACKGROUND_S": BACKGROUND_S,
    "SAVE_LOST_S": SAVE_LOST_S,
    "PLANNED_S": PLANNED_S,
    "CRASH_S": CRASH_S,
    "NODE_S": NODE_S,
}

# What the benchmarks ran on: the device of their JSON, and what was trained.
MEASURED_ON = {
    "checkpoint": "2 ranks on 2 cores of an AMD EPYC",
    "resize": "a DiT of 1.0 M parameters on 2 cores of an AMD EPYC",
}

RATE_LLAMA3 = Published(
    4.7e-4, "1/GPU-day", "Llama 3 405B, arXiv 2407.21783: 419 unplanned in 54 days of 16,384 GPUs"
)
RATE_RSC = Published(
    3.0e-3, "1/GPU-day", "Meta RSC, arXiv 2410.21680: mean time to failure 7.9 h on 1,024 GPUs"
)
MACHINE_SHARE = Published(
    0.587, "of faults", "Llama 3 405B: faults of a GPU, which take its machine out of the run"
)
MACHINE_GPUS = Published(8.0, "GPUs", "assumed: one machine fails as a whole")
RETURN_S = Published(600.0, "s", "assumed: until a lost machine, or another for it, is there")
GPU_FLOPS = Published(4.0e14, "FLOP/s a GPU", "assumed: 40 % of an H100's 989 TFLOP/s in bf16")
RUN_DAYS = Published(30.0, "days", "assumed: how long the run is that is modelled")
