"""Write the report of a run to files: the JSON document, a report in Markdown and a folder of pictures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from requant.flows.checkout import check_writable
from requant.tasks.checkpoint.writer import write_file, write_json
from requant.tasks.errors import FolderInUse
from requant.tasks.plots import write_pictures

if TYPE_CHECKING:
    from requant.flows.report.report import RunReport


def write_report(report: RunReport, path: Path) -> None:
    """Write the JSON document to `path`, and STEM.md and the folder STEM-pictures next to it.

    If there are several outputs, the folder has a folder for each.
    """
    from requant.flows.report.markdown import comparison, markdown

    write_json(path.parent, path.name, report.document().to_json())
    parts = [comparison(report)] if report.recipe.outputs else []
    for name, one in report.each.items():
        folder = path.with_name(f"{path.stem}-pictures") / name
        if one.pictures or folder.is_dir():
            write_pictures(folder, one.pictures)
        where = quote(folder.relative_to(path.parent).as_posix())
        parts.append(markdown(one, functools.partial("{0}/{1.name}.svg".format, where)))
    write_file(path.parent, f"{path.stem}.md", ["\n".join(parts).encode()])


def check_report(path: Path) -> None:
    """Check before a run that its report can be written to `path` and next to it. Raises FolderInUse if it cannot."""
    check_writable(path.parent.resolve(), path)
    pictures = path.with_name(f"{path.stem}-pictures")
    if pictures.exists() and not pictures.is_dir():
        raise FolderInUse(
            f"{pictures} is a file, and the report's pictures go into a folder of this name: move it", path=pictures
        )
    if (text := path.with_name(f"{path.stem}.md")).is_dir():
        raise FolderInUse(f"{text} is a folder, and the report in markdown gets this name: move it", path=text)
