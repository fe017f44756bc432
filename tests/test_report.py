"""The report's page and table: complete, escaped, the same each time, and drawn without a fault by a real browser."""

from __future__ import annotations

import base64
import hashlib
import html as entities
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edge_infer.report import facts, html, plots, scatter, svg, text, units

RECORDS = sorted((Path(__file__).parent / "data" / "reports").glob("*.json"))
NAMES = [path.stem for path in RECORDS]
VOID = {"br", "circle", "line", "link", "meta", "path", "rect"}


def record(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "data" / "reports" / f"{name}.json").read_text("utf-8"))


def tree(page: str) -> ElementTree.Element:
    """The page as XML, without its script, which is not."""
    return ElementTree.fromstring(re.sub(r"<script>.*?</script>", "", page, flags=re.S).partition("\n")[2])


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).replace("\u00a0", " ").split())


def assert_drawn_with_numbers(page: str) -> None:
    for tag, attributes in Reader(page).tags:
        if tag in ("rect", "circle", "line", "text", "path"):
            assert not re.search(r"nan|inf|None|e[+-]\d", " ".join(str(value) for value in attributes.values()), re.I)


class Reader(HTMLParser):
    """What a browser's tokenizer sees: tags with their attributes, and that all are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)


# ------------------------------------------------------------------------------------------- form of the page


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_well_formed_and_says_what_its_tables_and_pictures_are(name: str) -> None:
    page = html.render(record(name))
    reader = Reader(page)
    assert reader.open == []
    root = tree(page)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for key in ("aria-labelledby", "aria-describedby"):
            assert set((element.get(key) or "").split()) <= set(ids)
        if element.tag == "a":
            assert (element.get("href") or "").removeprefix("#") in ids
        if element.tag == "table":
            assert words(element.find("caption"))  # type: ignore[arg-type]
            columns = {len(row) for row in element.iter("tr")}
            assert len(columns) == 1, "rows of different lengths"
        if element.tag == "svg" and element.get("aria-hidden") != "true":
            assert element.get("role") == "img" and words(element.find("title"))  # type: ignore[arg-type]
            assert "meter" in (element.get("class") or "") or words(element.find("desc"))  # type: ignore[arg-type]
    assert_drawn_with_numbers(page)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_asks_the_network_for_nothing(name: str) -> None:
    reader = Reader(html.render(record(name)))
    for tag, attributes in reader.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "audio", "video", "use", "image")
        for key in attributes:
            assert key not in ("src", "srcset", "style", "action", "xlink:href", "ping") and not key.startswith("on")
        assert re.fullmatch(r"#[a-z]+|data:,|", attributes.get("href") or "")
    assert not re.search(r"url\(|@import|//", "".join(reader.raw["style"]))
    assert not re.search(r"fetch|XMLHttp|import\(|https?:", "".join(reader.raw["script"]))


def test_only_the_page_s_own_style_and_script_may_run() -> None:
    reader = Reader(html.render(record("hostile")))
    (policy,) = (attributes["content"] for tag, attributes in reader.tags if "http-equiv" in attributes)
    for tag in ("style", "script"):
        assert len([found for found, _ in reader.tags if found == tag]) == 1
        digest = hashlib.sha256("".join(reader.raw[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_names_cannot_become_markup_or_reorder_the_text() -> None:
    given = record("hostile")
    page = html.render(given)
    page.encode("utf-8")
    kinds = {(tag, key) for tag, attributes in Reader(page).tags for key in attributes}
    assert kinds <= {
        (tag, key) for name in ("full", "layers300") for tag, attributes in Reader(html.render(record(name))).tags
        for key in attributes
    }  # fmt: skip
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    shown = words(tree(page))
    for name in (
        "<script>alert('x')</script> & \"quotes\" '",
        "red\ufffdgpj.exe \ufffd end",
        "\"'><svg onload=alert(0)>",
    ):
        assert name in shown
    assert given["layers"][0]["name"] in shown and given["layers"][3]["name"] in shown


def test_the_same_record_gives_the_same_bytes_in_any_process() -> None:
    given = record("full")
    here = html.render(given)
    assert here == html.render(json.loads(json.dumps(given)))
    code = (
        "import json, sys; from edge_infer.report.html import render; "
        "sys.stdout.buffer.write(render(json.load(sys.stdin)).encode())"
    )
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(given).encode(), capture_output=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
        )  # fmt: skip
        assert made.stdout == here.encode()
    assert given == record("full"), "the record was changed"


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys; import edge_infer.report.html, edge_infer.report.text; "
        "print({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    path = str(Path(html.__file__).parents[2])
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = set(re.findall(r"'(\w+)'", done.stdout))
    assert found.isdisjoint({"numpy", "jinja2", "plotly", "matplotlib", "rich", "torch", "tensorflow", "onnx"})


# ---------------------------------------------------------------------------------------------- what it tells


def test_the_page_starts_with_the_verdict_and_its_figures() -> None:
    root = tree(html.render(record("full")))
    first = root.find(".//main/section")
    assert first is not None and first.get("id") == "verdict"
    says = words(first)
    assert says.startswith("✓tflite int8-mixed was chosen for raspberry-pi-4.")
    for figure in ("It keeps all 5 limits.", "94.4% (90.1% to 97.0%)",
                   "the source has 94.8% on 400 samples; the loss against it is 0.4% (-0.6% to 1.4%).",
                   "loss against the source: 0.4% (-0.6% to 1.4%)",
                   "339 KB", "2.41 ms", "31.5 MB", "752 MB allowed", "float32: 3.6 \u00d7 as much"):  # fmt: skip
        assert figure in says


def test_every_candidate_is_listed_with_its_reason() -> None:
    given = record("full")
    section = tree(html.render(given)).find(".//section[@id='candidates']")
    assert section is not None
    rows = section.findall(".//tbody/tr")
    assert len(rows) == 14
    for row, item in zip(rows, given["candidates"], strict=True):
        says = words(row)
        assert row.get("class") == item["status"] and item["id"] in says and (item["reason"] or "") in says
        assert ("on the front" in says) == item["pareto"]
    assert "14 candidates: 1 chosen, 5 more fit, 8 dropped." in words(section)


def test_the_candidates_loss_stands_with_the_held_out_score() -> None:
    given = record("full")

    def losses() -> list[str]:
        section = tree(html.render(given)).find(".//section[@id='candidates']")
        assert section is not None
        return [words(part) for part in section.iter("small") if words(part).startswith("loss ")]

    assert losses()[:2] == ["loss 0.4% (-0.6% to 1.4%)", "loss 8.2% (5.1% to 11.3%)"]
    assert len(losses()) == 3
    for item in given["candidates"]:
        item["loss"] = None
    assert losses() == []
    assert "loss" not in text.summary(given)


def test_when_nothing_fits_the_page_says_what_binds_and_what_to_relax() -> None:
    root = tree(html.render(record("nothing_fits")))
    says = words(root.find(".//section[@id='verdict']"))  # type: ignore[arg-type]
    assert says.startswith(
        "✕Nothing fits raspberry-pi-zero-2w: memory is the limit that stops it; the nearest, tflite int8, has 252 MB, "
        "allowed is 188 MB."
    )
    assert "Allow 252 MB of memory with --max-memory 252MB" in says and "✕ beyond the limit" in says
    limits = [words(row) for row in root.findall(".//section[@id='limits']//tbody/tr")]
    assert "✕ not kept, 133.9%" in limits[1] and "✓ kept, 71.1%" in limits[2]
    assert "Further left and lower is better" in words(root)
    assert "✕ not kept" in words(root.find(".//section[@id='answers']"))  # type: ignore[arg-type]


def test_a_record_with_nothing_optional_makes_a_short_page() -> None:
    root = tree(html.render(record("minimal")))
    assert [section.get("id") for section in root.iter("section")] == ["verdict", "candidates"]
    assert "onnx float32 was chosen" in words(root)
    assert "Nothing was chosen" in html.render({})


@pytest.mark.parametrize("seed", range(40))
def test_any_part_of_a_record_may_be_missing_or_absurd(seed: int) -> None:
    chance = random.Random(seed)
    given = record("full")
    for _ in range(chance.choice((1, 3, 12, 60))):
        holder, key = chance.choice(list(_places(given)))
        if isinstance(holder[key], (int, float)) and chance.random() < 0.5:
            holder[key] = chance.choice((0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), 10**400))
        elif chance.random() < 0.5:
            holder[key] = None
        else:
            del holder[key]
    page = html.render(given)
    tree(page)
    assert_drawn_with_numbers(page)
    columns, rows = text.table(given)
    assert all(len(row) == len(columns) for row in rows)


def _places(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(value, dict):
        yield from ((value, key) for key in value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _places(inner)


def test_a_score_below_its_limit_is_not_called_kept() -> None:
    given = record("full")
    given["limits"] = [{"name": "score", "allowed": 0.95, "unit": "share", "from": "--min-score"}]
    (row,) = facts.limits(given)
    assert row.at_least and row.kept is False and row.observed == given["candidates"][0]["search"]["value"]
    assert "It does not keep the limit on score." in facts.verdict(given).more
    given["metric"].update(kind="error", higher_is_better=False)
    assert facts.limits(given)[0].kept is True


def test_three_hundred_layers_stay_usable() -> None:
    given = record("layers300")
    page = html.render(given)
    assert len(page) < 800_000
    section = tree(page).find(".//section[@id='layers']")
    assert section is not None and len(section.findall(".//tbody/tr")) == 300
    frame = section.find(".//div[@role='region']")
    assert frame is not None and "long" in (frame.get("class") or "") and frame.get("tabindex") == "0"
    heights = [float(picture.get("height") or 0) for picture in section.iter("svg")]
    assert len(heights) == 2 and max(heights) < 500
    kept = [mark for mark in section.findall(".//svg[@id='plot-layers']/g") if "float" in (mark.get("class") or "")]
    assert len(kept) == 6


# -------------------------------------------------------------------------------------------- plots and units


def test_marks_lie_where_their_figures_are() -> None:
    """Positions read back from the picture: linear in the score, logarithmic in the size."""
    given = record("full")
    given["candidates"] = [item for item in given["candidates"] if item["size_bytes"] and item["search"]][:8]
    samples, items = scatter.plotted(given, "size_bytes")
    assert samples == "search" and len(items) == 8
    drawing = ElementTree.fromstring(scatter.draw(given, "size_bytes", "size", "bytes", "p", 540) or "")
    spots = {}
    for mark in drawing.iter("g"):
        title, circle = mark.find("title"), mark.find("circle")
        if title is not None and circle is not None and "fits" in (mark.get("class") or ""):
            name = (title.text or "").split(" (")[0]
            spots[name] = (float(circle.get("cx") or 0), float(circle.get("cy") or 0))
    assert set(spots) == {item["id"] for item in items if item["status"] == "fits"}
    by_id = {item["id"]: item for item in items}
    one, two = spots["tflite int8-dynamic"], spots["tflite float32"]
    assert one[0] < spots["tflite float16"][0] < two[0]
    assert one[1] > two[1] == spots["tflite float16"][1]  # a lower score is further down
    assert by_id["tflite int8-dynamic"]["search"]["value"] < by_id["tflite float32"]["search"]["value"]


def test_labels_never_touch_each_other_or_a_mark() -> None:
    points = [(200 + 7.0 * (index % 5), 150 + 5.0 * (index % 4), f"tflite int8-dynamic {index}") for index in range(20)]
    marks = [svg.Box(x - 6, y - 6, 12, 12) for x, y, _ in points]
    bounds = svg.Box(0, 0, 540, 300)
    placed = svg.place_labels(points, marks, [], bounds)
    labels = [label for label in placed if label]
    assert placed[0] is not None and len(labels) >= 8
    assert all(bounds.holds(label.box) for label in labels)
    for a, b in itertools.combinations([label.box for label in labels], 2):
        assert not a.meets(b)
    assert not any(label.box.meets(mark) for label in labels for mark in marks)


@pytest.mark.parametrize(("low", "high", "log"), [
    (0, 1, False), (0.9, 0.92, False), (-0.4, 0.4, False), (1e-9, 3e2, True), (2e5, 3e5, True), (1e-12, 2e-12, False),
])  # fmt: skip
def test_axes_have_a_few_round_ticks_inside(low: float, high: float, log: bool) -> None:
    axis = svg.Axis(low, high, 0, 500, log=log)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 9 and ticks == sorted(set(ticks))
    assert all(low * 0.999 - 1e-15 <= tick <= high * 1.001 for tick in ticks if low >= 0)
    assert axis.at(low) == 0 and axis.at(high) == pytest.approx(500) and axis.at(high * 2) == pytest.approx(500)


def test_an_outlier_does_not_press_the_others_together() -> None:
    given = record("full")
    drawing = scatter.draw(given, "size_bytes", "size", "bytes", "p", 540) or ""
    assert "tflite int4-weights, 71.0%</text>" in drawing
    for item in given["candidates"]:
        item["status"] = "dropped"
    assert "71.0%</text>" not in (scatter.draw(given, "size_bytes", "size", "bytes", "p", 540) or "")


def test_an_output_says_how_far_it_is_off_altogether() -> None:
    given = record("full")
    given["outputs"][1] |= {"cosine": None, "not_finite": 3}
    section = tree(html.render(given)).find(".//section[@id='answers']")
    assert section is not None
    lines = [[words(line) for line in figure.findall("small")] for figure in section.iter("figure")]
    assert lines == [
        ["largest difference 0.0594", "cosine similarity 0.999873"],
        ["largest difference 0.391", "3 differences not finite"],
    ]


def test_an_output_without_usable_counts_has_no_histogram() -> None:
    good = {"name": "y", "edges": [0, 1, 2], "counts": [3, 4]}
    assert plots.histogram(good, "h", 340)
    for bad in ({"edges": [], "counts": []}, {"edges": [0, 1], "counts": [3, 4]}, {"edges": [1, 1], "counts": [2]},
                {"edges": [0, float("nan"), 1], "counts": [1, 1]}):  # fmt: skip
        assert plots.histogram({**good, **bad}, "h", 340) is None


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (units.size(999), "999 B"), (units.size(999_600), "1.00 MB"), (units.size(1_500_000), "1.5 MB"),
        (units.size(338_912), "339 KB"), (units.size(None), units.NOTHING), (units.duration(0.042), "42 µs"),
        (units.duration(0), "0 ms"), (units.duration(1210), "1.21 s"), (units.share(0.0001), "<0.1%"),
        (units.share(0.978), "97.8%"), (units.share(-0.0002), "0.0%"), (units.share(-0.031), "-3.1%"),
        (units.number(1234.5), "1,234"), (units.number(8.4e-7), "8.4e-07"),
        (units.number(True), units.NOTHING), (units.number(float("inf")), units.NOTHING),
        (units.number(10**400), units.NOTHING),
        (units.score(32.16, {"kind": "agreement", "unit": "dB"}), "32.2 dB"),
        (units.score(0.978, {"kind": "agreement", "unit": None}), "97.8%"),
        (units.score(3.2, {"kind": "error"}), "3.2"),
        (units.count(1, "sample"), "1 sample"), (units.quantity(3, "W"), "3 W"),
    ],
)  # fmt: skip
def test_numbers_are_readable(made: str, expected: str) -> None:
    assert made.replace("\u00a0", " ") == expected


# -------------------------------------------------------------------------------------------------- contrast


def _schemes() -> list[dict[str, str]]:
    css = (Path(html.__file__).parent / "page.css").read_text("utf-8")
    found = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(found) == 2 and found[0].keys() == found[1].keys()
    return found


def _luminance(color: str) -> float:
    """Relative luminance, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart(scheme: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for marks, https://www.w3.org/TR/WCAG22/#contrast-minimum"""
    colors = _schemes()[scheme]
    pairs = [(ink, paper, 4.5) for ink in ("text", "muted") for paper in ("page", "card", "soft", "chosen-soft")]
    pairs += [(ink, "card", 4.5) for ink in ("chosen", "fits", "dropped", "limit", "link")]
    pairs += [("link", "page", 4.5), ("chosen", "chosen-soft", 4.5), ("dropped", "soft", 4.5), ("chosen", "soft", 3)]
    for ink, paper, least in pairs:
        light, dark = sorted((_luminance(colors[ink]), _luminance(colors[paper])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, f"{ink} on {paper}"


# ------------------------------------------------------------------------------------------------- terminal


def test_the_table_for_a_terminal_has_every_candidate_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from edge_infer.cli import console

    given = record("full")
    columns, rows = text.table(given)
    assert columns == ["candidate", "", "size>", "memory>", "load>", "latency>", "score>", "interval", "reason"]
    assert rows[0][:7] == ["tflite int8-mixed", "chosen", "339 KB", "31.5 MB", "6.2 ms", "2.41 ms", "94.4%"]
    assert [row[-1] for row in rows] == [item["reason"] or "" for item in given["candidates"]]
    console.print_table(columns, rows)
    assert "tflite int16x8" in capsys.readouterr().out
    assert text.table(record("minimal")) == (["candidate", ""], [["onnx float32", "chosen"]])
    assert text.summary(record("nothing_fits")).startswith("Nothing fits raspberry-pi-zero-2w: memory")


def test_names_cannot_drive_the_terminal() -> None:
    given = record("hostile")
    given["candidates"][0]["id"] = "a\x1b]0;owned\x07\nb\u202e"
    _, rows = text.table(given)
    assert rows[0][0] == "a\ufffd]0;owned\ufffd b\ufffd"
    assert all(cell.isprintable() for row in rows for cell in row)


# -------------------------------------------------------------------------------------------------- browser

PROBE = """<!DOCTYPE html><meta charset="utf-8"><body>FRAMES<pre id="probe"></pre><script>
const overlap = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const found = { name: frame.id, pictures: [], touching: [], cut: [] };
  found.wide = page.documentElement.scrollWidth - frame.clientWidth;
  const rows = () => [...page.querySelectorAll("#candidates tbody tr")];
  const sizes = () => rows().map((row) => row.cells[2].dataset.sort || null);
  for (const picture of page.querySelectorAll("svg[role=img]")) {
    if (picture.closest("details:not([open])")) continue;
    const box = picture.getBoundingClientRect();
    if (view.getComputedStyle(picture.parentElement).display === "none") continue;
    found.pictures.push([picture.id, box.width, box.height]);
    const names = [...picture.querySelectorAll("text")].map((name) => [name.textContent, name.getBoundingClientRect()]);
    for (const [name, at] of names)
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1) found.cut.push(name);
    names.forEach(([a, at], index) => names.slice(index + 1).forEach(([b, other]) => {
      if (overlap(at, other)) found.touching.push(`${picture.id}: ${a} | ${b}`);
    }));
  }
  const buttons = [...page.querySelectorAll("#candidates thead button")];
  const size = buttons.find((button) => button.textContent === "Size");
  if (size) {
    size.click();
    found.ascending = sizes();
    size.click();
    found.descending = sizes();
  }
  const filter = page.querySelector("#layers .filter input");
  if (filter) {
    filter.value = "gemm_2"; filter.dispatchEvent(new view.Event("input"));
    found.filtered = [...page.querySelectorAll("#layers tbody tr")].filter((row) => !row.hidden).length;
  }
  const mark = page.querySelector("#plot-size .mark") || page.querySelector("svg .mark");
  if (mark) {
    mark.dispatchEvent(new view.PointerEvent("pointerover", { bubbles: true }));
    found.tip = page.querySelector(".tip").textContent;
  }
  found.page = view.getComputedStyle(page.body).backgroundColor;
  return found;
}
window.addEventListener("load", () => {
  document.getElementById("probe").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
  console.log("the probe is done");
});
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next((path for path in found if path), None)
    assert path, "no chromium, chromium-browser or google-chrome is installed; scripts/test installs Debian's"
    return path


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_draws_the_pages_and_has_nothing_to_complain_about(
    chromium: str, tmp_path: Path, scheme: str
) -> None:
    """All records in a wide and a narrow window, as they are: policy, script and all."""
    frames = []
    for name in NAMES:
        (tmp_path / f"{name}.html").write_text(html.render(record(name)), "utf-8")
        frames += [
            f'<iframe id="{name} {width}" src="{name}.html" width="{width}" height="900"></iframe>'
            for width in (1280, 375)
        ]
    (tmp_path / "probe.html").write_text(PROBE.replace("FRAMES", "".join(frames)), "utf-8")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
            "--hide-scrollbars", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--virtual-time-budget=20000",
            "--dump-dom", f"file://{tmp_path}/probe.html",
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "the probe is done" in said[0], said
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert probe
    seen = {frame["name"]: frame for frame in json.loads(entities.unescape(probe.group(1)))}
    for frame in seen.values():
        assert all(width > 50 and height > 10 for _, width, height in frame["pictures"]), frame["pictures"]
        assert frame["wide"] <= 0, f"{frame['name']} is {frame['wide']} px too wide"
        assert frame["touching"] == [] and frame["cut"] == [], frame["name"]
        assert frame["page"] == ("rgb(18, 21, 24)" if scheme == "dark" else "rgb(246, 247, 248)")
    for width, suffix in ((1280, ""), (375, "-narrow")):
        full = seen[f"full {width}"]
        wanted = {f"plot-size{suffix}", f"plot-latency{suffix}", f"plot-layers{suffix}", "plot-output-0", "limit-0"}
        assert wanted <= {name for name, *_ in full["pictures"]}
        for order, down in ((full["ascending"], False), (full["descending"], True)):
            numbers = [float(value) for value in order if value is not None]
            assert len(order) == 14 and numbers == sorted(numbers, reverse=down) and order[-1] is None
        assert full["tip"].startswith("tflite int8")
        assert 1 <= seen[f"layers300 {width}"]["filtered"] < 50
