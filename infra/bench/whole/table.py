"""What a whole run took, stage by stage, beside what the plan said."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.bench.whole.sampler import read_samples
from requant.tasks import hardware
from requant.tasks.record import StageRecord
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.store import Store

GB = 1e9
RECORDED = Path(__file__).parents[2] / "gpu-figures.json"  # A test compares the plan with it.


@dataclass(frozen=True)
class MeasuredStage:
    """One stage. `planned_*` is what the plan said. Sizes are peaks in bytes, None where nothing is known.

    `compile_seconds` is the part of the time in which new kinds of blocks were compiled.
    """

    name: str
    seconds: float
    planned_seconds: float
    private_bytes: int | None
    mapped_bytes: int | None
    planned_ram_bytes: int | None
    gpu_bytes: int | None
    planned_gpu_bytes: int | None
    gpu_percent: float | None
    disk_bytes: int | None
    planned_disk_bytes: int | None
    compile_seconds: float = 0.0


def measure(store: Store, plan: Mapping[str, Any], run: Mapping[str, Any], samples: Path) -> list[MeasuredStage]:
    """Put the samples of each stage beside the plan's figures. The disk is what the stage added at its peak."""
    records = {entry.stage: entry.provenance.document for entry in read_catalog(store).entries.values()}
    taken = read_samples(samples)
    planned = {stage["name"]: stage for stage in plan["stages"]}
    stages = []
    for row in run["stages"]:
        name = row["name"]
        record, needs = records.get(name, {}), plan["needs"]["stages"].get(name, {})
        began = datetime.datetime.fromisoformat(str(record["started"])).timestamp() if "started" in record else None
        seconds = float(str(record.get("seconds", row["seconds"])))
        during = [s for s in taken if began is not None and began <= s.at <= began + seconds]
        busy = [s.gpu_percent for s in during if s.gpu_percent is not None]
        stages.append(
            MeasuredStage(
                name,
                seconds,
                planned.get(name, {}).get("seconds", 0.0),
                _peak(s.private_bytes for s in during),
                _peak(s.mapped_bytes for s in during),
                needs.get("ram_bytes"),
                _peak(s.gpu_bytes for s in during),
                needs.get("vram_bytes"),
                round(sum(busy) / len(busy), 1) if busy else None,
                (max(s.disk_bytes for s in during) - during[0].disk_bytes) if during else None,
                needs.get("disk_bytes"),
                StageRecord(record).compile_seconds,
            )
        )
    return stages


def write_figures(folder: Path, layers: int, iters: int, stages: Sequence[MeasuredStage]) -> None:
    """Write figures.json and figures.md into the folder of a run."""
    document = {
        "date": datetime.date.today().isoformat(),
        "machine": hardware.machine().to_json(),
        "layers": layers,
        "iters": iters,
        "stages": [asdict(stage) for stage in stages],
    }
    (folder / "figures.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "figures.md").write_text(as_markdown(stages))


def record_stages(path: Path, layers: int, iters: int, stages: Sequence[MeasuredStage]) -> None:
    """Put what was measured into a file of rows, in place of the rows of an earlier run of this size on this GPU."""
    where = {
        "gpu": next(iter(hardware.machine().gpus), "cpu"),
        "layers": layers,
        "iters": iters,
    }
    names = {stage.name for stage in stages}
    kept = [
        row
        for row in json.loads(path.read_text())
        if row["stage"] not in names or any(row[key] != value for key, value in where.items())
    ]
    rows = [
        {"stage": values.pop("name"), "date": datetime.date.today().isoformat(), **where, **values, "how": "run-27b"}
        for values in map(asdict, stages)
    ]
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")


def as_markdown(stages: Iterable[MeasuredStage]) -> str:
    """Return a table with measured values and, in parentheses, those of the plan. Sizes are in GB of 10^9 bytes."""
    head = ("stage", "seconds", "memory", "of that mapped files", "GPU memory", "GPU busy", "disk")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for s in stages:
        ram = None if s.private_bytes is None or s.mapped_bytes is None else s.private_bytes + s.mapped_bytes
        cells = (
            s.name,
            f"{s.seconds:.1f} ({s.planned_seconds:.0f})",
            f"{_gb(ram)} ({_gb(s.planned_ram_bytes)})",
            _gb(s.mapped_bytes),
            f"{_gb(s.gpu_bytes)} ({_gb(s.planned_gpu_bytes)})",
            "" if s.gpu_percent is None else f"{s.gpu_percent:.0f} %",
            f"{_gb(s.disk_bytes)} ({_gb(s.planned_disk_bytes)})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gb(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GB:.2f}"


def _peak(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
