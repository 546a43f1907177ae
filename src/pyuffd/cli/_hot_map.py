"""The picture of `pyuffd info --png`: a working set by place and order of access (layer L6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyuffd import SnapshotRegion, WorkingSet

MIB = float(1 << 20)
PAGE = 4096
COLUMNS = 256
ROWS_MOST = 360  # of all mappings
ROWS_FEW = 16  # a panel of so few rows is too low for more than two labels
MAPPINGS_MOST = 10
NAN = float("nan")


@dataclass(slots=True)
class _Mapping:
    region: SnapshotRegion
    touched: list[tuple[int, int, int]] = field(default_factory=list)  # page, pages, their order

    @property
    def pages(self) -> int:
        return sum(pages for _, pages, _ in self.touched)

    def rows(self, cell: int) -> int:
        return -(-self.region.length // (COLUMNS * cell * PAGE))

    def grid(self, cell: int) -> list[list[float]]:
        """Return for each cell how many MiB were touched before the first page in it."""
        grid = [[NAN] * COLUMNS for _ in range(self.rows(cell))]
        for page, pages, order in self.touched:
            for number in range(page // cell, (page + pages - 1) // cell + 1):
                row, column = divmod(number, COLUMNS)
                if grid[row][column] != grid[row][column]:
                    before = order + max(0, number * cell - page)
                    grid[row][column] = before * PAGE / MIB
        return grid


def _mappings(regions: Sequence[SnapshotRegion], known: WorkingSet) -> Iterator[_Mapping]:
    """Yield the mappings in which the working set has pages."""
    spans = []
    order = 0
    for run in known:
        spans.append((run.offset // PAGE, run.length // PAGE, order))
        order += run.length // PAGE
    spans.sort()
    at = first = 0
    for region in regions:
        end = first + region.length // PAGE
        mapping = _Mapping(region)
        while at < len(spans) and spans[at][0] < end:
            page, pages, order = spans[at]
            begin = max(page, first)
            mapping.touched.append(
                (begin - first, min(page + pages, end) - begin, order + begin - page)
            )
            if page + pages > end:
                break
            at += 1
        if mapping.touched:
            mapping.touched.sort(key=lambda each: each[2])
            yield mapping
        first = end


def draw(path: str, title: str, regions: Sequence[SnapshotRegion], known: WorkingSet) -> None:
    """Draw the mappings that hold most of the working set, as rows coloured by order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = sorted(_mappings(regions, known), key=lambda each: each.pages)
    chosen = sorted(found[-MAPPINGS_MOST:], key=lambda each: each.region.start)
    left = sum(each.pages for each in found[:-MAPPINGS_MOST]) * PAGE / MIB
    cell = 1
    while sum(each.rows(cell) for each in chosen) > ROWS_MOST:
        cell *= 2
    rows = [each.rows(cell) for each in chosen]
    least = max(4.0, sum(rows) / 16)
    figure, axes = pyplot.subplots(
        len(chosen),
        1,
        figsize=(11, 2.0 + 0.75 * len(chosen) + 0.012 * sum(rows)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [max(least, each) for each in rows]},
        layout="constrained",
    )
    width = COLUMNS * cell * PAGE / MIB
    image = None
    for (axis,), mapping in zip(axes, chosen, strict=True):
        image = _panel(axis, mapping, cell, width, known.length / MIB)
    axes[-1][0].set_xlabel(f"MiB within a row ({width:g} MiB; one cell is {cell * PAGE >> 10} KiB)")
    figure.supylabel("offset in the mapping, MiB", fontsize=9)
    more = f"; {left:.2f} MiB in {len(found) - len(chosen)} other mappings" if left else ""
    figure.suptitle(title + more, fontsize=10)
    if image is not None:
        bar = figure.colorbar(image, ax=[axis for (axis,) in axes], shrink=0.9)
        bar.set_label("order of the first touch: MiB touched before")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _panel(axis: Any, mapping: _Mapping, cell: int, width: float, most: float) -> Any:
    from matplotlib.patches import Rectangle

    region = mapping.region
    rows = mapping.rows(cell)
    # The whole mapping, in grey behind its touched pages.
    size = region.length / MIB
    whole = int(size / width)
    for origin, extent in (
        ((0, 0), (width, whole * width)),
        ((0, whole * width), (size - whole * width, width)),
    ):
        axis.add_patch(Rectangle(origin, *extent, facecolor="0.9", linewidth=0))
    image = axis.imshow(
        mapping.grid(cell),
        aspect="auto",
        origin="upper",
        extent=(0, width, rows * width, 0),
        vmin=0,
        vmax=most,
        cmap="plasma",
        interpolation="nearest",
        zorder=2,
    )
    axis.set_xlim(0, width)
    axis.set_ylim(rows * width, 0)
    axis.tick_params(labelsize=7)
    axis.locator_params(axis="y", nbins=5 if rows > ROWS_FEW else 2)
    name = region.path or region.kind
    axis.set_title(
        f"{name[-60:]}  at {region.start:x}: {mapping.pages * PAGE / MIB:.2f} of {size:.2f} MiB",
        fontsize=8,
        loc="left",
        pad=3,
    )
    return image
