"""Pictures show the values that they are given, the same way each time, and nothing that a name smuggles in."""

from __future__ import annotations

import hashlib
import io
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import Image

from requant.tasks.plots import NAMES, Picture, write_pictures
from requant.tasks.plots import draw as drawing
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.measured import Measured
from tests.factories.paths import ROOT
from tests.factories.pictures import HOSTILE, benchmark, everything, model, prompt, tuned

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def draw(measured: Any, speed: Any, blocks: Any) -> list[Picture]:
    """Draw all pictures. `measured` and `blocks` are in their JSON form."""
    tuned = StageRecord({"blocks": list(blocks)}).blocks
    return drawing.draw(None if measured is None else Measured.from_json(measured), speed, tuned)


OF_MEASURED = {
    "divergence-by-domain": {"domains"},
    "block-errors": {"blocks"},
    "matrices": {"matrices"},
    "acceptance-by-position": {"mtp_acceptance_by_position", "base_mtp_acceptance_by_position"},
}


def one(name: str, measured: Any = None, speed: Any = None, blocks: Any = ()) -> Picture:
    """Draw a picture from those of the values that are its own."""
    own = {key: value for key, value in (measured or {}).items() if key in OF_MEASURED.get(name, ())}
    return next(picture for picture in draw(own, speed, blocks) if picture.name == name)


def tree(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(picture.svg)


def texts(picture: Picture) -> list[str]:
    return [element.text or "" for element in tree(picture).iter(f"{SVG}text")]


def points(picture: Picture, group: str) -> list[tuple[float, float]]:
    """Where the markers of a group are drawn, in the order drawn; y grows upwards."""
    found = next(element for element in tree(picture).iter(f"{SVG}g") if element.get("id") == group)
    return [(float(use.get("x", "")), -float(use.get("y", ""))) for use in found.iter(f"{SVG}use")]


def bar_lengths(picture: Picture, group: str) -> list[float]:
    """The horizontal extent of each bar of a group."""
    lengths = []
    for element in tree(picture).iter(f"{SVG}g"):
        if element.get("id") == group:
            path = next(element.iter(f"{SVG}path")).get("d", "")
            xs = [float(x) for x in re.findall(r"[ML] (\S+) \S+", path)]
            lengths.append(max(xs) - min(xs))
    return lengths


def proportional(drawn: Sequence[float], values: Sequence[float], at_least: int = 2) -> bool:
    """Whether what was drawn is a linear function of the values."""
    assert len(drawn) == len(values) >= at_least
    low, high = values.index(min(values)), values.index(max(values))
    scale = (drawn[high] - drawn[low]) / (values[high] - values[low])
    return scale > 0 and all(
        math.isclose(d, drawn[low] + scale * (v - values[low]), abs_tol=0.02)
        for d, v in zip(drawn, values, strict=True)
    )


def test_every_block_is_a_point_at_its_error_by_kind() -> None:
    measured = model(64)
    picture = one("block-errors", measured)
    for kind in ("linear_attention", "full_attention"):
        values = [b["error"] for b in measured["blocks"] if b["kind"] == kind]
        drawn = points(picture, f"error {kind}")
        assert proportional([y for _, y in drawn], [math.log(v) for v in values])
        at = [float(b["block"]) for b in measured["blocks"] if b["kind"] == kind]
        assert proportional([x for x, _ in drawn], at)
    assert {"linear attention", "full attention", "relative error", "block"} <= set(texts(picture))


def test_one_broken_block_among_64_is_named_with_its_error() -> None:
    picture = one("block-errors", model(64, b17=0.41))
    assert "block 17: 41 %" in texts(picture)
    assert "worst 41 % in block 17" in picture.caption
    assert not [text for text in texts(one("block-errors", model(64))) if text.startswith("block ")]


def test_a_block_whose_error_is_no_number_is_named() -> None:
    picture = one("block-errors", model(8, b5=math.nan))
    assert "block 5: not a number" in texts(picture)
    assert sum(len(points(picture, f"error {kind}")) for kind in ("linear_attention", "full_attention")) == 7
    assert "no number in block 5" in picture.caption


def test_every_matrix_is_a_point_at_its_slope_and_the_far_one_is_named() -> None:
    measured = model(12)
    measured["matrices"][15] |= {"slope": 1.05, "error": 0.2}
    measured["matrices"].append({"name": "lm_head", "bits": 8, "slope": 1.0, "offset": 0.0, "error": 0.01})
    picture = one("matrices", measured)
    packed = measured["matrices"][:-1]
    assert proportional([y for _, y in points(picture, "slope 4 bits")], [m["slope"] + m["error"] ** 2 for m in packed])
    drawn = [y for _, y in points(picture, "error 4 bits")]
    assert proportional(drawn, [math.log(m["error"]) for m in packed])
    assert len(points(picture, "error 8 bits")) == len(points(picture, "slope 8 bits")) == 1
    assert "7.mlp.down_proj: 9.0 %" in texts(picture) and "other" in texts(picture)
    assert "at most 9.0 % (7.mlp.down_proj)" in picture.caption


def test_a_head_is_not_taken_for_the_first_block() -> None:
    measured = model(4)
    for name in ("mtp.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"):
        measured["matrices"].append({"name": name, "bits": 8, "slope": 1.0, "offset": 0.0, "error": 0.1})
    picture = one("matrices", measured)
    (head, _), (block, _) = points(picture, "error 8 bits")
    assert head > max(x for x, _ in points(picture, "error 4 bits")) > block


def test_losses_are_drawn_before_and_after() -> None:
    blocks = [*tuned(4), {"name": "model.language_model.layers.4"}]
    picture = one("losses", blocks=blocks)
    drawn = [y for group in ("before", "after") for _, y in points(picture, group)]
    values = [b[key] for key in ("loss_before", "loss_after") for b in blocks[:4]]
    assert proportional(drawn, [math.log(value) for value in values])
    assert picture.caption == "Tuning made the loss of a block 2 times smaller (median)."


def test_acceptance_by_position_has_the_bases_beside_ours() -> None:
    picture = one("acceptance-by-position", model(4))
    drawn = bar_lengths(picture, "base bar") + bar_lengths(picture, "quantized bar")
    assert proportional(drawn, [0.894, 0.8, 0.65, 0.871, 0.76, 0.61], at_least=6)
    assert {"1st draft", "2nd draft", "3rd draft", "89 %", "61 %"} <= set(texts(picture))
    alone = one("acceptance-by-position", {"mtp_acceptance_by_position": [0.5]})
    assert bar_lengths(alone, "base bar") == [] and len(bar_lengths(alone, "quantized bar")) == 1


@pytest.mark.filterwarnings("error")
def test_a_head_of_which_nothing_is_accepted_has_a_picture_without_bars() -> None:
    none = [0.0, 0.0, 0.0]
    picture = one(
        "acceptance-by-position", {"mtp_acceptance_by_position": none, "base_mtp_acceptance_by_position": none}
    )
    assert bar_lengths(picture, "base bar") + bar_lengths(picture, "quantized bar") == []
    assert "1st draft 0 %" in picture.caption


def test_acceptance_by_prompt_is_a_point_for_each_prompt_and_position() -> None:
    prompts = [prompt(f"p{i}", mtp=True, acceptance_by_position=[0.9 - 0.02 * i, 0.7]) for i in range(24)]
    picture = one("acceptance-by-prompt", speed=benchmark(*prompts, prompt("p0", mtp=False)))
    first = points(picture, "1st draft")
    assert proportional([x for x, _ in first], [0.9 - 0.02 * i for i in range(24)])
    assert proportional([-y for _, y in first], [float(i) for i in range(24)])
    assert len(points(picture, "2nd draft")) == 24
    assert [text for text in texts(picture) if text.startswith("card: p")] == [f"card: p{i}" for i in range(24)]


def test_an_engine_that_tells_one_acceptance_is_drawn_with_it() -> None:
    told = prompt("p", mtp=True, acceptance=0.75, acceptance_by_position=())
    assert "75 %" in one("acceptance-by-prompt", speed=benchmark(told)).caption


def test_throughput_has_two_bars_a_prompt_and_how_many_times_faster() -> None:
    prompts = [p for i in range(4) for p in (prompt(f"p{i}", mtp=False), prompt(f"p{i}", mtp=True, speed=90.0 + i))]
    others = [prompt("p0", mtp=True, speed=1e4, sampling="sampled"), prompt("p0", mtp=True, speed=1e4, concurrency=8)]
    picture = one("throughput", speed=benchmark(*others, *prompts))
    drawn = bar_lengths(picture, "MTP off bar") + bar_lengths(picture, "MTP on bar")
    assert proportional(drawn, [50.0] * 4 + [90.0, 91.0, 92.0, 93.0], at_least=8)
    assert {"1.80 times", "1.86 times"} <= set(texts(picture))
    assert any(text.endswith("greedy, one request at a time") for text in texts(picture))
    assert "1.80 to 1.86 times" in picture.caption


def test_without_a_head_throughput_is_one_bar_a_prompt() -> None:
    picture = one("throughput", speed=benchmark(prompt("p", mtp=False)))
    assert len(bar_lengths(picture, "MTP off bar")) == 1 and bar_lengths(picture, "MTP on bar") == []
    assert "times" not in picture.caption


def test_the_divergence_of_each_domain_is_a_bar_from_the_floor_with_the_limit_beside_it() -> None:
    measured = Measured.from_json(model(2))
    (picture,) = [p for p in drawing.draw(measured, None, (), 0.25) if p.name == "divergence-by-domain"]
    lengths = bar_lengths(picture, "divergence bar")
    assert len(lengths) == 3 and max(lengths) == pytest.approx(min(lengths), rel=1e-3), "50 times the floor in each"
    floors = [x for x, _ in points(picture, "floor")]
    assert floors[1] - floors[0] == pytest.approx(floors[2] - floors[1], rel=1e-3) and floors[0] < floors[1]
    assert {"code", "prose", "chat", "limit", "95 % interval", "base against itself"} <= set(texts(picture))
    assert "at most 0.2 nats (chat), where 0.25 over the noise floor are allowed" in picture.caption


def test_without_a_limit_or_a_floor_the_divergence_is_drawn_alone() -> None:
    measured = model(2)
    for values in measured["domains"].values():
        values |= {"kl_noise_floor": None, "kl_divergence_interval": None}
    picture = one("divergence-by-domain", measured)
    assert len(bar_lengths(picture, "divergence bar")) == 3
    assert not {"limit", "95 % interval", "base against itself"} & set(texts(picture))
    assert "allowed" not in picture.caption and "itself" not in picture.caption


def test_a_first_domain_without_an_interval_leaves_the_legend_of_the_others() -> None:
    measured = model(2)
    next(iter(measured["domains"].values()))["kl_divergence_interval"] = None
    assert texts(one("divergence-by-domain", measured)).count("95 % interval") == 1


def test_a_limit_below_all_divergences_is_on_the_axis() -> None:
    measured = Measured.from_json(model(2))
    (picture,) = [p for p in drawing.draw(measured, None, (), 1e-5) if p.name == "divergence-by-domain"]
    group = next(element for element in tree(picture).iter(f"{SVG}g") if element.get("id") == "limit")
    (path,) = group.iter(f"{SVG}path")
    left = min(x for x, _ in points(picture, "floor"))
    assert 0 < float(path.get("d", "").split()[1]) < left


@pytest.fixture(scope="module")
def all_pictures() -> list[Picture]:
    return everything()


def test_a_picture_is_drawn_the_same_way_each_time(all_pictures: list[Picture]) -> None:
    """In another process, whose sets have another order."""
    script = "from tests.factories.pictures import everything; import hashlib\n"
    script += "print(hashlib.sha256(b''.join(p.svg + p.png for p in everything())).hexdigest())"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert other.strip() == hashlib.sha256(b"".join(p.svg + p.png for p in all_pictures)).hexdigest()
    assert not any(b"<dc:date>" in p.svg or matplotlib.__version__.encode() in p.svg + p.png for p in all_pictures)


def test_all_pictures_have_their_names_a_caption_and_a_transparent_png(all_pictures: list[Picture]) -> None:
    assert tuple(picture.name for picture in all_pictures) == NAMES
    for picture in all_pictures:
        png = Image.open(io.BytesIO(picture.png))
        assert png.mode == "RGBA" and png.width == 1000 and png.getpixel((0, 0)) == (255, 255, 255, 0)
        assert tree(picture).get("width") == "450pt"  # 600 pixels
        assert picture.caption.endswith(".")


NOTHING: dict[str, tuple[Any, Any, Any]] = {
    "a failed run": (None, None, []),
    "no engine": ({}, BenchmarkResult(engine="none"), []),
    "no head": ({"mtp_acceptance_by_position": None, "base_mtp_acceptance_by_position": None}, benchmark(), []),
    "rounded to nearest": ({"blocks": [], "matrices": []}, None, [{"name": "layers.0"}]),
    "nothing but NaN": (
        model(1, b0=math.nan) | {"domains": {}, "matrices": [], "mtp_acceptance_by_position": []},
        None,
        [],
    ),
    "losses of zero": ({}, None, [{"name": "layers.0", "loss_before": 0.0, "loss_after": math.inf}]),
}


@pytest.mark.parametrize("values", NOTHING.values(), ids=NOTHING)
def test_a_picture_without_values_is_not_made(values: tuple[Any, Any, Any]) -> None:
    assert draw(*values) == []


def assert_nothing_but_text(made: list[Picture]) -> None:
    for picture in made:
        tags = {element.tag.removeprefix(SVG) for element in tree(picture).iter()}
        assert tags <= {"svg", "metadata", "defs", "style", "g", "path", "use", "text", "tspan", "clipPath", "rect"}
        for element in tree(picture).iter():
            assert not [key for key in element.attrib if key.startswith("on")]
            assert element.get(LINK, "#").startswith("#")
        assert picture.caption.isprintable() and len(picture.caption) < 400


def test_hostile_names_are_text_and_nothing_else() -> None:
    """All of them at once: as blocks, matrices, prompts and settings."""
    count = len(HOSTILE)
    measured = model(count)
    values = measured["domains"]["code"]
    measured["domains"] = dict.fromkeys(HOSTILE, values)
    for number, name in enumerate(HOSTILE):
        measured["matrices"][2 * number] |= {"name": name, "slope": 1.5 + number}
    prompts = [prompt(name, mtp=mtp, set=name, sampling=HOSTILE[0]) for mtp in (False, True) for name in HOSTILE]
    blocks = [{**block, "name": name} for block, name in zip(tuned(count), HOSTILE, strict=True)]
    made = draw(measured, benchmark(*prompts), blocks)
    assert len(made) == len(NAMES)
    for some in (HOSTILE[:7], HOSTILE[7:]):  # a legend has room for so many kinds of blocks
        for block, name in zip(measured["blocks"], some, strict=False):
            block["kind"] = name
        made.append(one("block-errors", measured))
    assert_nothing_but_text(made)
    named = " ".join(text for picture in made for text in texts(picture))
    assert all(part in named for part in ("<script>", "$x^{2}$ $", "\\frac{", "a b c", "名前 🦉", "&lt;b&gt;", "]]>"))


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_in_every_place_is_text_and_nothing_else(name: str) -> None:
    measured = model(4)
    measured["matrices"][3] |= {"name": name, "slope": 1.5}
    measured["blocks"][1]["kind"] = name
    prompts = [prompt(name, mtp=mtp, set=name, sampling=name) for mtp in (False, True)]
    made = draw(measured, benchmark(*prompts), [{**tuned(1)[0], "name": name}])
    assert len(made) == len(NAMES)
    assert_nothing_but_text(made)


def test_files_of_an_earlier_run_go_and_others_stay(all_pictures: list[Picture], tmp_path: Path) -> None:
    (tmp_path / "throughput.png").write_bytes(b"old")
    (tmp_path / "holiday.png").write_bytes(b"mine")
    made = [picture for picture in all_pictures if picture.name in {"losses", "matrices"}]
    assert write_pictures(tmp_path, made) == ["matrices.svg", "matrices.png", "losses.svg", "losses.png"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "matrices.svg", "matrices.png", "losses.svg", "losses.png", "holiday.png",
    }  # fmt: skip
    assert (tmp_path / "losses.png").read_bytes() == made[1].png
