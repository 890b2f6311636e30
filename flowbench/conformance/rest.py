"""Whether a method that is anchored by its formula comes to rest, where the reward has no bound."""

from __future__ import annotations

from dataclasses import dataclass

from flowbench.conformance.bench import AlgorithmBench
from flowbench.conformance.verdict import Verdict, failed, passed, skipped
from flowbench.evaluation.exact import COARSE_SPACING, exact_evaluation, quadratic_form
from flowbench.models.families.plane import exact_field
from flowbench.testbeds.plane.density import Point, QuadraticForm
from flowbench.training.trainer import Trainer

MODEL = "mixture"
# Sampling error included. Twenty runs of orw-cfm-w2 moved by at most 11 % in gain and 22 % in KL; methods without an
# anchor move by several times their KL.
LARGEST_MOVE_REWARD, LARGEST_MOVE_KL = 0.15, 0.3


@dataclass(frozen=True)
class Ending:
    """Mean gain in E[r] and mean KL over the last fifth of a run and over the fifth before."""

    before: Point
    last: Point

    @property
    def moves(self) -> tuple[float, float]:
        """By how much gain and KL changed, as shares of the last."""
        return _move(self.before.reward, self.last.reward), _move(self.before.kl, self.last.kl)


def ending(trainer: Trainer, reward: QuadraticForm) -> Ending | None:
    """Train on an analytic model to the end of the budget; None if the weights leave all that has a density.

    Points are exact, and those of the averaged weights, where the run keeps an average.
    """
    exact = exact_evaluation(trainer.policy, reward, spacing=COARSE_SPACING)
    base, fifth = exact.frontier(0.0).base, max(1, trainer.iterations // 5)
    path: list[Point | None] = []

    def probe(iteration: int) -> dict[str, float]:
        if iteration > trainer.iterations - 2 * fifth:
            with trainer.updater.average.in_use():
                path.append(exact.point(exact_field(trainer.policy)))
        return {}

    trainer.probe = probe
    trainer.run()
    points = [point for point in path if point]
    if len(points) < len(path):
        return None
    return Ending(_mean(points[:fifth], base), _mean(points[fifth:], base))


def _move(before: float, last: float) -> float:
    return abs(last - before) / max(abs(last), 1e-9)


def _mean(points: list[Point], base: float) -> Point:
    n = len(points)
    return Point(sum(p.reward for p in points) / n - base, sum(p.kl for p in points) / n)


def it_comes_to_rest(bench: AlgorithmBench) -> Verdict:
    """With a linear reward on the mixture, the path ends at a fixed point, if the class declares itself anchored."""
    if bench.observed.fault:
        return skipped(f"its run ended early: {bench.observed.fault[1]}")
    if not bench.plugin.cls.anchored:
        return skipped("it does not declare that its formula anchors it")
    plane = AlgorithmBench(bench.name, MODEL, bench.folder / MODEL)
    found = ending(plane.trainer(plane.config({})), quadratic_form(plane.reward))
    if found is None:
        return failed(f"on {MODEL} it leaves all that has a density")
    reward, kl = found.moves
    text = (
        f"on {MODEL} E[r] moves by {reward:.0%} and KL by {kl:.0%} in the last fifth, "
        f"at a gain of {found.last.reward:.2f} and a KL of {found.last.kl:.2f}"
    )
    return passed(text) if reward <= LARGEST_MOVE_REWARD and kl <= LARGEST_MOVE_KL else failed(text)
