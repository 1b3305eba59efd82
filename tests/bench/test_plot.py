"""The picture of `kvist bench --plot`."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from kvist.bench.config import OfflineConfig, Scenario, TargetConfig
from kvist.bench.plot import MAX_POINTS, axis_end, picture, thinned
from kvist.bench.report import Run
from kvist.bench.verbs import run_scenarios
from kvist.errors import ConfigError
from tests.bench.test_report import bad, good, run_of

SVG = "{http://www.w3.org/2000/svg}"


def run(*, name: str = "rate", slower: float = 1.0) -> Run:
    rows = [
        msgspec.structs.replace(
            good(index, ttft_s=0.1 * slower * (index + 1)), sent_s=float(index), itl_p99_s=0.01 * slower
        )
        for index in range(10)
    ]
    return msgspec.structs.replace(run_of(*rows, bad(10)), name=name)


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}{tag}"))


def test_every_request_is_a_point_and_a_failed_one_is_red() -> None:
    svg = picture([run()], {})
    assert len(elements(svg, "circle")) == 10
    assert len([line for line in elements(svg, "line") if line.get("stroke") == "#c0392b"]) == 1
    curves = elements(svg, "polyline")
    assert len(curves) == 2
    places = [tuple(map(float, place.split(","))) for place in str(curves[0].get("points")).split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert "rate: 10 of 11 requests" in svg


def test_a_baseline_is_drawn_behind_in_grey() -> None:
    svg = picture([run(), run(name="other")], {"rate": run(slower=3.0)})
    colors = [curve.get("stroke") for curve in elements(svg, "polyline")]
    assert colors == ["#a8a8a8", "#2f6f9f"] * 2 + ["#2f6f9f"] * 2
    assert svg.count("grey: the baseline") == 1


def test_everything_lies_inside_the_picture() -> None:
    svg = picture([run(), run(slower=0.01)], {"rate": run(slower=50.0)})
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for circle in elements(svg, "circle"):
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
    for number in re.findall(r'(?:x1|x2|x)="([^"]+)"', svg):
        assert 0 <= float(number) <= width


def test_a_run_without_an_answer_has_empty_charts() -> None:
    svg = picture([run_of(bad(0), bad(1))], {})
    assert elements(svg, "circle") == elements(svg, "polyline") == []
    assert "0 of 2 requests" in svg


def test_names_are_text() -> None:
    svg = picture([run(name="<script>&")], {})
    assert "<script>" not in svg
    assert any(text.text and text.text.startswith("<script>&: ") for text in elements(svg, "text"))


def test_points_are_bounded_and_the_last_stays() -> None:
    assert thinned([1, 2, 3]) == [1, 2, 3]
    many = thinned(list(range(5 * MAX_POINTS + 1)))
    assert len(many) <= MAX_POINTS
    assert many[-1] == 5 * MAX_POINTS


@pytest.mark.parametrize(
    ("values", "end"), [([], 1.0), ([0.0], 1.0), ([0.3], 0.5), ([7.0], 10.0), ([10.0], 10.0), ([101.0, 3.0], 200.0)]
)
def test_an_axis_ends_at_a_round_number(values: list[float], end: float) -> None:
    assert axis_end(values) == pytest.approx(end)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        TargetConfig(plot=tmp_path / "picture.png")
    assert "end it with .svg" in caught.value.message
    scenario = Scenario(name="offline", kind="offline", load=OfflineConfig())
    with pytest.raises(ConfigError) as caught:
        run_scenarios([scenario], TargetConfig(base_url="http://127.0.0.1:9", plot=tmp_path / "no" / "picture.svg"))
    assert "--plot" in caught.value.message
