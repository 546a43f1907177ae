"""Draw the pictures of the site as SVG, once for light and once for dark pages.

    python docs/pictures/draw.py

writes them beside this file, and the table of speed into README.md; tests/unit/test_pictures.py
fails while they are out of date. The latencies and the table are those of benchmarks/RESULTS.md,
the timeline is that of timeline.json, which `record_timeline.py` writes, and the restores are those
that docs/restore.md shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMELINE = HERE / "timeline.json"
RESTORES = HERE.parent / "restore.md"
RESULTS = HERE.parents[1] / "benchmarks" / "RESULTS.md"
README = HERE.parents[1] / "README.md"
WIDTH = 600
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Colours:
    """The colours of one theme; `gil` marks what holds the GIL, `free` what needs none."""

    text: str
    faint: str
    gil: str
    free: str
    kernel: str
    other: str
    wait: str
    bad: str


LIGHT = Colours(
    text="#1f2328",
    faint="#656d76",
    gil="#ffb74d",
    free="#80cbc4",
    kernel="#cfd8dc",
    other="#ce93d8",
    wait="#ffe0b2",
    bad="#c62828",
)
DARK = Colours(
    text="#e6edf3",
    faint="#9198a1",
    gil="#b26a00",
    free="#00796b",
    kernel="#455a64",
    other="#7b3f8c",
    wait="#5c4420",
    bad="#ff8a80",
)
THEMES = {"": LIGHT, "-dark": DARK}

LANE_X, LANE_HEIGHT, TIME = 132, 30, WIDTH - 132 - 12


@dataclass(frozen=True)
class Box:
    """What somebody does from one point of time to another, in hundredths of the picture."""

    start: int
    end: int
    text: str
    kind: str  # a colour's name


@dataclass(frozen=True)
class Lane:
    """One participant."""

    name: str
    boxes: list[Box]


@dataclass(frozen=True)
class Panel:
    """The way of one fault."""

    title: str
    remark: str
    lanes: list[Lane]
    arrows: list[tuple[int, int, int]]  # at a time, from a lane to another
    stuck: bool = False


LOOP = Panel(
    "your own loop, in a Python thread of the same process",
    "The loop needs the GIL, which the faulting thread holds: the program hangs.",
    [
        Lane(
            "faulting thread",
            [Box(0, 18, "runs", "gil"), Box(22, 100, "waits for the page, holds the GIL", "wait")],
        ),
        Lane("kernel", [Box(18, 34, "message", "kernel")]),
        Lane("Python thread", [Box(38, 100, "waits for the GIL", "bad")]),
    ],
    [(20, 0, 1), (36, 1, 2)],
    stuck=True,
)
NATIVE = Panel(
    "native: a C thread",
    "The C thread needs no GIL, so it does not matter that the faulting thread holds it.",
    [
        Lane(
            "faulting thread",
            [
                Box(0, 18, "runs", "gil"),
                Box(22, 84, "waits for the page, holds the GIL", "wait"),
                Box(86, 100, "runs", "gil"),
            ],
        ),
        Lane("kernel", [Box(18, 34, "message", "kernel"), Box(72, 86, "wakes", "kernel")]),
        Lane("C thread", [Box(38, 70, "copies the page", "free")]),
    ],
    [(20, 0, 1), (36, 1, 2), (71, 2, 1), (85, 1, 0)],
)
INLINE = Panel(
    "inline: the faulting thread itself",
    "No message and no other thread. System calls that touch a missing page get EFAULT.",
    [
        Lane(
            "faulting thread",
            [
                Box(0, 18, "runs", "gil"),
                Box(38, 70, "copies the page", "free"),
                Box(74, 100, "runs", "gil"),
            ],
        ),
        Lane("kernel", [Box(20, 36, "SIGBUS", "kernel")]),
    ],
    [(19, 0, 1), (37, 1, 0)],
)
PROCESS = Panel(
    "process: a helper process calls the source",
    "The source needs the GIL of the helper, which is another one.",
    [
        Lane(
            "faulting thread",
            [
                Box(0, 14, "runs", "gil"),
                Box(17, 89, "waits for the page, holds the GIL", "wait"),
                Box(91, 100, "runs", "gil"),
            ],
        ),
        Lane("kernel", [Box(14, 28, "message", "kernel"), Box(77, 90, "wakes", "kernel")]),
        Lane("helper: engine", [Box(31, 42, "asks", "free"), Box(65, 76, "copies", "free")]),
        Lane("helper: source", [Box(44, 63, "Python", "other")]),
    ],
    [(15, 0, 1), (29, 1, 2), (43, 2, 3), (64, 3, 2), (76, 2, 1), (90, 1, 0)],
)
THREAD = Panel(
    "thread: Python threads of this process call the source",
    "For accesses that release the GIL. One that holds it ends with on_error.",
    [
        Lane(
            "faulting thread",
            [
                Box(0, 14, "runs", "gil"),
                Box(17, 89, "waits for the page, without the GIL", "kernel"),
                Box(91, 100, "runs", "gil"),
            ],
        ),
        Lane("kernel", [Box(14, 28, "message", "kernel"), Box(77, 90, "wakes", "kernel")]),
        Lane("engine", [Box(31, 42, "asks", "free"), Box(65, 76, "copies", "free")]),
        Lane("source", [Box(44, 63, "Python", "gil")]),
    ],
    [(15, 0, 1), (29, 1, 2), (43, 2, 3), (64, 3, 2), (76, 2, 1), (90, 1, 0)],
)


class Drawing:
    """SVG elements, and how far down they reach."""

    def __init__(self, colours: Colours) -> None:
        self.colours = colours
        self.elements: list[str] = []
        self.y = 8.0

    def text(self, x: float, y: float, text: str, colour: str, size: int = 14, **more: str) -> None:
        """Add a line of text."""
        attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{attributes}>'
            f"{escape(text)}</text>"
        )

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Add a filled rectangle."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
            f' fill="{colour}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, more: str = "") -> None:
        """Add a line in the faint colour."""
        self.elements.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
            f' stroke="{self.colours.faint}"{more}/>'
        )

    def svg(self, title: str) -> str:
        """Return the file."""
        marker = (
            '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
            f'<path d="M0,0 L6,3 L0,6 z" fill="{self.colours.faint}"/></marker></defs>'
        )
        height = f"{self.y + 4:g}"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
                f' width="{WIDTH}" height="{height}" font-family="{FONT}" role="img">',
                f"<title>{escape(title)}</title>",
                marker,
                *self.elements,
                "</svg>\n",
            ]
        )


def draw_panel(drawing: Drawing, panel: Panel) -> None:
    """Draw the way of one fault below what is there."""
    colours = drawing.colours
    drawing.text(8, drawing.y + 14, panel.title, colours.text, 15, font_weight="600")
    drawing.y += 24
    top = drawing.y
    for at, lane in enumerate(panel.lanes):
        y = top + at * (LANE_HEIGHT + 8)
        drawing.text(8, y + 20, lane.name, colours.faint, 13)
        for box in lane.boxes:
            x, width = LANE_X + box.start * TIME / 100, (box.end - box.start) * TIME / 100
            is_bad = box.kind == "bad"
            drawing.rect(
                x, y, width, LANE_HEIGHT, colours.wait if is_bad else getattr(colours, box.kind)
            )
            drawing.text(
                x + width / 2,
                y + 20,
                box.text,
                colours.bad if is_bad else colours.text,
                13,
                text_anchor="middle",
            )
    for time, source, target in panel.arrows:
        draw_arrow(drawing, top, time, source, target)
    drawing.y = top + len(panel.lanes) * (LANE_HEIGHT + 8)
    drawing.text(8, drawing.y + 12, panel.remark, colours.bad if panel.stuck else colours.faint, 13)
    drawing.y += 34


def draw_arrow(drawing: Drawing, top: float, time: int, source: int, target: int) -> None:
    """Draw an arrow from the edge of one lane to that of another."""
    x = LANE_X + time * TIME / 100
    down = target > source
    start = top + source * (LANE_HEIGHT + 8) + (LANE_HEIGHT / 2)
    end = top + target * (LANE_HEIGHT + 8) + (4 if down else LANE_HEIGHT - 4)
    drawing.line(x, start, x, end, ' stroke-width="1.5" marker-end="url(#a)"')


def draw_legend(drawing: Drawing) -> None:
    """Draw what the colours mean."""
    colours = drawing.colours
    entries = [
        ("gil", "Python, with the GIL"),
        ("wait", "holds it and waits"),
        ("free", "C, needs no GIL"),
        ("other", "another GIL"),
    ]
    x = 8.0
    for kind, text in entries:
        drawing.rect(x, drawing.y, 14, 14, getattr(colours, kind))
        drawing.text(x + 19, drawing.y + 12, text, colours.faint, 12)
        x += 19 + 6.6 * len(text) + 14
    drawing.y += 24


def paths(panels: list[Panel], title: str, colours: Colours) -> str:
    """Return a picture of the ways of faults, one below the other."""
    drawing = Drawing(colours)
    draw_legend(drawing)
    for panel in panels:
        draw_panel(drawing, panel)
    return drawing.svg(title)


ROW = re.compile(r"^\| (.+? / .+?) \| ([\d.]+) \| ([\d.]+) \| (\S+) \| ([\d.]+) \|", re.MULTILINE)
# Rows of RESULTS.md, by what the pictures call them: drivers beside the C program of the same kind.
SHOWN = {
    "inline": "missing fault: inline / sigbus",
    "native, same CPU": "missing fault: native on the faulter's CPU / read(2) loop there",
    "native": "missing fault: native / spinning",
    "native, another CPU": "missing fault: native on another CPU / spinning there",
    "process, same CPU": "missing fault, Python: process on the faulter's CPU / read(2) loop there",
    "process, another CPU": "missing fault, Python: process on another CPU / spinning there",
    "thread": "missing fault of a child, Python: thread / spinning",
    "native; C that sleeps in read(2)": "missing fault: native / blocking",
}
# The same for README's table.
SPEED = {
    "missing fault, resolved by the faulting thread (`inline`)": SHOWN["inline"],
    "missing fault, by a C thread on the same CPU (`native`)": SHOWN["native, same CPU"],
    "missing fault, content from a function in Python (`process`)": SHOWN["process, same CPU"],
    "lazy restore of 1 GiB, anonymous memory": (
        "lazy restore of 1024 MiB anon: native / 2 MiB UFFDIO_COPYs"
    ),
    "lazy restore of 1 GiB, huge pages": (
        "lazy restore of 1024 MiB hugetlb: native / 2 MiB UFFDIO_COPYs"
    ),
    "pause of a snapshot of 1 GiB (`cow`), beside fork()": (
        "1024 MiB, 8 threads: pause, cow / fork()"
    ),
    "longest stop of a process of 1 GiB for a core, beside gcore": (
        "1024 MiB, 8 threads: core / gcore, longest time without the process's thread"
    ),
}
SPEED_TABLE = re.compile(r"(?<=<!-- table: speed -->\n)(?:\|.*\n)+")


@dataclass(frozen=True)
class Result:
    """A row of RESULTS.md: medians of the C program and of pyuffd, and the ratio."""

    base: str
    c: str
    ours: str
    unit: str
    ratio: str


def results() -> dict[str, Result]:
    """Return the rows that compare two programs, by their name."""
    return {
        name: Result(name.rpartition(" / ")[2], *values)
        for name, *values in ROW.findall(RESULTS.read_text())
    }


def speed_table() -> str:
    """Return README's table of speed."""
    found = results()
    lines = ["| | base | pyuffd | ratio |", "|---|---|---|---|"]
    for what, name in SPEED.items():
        if name not in found:  # results of a part of the benchmarks
            continue
        row = found[name]
        lines.append(f"| {what} | {row.c} {row.unit} | {row.ours} {row.unit} | {row.ratio} |")
    return "\n".join(lines) + "\n"


def latencies() -> Iterator[tuple[str, str, float, float]]:
    """Yield the driver, the C program, and both medians in microseconds, as RESULTS.md has them."""
    found = results()
    for what, name in SHOWN.items():
        row = found[name]
        yield what, row.base, float(row.c), float(row.ours)


def latency(colours: Colours) -> str:
    """Return bars: a missing fault with each driver, beside a bare C program of the same kind."""
    drawing = Drawing(colours)
    rows = list(latencies())
    longest = max(max(c, ours) for _, _, c, ours in rows)
    scale = (WIDTH - 250) / longest
    drawing.text(
        8,
        drawing.y + 14,
        "missing fault, median, microseconds",
        colours.text,
        15,
        font_weight="600",
    )
    drawing.y += 30
    for driver, base, c, ours in rows:
        drawing.text(8, drawing.y + 22, driver, colours.text, 12)
        for at, (value, colour, name) in enumerate(
            [(ours, colours.free, "pyuffd"), (c, colours.kernel, f"C: {base}")]
        ):
            y = drawing.y + at * 17
            drawing.rect(200, y, value * scale, 14, colour)
            drawing.text(
                204 + value * scale if value < longest / 2 else 206,
                y + 11.5,
                f"{value:g}  {name}",
                colours.text,
                11,
            )
        drawing.y += 46
    return drawing.svg("Latency of a missing fault by driver")


CHART_HEIGHT = 54


def timeline(colours: Colours) -> str:
    """Return the timeline of a snapshot by method cow, of a real run."""
    run = json.loads(TIMELINE.read_text())
    at = run["events"]
    end = at["swept"]
    drawing = Drawing(colours)

    def x_of(time_ms: float) -> float:
        return LANE_X + time_ms * TIME / end

    drawing.text(
        8,
        drawing.y + 14,
        f"snapshot of {run['mib']} MiB by cow: it was stopped for {run['pause_ms']:.0f} ms",
        colours.text,
        15,
        font_weight="600",
    )
    drawing.y += 26
    lanes = {
        "process": [
            (0, at["stopped"], "runs", colours.free),
            (at["stopped"], at["resumed"], "", colours.bad),
            (at["resumed"], end, "runs; a first write waits", colours.free),
        ],
        "pyuffd": [
            (at["attached"], at["armed"], "protects all", colours.kernel),
            (at["armed"], at["stopped"], "again", colours.other),
            (at["stopped"], at["resumed"], "", colours.bad),
            (at["resumed"], end, "saves every page", colours.gil),
        ],
    }
    top = drawing.y
    for name, boxes in lanes.items():
        drawing.text(8, drawing.y + 20, name, colours.faint, 13)
        for start, stop, text, colour in boxes:
            x, width = x_of(start), x_of(stop) - x_of(start)
            drawing.rect(round(x, 1), drawing.y, round(width, 1), LANE_HEIGHT, colour)
            if text:
                middle = round(x + width / 2, 1)
                drawing.text(middle, drawing.y + 20, text, colours.text, 12, text_anchor="middle")
        drawing.y += LANE_HEIGHT + 8
    draw_charts(drawing, run["saved"], x_of, at["resumed"])
    for name, text, anchor in (
        ("stopped", "stop", "end"),
        ("resumed", "resume", "start"),
    ):
        x = round(x_of(at[name]), 1)
        drawing.line(x, top - 4, x, drawing.y, ' stroke-dasharray="3 3"')
        side = -4 if anchor == "end" else 4
        drawing.text(x + side, drawing.y - 4, text, colours.bad, 12, text_anchor=anchor)
    for tick in range(0, int(end) + 1, 100):
        x = round(x_of(tick), 1)
        drawing.line(x, drawing.y, x, drawing.y + 5)
        drawing.text(x, drawing.y + 18, f"{tick}", colours.faint, 12, text_anchor="middle")
    drawing.line(LANE_X, drawing.y, LANE_X + TIME, drawing.y)
    drawing.text(8, drawing.y + 18, "milliseconds", colours.faint, 12)
    drawing.y += 26
    return drawing.svg("Timeline of a snapshot: protect, stop, resume, faults, sweep")


def draw_charts(
    drawing: Drawing, saved: list[list[float]], x_of: Callable[[float], float], resumed: float
) -> None:
    """Draw how many pages the writes of the process and the sweep have saved so far."""
    for name, column, colour in (
        ("before a write", 1, drawing.colours.other),
        ("by the sweep", 2, drawing.colours.gil),
    ):
        most = saved[-1][column]
        bottom = drawing.y + CHART_HEIGHT
        points = [(x_of(resumed), bottom)]
        points += [(x_of(row[0]), bottom - row[column] / most * CHART_HEIGHT) for row in saved]
        points.append((points[-1][0], bottom))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawing.elements.append(f'<polygon points="{path}" fill="{colour}"/>')
        drawing.text(8, bottom - 34, "pages saved", drawing.colours.faint, 12)
        drawing.text(8, bottom - 18, name, drawing.colours.faint, 12)
        drawing.text(8, bottom - 2, f"{most:,.0f}", drawing.colours.text, 12)
        drawing.y += CHART_HEIGHT + 12
    drawing.y += 8


RUN = re.compile(r"^\$ pyuffd restore-bench (.*)\n((?:(?!\$|```).*\n)+)", re.MULTILINE)
RESTORE = re.compile(
    r"^ +(\w+) +[\d.]+ ms +([\d.]+) ms +([\d.]+) ms +([\d.]+) ms +\d+$", re.MULTILINE
)
CHOSEN = re.compile(r"auto is (\w+):")


@dataclass(frozen=True)
class Restored:
    """One line of `pyuffd restore-bench`, in milliseconds."""

    name: str
    first: float
    placed: float
    read: float


def restored() -> Iterator[tuple[bool, list[Restored]]]:
    """Yield whether the file was cold, and the lines, of each run that the page shows."""
    for options, lines in RUN.findall(RESTORES.read_text()):
        chosen = CHOSEN.findall(lines)
        names = {"read": "read at once", "auto": f"auto ({chosen[0]})"}
        yield (
            "--cold" in options,
            [
                Restored(names.get(name, name), *map(float, times))
                for name, *times in RESTORE.findall(lines)
            ],
        )


def restores(colours: Colours) -> str:
    """Return bars: the first access and the whole restore, by method, of warm and cold files."""
    drawing = Drawing(colours)
    runs = list(restored())
    longest = max(row.read for _, rows in runs for row in rows)
    scale = (WIDTH - LANE_X - 90) / longest
    x = 8.0
    for colour, text in (
        (colours.free, "first access"),
        (colours.gil, "all in place"),
        (colours.kernel, "all read"),
    ):
        drawing.rect(x, drawing.y, 14, 14, colour)
        drawing.text(x + 19, drawing.y + 12, text, colours.faint, 12)
        x += 19 + 6.6 * len(text) + 14
    drawing.y += 24
    for is_cold, rows in runs:
        state = "not in the page cache" if is_cold else "in the page cache"
        title = f"files {state}: first access / all read, milliseconds"
        drawing.text(8, drawing.y + 14, title, colours.text, 15, font_weight="600")
        drawing.y += 24
        for row in rows:
            draw_restore(drawing, row, scale)
        drawing.y += 10
    return drawing.svg("Restores by method: first access and whole time")


def draw_restore(drawing: Drawing, row: Restored, scale: float) -> None:
    """Draw one method: bars to the end, to the last page in place, and to the first access."""
    colours = drawing.colours
    drawing.text(8, drawing.y + 16, row.name, colours.text, 13)
    for time, colour in (
        (row.read, colours.kernel),
        (row.placed, colours.gil),
        (row.first, colours.free),
    ):
        drawing.rect(LANE_X, drawing.y, round(max(time * scale, 2), 1), 22, colour)
    end = round(LANE_X + row.read * scale + 6, 1)
    drawing.text(end, drawing.y + 16, f"{row.first:.0f} / {row.read:.0f}", colours.text, 12)
    drawing.y += 28


def pictures() -> Iterator[tuple[Path, str]]:
    """Yield each file and its content."""
    for suffix, colours in THEMES.items():
        yield (
            HERE / f"gil{suffix}.svg",
            paths([LOOP, NATIVE], "A fault resolved by Python and by C", colours),
        )
        yield (
            HERE / f"drivers{suffix}.svg",
            paths([NATIVE, INLINE, PROCESS, THREAD], "The way of a fault, by driver", colours),
        )
        yield HERE / f"latency{suffix}.svg", latency(colours)
        yield HERE / f"timeline{suffix}.svg", timeline(colours)
        yield HERE / f"restore{suffix}.svg", restores(colours)


def main() -> None:
    """Write all pictures, and README's table of speed."""
    for path, text in pictures():
        path.write_text(text)
    README.write_text(SPEED_TABLE.sub(lambda _: speed_table(), README.read_text()))


if __name__ == "__main__":
    main()
