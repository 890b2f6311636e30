"""One style for all pictures, and what the pictures of a run show."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.errors import UsageError
from flowbench.evaluation.pairs import Pair
from flowbench.evaluation.protocol import SplitScores
from flowbench.prompts import Prompt
from flowbench.record import Point
from flowbench.registry import FAMILIES, algorithms, register_algorithm
from flowbench.reporting import style
from flowbench.reporting.meanings import meaning
from flowbench.reporting.plots import Curve, ablation_curves, learning_curves
from flowbench.reporting.samples import blocks, changed_samples, sampled_of

PAGES = Path(__file__).parent.parent / "docs" / "algorithms"
BUILT_IN = sorted(page.stem for page in PAGES.glob("*.md"))


def test_every_built_in_method_has_its_familys_colour_and_a_look_of_its_own():
    looks = {name: style.mark(name) for name in BUILT_IN}
    assert len(looks) == 12
    assert len(set(looks.values())) == 12
    for name, look in looks.items():
        assert look.color == style.COLORS[style.family_of(name)]
        assert style.family_of(name) == algorithms.get(name).info.family  # read from the source, and from the class
    by_family = {family: [n for n in looks if style.family_of(n) == family] for family in FAMILIES}
    assert [len(names) for names in by_family.values()] == [6, 3, 2, 1, 0]


def test_a_foreign_method_has_a_look_that_its_name_alone_decides():
    assert style.mark("somebodys") == style.mark("somebodys", "other")
    assert style.mark("somebodys").marker not in {style.mark(name).marker for name in ("acflow", "raft", "nft")}
    assert style.mark("[/]\n\x1b").color == style.COLORS["other"]
    with pytest.raises(UsageError, match="is of family 'forward', which is unknown; did you mean 'forward-p"):
        register_algorithm("strange", paper="none", needs=set(), family="forward")(type("Strange", (), {}))


def test_lines_and_text_stand_out_from_their_ground():
    def luminance(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for theme in (style.LIGHT, style.DARK):
        assert min(contrast(c, theme.ground) for c in (theme.ink, theme.truth, theme.base)) > 4.5
        assert min(contrast(c, theme.ground) for name, c in style.COLORS.items() if name != "other") > 2.8


def test_labels_are_moved_apart_and_keep_their_order():
    values = [0.0, 0.1, 0.15, 5.0, 5.05]
    placed = style.spaced(values, 1.0)
    assert min(b - a for a, b in itertools.pairwise(placed)) > 1 - 1e-9
    assert np.mean(placed[:3]) == pytest.approx(np.mean(values[:3]))
    assert style.spaced([3.0, 1.0], 1.0) == [3.0, 1.0]


def test_a_long_prompt_is_two_lines_and_an_ellipsis():
    assert style.wrap("short", 20) == "short"
    two = style.wrap("a very long prompt of many words that goes on and on", 16)
    assert two.endswith("…")
    assert [len(line) <= 16 for line in two.split("\n")] == [True, True]


def test_pictures_are_seven_inches_wide_at_200_dots_in_light_and_dark(tmp_path: Path):
    def build(theme: style.Theme) -> Any:
        figure = style.figure(style.FULL, 1.0)
        figure.subplots().set_ylabel("$5 a_b")
        return figure

    written = style.save_variants(tmp_path / "one", build, "what it says <&>")
    assert [path.name for path in written] == ["one.png", "one.svg", "one-dark.png", "one-dark.svg"]
    light, dark = (Image.open(path) for path in written[::2])
    assert light.size == dark.size == (1400, 200)
    assert light.getpixel((0, 0))[3] == 0
    svg = written[1].read_text(encoding="utf-8")
    assert "$5 a_b" in svg
    assert "what it says &lt;&amp;&gt;" in svg
    again = style.save_variants(tmp_path / "two", build, "what it says <&>")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in written]


def lines(**metrics: list[float]) -> list[dict[str, Any]]:
    """Three lines of a training log."""
    return [
        {"images": 32 * (k + 1), "reward": 0.1 * k, "metrics": {m: v[k] for m, v in metrics.items()}} for k in range(3)
    ]


def test_the_curves_of_a_run_show_dev_at_its_points_and_every_metric_with_its_meaning(tmp_path: Path):
    points = [
        Point(images=32 * k, iteration=k, seconds=k, function_evaluations=k, scores={"clip": k, "diversity": 1.0})
        for k in (1, 3)
    ]
    log = lines(critic_loss=[1, 0.5, 0.3], mine=[1, 2, 3], oracle_exact=[0.1, 0.2, 0.3])
    learning_curves(tmp_path / "curves.png", log, "acflow on $clip$", "clip", {"clip": 0.0}, points, "acflow")
    svg = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    for text in (
        "reward: clip",
        "truth: share correct",
        "diversity",
        "acflow on $clip$",
        "averaged policy on split dev",
    ):
        assert text in svg
    assert Image.open(tmp_path / "curves.png").size[0] == Image.open(tmp_path / "metrics.png").size[0] == 1400


def test_without_points_the_training_reward_is_smoothed(tmp_path: Path):
    learning_curves(tmp_path / "curves.png", lines(), "raft on jpeg", "jpeg")
    assert "moving average" in (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert not (tmp_path / "metrics.png").exists()


def test_every_metric_that_a_page_documents_has_a_meaning():
    for name in BUILT_IN:
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        table = page.split("## Logged metrics")[1].split("\n## ")[0].split("| --- | --- | --- |")[1].split("\n\n")[0]
        metrics = re.findall(r"^\| `(\w[\w.]*)`", table, re.MULTILINE)
        assert "grad_norm" in metrics
        assert [m for m in metrics if not meaning(m, name)] == []
    assert meaning("explained_variance_0.33", "acflow") == meaning("explained_variance", "acflow")
    assert meaning("mine", "acflow") == meaning("mine", "unknown") == ""


@pytest.mark.parametrize("variants", [3, 8])
def test_an_ablation_says_what_its_bands_are_and_names_each_line(variants: int, tmp_path: Path):
    curve = Curve(np.arange(4), np.arange(8.0).reshape(2, 4))
    ablation_curves(tmp_path / "a.svg", {f"tau={k}": {"reward": curve} for k in range(variants)}, "acflow on clip")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "range" in svg.split("Bands: the seeds")[1][:20]
    assert all(f"tau={k}" in svg for k in range(variants))


def pair(prompts: int = 12, n: int = 2) -> Pair:
    """An evaluation whose last prompts changed most."""

    def scores(shift: float) -> SplitScores:
        each = np.full((prompts, n), 0.5) + shift * np.arange(prompts)[:, None]
        means = {"clip": each.mean(1), "w2": np.zeros(prompts)}
        images = {"clip": each, "oracle_exact": np.array([[0.0, 1.0]] * prompts)}
        named = tuple(Prompt(f"prompt ${k}", "all") for k in range(prompts))
        return SplitScores(named, means, torch.rand(prompts, n, 3, 8, 8), images)

    return Pair(scores(0.0), scores(-0.01))


def test_the_samples_that_changed_most_come_first_and_a_random_block_beside_them():
    sampled = sampled_of(pair(), "clip")
    most, others = blocks(sampled, 4)
    assert [s.prompt for s in most] == ["prompt $11", "prompt $10", "prompt $9", "prompt $8"]
    assert len(others) == 4
    assert not {s.prompt for s in most} & {s.prompt for s in others}
    assert [s.prompt for s in blocks(sampled_of(pair(), "clip"), 4)[1]] == [s.prompt for s in others]
    assert most[0].change == pytest.approx(-0.11)
    assert most[0].rewards[1].tolist() == pytest.approx([0.39, 0.39])


def test_under_each_image_stands_its_reward_and_the_truths_verdict(tmp_path: Path):
    changed_samples(tmp_path / "s.svg", sampled_of(pair(), "clip"), "raft on clip", "clip", rows=2)
    svg = (tmp_path / "s.svg").read_text(encoding="utf-8")
    assert svg.count("0.50 ✓") == svg.count("0.50 ✗") == 4
    assert "0.39 ✓" in svg
    assert "prompt $11" in svg
    assert "from the same noise" in svg


def test_a_run_without_scores_of_single_images_is_drawn_all_the_same(tmp_path: Path):
    whole = pair(3)
    bare = Pair(*(SplitScores(s.prompts, s.scores, s.grid) for s in (whole.base, whole.tuned)))
    changed_samples(tmp_path / "s.png", sampled_of(bare, "unknown"), "raft on clip", "clip")
    assert (tmp_path / "s.png").stat().st_size > 1000
