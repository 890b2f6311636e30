"""The log of a search: Optuna's journal file, which proposes trials and keeps every result, failed ones too."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.errors import UsageError
from flowbench.experiments.tuning.plan import QMC, SamplerName
from flowbench.experiments.tuning.selection import Candidate, DevResult
from flowbench.experiments.tuning.space import SearchSpace, distribution
from flowbench.files import write_atomically

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import Study

LOG = "journal.log"
IDENTITY = "search"  # the study's attribute that says what it is a search of
DIMENSIONS = 6  # of the quasi-random sequence, as many as the rules allow a space
CRC, NONE_BEFORE = "crc", b"00000000"  # the last entry of a line of the log
_ENTRY = re.compile(rb'(.*),"([^"]*)":"([0-9a-f]{8})"\}')
SEED_OF_TRIAL = 7919  # apart, so that studies do not share proposals


@dataclass(frozen=True)
class Attempt:
    """One run of a trial. run: the name of its folder, <config-hash>-s<seed>; result None: it failed, and why."""

    seed: int
    run: str
    result: DevResult | None
    failure: str | None = None


@dataclass(frozen=True)
class Trial:
    """One setting that was tried, by full names, and its runs so far, one per seed."""

    number: int
    settings: Mapping[str, Any]
    attempts: tuple[Attempt, ...]

    @property
    def candidate(self) -> Candidate:
        """What a selection sees of it."""
        return Candidate(self.number, tuple(attempt.result for attempt in self.attempts))

    @property
    def failure(self) -> str | None:
        """Why the first of its runs that failed did so."""
        return next((a.failure for a in self.attempts if a.failure), None)


class Journal:
    """One study's log. What it proposes does not depend on results with "qmc", and so not on who runs what when.

    folder: where the log lies; None is memory alone. identity: what the search is of; a log of another is refused.
    Raises UsageError for a log that is another search's, or none.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        space: SearchSpace,
        sampler: SamplerName,
        seed: int,
        identity: Mapping[str, Any],
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.sampler, self.seed = space, sampler, seed
        self.path = folder / LOG if folder else None
        self.study = _open(self.path, name)
        said = {**identity, "space": space.spelled(), "sampler": sampler, "seed": seed}
        known = self.study.user_attrs.get(IDENTITY)
        if known is None:
            self.study.set_user_attr(IDENTITY, said)
        elif known != said:
            differs = next(key for key in {**known, **said} if known.get(key) != said.get(key))
            raise UsageError(
                f"'{self.path}' is the log of another search ({differs}: {known.get(differs)!r}, now "
                f"{said.get(differs)!r}); use another --output, or delete that folder"
            )

    def propose(self, count: int) -> None:
        """Have so many trials; those that are there already stay as they are.

        The log gets all of the new ones in one step: a process that is killed on the way leaves none half drawn.
        """
        if len(self.study.trials) >= count:
            return
        space = {key: distribution(dimension) for key, dimension in self.space.dimensions.items()}

        def ask() -> None:
            for number in range(len(self.study.trials), count):
                self.study.sampler = self._make_sampler(number)
                self.study.ask(fixed_distributions=space)

        def draft(place: Path) -> None:
            if self.path:
                shutil.copyfile(self.path, place)
            self.study = _open(place, self.study.study_name)
            ask()

        if self.path is None:
            ask()
        else:
            write_atomically(self.path, draft)
            self.study = _open(self.path, self.study.study_name)

    def trials(self, count: int | None = None) -> list[Trial]:
        """The trials in the order of their proposal, the first `count` of them."""
        attempts = self.study.user_attrs
        found = []
        for frozen in self.study.trials[:count]:
            runs = attempts.get(_key(frozen.number), {})
            read = sorted((_attempt(int(seed), content) for seed, content in runs.items()), key=lambda a: a.seed)
            found.append(Trial(frozen.number, {**self.space.fixed, **frozen.params}, tuple(read)))
        return found

    def keep(self, number: int, attempt: Attempt) -> None:
        """Write what became of one run of a trial; the first is the trial's result for the sampler."""
        runs = self.study.user_attrs.get(_key(number), {})
        result = None if attempt.result is None else asdict(attempt.result)
        content = {"run": attempt.run, "result": result, "failure": attempt.failure}
        self.study.set_user_attr(_key(number), {**runs, str(attempt.seed): content})
        self._tell(number)

    def settle(self) -> None:
        """Tell the sampler of results that were kept when an earlier call was interrupted before it could."""
        for trial in self.trials():
            if trial.attempts:
                self._tell(trial.number)

    @property
    def sha256(self) -> str:
        """Of the log file; of nothing for one in memory."""
        return hashlib.sha256(self.path.read_bytes() if self.path else b"").hexdigest()

    def _tell(self, number: int) -> None:
        from optuna.trial import TrialState

        if self.study.trials[number].state.is_finished():
            return
        candidate = Candidate(number, self.trials()[number].candidate.results[:1])
        if candidate.failed:
            self.study.tell(number, state=TrialState.FAIL)
        else:
            # A collapsed trial is worth no more than the base model.
            reward, gain = candidate.reward, candidate.gain
            self.study.sampler = self._make_sampler(number)
            self.study.tell(number, reward if candidate.qualifies else reward - max(gain, 0.0))

    def _make_sampler(self, number: int) -> BaseSampler:
        """For one trial's proposal: what it draws must not depend on how often the search was interrupted."""
        from optuna.samplers import TPESampler

        if self.sampler == QMC:
            return _scrambled_sobol(self.space, self.seed)
        return TPESampler(seed=self.seed * SEED_OF_TRIAL + number)


def _scrambled_sobol(space: SearchSpace, seed: int) -> BaseSampler:
    from optuna.distributions import FloatDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import QMCSampler

    declared = {key: distribution(dimension) for key, dimension in space.dimensions.items()}

    class DeclaredSobol(QMCSampler):
        """Takes the space as declared. Optuna's own reads it from the first trial, which it therefore draws at
        random."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            """The declared space."""
            return dict(declared)

        def _sample_qmc(self, study: Any, search_space: dict[str, Any]) -> Any:
            """A point of the same sequence for every algorithm, of which each has as many coordinates as it searches.

            Coordinates depend on how many there are; so trial k has the same values of the dimensions that all
            algorithms share, which they declare first.
            """
            unused = {f"unused {k}": FloatDistribution(0.0, 1.0) for k in range(len(search_space), DIMENSIONS)}
            return super()._sample_qmc(study, {**search_space, **unused})[:, : len(search_space)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return DeclaredSobol(qmc_type="sobol", scramble=True, seed=seed)


def _open(path: Path | None, name: str) -> Study:
    import optuna

    if path is None:
        return optuna.create_study(study_name=name, direction="maximize")
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    _check_lines(path)
    try:
        storage = optuna.storages.JournalStorage(_checked_file(path))
        if name in optuna.get_all_study_names(storage):
            return optuna.load_study(study_name=name, storage=storage)
        return optuna.create_study(storage=storage, study_name=name, direction="maximize")
    except (ValueError, KeyError) as error:
        raise UsageError(f"'{path}' is no log of a search ({error}); use another --output, or delete it") from error


def _drop_torn_line(path: Path) -> None:
    """Forget a line that a killed process did not finish; Optuna would append to it."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _checked_file(path: Path) -> JournalFileBackend:
    """Optuna's file, whose lines get a checksum as their last entry; Optuna itself passes over it."""
    from optuna.storages.journal import JournalFileBackend

    class CheckedFile(JournalFileBackend):
        """Adds the checksum."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            """Write lines, each with a checksum over itself and all before it that have one."""
            match = _ENTRY.fullmatch((path.read_bytes().splitlines() or [b""])[-1])
            before, checked = match[3] if match else NONE_BEFORE, []
            for log in logs:
                before = _crc(json.dumps(log, separators=(",", ":")).encode(), before)
                checked.append({**log, CRC: before.decode()})
            super().append_logs(checked)

    return CheckedFile(str(path))


def _crc(line: bytes, before: bytes) -> bytes:
    return b"%08x" % zlib.crc32(line, int(before, 16))


def _check_lines(path: Path) -> None:
    """Raise UsageError for a line that is not as it was written, or whose neighbours are not.

    Of the last line that is gone nothing is known: its run is made again, or found where it lies. Logs that flowbench
    0.1 began have no checksums in their first lines.
    """
    before = None
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        match = _ENTRY.fullmatch(line)
        # Under a name that is damaged, too.
        if before is not None or match is not None or f'"{CRC}":'.encode() in line[-20:]:
            expected = _crc(match[1] + b"}", before or NONE_BEFORE) if match else None
            whole = match is not None and (match[2], match[3]) == (CRC.encode(), expected)
            before = expected
        else:
            whole = _is_json(line)
        if not whole:
            raise UsageError(f"line {number} of '{path}' is damaged; restore it, use another --output, or delete it")


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _key(number: int) -> str:
    return f"trial {number}"


def _attempt(seed: int, content: Mapping[str, Any]) -> Attempt:
    result = content["result"]
    return Attempt(seed, content["run"], DevResult(**result) if result else None, content["failure"])
