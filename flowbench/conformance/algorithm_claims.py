"""What must hold of every algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from flowbench import __file__ as package
from flowbench.config import resolve_config
from flowbench.conformance.bench import PATIENCE, AlgorithmBench, difference, finished, state
from flowbench.conformance.declarations import declaration_fault
from flowbench.conformance.learning import t_interval
from flowbench.conformance.rest import it_comes_to_rest
from flowbench.conformance.row_claims import loss_is_a_function_of_rows
from flowbench.conformance.verdict import Claim, Finding, Verdict, examine, failed, passed, skipped
from flowbench.conformance.watch import LossCall, Part
from flowbench.errors import UsageError
from flowbench.settings import full_names

DOCS = Path(package).parent.parent / "docs"
STANDARD_ERRORS = 4.0  # that a sampled reward may lie beyond the frontier


def check_algorithm(name: str, model: str = "gaussian") -> Iterator[Finding]:
    """Try every claim on an algorithm, with runs on this model; yields as it goes.

    Raises UsageError for an unknown algorithm or model.
    """
    with TemporaryDirectory(prefix="flowbench-check-") as folder:
        yield from examine("algorithm", name, CLAIMS, AlgorithmBench(name, model, Path(folder)))


def metadata_is_complete(bench: AlgorithmBench) -> Verdict:
    """Paper, summary, a description of every hyperparameter; valid ablations, defaults and search dimensions.

    A built-in algorithm also has a page.
    """
    info, cls = bench.plugin.info, bench.plugin.cls
    missing = [name for name in ("paper", "summary") if not getattr(info, name).strip()]
    fields = cls.Config.model_fields
    missing += [f"the description of {name}" for name, field in fields.items() if not (field.description or "").strip()]
    page = DOCS / "algorithms" / f"{bench.name}.md"
    if cls.__module__.startswith("flowbench.algorithms.") and DOCS.is_dir() and not page.is_file():
        missing.append(f"docs/algorithms/{bench.name}.md")
    if missing:
        return failed(f"missing: {', '.join(missing)}")
    for changed in cls.ablations:
        try:
            bench.config(full_names(changed))
        except UsageError as error:
            return failed(f"its ablation {dict(changed)} is refused: {error}")
    fault = declaration_fault(cls)
    return failed(fault) if fault else passed()


def needs_are_honoured(bench: AlgorithmBench) -> Verdict:
    """It works with what it declares and no more, uses a declared gradient, and is refused where a need is not met."""
    declared, seen = bench.plugin.info.needs, bench.observed
    held = ", ".join(sorted(declared)) or "no needs"
    if seen.fault and seen.fault[0] != "training":
        return failed(f"its {seen.fault[0]} fails with a rollout that holds only {held}: {seen.fault[1]}")
    if "reward_grad" not in declared and seen.scored:
        return failed("it calls self.score, but does not declare the need 'reward_grad'")
    if "reward_grad" in declared and not seen.scored:
        return failed("it declares the need 'reward_grad', but never calls self.score")
    if "log_prob" in declared and not _refused(bench, bench.reward_name, bench.model, {"training.sampler": "ode"}):
        return failed("it needs log_prob, but is not refused with a sampler that has none")
    if "reward_grad" in declared and not _refused(bench, "jpeg", "mini-sd3", {}):
        return failed("it needs reward_grad, but is not refused with a reward that has no gradient")
    return passed()


def _refused(bench: AlgorithmBench, reward: str, model: str, overrides: Mapping[str, object]) -> bool:
    try:
        resolve_config(bench.name, reward, model, overrides=dict(overrides))
    except UsageError:
        return True
    return False


def loss_is_per_row(bench: AlgorithmBench) -> Verdict:
    """Each part of the loss is (R,), float32 and finite; the policy has one after its warm-up."""
    seen = bench.observed
    for call in seen.calls:
        for name, part in _parts(call):
            if part.shape != (call.rows,):
                return failed(f"its {name} loss has shape {part.shape} for {call.rows} rows; expected ({call.rows},)")
            if part.dtype != torch.float32:
                return failed(f"its {name} loss is {str(part.dtype).removeprefix('torch.')}; expected float32")
            if not part.finite:
                return failed(f"its {name} loss is not finite")
    if seen.fault:
        # A fault of one of its methods has failed the needs already.
        return (failed if seen.fault[0] == "training" else skipped)(f"its run ended early: {seen.fault[1]}")
    if seen.first_policy_loss is None:
        return failed(f"the policy has no loss in {PATIENCE} iterations")
    return passed()


def _parts(call: LossCall) -> Iterator[tuple[str, Part]]:
    for name, part in (("policy", call.policy), ("auxiliary", call.auxiliary)):
        if part is not None:
            yield name, part


def gradients_stay_in_place(bench: AlgorithmBench) -> Verdict:
    """The policy's loss trains the policy, the auxiliary loss the algorithm's networks; nothing else moves."""
    seen = bench.observed
    if seen.moved:
        return failed(f"it changes {', '.join(sorted(seen.moved))}, which no update may touch")
    if seen.stray:
        return failed(f"its gradient reaches parameters of {', '.join(sorted(seen.stray))} that are not trained")
    for call in seen.calls:
        if call.auxiliary and call.auxiliary.reaches_policy:
            return failed("the gradient of its auxiliary loss reaches the policy")
        if call.policy and call.policy.reaches_networks:
            return failed("the gradient of its policy loss reaches its own networks; detach their output")
    if seen.fault:
        return skipped(f"its run ended early: {seen.fault[1]}")
    if not any(call.policy and call.policy.reaches_policy for call in seen.calls):
        return failed("the gradient of its policy loss does not reach the policy")
    if any(call.auxiliary for call in seen.calls) and not any(
        call.auxiliary and call.auxiliary.reaches_networks for call in seen.calls
    ):
        return failed("the gradient of its auxiliary loss does not reach the networks that networks() names")
    return passed()


def state_round_trips(bench: AlgorithmBench) -> Verdict:
    """A new run made from a checkpoint holds what the interrupted one held, to the last bit."""
    if bench.observed.fault:
        return skipped(f"its run ended early: {bench.observed.fault[1]}")
    first, second = bench.interrupted(bench.iterations - 2)
    where = difference(state(first), state(second))
    return failed(f"after a checkpoint is read back, {where} differs") if where else passed()


def resuming_is_exact(bench: AlgorithmBench) -> Verdict:
    """An interrupted and resumed run equals one without interruption."""
    if bench.observed.fault:
        return skipped(f"its run ended early: {bench.observed.fault[1]}")
    at = bench.iterations - 2
    _, second = bench.interrupted(at)
    second.run()
    resumed = finished(second)
    for whole, part in zip(bench.straight.log, resumed.log, strict=True):
        if where := difference(whole, part):
            return failed(f"interrupted after iteration {at}, {where} differs in iteration {whole['iteration']}")
    where = difference(bench.straight.state, resumed.state)
    return failed(f"interrupted after iteration {at}, {where} differs at the end") if where else passed()


def the_seed_decides(bench: AlgorithmBench) -> Verdict:
    """The same seed gives the same run, whatever else uses the global random generators."""
    if bench.observed.fault:
        return skipped(f"its run ended early: {bench.observed.fault[1]}")
    again = bench.again()
    for one, other in zip(bench.straight.log, again.log, strict=True):
        if where := difference(one, other):
            return failed(
                f"with the same seed, {where} differs in iteration {one['iteration']}; draw from policy.generator"
            )
    where = difference(bench.straight.state, again.state)
    return failed(f"with the same seed, {where} differs at the end; draw from policy.generator") if where else passed()


def it_improves_the_reward(bench: AlgorithmBench) -> Verdict:
    """The exact gain over a few seeds has a 95 % interval (Student's t) above zero, see AlgorithmBench.learned."""
    if problem := _untestable(bench):
        return skipped(problem)
    gains = np.array([learned.sampled if learned.gain is None else learned.gain for learned in bench.learned])
    low, high = t_interval(gains)
    text = f"E[r] {gains.mean():+.3f} [{low:+.3f}, {high:+.3f}] over {len(gains)} seeds"
    return passed(text) if low > 0 else failed(text)


def it_respects_the_frontier(bench: AlgorithmBench) -> Verdict:
    """The reward of its samples is not above what any distribution of its KL can have, up to sampling error."""
    if problem := _untestable(bench):
        return skipped(problem)
    for learned in bench.learned:
        if learned.best is None:
            return failed(f"seed {learned.seed}: the sampler's map folds, so that its samples have no density")
        slack = STANDARD_ERRORS * learned.standard_error
        if learned.sampled > learned.best + slack:
            return failed(
                f"seed {learned.seed}: E[r] {learned.sampled:+.3f} at a KL of {learned.kl:.3f}; "
                f"no distribution exceeds {learned.best:+.3f} (sampling error {slack:.3f})"
            )
    shares = [learned.gain / learned.best for learned in bench.learned if learned.gain and learned.best]
    return passed(f"{np.mean(shares):.0%} of the best gain at its KL" if shares else "")


def _untestable(bench: AlgorithmBench) -> str | None:
    if not bench.analytic:
        return f"model '{bench.model}' has no known optimum; use --model gaussian"
    return f"its run ended early: {bench.observed.fault[1]}" if bench.observed.fault else None


CLAIMS: tuple[Claim[AlgorithmBench], ...] = (
    Claim("metadata is complete", metadata_is_complete),
    Claim("declared needs are honoured", needs_are_honoured),
    Claim("the loss is per row and finite", loss_is_per_row),
    Claim("the loss is a function of rows", loss_is_a_function_of_rows),
    Claim("gradients reach only what is trained", gradients_stay_in_place),
    Claim("state round-trips bit for bit", state_round_trips),
    Claim("resuming is exact", resuming_is_exact),
    Claim("the same seed gives the same run", the_seed_decides),
    Claim("it improves a linear reward", it_improves_the_reward),
    Claim("it stays within the frontier", it_respects_the_frontier),
    Claim("it comes to rest, if anchored", it_comes_to_rest),
)
