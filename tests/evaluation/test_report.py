"""The table and the page of a report."""

import csv
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from evaluation.charts import bar_chart, line_chart, ticks
from evaluation.report import Report, Row, page, read_log, relative_bars, scores, table, write_report


def row(checkpoint: str = "ours", protocol: str = "knn, k = 20", score: float | None = 70.0, **changed) -> Row:
    values = {"method": "dino", "preset": "boosted", "epoch": 7, "weights": "ab" * 32, "data": "cd" * 32}
    return Row(checkpoint=checkpoint, protocol=protocol, score=score, tokens="class token", **values | changed)


def test_what_stands_for_a_result():
    knn = {"10": {"top1": 61.0, "top5": 80.0}, "20": {"top1": 62.0}, "images": 100}
    assert scores("knn", knn) == [("knn, k = 10", 61.0, False), ("knn, k = 20", 62.0, True)]
    assert scores("knn", {"5": {"top1": 1.0}}) == [("knn, k = 5", 1.0, True)]
    assert scores("linear", {"epoch": 3, "top1": 71.5, "heads": []}) == [("linear", 71.5, True)]
    assert scores("video", {"videos": 30, "J&F-Mean": 61.8, "J-Mean": 60.2}) == [("video, J&F-Mean", 61.8, True)]
    assert scores("retrieval", {"M": {"mAP": 41.8}}) == [("retrieval, M mAP", 41.8, True)]
    sets = {"sets": {"dtd": {"top1": 70.0}, "pets": {"top1": 90.0}}, "mean_accuracy": 80.0}
    assert [score for _, score, _ in scores("transfer", sets)] == [70, 90, 80]
    assert scores("transfer", {"sets": {"dtd": {"top1": 70.0}}}) == [("transfer, dtd", 70.0, False)]
    assert scores("odd", {"name": "x", "flag": True, "nan": float("nan")}) == []


def test_the_table_has_a_row_for_every_result_and_no_formula():
    rows = [row(), row("=1+1", score=None, error="no\nsuch file")]
    header, first, second = csv.reader(io.StringIO(table(rows)))
    assert header[:6] == ["checkpoint", "method", "preset", "epoch", "weights", "data"]
    assert first[header.index("score")] == "70.0" and second[0] == "'=1+1" and second[-1] == "no\nsuch file"
    assert second[header.index("score")] == ""


def well_formed(html: str) -> ET.Element:
    """The page as a tree; fails where a tag is left open."""
    body = re.sub(r"<(meta|img)([^>]*?)>", r"<\1\2/>", html.split(">", 1)[1]).replace(" loading", " data-loading")
    return ET.fromstring(body)


def test_the_page_stands_by_itself_and_shows_everything(tmp_path):
    picture = tmp_path / "sheet.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)).save(picture)
    rows = [row(published="73.3"), row("theirs", score=72.5), row("theirs", "linear", None, error="<b>a</b> & b")]
    curves = {"ours": [{"epoch": e, "train_loss": 5 - e, "knn_top1": float("nan") if e == 1 else e} for e in range(4)]}
    pictures = {"Attention": [("ours: cat <x>", picture), ("gone", tmp_path / "gone.png")]}
    html = page(Report(rows, curves, pictures))
    tree = well_formed(html)
    assert not re.search(r"(src|href)=\"(?!data:image/jpeg;base64,|#s\d)|<script|url\(", html)
    assert [heading.text for heading in tree.iter("h2")] == ["Results", "Relative", "Training", "Attention"]
    assert len(list(tree.iter("img"))) == 1 and "cat &lt;x&gt;" in html
    assert "&lt;b&gt;a&lt;/b&gt; &amp; b" in html and "<b>" not in html
    assert [element.text for element in tree.iter("strong")] == ["72.50"]  # the best on the same images
    assert [element.text for element in tree.iter("figcaption")][1:3] == ["knn_top1", "train_loss"]
    assert "+3.6 %" in relative_bars(rows, ["ours", "theirs"])  # 72.5 of 70
    assert "\u22123.4 %" in relative_bars(rows, ["theirs", "ours"])
    write_report(Report(rows[:1]), tmp_path)
    assert "1 result of 1 checkpoint" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "table.csv").read_text().count("\n") == 2


def test_scores_on_other_images_are_not_compared():
    rows = [row(), row("theirs", score=99.0, data="ef" * 32)]
    assert relative_bars(rows, ["ours", "theirs"]) == "" and "<strong>" not in page(Report(rows))


def test_ten_results_and_fifty_pictures_fit_into_ten_megabytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (450, 600, 3), dtype=np.uint8)  # nothing compresses worse
    Image.fromarray(noise).save(tmp_path / "sheet.png", compress_level=1)
    pictures = {"Attention": [(f"picture {number}", tmp_path / "sheet.png") for number in range(50)]}
    rows = [row(f"run {number % 2}", f"protocol {number // 2}") for number in range(10)]
    write_report(Report(rows, {"run 0": [{"epoch": e, "loss": 1 / (e + 1)} for e in range(800)]}, pictures), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 10_000_000


def test_a_log_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "log.txt"
    assert read_log(path) == []
    path.write_text(
        '{"epoch": 0, "train_loss": 3.5}\nnot json\n[1]\n{"train_loss": 2}\n{"epoch": 1, "train_loss": NaN}\n'
    )
    assert [line["epoch"] for line in read_log(path)] == [0, 1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 12), (0.0001, 0.0005), (67.2, 67.9), (0, 799)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 12 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in found)


def test_charts_of_little_are_drawn():
    assert line_chart("x", {0: [(0, float("nan"))]}) == "" and bar_chart("x", []) == ""
    assert "<circle" in line_chart("x", {0: [(3, 0.0)]})
    assert line_chart("x", {0: [(0, 1.0), (1, float("nan")), (2, 1.0), (3, 2.0)]}).count("<polyline") == 2
    assert "+0.0 %" in bar_chart("x", [("a", [(1, 0.0)])])
