"""The order in which a server that batches sees the tokens of its documents.

So many sessions run side by side. Each takes the next document when it has finished one; in every step
it adds a chunk of its prompt, or while it decodes a step's tokens. The tokens that all sessions add
in one step are one batch, session after session.
"""

from __future__ import annotations

import numpy as np

from tierbench.policy.compiled import simulator


def server_batches(
    starts: np.ndarray, prompts: np.ndarray, lengths: np.ndarray, *, sessions: int, chunk: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the tokens in the order a server sees them, int64, and where each batch ends, int64.

    Document d, int64 [documents], holds the tokens from position starts[d] on, lengths[d] of them, the first
    prompts[d] of which are added `chunk` at a time and the others `step` at a time.
    """
    positions = np.empty(int(lengths.sum()), np.int64)
    ends = np.empty(positions.size, np.int64)
    count = _batches(
        starts, prompts, lengths, min(sessions, max(1, lengths.size)), chunk, step, positions, ends
    )
    return positions, ends[:count].copy()


@simulator
def _batches(starts, prompts, lengths, sessions, chunk, step, positions, ends):
    running = np.empty(sessions, np.int64)  # document of each session, in the order they began
    done = np.zeros(sessions, np.int64)  # tokens of it that were added
    active = waiting = written = count = 0
    while True:
        while active < sessions and waiting < lengths.size:
            if lengths[waiting]:
                running[active], done[active] = waiting, 0
                active += 1
            waiting += 1
        if active == 0:
            return count
        left = 0
        for s in range(active):
            d, first = running[s], done[s]
            if first < prompts[d]:
                last = min(first + chunk, prompts[d])
            else:
                last = min(first + step, lengths[d])
            for t in range(first, last):
                positions[written] = starts[d] + t
                written += 1
            if last < lengths[d]:
                running[left], done[left] = d, last
                left += 1
        active = left
        ends[count] = written
        count += 1
