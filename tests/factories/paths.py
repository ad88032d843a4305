"""Folders of the repository that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CORPUS = ROOT / "tests" / "corpus"
TINY = ROOT / "infra" / "dev" / "models" / "tiny-qwen3_5-mtp"  # a small trained base with an MTP head
