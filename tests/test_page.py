from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from fake_records import METHODS, fake_record, fake_records
from PIL import Image

from flowbench.errors import UsageError
from flowbench.record import Record
from flowbench.reporting.documents import to_csv
from flowbench.reporting.page import about, data
from flowbench.reporting.page.build import page_data, tables
from flowbench.reporting.page.curves import front
from flowbench.reporting.page.render import html, write
from flowbench.reporting.page.samples import spread, walls
from flowbench.workloads import Target, load_workload

HOSTILE = "<script>alert(1)</script>\"'& </script><!--\u202e\u2066"


def page_of(records: list[Record], **more: Any) -> data.PageData:
    return page_data(tables(records), records, **more)


def levels(gains: dict[str, float], seeds: int = 4, **changed: Any) -> list[Record]:
    """Runs whose gain in oracle_exact is as given on every prompt, but for a little noise."""
    made = []
    for k, (method, gain) in enumerate(gains.items()):
        for seed in range(seeds):
            one = fake_record(method, seed, k=0, points=False, **changed)
            values = one.per_prompt["oracle_exact/test"]
            tuned = [b + gain + 0.004 * ((i + 3 * k + 5 * seed) % 7 - 3) for i, b in enumerate(values["base"])]
            score = one.scores["oracle_exact/test"].model_copy(update={"tuned": sum(tuned) / len(tuned)})
            update = {
                "per_prompt": {**one.per_prompt, "oracle_exact/test": {"base": values["base"], "tuned": tuned}},
                "scores": {**one.scores, "oracle_exact/test": score},
                "config_hash": method,
            }
            made.append(one.model_copy(update=update))
    return made


# ---- the verdict


def test_the_first_sentence_says_who_shares_the_first_place_and_the_second_whom_they_beat():
    said = page_of(levels({"nft": 0.2, "acflow": 0.2, "awm": 0.05, "ddpo": 0.0})).verdict
    assert re.match(r"(nft and acflow|acflow and nft) share the first place by oracle_exact at 4 seeds:", said[0])
    assert said[1].startswith("Both beat the other two (5\u00a0%")
    assert re.search(r"The smallest difference that 4 seeds can show here is 0\.\d+", said[2])


def test_one_method_that_beats_all_is_first_alone():
    said = page_of(levels({"nft": 0.2, "awm": 0.05, "ddpo": 0.0})).verdict
    assert said[0] == "nft alone has the first place by oracle_exact at 4 seeds."
    assert said[1].startswith("It beats the other two")


def test_equal_methods_are_not_separable():
    assert page_of(levels({"nft": 0.1, "awm": 0.1})).verdict[0].startswith("No method is separable from the others")


def test_a_single_seed_tells_nothing_apart():
    page = page_of(levels({"nft": 0.2, "awm": 0.0}, seeds=1))
    assert [(row.rank, row.shares_first) for row in page.workloads[0].rows] == [(None, False)] * 2
    assert page.verdict == ("One finished run a method: there are no intervals, and nothing can be told apart.",)


def test_a_method_with_one_seed_never_stands_among_the_first():
    records = [*levels({"nft": 0.2, "ddpo": 0.0}), *levels({"awm": 0.3}, seeds=1)]
    said = page_of(records).verdict
    assert said[0].startswith("nft alone has the first place")
    assert "Nothing can be told of awm: one finished run." in said


def test_one_method_alone_is_compared_with_the_base_model():
    assert "above the base model's, and it has no rank" in page_of(levels({"nft": 0.2})).verdict[0]
    assert "not separable from the base model's" in page_of(levels({"nft": 0.0})).verdict[0]


def test_failed_runs_are_counted_and_never_called_results():
    failed = {"status": "failed", "failure": "out of memory", "scores": {}, "per_prompt": {}}
    alone = page_of([fake_record("nft", seed, **failed) for seed in range(3)])
    assert alone.verdict == ("No run has finished: there is nothing to compare.",)
    assert alone.facts.failed == 3
    beside = page_of([*levels({"awm": 0.1, "ddpo": 0.0}), fake_record("nft", 0, config_hash="nft", **failed)])
    assert "No run of nft finished." in beside.verdict
    assert beside.workloads[0].rows[-1].runs[0].failure == "out of memory"


def test_an_empty_folder_makes_a_page_that_says_so():
    page = page_of([])
    assert page.verdict == ("There is no result yet: no record of a run was found.",)
    assert "There is no result yet" in html(page)


def test_several_workloads_are_summed_up_by_who_is_first_on_all():
    def both(clip: dict[str, float], other: dict[str, float]) -> tuple[str, ...]:
        return page_of([*levels(clip), *levels(other, workload="shapes-imagereward")]).verdict

    everywhere = both({"nft": 0.2, "awm": 0.0}, {"nft": 0.2, "awm": 0.1})
    assert everywhere[0] == "nft is the only method that is in the first place on both workloads, alone or shared."
    nowhere = both({"nft": 0.2, "awm": 0.0}, {"nft": 0.0, "awm": 0.2})
    assert nowhere[0] == "No method is in the first place on both workloads."
    assert nowhere[1].startswith("shapes-clip: first nft; awm is behind")


def test_runs_of_different_commits_and_without_a_ruleset_are_named_before_any_number():
    records = levels({"nft": 0.1, "awm": 0.0})
    records[0] = records[0].model_copy(update={"commit": "f" * 40})
    cautions = " ".join(page_of(records).warnings)
    assert "different commits, devices or versions" in cautions
    assert "no ruleset" in cautions


# ---- the data


def test_a_page_has_every_method_pair_and_run_of_its_records():
    page = page_of(fake_records(seeds=3))
    assert [w.name for w in page.workloads] == ["shapes-clip", "shapes-imagereward"]
    assert {m.name for m in page.methods} == set(METHODS)
    (clip, _) = page.workloads
    assert len(clip.pairs) == 12 * 11 / 2
    assert sum(len(row.runs) for row in clip.rows) == 36
    assert clip.roles == data.Roles(reward="clip", truth="oracle_exact", diversity="diversity", distance="w2")
    assert {j.name for j in clip.judges} >= {"clip", "hpsv2", "mean of the held-out judges"}


def test_curves_are_gains_over_the_base_model_with_intervals_over_seeds():
    (workload,) = page_of(fake_records(seeds=3, methods=("acflow",), workloads=("shapes-clip",))).workloads
    end = workload.rows[0].curve[-1]
    assert (end.images, len(workload.rows[0].curve)) == (2880, 5)
    assert end.scores["oracle_exact"].value == pytest.approx(0.1 * (1 - 0.082), abs=0.02)
    assert end.scores["diversity"].value == pytest.approx(0.98, abs=0.02)
    assert end.scores["clip"].low is not None
    assert end.scores["clip"].low < end.scores["clip"].value


def test_a_target_is_half_of_the_largest_median_gain_unless_the_workload_states_one(monkeypatch: pytest.MonkeyPatch):
    records = fake_records(seeds=3, workloads=("shapes-clip",))
    (workload,) = page_of(records).workloads
    assert workload.goal is not None
    assert (workload.goal.metric, workload.goal.fixed) == ("oracle_exact", False)
    best = workload.rows[0].reached["images"]
    assert best.median is not None
    assert 0 < best.median < 2880
    worst = next(row for row in workload.rows if row.label == "refl").reached["images"]
    assert (worst.median, worst.arrived) == (None, 0)
    known = load_workload("shapes-clip")
    stated = known.model_copy(update={"target": Target(metric="oracle_exact", gains=(0.05, 0.08))})
    monkeypatch.setattr(about, "load_workload", lambda name: stated)
    same = [r.model_copy(update={"workload_hash": known.hash}) for r in records]
    assert page_of(same).workloads[0].goal == data.Goal(metric="oracle_exact", gain=0.05, fixed=True)
    assert page_of(records).workloads[0].goal == workload.goal  # of another version of the workload


def test_records_without_points_make_a_page_that_says_what_is_missing():
    page = page_of(fake_records(seeds=2, points=False))
    assert page.profile is None
    assert any("no curves" in said for said in page.workloads[0].missing)


def test_the_front_has_whom_no_other_surpasses_in_both():
    assert front({"a": (1, 3), "b": (2, 2), "c": (1, 2), "d": (3, 1)}) == ("d", "b", "a")


def test_trials_of_a_search_are_shown_with_the_method_and_stand_in_no_table():
    trial = fake_record("nft", 7, ruleset="search", config={"hyperparameters": {"tau": 2.0}})
    other = fake_record("nft", 8, ruleset="search", config={"hyperparameters": {"tau": 0.5}})
    page = page_of([*fake_records(seeds=2, methods=("nft",)), trial, other])
    assert page.facts.trials == 2
    assert sum(len(row.runs) for w in page.workloads for row in w.rows) == 4
    assert [t.settings for t in page.methods[0].trials] == ["algorithm.tau=2.0", "algorithm.tau=0.5"]


def test_methods_link_to_their_page_and_paper_and_name_their_search_space():
    (method,) = page_of(levels({"acflow": 0.1}), spaces=about.spaces(["acflow", "unheard-of"])).methods
    assert method.paper == "https://arxiv.org/abs/2510.18072"
    assert method.page == "https://flowbench.github.io/flowbench/algorithms/acflow/"
    assert "logarithmic" in method.space["training.learning_rate"]
    (foreign,) = page_of(levels({"javascript:alert(1)": 0.1})).methods
    assert (foreign.page, foreign.paper) == (None, None)


def test_the_embedded_data_reads_back_as_the_model_it_was():
    page = page_of(fake_records(seeds=2, methods=("acflow", "nft")))
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html(page), re.DOTALL)
    assert block
    assert data.PageData.model_validate_json(block[1]) == page


def test_hostile_names_cannot_end_an_element_or_reorder_text():
    records = levels({HOSTILE: 0.1, "nft": 0.0}, command=HOSTILE, commit=HOSTILE, device=HOSTILE)
    text = html(page_of(records), to_csv(tables(records)))
    assert "<script>alert" not in text
    assert not re.search("[\u202e\u2066]", text)
    assert text.count("</script>") == 3


def test_the_data_lie_beside_the_page_if_asked(tmp_path: Path):
    records = levels({"nft": 0.1, "awm": 0.0})
    page = page_of(records)
    written = write(tmp_path / "index.html", page, to_csv(tables(records)), beside=True)
    assert [path.name for path in written] == ["index.html", "index.json", "index.csv"]
    assert json.loads(written[1].read_text())["schema_version"] == data.VERSION
    assert written[2].read_text().startswith("workload,")


# ---- samples


def keep_images(folder: Path, record: Record, prompts: int = 24, size: int = 32) -> None:
    """A run's folder with images, all of one colour that tells prompt and model."""
    record.save(folder / "record.json")
    lines = ["file,split,model,guidance_scale,prompt_index,image,noise_seed,prompt,oracle_exact"]
    for model in ("base", "tuned"):
        for k in range(prompts):
            file = folder / "images" / (name := f"test/{model}/{k:04d}-0.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), (10 * k, 200 if model == "tuned" else 0, record.seed % 256)).save(file)
            lines.append(f"{name},test,{model},1.0,{k},0,7,a prompt,{1.0 if model == 'tuned' else 0.0}")
    lines.append("../../../secret.png,test,tuned,1.0,0,0,7,a prompt,1.0")
    (folder / "images" / "images.csv").write_text("\n".join(lines), encoding="utf-8")


def test_a_wall_shows_the_same_prompts_of_the_seed_that_most_methods_have(tmp_path: Path):
    records = fake_records(seeds=2, methods=("acflow", "nft"), workloads=("shapes-clip",))
    for k, record in enumerate(records[:3]):
        keep_images(tmp_path / str(k), record)
    (wall,) = walls([tmp_path], tables(records))
    assert (wall.workload, wall.seed, wall.size) == ("shapes-clip", 100, (32, 32))
    assert [strip.method for strip in wall.strips] == [None, "acflow", "nft"]
    assert len(wall.tiles) == 24
    assert wall.strips[0].passed == (False,) * 24
    assert wall.strips[1].image.startswith("data:image/png;base64,")
    assert page_of(records, walls=[wall]).walls[0].workload == "w0"


def test_large_images_become_thumbnails(tmp_path: Path):
    record = fake_record("nft", 0)
    keep_images(tmp_path / "a", record, prompts=2, size=256)
    (wall,) = walls([tmp_path], tables([record]))
    assert wall.size == (128, 128)
    assert wall.strips[1].image.startswith("data:image/webp;base64,")


def test_a_folder_without_kept_images_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(UsageError, match="run them with --keep-images"):
        walls([tmp_path], tables([fake_record("nft", 0)]))


def test_prompts_are_taken_evenly_from_each_category():
    assert spread(["a", "a", "a", "a", "b", "c", "c"], 5) == [0, 1, 4, 5, 6]
    assert spread(["a"], 5) == [0]


@pytest.mark.slow
def test_two_thousand_records_become_a_page_of_three_megabytes_in_twenty_seconds():
    records = fake_records(seeds=84, prompts=119)
    begun = time.process_time()
    result = tables(records)
    text = html(page_data(result, records), to_csv(result))
    assert len(records) > 2000
    assert time.process_time() - begun < 20
    assert len(text.encode()) <= 3 * 2**20
