"""Every record that needs a GPU, from one command: `tierbench gpu`, or `make bench-gpu`.

A section is a module `sections/NAME.py`:

    TIMEOUT_S = 60                          how long it may take at the scale of a GPU
    BARS = (Bar("what", "path.in.results", ">=", 1.2),)
    def run(device: torch.device, scale: Scale) -> dict: ...

and nothing else has to know of it. `run` checks what it measures before it measures it, takes every size
from `scale`, keeps files under `scale.scratch`, and returns what JSON can hold. Each section runs in a
process of its own (`child.py`, started by `isolated.py`), so one that hangs, runs out of device memory or
dies loses no other. Its record is written as soon as it has ended.

A machine with a GPU may be had for minutes only: `plan.py` divides the sections into two parts, each of
which fits into ten minutes by its timeouts alone.
"""
