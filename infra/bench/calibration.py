"""Measure results of a base by calibration text: `python -m infra.bench.calibration BASE FOLDER`.

BASE is a folder with a checkpoint. Each calibration, scheme and seed is quantized and validated in a process of its
own, several at once, in one store in FOLDER. The table has the KL divergence to the base by domain, in nats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    """Run what is not yet in FOLDER, and print the table of all results in it."""
    parser = argparse.ArgumentParser(prog="infra.bench.calibration", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", default="builtin:python,builtin:mixed,self")
    parser.add_argument("--scheme", default="W4A16G64,W2A16G64")
    parser.add_argument("--seed", default="42")
    parser.add_argument("--quantize", default="{}", help="further settings of the section quantize, as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    runs = [
        {"calibration": calibration, "scheme": scheme, "seed": int(seed), **json.loads(asked.quantize)}
        for scheme in asked.scheme.split(",")
        for calibration in asked.calibration.split(",")
        for seed in asked.seed.split(",")
    ]
    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(lambda run: _run_apart(asked.base, asked.folder, run), runs))
    sys.stdout.write(table(asked.folder))


def _run_apart(base: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Do one run in a process of its own, unless its result is there."""
    name = "-".join(str(settings[key]).replace(":", "-") for key in ("scheme", "calibration", "seed"))
    if (folder / f"{name}.json").exists():
        return
    command = [sys.executable, "-m", "infra.bench.calibration", "--one", str(base), str(folder), json.dumps(settings)]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    if done.returncode == 0:
        (folder / f"{name}.json").write_text(done.stdout.splitlines()[-1] + "\n")
    else:
        print(f"{name} failed: {folder / f'{name}.log'}", file=sys.stderr)


def run_one(base_folder: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize and validate, and return the measured values."""
    import logging

    from requant.tasks.artifact import Manifest, file_of
    from requant.tasks.mtp_fix import mtp_fix
    from requant.tasks.quantize import quantize
    from requant.tasks.recipe.loader import parse_recipe
    from requant.tasks.self_calibration import self_calibration
    from requant.tasks.store import open_store
    from requant.tasks.texts.calibration import find_calibration
    from requant.tasks.texts.validation import find_validation_text
    from requant.tasks.validate import read_values, validate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    store = open_store((folder / "store").as_uri())
    base = Manifest.of(file_of(base_folder, path.name) for path in sorted(base_folder.iterdir()))
    copies = folder / f"base-{os.getpid()}"
    copies.mkdir()
    for file in base.files:
        os.link(base_folder / file.path, copies / file.path)
        store.put_blob(copies / file.path, file)
    recipe = parse_recipe({"base": {"repo_id": "bench/base"}, "quantize": settings})
    calibration, text = find_calibration(recipe.quantize), find_validation_text(recipe.validation.text)
    written_s = 0.0
    if calibration.waits_for_base:
        written = self_calibration(store, recipe, base)
        calibration, written_s = calibration.with_written(written.manifest), written.seconds
    quantized = quantize(store, recipe, base, calibration)
    fixed = mtp_fix(store, recipe, base, quantized.manifest)
    validated = validate(store, recipe, base, fixed.manifest, text)
    measured = read_values(store, validated)
    return {
        "settings": settings,
        "write_s": round(written_s, 1),
        "quantize_s": round(quantized.seconds, 1),
        "validate_s": round(validated.seconds, 1),
        "measured": {key: value for key, value in measured.to_json().items() if key not in ("matrices", "blocks")},
    }


def table(folder: Path) -> str:
    """Write all results in a folder as Markdown: KL divergence by domain in nats, and seconds."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        return "no results\n"
    domains = list(results[0]["measured"]["domains"])
    lines = [
        "| scheme | calibration | seed | " + " | ".join(domains) + " | write s | quantize s | validate s |",
        "|---" * (6 + len(domains)) + "|",
    ]
    for result in results:
        asked = result["settings"]
        values = result["measured"]["domains"]
        cells = [asked["scheme"], asked["calibration"], asked["seed"]]
        cells += [f"{values[name]['kl_divergence']:.4f}" for name in domains]
        cells += [result[key] for key in ("write_s", "quantize_s", "validate_s")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run_one(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))))
    else:
        main()
