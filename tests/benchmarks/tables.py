"""What the benchmarks of slices found, as tables of the README and as plots.

    python tests/benchmarks/tables.py

Writes the tables of all results below `model_cards/` into the README, where their folders are named in comments, and
draws the plots beside the results.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_spp import WidthReport
from hf_spp.cards.width_rows import width_table

README = Path(__file__).parents[2] / "README.md"
CARDS = README.parent / "model_cards"
Rows = Sequence[Mapping[str, Any]]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


@dataclass(frozen=True)
class Table:
    """Means over seeds, with the lowest and the highest value, of the results of a benchmark.

    Attributes:
        folder: Where `results.json` lies, below `model_cards/`.
        values: Fields to show, with what is said of them.
        methods: Methods to show, with their names.
        write: How a value is written.
        sizes: The field of the columns.
        sizes_title: What that is.
        full: The size that is the model's own.
        logarithmic: Whether the axis of values is drawn so.
    """

    folder: str
    values: Mapping[str, str]
    methods: Mapping[str, str]
    write: Callable[[float], str] = percent
    sizes: str = "share"
    sizes_title: str = "parameters kept"
    full: float = 1.0
    logarithmic: bool = False

    def rows(self) -> Rows:
        """The results."""
        stored = json.loads((CARDS / self.folder / "results.json").read_text())
        return stored if isinstance(stored, list) else stored["rows"]

    def found(self, method: str, size: float, value: str) -> list[float]:
        """One value of every seed."""
        return [
            row[value]
            for row in self.rows()
            if row["method"] == method and row.get(self.sizes) == size and value in row
        ]

    def shown_sizes(self) -> list[float]:
        """From the largest to the smallest."""
        return sorted({row[self.sizes] for row in self.rows() if self.sizes in row}, reverse=True)

    def markdown(self) -> str:
        """The table."""
        sizes = self.shown_sizes()
        lines = [f"| | {' | '.join(map(share, sizes))} |", f"| --- |{' ---: |' * len(sizes)}"]
        for value, title in self.values.items():
            if title:
                lines.append(f"| *{title}* |{' |' * len(sizes)}")
            for method, name in self.methods.items():
                cells = [self._cell(self.found(method, size, value)) for size in sizes]
                if any(cells):
                    lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _cell(self, found: Sequence[float]) -> str:
        if not found:
            return ""
        mean, low, high = (self.write(one) for one in (statistics.mean(found), min(found), max(found)))
        return mean if low == high else f"{mean} ({low}–{high})"

    def draw(self) -> None:
        """Draw the values against the size, bars from the lowest to the highest."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure, all_axes = plt.subplots(
            1,
            len(self.values),
            figsize=(3 + 3 * len(self.values), 3.8),
            sharey=len(self.values) > 2,
            squeeze=False,
            layout="constrained",
        )
        for axes, (value, title) in zip(all_axes[0], self.values.items(), strict=True):
            drawn = set()
            # A method has the color of its place in all panels, also where others are missing.
            for place, (method, name) in enumerate(self.methods.items()):
                points = [(size, self.found(method, size, value)) for size in self.shown_sizes()]
                points = [(size, found) for size, found in points if found]
                if [size for size, _ in points] == [self.full]:
                    axes.axhline(statistics.mean(points[0][1]), color="grey", linestyle=":", label=name)
                elif points:
                    means = [statistics.mean(found) for _, found in points]
                    spread = [
                        [mean - min(found) for mean, (_, found) in zip(means, points, strict=True)],
                        [max(found) - mean for mean, (_, found) in zip(means, points, strict=True)],
                    ]
                    sizes = [size for size, _ in points]
                    axes.errorbar(sizes, means, spread, marker="o", capsize=3, label=name, color=f"C{place}")
                    drawn.update(sizes)
            axes.set_xlabel(self.sizes_title)
            axes.set_xticks(sorted(drawn))
            axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
            axes.set_title(title, fontsize=10)
            if self.logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:,.0f}")
            elif self.write is percent:
                axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
            axes.grid(alpha=0.3)
        lines, names = all_axes[0][0].get_legend_handles_labels()
        columns = 3 if len(self.values) > 1 else 2
        figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=8)
        figure.savefig(CARDS / self.folder / "widths.png", dpi=120)
        plt.close(figure)


TABLES = (
    Table(
        "dinov2-small-spp/against-torch-pruning",
        {
            "accuracy": "accuracy as cut",
            "accuracy_retrained_2e-05": "after 60 steps at 2e-5",
            "accuracy_retrained_5e-05": "after 60 steps at 5e-5",
        },
        {
            "none": "full model",
            "spp": "hf_spp",
            "spp-plain": "hf_spp without compensation",
            "random": "random order with compensation",
            "random-plain": "random order without",
            "tp-hessian": "Torch-Pruning, Hessian",
            "tp-taylor": "Torch-Pruning, Taylor",
            "tp-l2": "Torch-Pruning, L2",
            "tp-l1": "Torch-Pruning, L1",
        },
    ),
    Table(
        "smollm2-135m-spp/against-llm-pruner",
        {"perplexity": "perplexity"},
        {
            "none": "full model",
            "spp": "hf_spp",
            "spp-plain": "hf_spp without compensation",
            "llm-pruner-taylor": "LLM-Pruner, Taylor",
            "llm-pruner-magnitude": "LLM-Pruner, magnitude",
        },
        write=lambda value: f"{value:,.1f}",
        logarithmic=True,
    ),
    Table(
        "minilm-spp/embeddings",
        {"cosine": "mean cosine to the full model's embedding, in %", "recall_at_10": "recall@10"},
        {
            "none": "full model",
            "spp": "hf_spp",
            "spp-plain": "hf_spp without compensation",
            "random": "random order",
            "magnitude": "order of L1 norms",
        },
    ),
    Table(
        "dinov2-small-spp/elastic-widths",
        {"accuracy": "accuracy"},
        {
            "separate": "four fine-tunings, one of each width",
            "fine-tuned, compensated": "the first of these alone, slices compensated",
            "elastic": "one elastic training",
            "elastic, compensated": "one elastic training, slices compensated",
        },
        sizes="width",
        sizes_title="neurons and heads kept",
    ),
)


# What `hf-spp demo` measures last.
DEMO = "dinov2-small-spp/widths"


def markdown_tables() -> dict[str, str]:
    """The tables of the README by the folder of their results."""
    return {
        DEMO: width_table(WidthReport.load(CARDS / DEMO).rows),
        **{one.folder: one.markdown() for one in TABLES},
    }


def written(text: str, folder: str, table: str) -> str:
    """The README with a table."""
    start, end = f"<!-- {folder} -->\n", "<!-- end -->"
    before, found, rest = text.partition(start)
    if not found:
        raise SystemExit(f"The README has no line {start}")
    return f"{before}{start}{table.strip()}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    for folder, table in markdown_tables().items():
        README.write_text(written(README.read_text(), folder, table))
    for table in TABLES:
        table.draw()


if __name__ == "__main__":
    main()
