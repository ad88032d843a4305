"""Print the base job template of a work pool, made of job.yaml and values.yaml:

python -m infra.kubernetes gpu > build/gpu.json
prefect work-pool create gpu --type kubernetes --base-job-template build/gpu.json --overwrite
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
POOLS = ("cpu", "gpu")
RUN_VARIABLES = {"name": "string", "labels": "object", "annotations": "object", "command": "string", "env": "object"}
WORKER_VARIABLES = ("namespace", "job_watch_timeout_seconds", "pod_watch_timeout_seconds", "stream_output")
TYPES = {str: "string", int: "integer", bool: "boolean", dict: "object", list: "array"}


def base_job_template(pool: str) -> dict[str, Any]:
    """Return the base job template of a pool.

    `job_configuration` is what the worker reads, `variables` the schema of its placeholders with the pool's defaults.
    """
    values = yaml.safe_load((FOLDER / "values.yaml").read_text())
    properties: dict[str, Any] = {name: {"type": kind, "title": name.title()} for name, kind in RUN_VARIABLES.items()}
    for name, value in {**values["all"], **values[pool]}.items():
        schema = {"anyOf": [{"type": "integer"}, {"type": "null"}]} if value is None else {"type": TYPES[type(value)]}
        properties[name] = {"title": name.replace("_", " ").capitalize(), **schema, "default": value}
    configuration = {name: f"{{{{ {name} }}}}" for name in (*RUN_VARIABLES, *WORKER_VARIABLES)}
    manifest = yaml.safe_load((FOLDER / "job.yaml").read_text())
    return {
        "job_configuration": {**configuration, "job_manifest": manifest},
        "variables": {"type": "object", "properties": properties},
    }


def main() -> None:
    """Print the base job template of one pool."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.kubernetes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pool", choices=POOLS)
    print(json.dumps(base_job_template(parser.parse_args().pool), indent=1))


if __name__ == "__main__":
    main()
