"""The packages that define ImageReward and HPSv2, and what they need to be imported beside a current torch."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One set for both, so that they share an environment. Beyond the two: image-reward imports helpers that transformers
# dropped after 4.55, and `clip` and `pkg_resources`, which it does not declare.
REQUIREMENTS = (
    "image-reward==1.5",
    "hpsv2==1.2.0",
    "transformers<4.56",
    "clip-anytorch==2.6.0",
    "setuptools<82",
)

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@contextmanager
def clip_vocabulary() -> Iterator[None]:
    """Within it, hpsv2 can be imported: its wheel lacks CLIP's vocabulary, which it reads on import.

    open_clip, of which hpsv2 holds a copy, has the same file.
    """
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    own, original = Path(spec.origin).with_name(_VOCABULARY), gzip.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        lost = isinstance(path, str | Path) and Path(path).name == _VOCABULARY and not Path(path).exists()
        return original(own if lost else path, *args, **kwargs)

    gzip.open = opened  # type: ignore[assignment]
    try:
        yield
    finally:
        gzip.open = original
