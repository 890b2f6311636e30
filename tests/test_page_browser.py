"""The page in a real browser: it works from a file, asks nobody for anything, and shows foreign text as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_records import fake_record, fake_records
from test_page import HOSTILE, keep_images
from test_studies import RECORDS, choice

from flowbench.reporting.documents import to_csv
from flowbench.reporting.page.build import page_data, tables
from flowbench.reporting.page.render import write
from flowbench.reporting.page.samples import walls

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs a chromium", allow_module_level=True)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


# The contrast of every text with what is behind it, as WCAG 2 defines it.
CONTRASTS = """() => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (!/, 0\\)$/.test(color)) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const wanted = "p, li, a, td, th, dt, dd, summary, button, h1, h2, h3, .interval, .rank";
    const shown = [...document.querySelectorAll(wanted)].filter((n) => n.offsetParent && !n.closest(".pairs td"));
    return shown.map((n) => {
        const [a, b] = [light(getComputedStyle(n).color), light(ground(n))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two workloads with samples, and among its methods one with a hostile name."""
    folder = tmp_path_factory.mktemp("site")
    records = fake_records(3, 12, ("acflow", "nft", "ddpo", "draft"), ("shapes-clip",))
    records += fake_records(3, 12, ("acflow", "nft"), ("shapes-imagereward",))
    records += [fake_record(HOSTILE, seed, k=5, prompts=12, command=HOSTILE, failure=HOSTILE) for seed in (100, 101)]
    for k, record in enumerate(records[:9:3]):
        keep_images(folder / f"run{k}", record, prompts=12)
    result = tables(records)
    page = page_data(result, records, walls=walls([folder], result))
    return write(folder / "index.html", page, to_csv(result))[0]


@dataclass
class Tab:
    """One tab for all tests, and what it logged, threw or asked for."""

    page: Any
    heard: list[str]


@pytest.fixture(scope="module")
def tab(browser: Any, site: Path) -> Tab:
    tab = Tab(browser.new_page(), [])
    tab.page.on("console", lambda message: tab.heard.append(message.text))
    tab.page.on("pageerror", lambda error: tab.heard.append(str(error)))
    known = ("data:", "blob:", site.as_uri())
    tab.page.on("request", lambda asked: asked.url.startswith(known) or tab.heard.append(asked.url))
    return tab


@pytest.fixture
def view(tab: Tab, site: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page opened anew from its file. It fails a test that made it log, throw, or ask for anything."""
    wanted = {"width": 1280, "scheme": "light", **getattr(request, "param", {})}
    tab.page.set_viewport_size({"width": wanted["width"], "height": 800})
    tab.page.emulate_media(color_scheme=wanted["scheme"])
    tab.page.goto(site.as_uri())
    tab.page.wait_for_selector("html[data-ready]", state="attached")
    yield tab.page
    assert tab.heard == []


def column(view: Any, place: int) -> list[str]:
    return view.locator(f"#w0-table tbody tr > :nth-child({place})").all_inner_texts()


def unfold(details: Any, inside: str) -> None:
    """Opens a <details> and waits for what it makes only then: the browser says `toggle` in a turn of its own."""
    details.locator("summary").first.click()
    details.locator(inside).first.wait_for()


def test_a_heading_sorts_and_says_so(view: Any):
    head = view.locator("#w0-table thead th")
    assert head.first.get_attribute("aria-sort") == "ascending"
    view.locator("#w0-table thead button", has_text="method").click()
    names = column(view, 2)
    assert names == sorted(names, key=str.lower)
    view.keyboard.press("Enter")  # the heading kept the focus
    assert column(view, 2) == names[::-1]
    assert head.nth(1).get_attribute("aria-sort") == "descending"
    view.locator("#w0-table thead button", has_text="oracle_exact").click()
    assert column(view, 2)[0] == "acflow"


def test_methods_are_filtered_by_name_and_by_family(view: Any):
    view.get_by_placeholder("Filter methods").first.fill("AC")
    assert column(view, 2) == ["acflow"]
    view.get_by_placeholder("Filter methods").first.fill("")
    view.locator("#w0-table button", has_text="policy-gradient").click()
    assert "ddpo" not in column(view, 2)
    assert "ddpo" not in view.locator("#w0-figures .legend").inner_text()


def test_columns_are_chosen(view: Any):
    assert "hpsv2" not in view.locator("#w0-table thead").inner_text()
    view.locator("#w0-table summary", has_text="Columns").click()
    view.locator("#w0-table .menu label", has_text="hpsv2").first.click()
    assert "hpsv2" in view.locator("#w0-table thead").inner_text()


def test_curves_change_their_axis(view: Any):
    curves = view.locator("#w0-figures figure").first
    assert "generated images" in curves.inner_text()
    view.locator("#w0-figures").get_by_label("seconds of training").check()
    assert "seconds of training" in curves.inner_text()
    assert "generated images" not in curves.inner_text()


def test_every_picture_has_a_description_and_the_numbers_behind_it(view: Any):
    pictures = view.locator("figure:visible svg[role=img]")
    assert pictures.count() >= 12
    described = (
        "all => all.every(one => one.querySelector('title').textContent && one.querySelector('desc').textContent)"
    )
    assert pictures.evaluate_all(described)
    first = view.locator("#w0-figures figure").first
    unfold(first, "tbody tr")
    assert first.locator("tbody tr").count() == 5 * 5


def test_a_picture_is_saved_as_a_file_of_seven_inches_that_stands_alone(view: Any, tmp_path: Path):
    with view.expect_download() as waiting:
        view.locator("#w0-figures button", has_text="Save as SVG").first.click()
    waiting.value.save_as(tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert 'width="672"' in text
    assert "var(--" not in text
    assert "#1a1a1a" in text


def test_a_pair_tells_its_difference_under_the_arrow_keys(view: Any):
    view.locator("#pairs td[tabindex='0']").focus()
    view.keyboard.press("ArrowRight")
    said = view.locator("#pairs [role=status]").inner_text()
    assert "minus" in said
    assert "after Holm's correction" in said


def test_the_wall_turns_its_pages_under_the_arrow_keys_and_holds_four_methods(view: Any):
    assert view.locator("#samples thead th").all_inner_texts() == ["prompt", "base model", "acflow", "nft", "ddpo"]
    view.locator(".wallbox").focus()
    view.keyboard.press("ArrowRight")
    assert "7 to 12 of 12" in view.locator("#samples [role=status]").inner_text()
    view.locator(".boxes label", has_text="nft").click()
    assert view.locator("#samples thead th").all_inner_texts() == ["prompt", "base model", "acflow", "ddpo"]


def test_a_method_shows_every_seed_with_its_command(view: Any):
    unfold(view.locator("details.method", has_text="acflow"), ".body a")
    assert view.locator("details.method .body a").all_inner_texts() == ["How it works here", "Paper"]
    body = view.locator("details.method .body").first.inner_text()
    for seed in (100, 101, 102):
        assert f"flowbench run acflow --reward clip --seed {seed}" in body


def test_a_tuned_row_shows_its_studies_and_a_method_what_its_searches_selected(browser: Any, tmp_path: Path):
    content = page_data(tables(RECORDS), RECORDS, searches=[choice(reason=HOSTILE), choice(edges=(HOSTILE,))])
    (path,) = write(tmp_path / "index.html", content)
    tab, wrong = browser.new_page(), list[str]()
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]", state="attached")
    assert "+0.100, +0.300, +0.120" in tab.locator("table.results").inner_text()
    method = tab.locator("details.method", has_text="nft")
    method.locator("summary").first.click()
    told = method.locator("table", has_text="best of k").inner_text()
    assert "20 (1 failed, 2 collapsed)" in told
    assert "20: +0.0200" in told
    assert "training.tuning=lora" in told
    assert wrong == []
    tab.close()


def test_hostile_names_are_text(view: Any):
    method = view.locator("details.method").first  # "<" sorts first
    unfold(method, ".body")
    shown = view.locator("body").inner_text()
    assert "<script>alert(1)</script>\"'& </script><!--<U+202E>" in shown
    assert view.locator("main script").count() == 0


@pytest.mark.parametrize("view", [{"width": 360}], indirect=True)
def test_at_360_pixels_the_page_itself_does_not_scroll_sideways(view: Any):
    unfold(view.locator("details.method").nth(1), ".body a")
    assert view.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("view", [{"scheme": "dark"}, {"scheme": "light"}], indirect=True)
def test_text_stands_out_from_its_ground_in_light_and_dark(view: Any):
    measured = view.evaluate(CONTRASTS)
    assert len(measured) > 100
    assert min(measured) >= 4.5


def test_headings_are_in_order_and_landmarks_are_named(view: Any):
    levels = view.locator("h1:visible, h2:visible, h3:visible, h4:visible").evaluate_all(
        "all => all.map(n => +n.tagName[1])"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    unnamed = "all => all.filter(n => !n.getAttribute('aria-labelledby') && !n.getAttribute('aria-label')).length"
    assert view.locator("main > section, nav, [role=region]").evaluate_all(unnamed) == 0
    assert view.locator("main, header, footer, nav").count() == 4
    assert view.locator("table:not(:has(caption))").count() == 0
