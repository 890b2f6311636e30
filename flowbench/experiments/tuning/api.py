"""`flowbench.tune`: what the command of this name does, with the same defaults. Importing this module is cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.experiments.defaults import DEVICE, OUTPUT, SEARCHES, WORKLOAD
from flowbench.outputs import check_folder

if TYPE_CHECKING:
    from flowbench.experiments.study import StudyListener
    from flowbench.experiments.tuning.plan import SearchPlan
    from flowbench.experiments.tuning.search import Places
    from flowbench.experiments.tuning.tune import StudyResult

ALL = "all"


def tune(
    algorithm: str | Sequence[str],
    workload: str = WORKLOAD,
    trials: int | None = None,
    studies: int = 1,
    finalists: int | None = None,
    more_seeds: int | None = None,
    sampler: str = "qmc",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    executor: str = "local",
    jobs: int | None = None,
    cores: int = 1,
    gpus: int | None = None,
    slurm: Mapping[str, str] | None = None,
    device: str = DEVICE,
    plugins: Sequence[str | Path] = (),
    runs: str | Path = OUTPUT,
    output: str | Path = SEARCHES,
    *,
    listener: StudyListener | None = None,
) -> list[StudyResult]:
    """Search for settings of algorithms, the same for each, selected on dev: `flowbench tune`.

    Runs are made by other processes, so that a script needs the usual `if __name__ == "__main__":`. The same call
    continues a search that was interrupted.

    Args:
        algorithm: a name or several, or "all": every installed one that can be run on the workload.
        workload: a workload's name or YAML file.
        trials: of each study; None is what the rules have, 20, or 5 where there are several studies.
        studies: independent ones; more than one is ruleset "tuned".
        finalists: trials that run again; None is what the rules have, 3, or none where there are several studies.
        more_seeds: of the finalists; None is what the rules have, 2.
        sampler: "qmc", a scrambled Sobol sequence; "tpe" is outside the rules.
        seed: of the first study's scramble, at least 0.
        settings: overrides that hold for every trial; with others than those that divide the work it is none of a
            ruleset.
        executor: "local", "ray" or "slurm".
        jobs: runs at a time; None is one on this machine, elsewhere as many as there is room for.
        cores: of each run; other numbers may round otherwise.
        gpus: of each run; None is one where it uses one.
        slurm: options of Slurm by submitit's names.
        device: "auto", "cpu", "cuda", ...
        plugins: Python files that register algorithms or rewards.
        runs: the folder of run folders.
        output: the folder of logs and choices.
        listener: is told how far the search is.

    Returns:
        Each study's choice and trials, in the order of the names.

    Raises:
        UsageError: the request is wrong, or the log there is of another search; nothing was computed.
        BusyError: another process is at the same search.
        RunError: runs were cut off again; what was made is kept.
    """
    from flowbench.experiments.executors import executor_for
    from flowbench.experiments.study import StudyListener
    from flowbench.experiments.tuning.tune import tune as search

    names, plan, places = asked(
        *(algorithm, workload, trials, studies, finalists, more_seeds, sampler, seed, settings),
        *(device, plugins, runs, output),
    )
    check_folder("--runs", places.runs)
    check_folder("--output", Path(output))
    where = executor_for(executor, jobs, cores, gpus, device, Path(runs), slurm)
    return search(names, plan, places, listener or StudyListener(), executor=where)


def asked(
    algorithm: str | Sequence[str],
    workload: str,
    trials: int | None,
    studies: int,
    finalists: int | None,
    more_seeds: int | None,
    sampler: str,
    seed: int,
    settings: Mapping[str, Any] | None,
    device: str,
    plugins: Sequence[str | Path],
    runs: str | Path,
    output: str | Path,
) -> tuple[list[str], SearchPlan, Places]:
    """The algorithms, the plan and the places of a request; arguments as in `tune`. Plug-ins are loaded.

    Raises UsageError as `tune` does.
    """
    from flowbench.registry import algorithms, load_plugin_file
    from flowbench.workloads import load_workload

    files = tuple(map(Path, plugins))
    for file in files:
        load_plugin_file(file)
    names = [algorithm] if isinstance(algorithm, str) else list(algorithm)
    for name in names if names != [ALL] else ():
        algorithms.describe(name)  # a misspelling is answered before torch is imported
    chosen = load_workload(workload)

    from flowbench.experiments.tuning.plan import search_plan
    from flowbench.experiments.tuning.search import Places
    from flowbench.experiments.tuning.tune import searchable

    plan = search_plan(chosen, trials, studies, finalists, more_seeds, sampler, seed, settings)
    places = Places(Path(runs), Path(output), device, files)
    return searchable(plan, places) if names == [ALL] else names, plan, places
