"""The heat map of `pyuffd track --png`: address by time (layer L6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from pyuffd import PageRanges
from pyuffd.cli._written import Sample

MIB = float(1 << 20)
ROWS = 160  # of the picture, shared among the mappings
MAPPINGS_MOST = 12
PAGE = 4096


@dataclass(slots=True)
class Heat:
    """The written pages of each round, until they are drawn."""

    rounds: list[tuple[float, PageRanges]] = field(default_factory=list)
    totals: dict[tuple[int, int, str], int] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Keep a round."""
        self.rounds.append((sample.seconds, sample.written))
        for part in sample.parts:
            key = (part.start, part.end, part.name)
            self.totals[key] = self.totals.get(key, 0) + part.written_bytes

    def draw(self, path: str) -> None:
        """Draw the mappings that were written most, one above the other."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        chosen = sorted(sorted(self.totals, key=self.totals.__getitem__)[-MAPPINGS_MOST:])
        count = max(1, len(chosen))
        figure, grid = pyplot.subplots(
            count,
            1,
            figsize=(11, 1.2 + 1.0 * count),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        axes = [row[0] for row in grid]
        rows = max(8, ROWS // count)
        cells = [self._cells(key, rows) for key in chosen]
        most = max((value for part in cells for line in part for value in line), default=1.0)
        ends = [seconds for seconds, _ in self.rounds]
        end = ends[-1] if ends else 1.0
        image = None
        for axis, key, part in zip(axes, chosen, cells, strict=False):
            size = (key[1] - key[0]) / MIB
            image = axis.imshow(
                part,
                aspect="auto",
                origin="lower",
                extent=(0, end, 0, size),
                vmin=0,
                vmax=most,
                cmap="inferno",
                interpolation="nearest",
            )
            axis.set_ylabel(f"{key[2][:18]}\n{key[0]:x}\nMiB", fontsize=7)
            axis.tick_params(labelsize=7)
        axes[-1].set_xlabel("seconds")
        axes[0].set_title("memory written: offset in the mapping by time")
        if image is not None:
            bar = figure.colorbar(image, ax=axes, shrink=0.9)
            bar.set_label("share of the pages written in a round, %")
        figure.savefig(path, dpi=110, format="png")
        pyplot.close(figure)

    def _cells(self, key: tuple[int, int, str], rows: int) -> list[list[float]]:
        """Return the share of pages written, in per cent: by part of the mapping, by round."""
        start, end, _ = key
        pages = (end - start) // PAGE
        rows = min(rows, pages)
        edges = [start + pages * row // rows * PAGE for row in range(rows + 1)]
        spans = list(pairwise(edges))
        columns = [written.bytes_in(spans) for _, written in self.rounds]
        return [
            [100.0 * column[row] / (edges[row + 1] - edges[row]) for column in columns]
            for row in range(rows)
        ]
