"""A trial's run: it is evaluated on `dev` at the end of its budget and on nothing else, and what is read of it."""

from __future__ import annotations

from typing import Any

from flowbench.errors import RunError
from flowbench.experiments.tuning.selection import DevResult
from flowbench.names import path_name
from flowbench.record import Record

DIVERSITY = "diversity"

# No reporting split and no judge: what does not exist cannot be selected by. One point, the end of the budget.
DEV_ALONE: dict[str, Any] = {"evaluation.splits": [], "evaluation.judges": [], "evaluation.points": 1}


def dev_result(record: Record) -> DevResult:
    """The reward trained on and the diversity at the end of the budget, of tuned and base model on `dev`.

    Of everything in a record a search reads these four numbers.
    Raises RunError for a run that was not scored there.
    """
    last = record.points[-1] if record.points else None
    if last is None or last.images != record.budget.images:
        raise RunError("the run has no score on dev at the end of its budget; its prompts need a split 'dev'")
    tuned, base = last.scores, record.dev_base
    reward = path_name(record.reward)
    for name in (reward, DIVERSITY):
        if name not in tuned or name not in base:
            raise RunError(f"the run's scores on dev lack '{name}'; a search needs it")
    return DevResult(tuned[reward], base[reward], tuned[DIVERSITY], base[DIVERSITY])
