"""The tables and plots of scripts/bench.py: printed, and put into docs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_cases import FORMATS, JUDGED, NETWORKS
from pages import between, markdown

from edge_infer.cli.console import print_table, size
from edge_infer.report.markup import Markup, element
from edge_infer.report.svg import LINE, Axis, line, linear_axis, log_axis, picture, text, x_axis, y_axis

DOCS = Path(__file__).resolve().parent.parent / "docs"
Report = dict[str, Any]

FIGURES = ("load_ms", "first_ms", "p50_ms", "private_bytes", "peak_bytes", "shared_bytes")
COLUMNS = ["case", "way", "load ms>", "first ms>", "p50 ms>", "private>", "peak>", "shared by 4>"]
GOAL_COLUMNS = ["case", "opens faster", "goal>", "private>", "goal>", "latency>", "goal>", "edge_infer", "plain, best"]
CALL_COLUMNS = ["case", "engine>", "run>", "adds>", "engine, fastest>", "run_buffers>", "adds>", "goal>"]
IMPORT_COLUMNS = ["import", "ms>", "against>", "goal"]

#: How many times faster than the plain way a model opens: by format, and ONNX by whether its weights are repacked.
FASTER = {"tflite": 15.0, "torchscript": 5.0, "onnx repacked": 2.0, "onnx": 10.0}
#: Milliseconds for TFLite of 100 MB; private bytes, and as a share of the weights beside them; latency beside the best
#: plain setting; microseconds that a call may take more; milliseconds of the import, and its share of an engine's.
TFLITE_MS, PRIVATE_BYTES, PRIVATE_SHARE, LATENCY, CALL_US, IMPORT_MS, IMPORT_SHARE = (
    10.0,
    5e6,
    0.05,
    1.02,
    5.0,
    5.0,
    1.1,
)


def judged(value: str, met: bool) -> str:
    return value if met else f"{value} (missed)"


def table(report: Report) -> list[list[str]]:
    """Rows for COLUMNS: both ways and their ratio, case by case."""
    rows = []
    for case, ways in report["results"].items():
        for way, figures in ways.items():
            times = [f"{figures[name]:.3g}" for name in ("load_ms", "first_ms", "p50_ms")]
            memory = [size(figures[name]) for name in ("private_bytes", "peak_bytes", "shared_bytes")]
            rows.append([case if way == "plain" else "", way, *times, *memory])
        ratios = [f"{ways['plain'][name] / max(ways['edge_infer'][name], 1e-9):.2f}x" for name in FIGURES]
        rows.append(["", "plain / edge_infer", *ratios])
    return rows


def goals(report: Report) -> list[list[str]]:
    """Rows for GOAL_COLUMNS; what misses its goal is marked."""
    rows = []
    for case, ways in report["results"].items():
        net, format, _ = case.split("-")
        if net not in JUDGED:
            continue
        bundle, plain, ours = report["bundles"][case], ways["plain"], ways["edge_infer"]
        faster = plain["load_ms"] / ours["load_ms"]
        wanted = FASTER["onnx repacked" if format == "onnx" and bundle["prepack"] else format]
        quick = format != "tflite" or not net.endswith("100") or ours["load_ms"] <= TFLITE_MS
        allowed = PRIVATE_BYTES + PRIVATE_SHARE * bundle["size"]
        slower = ours["p50_ms"] / plain["best_p50_ms"]
        rows.append(
            [
                case,
                judged(f"{faster:.1f}x", faster >= wanted and quick),
                f"{wanted:g}x",
                judged(size(ours["private_bytes"]), ours["private_bytes"] <= allowed),
                size(allowed),
                judged(f"{slower:.2f}", slower <= LATENCY),
                f"{LATENCY:g}",
                ours["setting"],
                said(json.loads(plain["best_setting"])),
            ]
        )
    return rows


def said(setting: dict[str, Any]) -> str:
    threads = setting["threads"]
    more = {"spinning": "not spinning", "optimized": "optimize_for_inference"}
    return ", ".join([f"{threads} thread{'s' * (threads > 1)}", *(more[name] for name in setting if name != "threads")])


def calls(report: Report) -> list[list[str]]:
    """Rows for CALL_COLUMNS, in microseconds."""
    rows = []
    for case, ways in report["calls"].items():
        added, added_bound = ways["run"] - ways["engine"], ways["run_buffers"] - ways["fastest"]
        rows.append(
            [
                case,
                f"{ways['engine']:.1f}",
                f"{ways['run']:.1f}",
                judged(f"{added:.1f}", added <= CALL_US),
                f"{ways['fastest']:.1f}",
                f"{ways['run_buffers']:.1f}",
                judged(f"{added_bound:.1f}", added_bound <= CALL_US),
                f"{CALL_US:g}",
            ]
        )
    return rows


def imports(report: Report) -> list[list[str]]:
    """Rows for IMPORT_COLUMNS: a whole process that imports and ends."""
    times = report["imports"]
    added = times["edge_infer"] - times["bare"]
    rows = [
        ["nothing", f"{times['bare']:.1f}", "", ""],
        [
            "edge_infer",
            f"{times['edge_infer']:.1f}",
            judged(f"+{added:.1f} ms", added <= IMPORT_MS),
            f"+{IMPORT_MS:g} ms",
        ],
    ]
    for format in FORMATS:
        alone, both = times[format], times[f"{format} and edge_infer"]
        share = both / alone
        rows.append([f"engine of {format}", f"{alone:.0f}", "", ""])
        goal = format == "tflite"
        rows.append(
            [
                "the same and what opens bundles",
                f"{both:.0f}",
                judged(f"{share:.2f}x", share <= IMPORT_SHARE or not goal),
                f"{IMPORT_SHARE:g}x" if goal else "",
            ]
        )
    return rows


TABLES = {
    "goals": (GOAL_COLUMNS, goals),
    "calls": (CALL_COLUMNS, calls),
    "imports": (IMPORT_COLUMNS, imports),
    "table": (COLUMNS, table),
}


def show(report: Report) -> None:
    for columns, rows in TABLES.values():
        print_table(columns, rows(report))
        print()


def around(report: Report) -> str:
    """The sentence on machine and versions."""
    facts = report["surroundings"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}, {versions}; medians of "
        f"{facts['runs']} alternating runs."
    )


def write(report: Report) -> None:
    """docs/benchmark.json, the tables of benchmark.md, and the plots."""
    (DOCS / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    page = DOCS / "benchmark.md"
    page.write_text(filled(page.read_text(), report))
    for name, draw in PLOTS.items():
        (DOCS / name).write_text(draw(report) + "\n")


def filled(page: str, report: Report) -> str:
    """The page with its tables as the report has them."""
    page = between(page, "machine", [around(report)])
    for name, (columns, rows) in TABLES.items():
        page = between(page, name, markdown(columns, rows(report)))
    return page


# -- plots -------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 640.0, 360.0
#: Readable on a light and on a dark page: the picture has a background of its own.
STYLE = """
svg{background:#fff;font:12px system-ui,sans-serif}text{fill:#333}.title{font-weight:600}.tick{fill:#666}
.grid{stroke:#e3e3e3}.tflite{stroke:#d9480f}.onnx{stroke:#1864ab}.torchscript{stroke:#5f3dc4}
polyline{fill:none;stroke-width:2}.plain{stroke-dasharray:5 4}circle{fill:#fff;stroke-width:2}
"""


def sizes(report: Report, figure: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(way, format) -> (bytes of the bundle, figure) of the dense networks in float32, in the order of their size."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for net in sorted(NETWORKS, key=lambda net: NETWORKS[net]):
        for format in FORMATS:
            case = f"{net}-{format}-float32"
            if net.startswith("dense") and case in report["results"]:
                for way, figures in report["results"][case].items():
                    point = (report["bundles"][case]["size"] / 1e6, figures[figure])
                    lines.setdefault((way, format), []).append(point)
    return lines


def plot(report: Report, figure: str, title: str, unit: str, factor: float) -> Markup:
    lines = {key: [(x, y * factor) for x, y in points] for key, points in sizes(report, figure).items()}
    every = [point for points in lines.values() for point in points]
    left, right, bottom, top = 56.0, WIDTH - 150, HEIGHT - 44, 30.0
    x = linear_axis([0, *(size for size, _ in every)], left, right, margin=0.02)
    y = log_axis([value for _, value in every], bottom, top)
    parts = [
        element("style", Markup(STYLE)),
        *x_axis(x, y.start, y.end, lambda tick: f"{tick:g}", 6),
        *y_axis(y, left, right, lambda tick: f"{tick:g}", 6),
        text(4, 16, f"{title} ({unit}, logarithmic)", "start", "title"),
        text(right, HEIGHT - 8, "size of the model in MB (dense, float32) →", "end", "title"),
        *(drawn(way, format, points, x, y) for (way, format), points in lines.items()),
        *legend(list(lines), right + 14, top + 10),
    ]
    name = figure.replace("_", "-")
    drawing = picture(name, title, f"{title} by the plain engine and by edge_infer.", WIDTH, HEIGHT, *parts)
    # A page needs no namespace, a file of its own does.
    return Markup(drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def drawn(way: str, format: str, points: list[tuple[float, float]], x: Axis, y: Axis) -> Markup:
    places = [(x.at(size), y.at(value)) for size, value in points]
    kind = f"{format}{' plain' if way == 'plain' else ''}"
    return element(
        "g",
        element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), cls=kind),
        *(element("circle", cx=round(a, 1), cy=round(b, 1), r=3, cls=format) for a, b in places),
    )


def legend(keys: list[tuple[str, str]], left: float, top: float) -> list[Markup]:
    """The lines by name, those of one way together."""
    parts = []
    for number, (way, format) in enumerate(sorted(keys, key=lambda key: (key[0] != "plain", FORMATS.index(key[1])))):
        at = top + number * (LINE + 4)
        kind = f"{format}{' plain' if way == 'plain' else ''}"
        parts += [
            line(left, at, left + 22, at, kind),
            text(left + 28, at + 4, f"{format}, {'plain' if way == 'plain' else 'edge_infer'}"),
        ]
    return parts


PLOTS = {
    "load-time.svg": lambda report: plot(report, "load_ms", "Time to open a model", "ms", 1.0),
    "private-memory.svg": lambda report: plot(report, "private_bytes", "Private memory of an open model", "MB", 1e-6),
}
