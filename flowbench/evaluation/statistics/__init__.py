"""Statistics of results, as pure functions of arrays and records; docs/statistics.md says which and why."""

from flowbench.evaluation.statistics.bootstrap import mean_ci95
from flowbench.evaluation.statistics.correlation import RankCorrelation, rank_correlation
from flowbench.evaluation.statistics.crossed import LIKE, THESE, Components, Interval, Over, components
from flowbench.evaluation.statistics.gains import Gains, gains_from_records
from flowbench.evaluation.statistics.means import (
    difference,
    interquartile_mean,
    mean_gain,
    probability_of_improvement,
)
from flowbench.evaluation.statistics.power import smallest_difference
from flowbench.evaluation.statistics.ranking import Pair, Ranking, Standing, compare
from flowbench.evaluation.statistics.targets import (
    Profile,
    Reached,
    Trajectory,
    cost_to_target,
    performance_profile,
    reached,
)

__all__ = [
    "LIKE",
    "THESE",
    "Components",
    "Gains",
    "Interval",
    "Over",
    "Pair",
    "Profile",
    "RankCorrelation",
    "Ranking",
    "Reached",
    "Standing",
    "Trajectory",
    "compare",
    "components",
    "cost_to_target",
    "difference",
    "gains_from_records",
    "interquartile_mean",
    "mean_ci95",
    "mean_gain",
    "performance_profile",
    "probability_of_improvement",
    "rank_correlation",
    "reached",
    "smallest_difference",
]
