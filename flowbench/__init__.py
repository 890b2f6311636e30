"""flowbench: a benchmark of reward fine-tuning for flow-matching text-to-image models."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# algorithms/ and rewards/ stand at the top of a checkout, where people contribute. In an installation they are inside
# the package; a checkout that is imported as it lies (as the current folder, or by PYTHONPATH) has them beside it.
_here = _Path(__file__).parent
if not (_here / "algorithms").is_dir():
    __path__.append(str(_here.parent))
