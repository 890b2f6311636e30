"""A plug-in may import what it likes, the way people write it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FORMS = (
    "from torch.autograd import Function",
    "import torch",
    "import torch.nn as nn",
    "from torch import nn",
    "import torch.nn.functional as F",
    "from torch import Tensor",
    "from torch.nn import Module",
    "from torch.optim import AdamW",
    "from torch.utils.data import DataLoader",
    "from torch.utils.checkpoint import checkpoint",
    "import torch.distributed as dist",
    "import numpy as np",
    "from numpy.typing import NDArray",
    "import transformers",
    "from transformers import AutoModel",
)

# The import comes first, before anything of flowbench; the class uses torch's in its base and signature.
PLUGIN = '''"""Begins with: {form}."""

{form}

import torch as t

from flowbench.reward import Reward, register_reward


class Mixin(t.nn.Module):
    pass


@register_reward("form-{i}", source="tests", licence="none", range=(0.0, 1.0), differentiable=True)
class Form(Reward):
    """Brightness."""

    zero: t.Tensor = t.zeros(1)

    def score(self, images: t.Tensor, prompts: tuple[str, ...]) -> t.Tensor:
        return images.mean((1, 2, 3))
'''


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, in which nothing is imported yet."""
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_plugin_files_load_with_every_usual_form_of_import(tmp_path: Path):
    for i, form in enumerate(FORMS):
        (tmp_path / f"form_{i}.py").write_text(PLUGIN.format(form=form, i=i), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from flowbench.registry import load_plugin_file, rewards\n"
        "assert 'torch' not in sys.modules\n"
        f"for i in range({len(FORMS)}): load_plugin_file(Path(f'form_{{i}}.py'))\n"
        "import torch\n"
        f"for i in range({len(FORMS)}):\n"
        "    reward = rewards.get(f'form-{i}').cls()\n"
        "    assert reward.score(torch.ones(2, 3, 4, 4), ('a', 'b')).tolist() == [1.0, 1.0]\n"
        "    print(reward.info.name)\n"
    )
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"form-{i}" for i in range(len(FORMS))]


def test_the_command_line_lists_a_plugin_that_begins_with_all_of_them(tmp_path: Path):
    (tmp_path / "all.py").write_text(PLUGIN.format(form="\n".join(FORMS), i="all"), encoding="utf-8")
    done = run(tmp_path, "-m", "flowbench", "list", "rewards", "--plugin", "all.py")
    assert done.returncode == 0, done.stderr
    assert "form-all" in done.stdout
    assert done.stderr == ""
