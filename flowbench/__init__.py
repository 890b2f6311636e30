"""flowbench: a benchmark of reward fine-tuning for flow-matching text-to-image models.

`run`, `evaluate` and `tune` do what the commands of these names do, `load_records` reads what runs leave, and
`register_algorithm` and `register_reward` add plug-ins. They are imported when they are first used, so that
`import flowbench` stays cheap.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowbench.experiments.api import RunResult, evaluate, load_records, run
    from flowbench.experiments.tuning.api import tune
    from flowbench.registry import register_algorithm, register_reward

__version__ = "0.1.0"
__all__ = ["RunResult", "evaluate", "load_records", "register_algorithm", "register_reward", "run", "tune"]
_ELSEWHERE = {"tune": "flowbench.experiments.tuning.api"}

# algorithms/ and rewards/ stand at the top of a checkout, where people contribute. In an installation they are inside
# the package; a checkout that is imported as it lies (as the current folder, or by PYTHONPATH) has them beside it.
_here = _Path(__file__).parent
if not (_here / "algorithms").is_dir():
    __path__.append(str(_here.parent))


if not TYPE_CHECKING:  # else a type checker would believe in every name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'flowbench' has no attribute '{name}'")
        module = "flowbench.registry" if name.startswith("register_") else "flowbench.experiments.api"
        return getattr(_import_module(_ELSEWHERE.get(name, module)), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
