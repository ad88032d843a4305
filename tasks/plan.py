"""plan: everything that can be known of a run before weights move, from headers, configs and the store.

`plan` is what `requant plan` prints; `preflight` is the same at the beginning of a run, which it stops. A plan fetches
no weight and changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from requant.tasks import benchmark, evaluate, quantize, validate
from requant.tasks.artifact import REWRITTEN, Manifest
from requant.tasks.checkpoint.base_check import check_base
from requant.tasks.checkpoint.checkpoint import Checkpoint, read_json
from requant.tasks.checkpoint.compat import PROCESSOR
from requant.tasks.download import download_key, text_files
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable, Refused
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.hub.sparse_checkout import fetch_files, lay_out
from requant.tasks.mtp_fix import mtp_fix_key
from requant.tasks.pipeline.stage import Stage, tool_problems
from requant.tasks.planning.base_diff import changed_fields, changed_files, changed_tensors, last_done
from requant.tasks.planning.checks import refusals
from requant.tasks.planning.durations import Figure, hardware, quantize_figure, stage_figure
from requant.tasks.planning.groups import settled
from requant.tasks.planning.output import Output, blocks_of, head_bytes, plan_output
from requant.tasks.planning.outputs import Before, together
from requant.tasks.planning.resources import Needs, disk_problem, needs
from requant.tasks.planning.texts import Texts
from requant.tasks.planning.transfers import Hashes, base_manifest, hashes_of, near_file, to_download, to_upload
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.texts.text import Text, find_text

ON_GPU = {"quantize", "validate", "benchmark"}  # what a GPU is rented for
LINEAR = re.compile(r"\.linear_attn\.")


def plan(store: Store, recipe: Recipe, *, elsewhere: bool = False) -> dict[str, Any]:
    """The document of `requant plan --json`. `elsewhere`: the run will be on another machine, and neither disk
    nor tools of this one are judged.

    Raises HubUnavailable, StoreUnreachable, RecipeError for a text that is not there, or for tasks of eval that this
    machine cannot run.
    """
    if not elsewhere:
        evaluate.check_tasks(recipe.eval)
    try:
        base = resolve(recipe.base.repo_id, recipe.base.revision)
        calibration = find_text(recipe.quantize.calibration)
        text = find_text(recipe.validation.text, "validation.text")
    except HubUnavailable:
        raise
    except HubError as error:
        return _document(recipe, None, problems=[str(error)])
    return plan_of(store, recipe, base, calibration, text, elsewhere=elsewhere)


@dataclass(frozen=True)
class Foreseen:
    """What is known of a result before the first byte: its recipe, with a number for a group size of auto, and which
    engines will load it and draft."""

    recipe: Recipe
    engines: Mapping[str, Any]


def preflight(
    store: Store, recipe: Recipe, base: Revision, calibration: Text, text: Text, there: Collection[str] = ()
) -> dict[str, Foreseen]:
    """Find out before the first byte whether a run can end well. Raises Refused with the plan's sentences.

    Returns what is foreseen of each result, by the output's name. `there`: the stages that another worker will do.
    """
    document = plan_of(store, recipe, base, calibration, text, fetch_texts=True, there=there)
    if document["problems"]:
        raise Refused("; ".join(document["problems"]))
    found = {one.get("name", ""): one for one in document.get("outputs") or [document]}
    return {
        name: Foreseen(one.with_group_size(found[name]["output"]["scheme"]["group_size"]), found[name]["engines"])
        for name, one in recipe.each.items()
    }


def plan_of(
    store: Store,
    recipe: Recipe,
    base: Revision,
    calibration: Text,
    text: Text,
    *,
    elsewhere: bool = False,
    fetch_texts: bool = False,
    there: Collection[str] = (),
) -> dict[str, Any]:
    """The plan for a base and texts that are resolved; of several outputs one for all. `fetch_texts`: texts that are
    Hub data sets are fetched and read too. `there`: the stages that another worker will do, with tools of its own."""
    hashes = hashes_of(store, base)
    with TemporaryDirectory(prefix="requant-") as temporary:
        try:
            base.check_names()
            folder = Path(temporary) / "base"
            folder.mkdir()
            lay_out(base, folder, lambda file: near_file(store, file, hashes))
            if (folder / PROCESSOR).is_file() and not (folder / PROCESSOR).is_symlink():
                fetch_files(base, folder, [PROCESSOR])  # whether an engine will load depends on what it says
            source = Checkpoint.open(folder)
        except CheckpointError as error:
            return _document(recipe, base, problems=[_of_the_base(error, f"{temporary}/base")])
        changes = functools.cache(lambda: _changes(store, base, hashes, source))
        joining = {f.path: f.size for f in base.wanted if _joins(f.path)}
        far = sum(f.size for f in base.wanted if near_file(store, f, hashes) is None)
        documents, before, made = dict[str, dict[str, Any]](), Before(), dict[str, str]()

        files_of = functools.partial(text_files, store)
        texts = Texts(files_of, base, folder, Path(temporary) / "texts", calibration, text, fetch=fetch_texts)

        def planned(one: Recipe) -> tuple[Recipe, dict[str, Any]]:
            problems = list(refusals(source, one))
            try:
                check_base(source, one.base.repo_id, with_head=one.mtp != "drop")
                one = settled(source, one)
                output = plan_output(source, one, joining)
            except CheckpointError as error:
                return one, _document(one, base, problems=[*problems, _of_the_base(error, str(folder))])
            done = _done(store, one, base, hashes, calibration, text)
            stages = _stages(store, one, base, hashes, done, before.stages(one), output)
            to_run = {stage["name"] for stage in stages if stage["state"] == "run"}
            needed = needs(output, one, far, to_run, kept=before.kept)
            problems += output.problems
            # With a store that machines share, the one that quantizes may be another than this.
            too_little = disk_problem(needed.disk, store.near.root) if store.is_local and not elsewhere else None
            problems += [too_little] if too_little else []
            problems += [] if elsewhere else tool_problems(_tools(one, to_run.difference(there)))
            # What ends the run in any case needs no text to be read.
            problems += [] if problems else texts.problems(one, to_run, source.text_config)
            return one, _document(one, base, source, output, stages, needed, changes(), problems, texts.notes)

        for name, asked in recipe.each.items():
            one, documents[name] = planned(asked)
            if (first := made.setdefault(one.makes, name)) != name:  # the recipe knew of no number for auto
                documents[name]["problems"].append(
                    f"quantize.group_size auto comes to {one.quantize.asked[1]} for this base, so that it makes the "
                    f"same as {first}: take one of them out"
                )
            before.add(one, documents[name])
        return together(recipe, documents) if recipe.outputs else documents[""]


def _of_the_base(error: CheckpointError, folder: str) -> str:
    """The sentence of an error, without the folder that the base's headers lie in."""
    return str(error).replace(f"{folder}/", "").replace(folder, "the base")


def _joins(path: str) -> bool:
    """Whether a file of the base is one of the result's as it is."""
    return path not in REWRITTEN and not path.endswith((".safetensors", ".safetensors.index.json"))


def _done(
    store: Store, recipe: Recipe, base: Revision, hashes: Hashes, calibration: Text, text: Text
) -> dict[str, Manifest]:
    """The artifacts of the stages that the store has, followed by the keys that a run computes.

    Fetches small files of the base where only they tell, and never a weight.
    """
    done: dict[str, Manifest] = {}

    def look(stage: str, key: str) -> Manifest | None:
        found = store.manifest(stage, key)
        if found is not None:
            done[stage] = found
        return found

    files = look("download", download_key(base))
    if files is None and next(iter(store.backend.keys("artifacts/quantize")), None) is not None:
        files = base_manifest(base, hashes, REWRITTEN)  # the same weights may have come from another commit
    quantized = look("quantize", quantize.quantize_key(recipe, files, calibration)) if files else None
    artifact = look("mtp_fix", mtp_fix_key(recipe, files, quantized)) if files and quantized else None
    if files and artifact:
        look("validate", validate.validate_key(recipe, files, artifact, text))
        look("benchmark", benchmark.benchmark_key(recipe, artifact))
    return done


def _stages(
    store: Store,
    recipe: Recipe,
    base: Revision,
    hashes: Hashes,
    done: Mapping[str, Manifest],
    shared: Collection[str],
    output: Output,
) -> list[dict[str, Any]]:
    """Each stage: whether the store has it, or will by then (`shared`), the bytes that it moves, its seconds and where
    that figure is from."""
    total = sum(file.size for file in base.wanted)
    made = sum(output.sizes.values())
    quantized = sum(output.before_head.values())
    moves = {
        "download": to_download(store, base, hashes),
        "quantize": quantized,
        "mtp_fix": head_bytes(output),
        "validate": total + made,
        "benchmark": made,
    }
    if recipe.publish is not None:
        moves["publish"] = to_upload(recipe, done.get("mtp_fix"), made)
    linear = {m.partition(".linear_attn.")[0] for m in output.choice.packed if LINEAR.search(m)}
    rows = []
    for name, nbytes in moves.items():
        reused = name in done or name in shared or (name == "publish" and not nbytes)
        if name in shared and name not in done:
            nbytes, figure = 0, Figure(0.0, "an output before it")
        elif reused:
            nbytes, figure = 0, Figure(0.0, "the store has it" if name != "publish" else "the Hub has it")
        elif name == "quantize":
            figure = quantize_figure(store, recipe, blocks_of(output), linear)
        else:
            figure = stage_figure(store, name, recipe, nbytes)
        row: dict[str, Any] = {"name": name, "state": "reused" if reused else "run", "bytes": nbytes}
        row |= {"seconds": round(figure.seconds, 1), "cost": _cost(recipe, name, figure.seconds)}
        rows.append({**row, "figure": figure.source})
    return rows


def _tools(recipe: Recipe, to_run: Collection[str]) -> Iterator[tuple[Stage, tuple[str, ...]]]:
    """Yield the stages that have tools, in the order of a run, each with the tools that it will use."""
    if "quantize" in to_run:
        yield quantize.STAGE, quantize.STAGE.tools
    if "validate" in to_run:
        yield validate.STAGE, validate.STAGE.tools
        if recipe.eval is not None:  # Tasks are evaluated inside validate.
            yield evaluate.STAGE, evaluate.STAGE.tools
    if "benchmark" in to_run:
        yield benchmark.STAGE, benchmark.used_tools(recipe.benchmark)


def _cost(recipe: Recipe, stage: str, seconds: float) -> float | None:
    price = recipe.hardware.price_per_hour if recipe.hardware else None
    return round(seconds / 3600 * price, 4) if price is not None and stage in ON_GPU else None


def _changes(store: Store, base: Revision, hashes: Hashes, source: Checkpoint) -> dict[str, Any] | None:
    """What this commit changed against the last one done; None where none was."""
    found = last_done(store, base)
    if found is None:
        return None
    sha, manifest = found
    files = changed_files(manifest, base, hashes)
    document: dict[str, Any] = {"since": sha, "files": files, "tensors": None, "config": []}
    if not any(files.values()):
        return document
    known: Hashes = {file.path: file.sha256 for file in manifest.files}
    with TemporaryDirectory(prefix="requant-") as temporary, contextlib.suppress(CheckpointError, HubError):
        # The Hub may not have that commit any more.
        folder = lay_out(resolve(base.repo_id, sha), Path(temporary), lambda file: near_file(store, file, known))
        document["config"] = changed_fields(read_json(folder / "config.json"), source.config)
        document["tensors"] = changed_tensors(Checkpoint.open(folder), source, files["changed"])
    return document


def _document(
    recipe: Recipe,
    base: Revision | None,
    source: Checkpoint | None = None,
    output: Output | None = None,
    stages: list[dict[str, Any]] | None = None,
    needed: Needs | None = None,
    changes: dict[str, Any] | None = None,
    problems: list[str] | None = None,
    notes: list[str] | None = None,
) -> dict[str, Any]:
    stages = stages or []
    costs = [stage["cost"] for stage in stages if stage["cost"] is not None]
    return {
        "base": {
            "repo_id": recipe.base.repo_id,
            "revision": recipe.base.revision,
            "sha": base.sha if base else None,
            "bytes": sum(file.size for file in base.wanted) if base else None,
            "tensors": len(source.tensors) if source else None,
        },
        "stages": stages,
        "output": _output(recipe, output),
        "needs": needed.to_json() if needed else {"disk_bytes": None, "ram_bytes": None, "vram_bytes": None},
        "transfer": {
            "download_bytes": sum(s["bytes"] for s in stages if s["name"] == "download"),
            "upload_bytes": sum(s["bytes"] for s in stages if s["name"] == "publish"),
        },
        "engines": output.engines() if output else {},
        "hardware": {
            "gpu": hardware(recipe),
            "seconds": round(sum(stage["seconds"] for stage in stages), 1),
            "price_per_hour": recipe.hardware.price_per_hour if recipe.hardware else None,
            "cost": round(sum(costs), 2) if costs else None,
        },
        "changes": changes,
        "notes": [*(output.notes if output else []), *_notes(recipe), *(notes or [])],
        "problems": problems or [],
        **({"outputs": []} if recipe.outputs else {}),
    }


def _notes(recipe: Recipe) -> list[str]:
    return ["how long the tasks of eval take is not foretold: validate will take longer"] if recipe.eval else []


def _output(recipe: Recipe, output: Output | None) -> dict[str, Any]:
    if output is None:
        return {"bytes": None, "quantized_tensors": None, "kept_tensors": None}
    bits, group_size, sym = recipe.quantize.resolved
    return {
        "bytes": sum(output.sizes.values()),
        "weights_bytes": sum(output.weights.values()),
        "quantized_tensors": len(output.choice.packed),
        "kept_tensors": len(output.kept_names),
        "scheme": {"bits": bits, "group_size": group_size, "sym": sym},
        "packing": output.choice.quantization["packing_format"],
        "shards": output.weights,
        "files": output.sizes,
        "quantized": output.packed(),
        "kept": output.kept(),
    }
