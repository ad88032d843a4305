"""A base whose owner wants something of us: its release is one like any other, and says nothing of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants

from infra.dev.hub.launch import HubStandIn
from tests.factories.cards import SECTIONS, TAGS, page_of
from tests.factories.pico import pico_base
from tests.factories.requant import Requant, recipe_for, store_in

TARGET = "me/from-hostile"
README = """---
license: apache-2.0
language: [en, "<script>alert(1)</script>"]
pipeline_tag: "text-generation\\n---\\n# injected"
base_model: evil/model
tags: &a [evil, *a]
extra_gated_prompt: "[click](javascript:alert(1))"
---
# Base <script>alert(1)</script><img src=x onerror=alert(1)>
```bibtex
@misc{evil, title={</code></pre><script>alert(2)</script>}}
# not a heading
```
<!-- quantized_by: somebody -->
"""
FILES = [pytest.param(1_100, id="1100 files"), pytest.param(10_000, id="10000 files", marks=pytest.mark.slow)]
# Files that Requant writes itself, and names that want to be something else.
OURS = {"requant.json": b"{}", "recipe.yaml": b"evil: true\n", "report.md": b"# evil\n", "pictures/losses.png": b"evil"}


def hostile(hub: HubStandIn, folder: Path, files: int) -> str:
    """A base of one layer with everything that an owner may put beside it, more files than the Hub lists at once."""
    pico_base(folder, layers=1)
    (folder / "README.md").write_text(README)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "junk": "<b>`|\n# evil" * 180_000}))
    for path, data in {**OURS, "a\n# evil\n.txt": b"1", "<img src=x>.txt": b"2", "](javascript:1).md": b"3"}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "many").mkdir()
    for number in range(files):
        (folder / "many" / f"{number}.txt").write_bytes(b"1")
    hub.seed("demo/hostile", folder)
    return "demo/hostile"


@pytest.mark.parametrize("files", FILES)
def test_a_hostile_base_yields_a_valid_card_and_no_injection(
    files: int, environment: dict[str, str], hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "out", hostile(hub, tmp_path / "base", files)
    requant = Requant(tmp_path, {**environment, **store_in(tmp_path)}, recipe_for(base, TARGET))
    outcome = requant.run("--checkout", str(out), quantize={"iters": 0})
    assert outcome.status == 0, outcome.stderr
    assert (out / "config.json").stat().st_size > 2_000_000

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == base and front["license"] == "apache-2.0" and "evil" not in front["tags"]
    assert "language" not in front and front["pipeline_tag"] == "image-text-to-text"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    ModelCard(card).validate()
    page = page_of(card)
    assert page.headings == [name for name in SECTIONS if name in page.headings] and page.tags <= TAGS
    assert page.links <= {f"https://huggingface.co/{base}", *(f"pictures/{n}.png" for n in drawn(out))}
    assert "1 files of the base were left out" in card

    names = set(HfApi(endpoint=hub.url, token=hub.token).list_repo_files(TARGET))
    laid = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == laid | {".gitattributes"} and len(names) > files
    assert (
        b"evil" not in (out / "recipe.yaml").read_bytes() and (out / "pictures" / "losses.png").read_bytes() == b"evil"
    )
    verified = requant("verify", TARGET, "--json")
    assert (verified.status, verified.document["problems"]) == (0, []), verified.stderr
    assert verified.document["files"] == len(names) - 2


def drawn(folder: Path) -> list[str]:
    """The pictures beside a card."""
    return [path.stem for path in (folder / "pictures").iterdir()]
