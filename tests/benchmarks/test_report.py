"""The charts and figures of what was measured, and that the pages show what the files hold."""

import html
import json
import math
import re

import pytest

pytest.importorskip("matplotlib")

from benchmarks import measured, tables
from benchmarks.cases import CPU_CASES
from benchmarks.measured import RESULTS, read
from benchmarks.measured import tables as tables_of
from benchmarks.report import charts, cores, expected, figures
from benchmarks.report.__main__ import main
from benchmarks.report.figures import PAGES

KEPT = sorted(RESULTS.glob("*.json"))
kept = pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)


@kept
def test_every_result_says_what_it_was_measured_on(path):
    result = read(path)
    assert {"date", "commit", "torch"} <= set(result)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"])
    assert "processor" in result or "gpu" in result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_what_the_files_hold(page):
    text = page.read_text()
    assert figures.MARKED.search(text)
    assert figures.filled(text) == text, "run: python -m benchmarks.report FILE --pages"


def test_the_readmes_first_sentence_is_of_the_same_file():
    text = PAGES[0].read_text()
    ours, theirs = figures.drawing(read(RESULTS / dict(figures.MARKED.findall(text))["headline"]))
    first = " ".join(text.split("**")[1].split())
    assert f"samples {ours:,.0f} characters/s" in first
    assert f"{ours / theirs:.0f} times as many" in first


def test_a_figure_that_disagrees_is_seen():
    text = PAGES[0].read_text()
    wrong = re.sub(r"(small \(.*\), inference, fp32 \| )[\d.]+", r"\g<1>0.001", text)
    assert wrong != text
    assert figures.filled(wrong) == text


def test_a_file_takes_the_place_of_its_kind_alone():
    """A GPU's figures leave the CPU's as they are, and the other way round."""
    text = "".join(page.read_text() for page in PAGES)
    sources = dict(figures.MARKED.findall(text))
    assert {"cpu", "gpu"} <= set(sources)
    for source in sources.values():
        assert figures.filled(text, source) == text
    older = next(path.name for path in KEPT if path.name not in sources.values())
    of_cpus = dict.fromkeys(sources.keys() - figures.OF_GPUS, older)
    assert dict(figures.MARKED.findall(figures.filled(text, older))) == sources | of_cpus


@kept
def test_page_holds_everything_itself(path, tmp_path, capsys):
    assert main([str(path), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "data:image/png;base64," in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    for rows in tables_of(read(path)).values():
        assert all(row.get("case", "").replace("'", "&#x27;") in text for row in rows)
    for line in read(path).get("failed", []) + read(path).get("skipped", []):
        assert html.escape(line) in text
    assert (tmp_path / f"{path.stem}-ratios.png").stat().st_size > 5000


def test_estimates_for_many_threads_are_printed_and_on_the_page(tmp_path, capsys):
    rates = {"multiply_adds": 4e11, "multiply_adds_bf16": 8e12}
    found = {"date": "2026-01-31", "commit": "0" * 40, "processor": "a Xeon, amx", "threads": 2,
             "ceilings": rates, "rows": [{"what": "a step a call", "case": "x"}]}  # fmt: skip
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(found))
    assert main([str(path), "--out", str(tmp_path)]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "index.html").read_text()
    for text in (printed, html.unescape(page)):
        assert cores.NOTE in text
        assert "not measured" in text
        assert all(case.name in text for case in CPU_CASES)
    (line,) = (x for x in printed.splitlines() if x.startswith("Karpathy's batch") and "4 x 1" in x)
    assert re.split(r"\s{2,}", line)[3] == "4 x 1: 4.0 (4.0)"
    head = next(x for x in printed.splitlines() if x.startswith("inference, bf16"))
    assert re.findall(r"(\d+) threads", head) == ["2", "4", "8", "16", "32", "64"]


def test_an_estimate_is_a_cost_at_the_rate_of_one_thread():
    """One thread alone: the products and the cells, where reading the weights is not the bound."""
    case = next(case for case in CPU_CASES if case.name == "H1024")
    result = {"processor": "an EPYC, avx2", "threads": 2, "ceilings": {"multiply_adds": 4e10}}
    products, cells = case.flops(training=False) / 2, 220 * case.steps * case.batch * 1024
    rows = cores.estimates(result, [case])
    assert [row["threads"] for row in rows] == list(cores.THREADS)
    assert rows[0]["estimated ms"] == pytest.approx((products + cells) / 1e10 * 1e3)
    assert rows[0]["estimated speedup"] == rows[0]["its speedup"] == 1
    assert rows[1]["estimated speedup"] == pytest.approx(2)


@pytest.mark.parametrize("found", [{"gpu": "a GPU"}, {"processor": "x, avx2", "ceilings": None}])
def test_nothing_is_estimated_without_the_rate_of_a_cpu(found):
    assert cores.estimates(found) == []


def test_stages_of_a_gpu_become_tables(tmp_path):
    parity = {"rows": [{"problem": "plain", "relative": 1e-7}], "seconds": 3.0}
    found = {"date": "2026-01-31", "commit": "0" * 40, "gpu": "a GPU", "parity": parity}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(found))
    assert main([str(path), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    assert "<h3>parity</h3>" in text
    assert "<td>1e-07</td>" in text


def test_a_gpus_figures_hold_both_sides_at_their_best():
    half = {
        "bf16": (9.0, 4.0, 3.0, 2.0),
        "fp16": (3.0, 5.0, 4.0, 6.0),
        "fp32": (8.0, 4.0, 9.0, 8.0),
    }
    names = ("torch", "torch_graph", "fastlstm", "fastlstm_graph")
    rows = [
        {"case": "small", "sizes": "1-2, B3 T4", "precision": kind, "training": training,
         "algorithm": "cluster", "backward_algorithm": "stepwise",
         **dict(zip(names, ms, strict=True)),
         "ratio": ms[0] / ms[2], "graph_ratio": ms[1] / ms[3], "step_microseconds": 7.0,
         "estimated_step_microseconds": 2.0}
        for kind, ms in half.items() for training in (True, False)
    ]  # fmt: skip
    refused = {"case": "small", "precision": "bf16", "training": True, "refused": "too large"}
    result = {"gpu": "a GPU", "driver": "1", "torch": "2", "cudnn": 3, "date": "2026-01-31T00:00",
              "commit": "0" * 40, "times": {"rows": [*rows, refused]}}  # fmt: skip
    text = figures.gpu_table(result)
    assert text.startswith("a GPU, driver 1, torch 2, cuDNN 3, 2026-01-31, commit 0000000. ")
    assert "| small (1-2, B3 T4) | 3 | 2 | 1.5 | 3 | 2 | 1.5 |" in text.splitlines()
    assert "in bf16 inference 3.00 to 3.00 (below 1 in 0 of 1)" in text
    assert text.endswith("both as graphs, 0.50 to 0.50 (below 1 in 2 of 2).")
    steps = figures.gpu_steps(result).splitlines()
    assert "| small (1-2, B3 T4) | cluster/stepwise | 2 | 7 | 2 | 7 |" in steps
    shown = [t.get_text() for t in charts.ratios(result).axes[0].texts]
    assert shown == ["0.50", "0.50", "2.00", "2.00", "0.83", "0.83"]


def test_estimates_are_held_against_their_best_and_their_eager_call_of_the_same_type():
    """Two cases, of which one was timed in bf16 alone; the best time may be a graph's."""
    times = {"small": {"bf16": (9.0, 4.0), "fp16": (6.0, 5.0), "fp32": (8.0, 7.0)},
             "batch 1": {"bf16": (2.0, 3.0)}}  # fmt: skip
    rows = [
        {"case": case, "precision": kind, "training": True, "torch": eager, "torch_graph": graph}
        for case, kinds in times.items() for kind, (eager, graph) in kinds.items()
    ]  # fmt: skip
    result = {"gpu": "a GPU", "driver": "1", "torch": "2", "cudnn": 3, "date": "2026-01-31T00:00",
              "commit": "0" * 40, "times": {"rows": rows},
              "ceilings": {"bf16_tflops": 700.0, "fp32_tflops": 50.0}}  # fmt: skip
    found = expected.rows(result)
    ours = {(row.case.name, row.kind): row.ours for row in found}
    assert {(row.case.name, row.kind): (row.theirs, row.eager) for row in found} == {
        ("small", "bf16"): (4.0, {"bf16": 9.0, "fp16": 6.0}),
        ("batch 1", "bf16"): (2.0, {"bf16": 2.0}),
        ("small", "fp32"): (7.0, {"fp32": 8.0}),
    }
    small, one, full = (
        ours[which] for which in (("small", "bf16"), ("batch 1", "bf16"), ("small", "fp32"))
    )
    eager = expected.eager_means(found)
    assert list(eager) == ["bf16", "fp16", "fp32"]
    ratios = (9 / small, 2 / one)
    assert eager["bf16"] == [pytest.approx((math.sqrt(ratios[0] * ratios[1]), min(ratios)))]
    assert eager["fp16"] == [pytest.approx((6 / small, 6 / small))]
    assert eager["fp32"] == [pytest.approx((8 / full, 8 / full))]
    assert expected.means(found)["fp32"] == [pytest.approx((7 / full, 7 / full))]
    last = figures.gpu_expected(result).splitlines()[-1]
    assert last.endswith(f"; fp32 {8 / full:.2f} (least {8 / full:.2f}).")
    assert f"; fp16 {6 / small:.2f} (least {6 / small:.2f}); " in last


def test_every_backend_that_was_timed_is_in_table_and_chart():
    times = dict(zip(tables.TITLES, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), strict=True))
    whats = [*measured.KINDS, "a training step", "a step a call"]
    rows = [{"what": what, "case": "small", "flops": 1e6, **times} for what in whats]
    result = {"rows": [r | {"ratio": 2.0} for r in rows], "date": "2026-01-31", "commit": "0" * 40,
              "processor": "a processor", "threads": 2, "torch": "2"}  # fmt: skip
    lines = figures.cpu_table(result).splitlines()
    assert f"| problem | {' | '.join(tables.TITLES.values())} |" in lines
    assert "| small (65-128x2, B50 T50), training, bf16 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |" in lines
    shown = charts.rates(result).axes[0]
    assert [line.get_label() for line in shown.lines] == list(tables.TITLES.values())
    assert [line.get_xdata()[0] for line in shown.lines] == pytest.approx(
        [1 / ms for ms in times.values()]
    )


# What the eye without red or without green cones makes of linear RGB (Machado et al., 2009).
COLOUR_BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def ratios_chart(cells):
    """The chart's axes, and the picture in it, of ratios by kind and case."""
    rows = [{"what": what, "case": case, **({} if ratio is None else {"ratio": ratio})}
            for (what, case), ratio in cells.items()]  # fmt: skip
    (axes,) = charts.ratios({"rows": rows}).axes
    return axes, axes.images[0]


def test_what_was_not_measured_has_no_colour_in_the_chart():
    first, second = measured.KINDS[:2]
    axes, image = ratios_chart({(first, "a"): 1.5, (first, "b"): 0.8, (second, "b"): 2.0})
    assert [text.get_text() for text in axes.texts] == ["1.50", "0.80", "2.00"]
    (hatched,) = axes.patches
    assert hatched.get_hatch()
    assert hatched.get_xy() == (0.5, -0.5)  # of the second kind and the first case
    drawn = image.to_rgba(image.get_array())
    assert drawn[0, 1, 3] == 0
    assert (drawn[..., 3] == 0).sum() == 1
    assert "not measured" in axes.get_xlabel()


@pytest.mark.parametrize("ratio", [1.1, 1.25, 1.5, 2.0, 5.0])
def test_every_eye_tells_faster_from_slower_and_reads_the_number(ratio):
    import numpy as np

    kind = measured.KINDS[0]
    axes, image = ratios_chart({(kind, "a"): ratio, (kind, "b"): 1 / ratio})
    colours = image.to_rgba(image.get_array())[:, 0, :3]
    for matrix in COLOUR_BLIND.values():
        linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in colours]
        a, b = (np.array(matrix) @ c for c in linear)
        assert np.linalg.norm(a - b) > 0.1  # red beside green: below 0.04 at 1.25
    for colour, text in zip(colours, axes.texts, strict=True):
        ink = {"white": 1.0, "black": 0.0}[text.get_color()]
        low, high = sorted((charts.luminance(colour), ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_rows_of_older_files_have_the_names_of_today(tmp_path):
    path = tmp_path / "old.json"
    row = {"what": "inference, fp32", "case": "small", "ours": 1.0, "torch": 2.0, "onnx": 3.0}
    path.write_text(json.dumps({"date": "2026-01-31", "commit": "0" * 40, "rows": [row]}))
    (found,) = read(path)["rows"]
    assert (found["fastlstm"], found["torch"], found["onnxruntime"]) == (1.0, 2.0, 3.0)


def test_keeping_a_run_of_the_suite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    rows = [
        {"what": "inference, fp32", "case": "small", "fastlstm": 1.0, "torch": 2.0, "ratio": 2.0}
    ]
    own = {"date": "2026-01-31", "commit": "0" * 40, "rows": rows}
    (tmp_path / "cpu.json").write_text(json.dumps({"benchmarks": [], "fastlstm": own}))
    assert main([str(tmp_path / "cpu.json"), "--keep", "--out", str(tmp_path / "page")]) == 0
    assert json.loads((tmp_path / "cpu-2026-01-31.json").read_text()) == own


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": []}', '{"date": 1, "commit": 2}'])
def test_other_files_are_refused_in_one_line(text, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main([str(path)]) == 2
    assert re.fullmatch(rf"benchmarks.report: {path}: expected .*\n", capsys.readouterr().err)
