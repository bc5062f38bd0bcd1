"""Looking for the least of a function of a few numbers, of which only values are known: CMA-ES.

Covariance matrix adaptation (Hansen and Ostermeier, 2001): points are drawn around a mean from a normal
distribution; the mean moves to the better half of them, and the distribution stretches along the directions
that it has moved in. It needs no derivatives and does not mind a rough function, which is what a made-up
trace's hit rates are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WIDTH = 0.15  # of the first draws, in a unit cube
OUTSIDE = 5.0  # what a point outside the cube is charged by distance


class Evolution:
    """Draws points and learns from their values; arrays float64."""

    def __init__(self, start: np.ndarray, seed: int) -> None:
        n = start.size
        self._random = np.random.default_rng(seed)
        self.points = 4 + int(3 * np.log(n))
        half = self.points // 2
        self._weights = np.log(half + 0.5) - np.log(np.arange(1, half + 1))
        self._weights /= self._weights.sum()
        self._mass = 1 / (self._weights**2).sum()
        self._mean, self._width, self._covariance = start.copy(), WIDTH, np.eye(n)
        self._path, self._width_path, self._rounds = np.zeros(n), np.zeros(n), 0
        self._axes, self._scales = np.eye(n), np.ones(n)

    def draw(self) -> np.ndarray:
        """float64 [points, n]."""
        values, self._axes = np.linalg.eigh(self._covariance)
        self._scales = np.sqrt(np.maximum(values, 1e-14))
        steps = self._random.standard_normal((self.points, self._mean.size)) * self._scales @ self._axes.T
        return self._mean + self._width * steps

    def learn(self, points: np.ndarray, values: np.ndarray) -> None:
        """Of the points just drawn, the smaller the better."""
        n, mass = self._mean.size, self._mass
        self._rounds += 1
        best = np.argsort(values)[: self._weights.size]
        steps = (points[best] - self._mean) / self._width
        moved = self._weights @ steps
        self._mean = self._mean + self._width * moved
        slow = (mass + 2) / (n + mass + 5)
        whitened = self._axes @ ((self._axes.T @ moved) / self._scales)
        self._width_path = (1 - slow) * self._width_path + np.sqrt(slow * (2 - slow) * mass) * whitened
        usual = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        length = np.linalg.norm(self._width_path)
        steady = length / np.sqrt(1 - (1 - slow) ** (2 * self._rounds)) < (1.4 + 2 / (n + 1)) * usual
        along = (4 + mass / n) / (n + 4 + 2 * mass / n)
        self._path = (1 - along) * self._path + steady * np.sqrt(along * (2 - along) * mass) * moved
        one = 2 / ((n + 1.3) ** 2 + mass)
        many = min(1 - one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
        self._covariance = (1 - one - many) * self._covariance
        self._covariance += one * np.outer(self._path, self._path) + many * (steps.T * self._weights) @ steps
        damping = 1 + 2 * max(0.0, np.sqrt((mass - 1) / (n + 1)) - 1) + slow
        self._width *= float(np.exp(slow / damping * (length / usual - 1)))


def least(
    function: Callable[[np.ndarray], float],
    start: np.ndarray,
    *,
    evaluations: int,
    good_enough: float,
    seed: int,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, float]:
    """The best point of the unit cube that was met, and its value; asks for `evaluations` values at most."""
    evolution = Evolution(start, seed)
    best, best_value, asked = start, function(start), 1
    while asked < evaluations and best_value > good_enough:
        points = evolution.draw()
        inside = np.clip(points, 0, 1)
        values = np.array([function(point) for point in inside])
        if values.min() < best_value:
            best, best_value = inside[values.argmin()], float(values.min())
        evolution.learn(points, values + OUTSIDE * np.abs(points - inside).sum(axis=1))
        asked += values.size
        progress(values.size)
    return best, best_value
