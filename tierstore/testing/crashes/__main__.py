"""python -m tierstore.testing.crashes: training stores through crashes; prints seeds, fails at the first
wrong one.

    --crashes N   power cuts on a simulated disk, many to a seed
    --kills N     kill -9 of real processes
    --seed N      the first seed; a failing one is printed, and `--seed N --crashes 1 --kills 0` repeats it
"""

from __future__ import annotations

import argparse
import sys
import time

from tierstore.testing.crashes.killed import KilledRun
from tierstore.testing.crashes.simulated import SimulatedRun

KILLS_OF_A_STORE = 10  # then a new one is made


def simulated(crashes: int, first_seed: int) -> None:
    seed, done, in_flight, copies, started = first_seed, 0, 0, 0, time.monotonic()
    while done < crashes:
        run = SimulatedRun(seed)
        try:
            run.run()
        except BaseException:
            print(
                f"seed {seed} fails; again: python -m tierstore.testing.crashes --seed {seed} --crashes 1 "
                "--kills 0",
                file=sys.stderr,
            )
            raise
        done, in_flight, seed = done + run.crashes, in_flight + run.recovered_in_flight, seed + 1
        copies += run.copies
    if done:
        print(
            f"{done} simulated power cuts, seeds {first_seed} to {seed - 1}: every recovery was a committed "
            f"step, {in_flight} times one that was on its way; {copies} snapshots were copied meanwhile; "
            f"{time.monotonic() - started:.0f} s"
        )


def killed(kills: int, first_seed: int) -> None:
    seed, left, in_flight, steps, outputs, started = first_seed, kills, 0, 0, 0, time.monotonic()
    while left > 0:
        run = KilledRun(seed)
        try:
            run.run(min(left, KILLS_OF_A_STORE))
        except BaseException:
            print(f"seed {seed} of killed processes fails (their timing is the system's)", file=sys.stderr)
            raise
        left, seed, in_flight = left - run.kills, seed + 1, in_flight + run.recovered_in_flight
        steps, outputs = steps + run.steps, outputs + run.outputs_killed
    if kills > 0:
        print(
            f"{kills} processes killed with {steps} steps acknowledged: every recovery was a committed step, "
            f"{in_flight} times one that was on its way; {outputs} more killed while they published or "
            f"copied a step; {time.monotonic() - started:.0f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crashes", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    killed(args.kills, args.seed)
    simulated(args.crashes, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
