"""What `flowbench run` computes before it begins: memory, time, and the division of the work below a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.errors import UsageError

if TYPE_CHECKING:
    from flowbench.config import RunConfig
    from flowbench.experiments.planning.plan import Plan


def planned(
    config: RunConfig, dry_run: bool, memory: bool, limit: str | None, tflops: float | None, file: Path | None
) -> tuple[RunConfig, Plan | None]:
    """The configuration, divided so that it stays below the limit, and its plan if one was asked for.

    Raises UsageError for options that do not go together, RunError for a limit that cannot be kept.
    """
    wanted = {"--memory": memory, "--tflops": tflops is not None, "--json": file is not None}
    for option in (name for name, given in wanted.items() if given):
        if not dry_run:
            raise UsageError(f"{option} belongs to --dry-run; add it")
        if not memory:
            raise UsageError(f"{option} needs --memory; add it")
    if not memory and limit is None:
        return config, None
    from flowbench.experiments.planning.plan import divided, parse_memory, plan
    from flowbench.files import write_atomically

    bound = None if limit is None else parse_memory(limit)
    found = plan(config, bound, tflops)
    if file is not None:
        write_atomically(file, json.dumps(found.as_json(), indent=1) + "\n")
    return config if bound is None else divided(config, found.division), found
