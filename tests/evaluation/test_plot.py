"""The picture of a comparison."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import pytest

from cachefold.evaluation import labels, plot
from cachefold.evaluation.plot import Point, draw, panels, pareto
from tests.evaluation.reports import report, row, task

pytest.importorskip("matplotlib")


def test_panels_have_what_was_measured() -> None:
    loss, piqa = panels(report()["rows"])
    assert [p.name for p in loss.points] == [
        "dense", "tova-cr2", "tova-cr8", "full+int4", "random-cr8",
    ]  # fmt: skip
    assert not loss.higher_is_better and piqa.higher_is_better
    assert [p.value for p in piqa.points] == [0.68, 0.63, 0.54, 0.67]
    assert piqa.title == "piqa, acc" and piqa.points[2].error is None


def test_front_is_what_nothing_beats() -> None:
    loss, piqa = panels(report()["rows"])
    assert [p.name for p in pareto(loss.points, False)] == ["tova-cr8", "full+int4", "dense"]
    assert [p.name for p in pareto(piqa.points, True)] == ["tova-cr8", "full+int4", "dense"]
    equal = [Point(n, 1.0, 0.5, None, n, None, None) for n in "ab"]
    assert len(pareto(equal, False)) == 1


def test_one_thing_is_joined_over_ratios() -> None:
    rows = [row(n, m, 0.1) for n, m in (("full+int4", 3), ("full+int8", 5), ("tova-cr2", 2),
            ("tova-cr4", 1), ("tova-cr2+int4", 1))]  # fmt: skip
    [loss] = panels(rows)
    names = [[p.name for p in family] for family in plot.families(loss.points)]
    assert names == [["tova-cr4", "tova-cr2"], ["tova-cr2+int4"], ["full+int4"], ["full+int8"]]
    rows[2]["weights"], rows[3]["weights"] = "one", "other"  # two artefacts of a policy
    [loss] = panels(rows)
    assert [len(family) for family in plot.families(loss.points)] == [1, 1, 1, 1, 1]


def test_two_artefacts_of_a_policy_have_two_colours() -> None:
    rows = [row(f"dmc-cr{cr}", 8 / cr, 0.1, weights=str(cr)) for cr in (2, 4)]
    colours, _ = plot._styles(panels(rows))
    assert len(set(colours.values())) == 2


def test_codecs_have_markers_of_their_own() -> None:
    from cachefold.cache.codecs import list_codecs

    assert len(set(plot.MARKERS)) > len(list_codecs())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Keeps the figures that are drawn."""
    from matplotlib import pyplot as plt

    found = []
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    for figure in found:
        plt.close(figure)


def test_every_point_is_named_and_no_name_hides_another(tmp_path: Path, figures: list) -> None:
    assert draw(report()["rows"], tmp_path / "x.png", 2048)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    [figure] = figures
    loss = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    named = {text.get_text(): text.get_window_extent(renderer) for text in loss.texts}
    assert set(named) == {"dense", "cr2", "tova-cr8", "full+int4", "random-cr8"}
    boxes = list(named.values())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = loss.get_window_extent(renderer)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert loss.get_xscale() == "log" and "2,048 tokens, MiB" in loss.get_xlabel()
    assert "Pareto front" in [text.get_text() for text in loss.get_legend().get_texts()]


def test_names_of_points_that_lie_together(tmp_path: Path, figures: list) -> None:
    names = ("tova-cr2", "h2o-cr2", "dmc-cr2", "dms-cr2")
    rows = [row(name, 8 + i / 20, 0.1 + i / 1000) for i, name in enumerate(names)]
    draw([row("dense", 16, 0.0), *rows, row("random-cr2", 8, 0.4)], tmp_path / "x.png", 10)
    axis = figures[0].axes[0]
    renderer = figures[0].canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_labels_leave_the_base_model_out(tmp_path: Path, figures: list) -> None:
    draw([row("m-dial-cr2", 8, 0.1), row("m-dial-cr4", 4, 0.2)], tmp_path / "x.png", 10, "m")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["dial-cr4", "cr2"]


def test_a_label_far_from_its_point_has_a_line_to_it(tmp_path: Path, figures: list) -> None:
    crowd = [row(f"method-{i}", 8 + i / 50, 0.1 + i / 2000) for i in range(12)]
    draw([row("dense", 16, 0.0), *crowd], tmp_path / "x.png", 10)
    texts = figures[0].axes[0].texts
    far = [math.hypot(*text.xyann) > labels.LEADER for text in texts]
    assert any(far) and [text.arrow_patch is not None for text in texts] == far


def test_losses_that_differ_much_get_a_logarithmic_axis(tmp_path: Path, figures: list) -> None:
    even = [row("dense", 8, 0.0), row("tova-cr2", 4, 0.1), row("tova-cr4", 2, 0.2)]
    draw(even, tmp_path / "a.png", 10)
    draw([*even, row("random-cr8", 1, 5.0)], tmp_path / "b.png", 10)
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "symlog"]


def test_one_method_and_three_panels(tmp_path: Path, figures: list) -> None:
    assert draw([row("dense", 8, 0.0)], tmp_path / "a.png", 10)
    tasks = {"a": task(0.5), "b": task(0.5)}
    assert draw([row("tova-cr2", 8, -0.1, tasks=tasks)], tmp_path / "b.png", 10)
    assert [axis.get_visible() for axis in figures[1].axes] == [True, True, True, False]
    assert not draw([row("dense", None, None)], tmp_path / "c.png", 10)
    assert not (tmp_path / "c.png").exists()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plot.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in plot.missing()


def test_examples_run() -> None:
    for module in (plot, labels):
        assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
