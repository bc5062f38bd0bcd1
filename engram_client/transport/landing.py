"""One read's right to fill one place of a staging ring, which it loses when the step is given up.

Several threads may be after that right: one that brings rows, one that gives the step up, the garbage
collector at any moment. Whoever takes the mark first has it; taking it is one step of the interpreter, so
there is no lock to be caught in.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena import copying


class Landing:
    """Room for the rows of one read, uint8 [bytes], and the word that says they are there.

    address, word: of the rows, and of the completion word
    step:          what the word is stamped with
    settled:       whether nobody writes here any more
    """

    def __init__(self, rows: np.ndarray, address: int, word: int, step: int) -> None:
        self.rows = rows
        self.address = address
        self.word = word
        self.step = step
        self.settled = False
        self._mine = [True]

    def _take(self) -> bool:
        """True once."""
        try:
            return self._mine.pop()
        except IndexError:
            return False

    def land(self, rows: np.ndarray) -> bool:
        """Copy rows of so many bytes here and stamp them; False where the step was given up."""
        if not self._take():
            return False
        try:
            self.rows[:] = rows.reshape(-1)
            copying.stamp(self.word, self.step)
        finally:
            self.settled = True
        return True

    def give_up(self) -> None:
        """Nothing lands here any more; what is landing right now still does."""
        if self._take():
            self.settled = True
