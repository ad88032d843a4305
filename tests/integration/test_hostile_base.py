"""A base whose owner wants something of us: its release is one like any other, and says nothing of theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants

from infra.hub.launch import HubStandIn
from tests.factories.cards import SECTIONS, TAGS, page_of
from tests.factories.requant import Outcome, Requant

Finished = tuple[Requant, Outcome]
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
FILES = 10_000
# Files that Requant writes itself, and names that want to be something else.
OURS = {"requant.json": b"{}", "recipe.yaml": b"evil: true\n", "report.md": b"# evil\n", "pictures/losses.png": b"evil"}


@pytest.fixture(scope="module")
def hostile(hub: HubStandIn, base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile") / "base"
    shutil.copytree(base, folder)
    (folder / "README.md").write_text(README)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "junk": "<b>`|\n# evil" * 180_000}))
    for path, data in {**OURS, "a\n# evil\n.txt": b"1", "<img src=x>.txt": b"2", "](javascript:1).md": b"3"}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "many").mkdir()
    for number in range(FILES):
        (folder / "many" / f"{number}.txt").write_bytes(b"1")
    hub.seed("demo/hostile", folder)
    return "demo/hostile"


def test_a_hostile_base_yields_a_valid_card_and_no_injection(
    hostile: str, requant: Requant, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = requant.folder / "out"
    outcome = requant.run("--checkout", str(out), base={"repo_id": hostile}, publish={"repo_id": TARGET})
    assert outcome.status == 0, outcome.stderr
    assert (out / "config.json").stat().st_size > 2_000_000

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == hostile and front["license"] == "apache-2.0" and "evil" not in front["tags"]
    assert "language" not in front and front["pipeline_tag"] == "image-text-to-text"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    ModelCard(card).validate()
    page = page_of(card)
    assert page.headings == [name for name in SECTIONS if name in page.headings] and page.tags <= TAGS
    assert page.links <= {f"https://huggingface.co/{hostile}", *(f"pictures/{n}.png" for n in drawn(out))}
    assert "1 files of the base were left out" in card

    names = set(HfApi(endpoint=hub.url, token=hub.token).list_repo_files(TARGET))
    laid = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == laid | {".gitattributes"} and len(names) > FILES
    assert (
        b"evil" not in (out / "recipe.yaml").read_bytes() and (out / "pictures" / "losses.png").read_bytes() == b"evil"
    )
    verified = requant("verify", TARGET, "--json")
    assert (verified.status, verified.document["problems"]) == (0, []), verified.stderr
    assert verified.document["files"] == len(names) - 2


def drawn(folder: Path) -> list[str]:
    """The pictures beside a card."""
    return [path.stem for path in (folder / "pictures").iterdir()]
