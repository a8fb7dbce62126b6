"""Charts of what was measured: ratios, rates by backend, scaling, the roofline."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..measured import GPU_KINDS, KINDS, Result, rows_of
from ..tables import TITLES


def _figure(columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")


def ratios(result: Result) -> Any:
    """The faster peer's time over ours, for every case and kind; on a GPU nn.LSTM's, as graphs."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    title = "time of the faster of nn.LSTM and ONNX Runtime over fastlstm's"
    if timed := result.get("times", {}).get("rows"):
        title = "nn.LSTM's time over fastlstm's, both as CUDA graphs"
        result = {"rows": [
            {"what": f"{'training' if r['training'] else 'inference'}, {r['precision']}",
             "case": r["case"], "ratio": r.get("graph_ratio")}
            for r in timed if "refused" not in r
        ]}  # fmt: skip
    kinds = [kind for kind in [*KINDS, *GPU_KINDS] if rows_of(result, kind)]
    if not kinds:
        return None
    cases = list(dict.fromkeys(row["case"] for kind in kinds for row in rows_of(result, kind)))
    figure, ((axes,),) = _figure(size=(max(7, 1.6 * len(kinds)), 0.4 * len(cases) + 1.2))
    values = [[_ratio(result, kind, case) for kind in kinds] for case in cases]
    # From red over white to blue, a pair that every kind of colour vision tells apart; without the
    # ends, which are both nearly black.
    colours = ListedColormap(colormaps["RdBu"](np.linspace(0.1, 0.9, 256)))
    logarithms = np.log2([[math.nan if v is None else v for v in line] for line in values])
    image = axes.imshow(logarithms, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is None:  # not measured: no colour, which would be a number
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///",
                                         edgecolor="0.8", linewidth=0))  # fmt: skip
                continue
            dark = luminance(image.to_rgba(logarithms[y, x])) < 0.18
            axes.text(x, y, f"{value:.2f}", ha="center", va="center",
                      color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_title(title)
    axes.set_xlabel("blue: fastlstm is faster; red: slower; hatched: not measured")
    return figure


def luminance(rgba: Any) -> float:
    """WCAG's relative luminance of a colour from 0 to 1; black text is the clearer above 0.18."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def _ratio(result: Result, kind: str, case: str) -> float | None:
    return next((r.get("ratio") for r in rows_of(result, kind) if r["case"] == case), None)


def rates(result: Result) -> Any:
    """GFLOP/s of every backend on every case, below what the multiply-adds reach."""
    grid = {kind: [r for r in rows_of(result, kind) if "flops" in r] for kind in KINDS}
    kinds = [kind for kind in KINDS if grid[kind]]
    if not kinds:
        return None
    cases = list(dict.fromkeys(row["case"] for kind in kinds for row in grid[kind]))
    figure, (line,) = _figure(len(kinds), (1.5 + 3.2 * len(kinds), 0.3 * len(cases) + 1.5))
    for axes, kind in zip(line, kinds, strict=True):
        rows = grid[kind]
        for j, (name, title) in enumerate(TITLES.items()):
            known = [row for row in rows if name in row]
            x = [row["flops"] / row[name] / 1e6 for row in known]
            if known:
                y = [cases.index(row["case"]) for row in known]
                axes.semilogx(x, y, "o", color=f"C{j}", alpha=0.7, label=title)
        ceiling = (result.get("ceilings") or {}).get(rows[0].get("ceiling", "multiply_adds"))
        if ceiling:
            axes.axvline(ceiling / 1e9, color="black")
        axes.set_yticks(range(len(cases)), cases if kind == kinds[0] else [""] * len(cases))
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(kind)
        axes.set_xlabel("GFLOP/s")
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def scaling(result: Result) -> Any:
    """Time over T, B, H and threads, and what growth in proportion from the first point is."""
    axes_of = [a for a in ("T", "B", "H", "threads") if rows_of(result, f"scaling in {a}")]
    if not axes_of:
        return None
    figure, (line,) = _figure(len(axes_of), (3.2 * len(axes_of), 3.2))
    for axes, name in zip(line, axes_of, strict=True):
        rows = rows_of(result, f"scaling in {name}")
        x = [row.get("x") or float(row["case"].split("=")[1]) for row in rows]
        y = [row["fastlstm"] for row in rows]
        power = {"H": 2, "threads": -1}.get(name, 1)
        axes.loglog(x, [y[0] * (value / x[0]) ** power for value in x], "--", color="gray",
                    label="proportional")  # fmt: skip
        axes.loglog(x, y, "o-", label="fastlstm")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel(name)
    line[0].set_ylabel("ms a training step")
    line[0].legend()
    return figure


def roofline(result: Result) -> Any:
    """What the products reach, under the ceilings that the same run measured."""
    ceilings = result.get("ceilings") or {}
    points = {kind: [r for r in rows_of(result, kind) if r.get("bytes")] for kind in KINDS}
    if not ceilings or not any(points.values()):
        return None
    figure, ((axes,),) = _figure()
    every = [row["flops"] / row["bytes"] for rows in points.values() for row in rows]
    lines = {"multiply_adds": "memory, multiply-adds", "multiply_adds_bf16": "those of bf16"}
    for (name, label), style in zip(lines.items(), ("-", "--"), strict=True):
        if name in ceilings:
            x = sorted([min(every) / 2, ceilings[name] / ceilings["copy"], max(every) * 2])
            axes.loglog(x, [min(v * ceilings["copy"], ceilings[name]) / 1e9 for v in x], style,
                        color="black", label=label)  # fmt: skip
    for kind, rows in points.items():
        axes.loglog([r["flops"] / r["bytes"] for r in rows],
                    [r["flops"] / r["fastlstm"] / 1e6 for r in rows], "o", label=kind)  # fmt: skip
    axes.set_xlabel("FLOP for every byte of weights, input and output")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    return figure


CHARTS: dict[str, Callable[[Result], Any]] = {
    "ratios": ratios, "rates": rates, "scaling": scaling, "roofline": roofline,
}  # fmt: skip


def png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()
