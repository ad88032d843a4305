"""Several outputs of one base: what each finds done by those before it, and one plan for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from requant.tasks.recipe.recipe import Recipe

Document = Mapping[str, Any]


@dataclass
class Before:
    """What the outputs before one leave to it in the same run: their artifacts in the store, and `kept` bytes less of
    disk."""

    recipes: list[Recipe] = field(default_factory=list)
    kept: int = 0

    def add(self, recipe: Recipe, document: Document) -> None:
        """One more, by its plan; what cannot be made leaves nothing."""
        if not document["stages"]:
            return
        self.recipes.append(recipe)
        if any(stage["state"] == "run" for stage in document["stages"] if stage["name"] in {"quantize", "mtp_fix"}):
            self.kept += document["output"]["bytes"]

    def stages(self, recipe: Recipe) -> set[str]:
        """The stages that a recipe finds done: the base is one, and the head is joined after quantizing."""
        quantized = any(one.quantize == recipe.quantize for one in self.recipes)
        return {*(["download"] if self.recipes else []), *(["quantize"] if quantized else [])}


def together(recipe: Recipe, documents: Mapping[str, Document]) -> dict[str, Any]:
    """One plan of the plans of each output, by name: bytes, seconds and costs are sums, needs the most of any."""
    plans = list(documents.values())
    stages = [{"output": name, **stage} for name, plan in documents.items() for stage in plan["stages"]]
    download = next((stage for stage in stages if stage["name"] == "download"), None)
    targets = {name: one.publish.repo_id if one.publish else None for name, one in recipe.each.items()}
    return {
        "base": max((plan["base"] for plan in plans), key=lambda base: base["tensors"] or 0),
        "stages": [stage for stage in stages if stage["name"] != "download" or stage is download],
        "output": {
            "bytes": _sum(plan["output"]["bytes"] for plan in plans),
            "quantized_tensors": None,
            "kept_tensors": None,
        },
        "needs": _most([plan["needs"] for plan in plans]),
        "transfer": {key: sum(plan["transfer"][key] for plan in plans) for key in ("download_bytes", "upload_bytes")},
        "engines": _engines(documents),
        "hardware": {
            **plans[0]["hardware"],
            "seconds": round(sum(plan["hardware"]["seconds"] for plan in plans), 1),
            "cost": _sum(plan["hardware"]["cost"] for plan in plans),
        },
        "changes": next((plan["changes"] for plan in plans if plan["changes"] is not None), None),
        "notes": _told(documents, "notes"),
        "problems": _told(documents, "problems"),
        "outputs": [{"name": name, "repo_id": targets[name], **plan} for name, plan in documents.items()],
    }


def _sum(values: Iterable[Any]) -> Any:
    """Of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return round(sum(known), 2) if known else None


def _most(needs: list[Any]) -> Any:
    """The most of any, number by number."""
    if all(isinstance(need, dict) for need in needs):
        keys = dict.fromkeys(key for need in needs for key in need)
        return {key: _most([need[key] for need in needs if key in need]) for key in keys}
    return max((need for need in needs if need is not None), default=None)


def _engines(documents: Mapping[str, Document]) -> dict[str, Any]:
    """Of each engine the worst verdict; where they differ, its reason says of which output it is."""
    found: dict[str, Any] = {}
    for engine in dict.fromkeys(engine for plan in documents.values() for engine in plan["engines"]):
        verdicts = {name: plan["engines"][engine] for name, plan in documents.items() if engine in plan["engines"]}
        name, verdict = min(verdicts.items(), key=lambda item: (item[1]["loads"], item[1]["mtp"]))
        alike = all(other == verdict for other in verdicts.values())
        found[engine] = verdict if alike else {**verdict, "reason": f"{name}: {verdict['reason']}"}
    return found


def _told(documents: Mapping[str, Document], key: str) -> list[str]:
    """Sentences once: what is true of all outputs as it is, the others with the output's name."""
    every = [set(plan[key]) for plan in documents.values()]
    common = set.intersection(*every)
    rows = [
        sentence if sentence in common else f"{name}: {sentence}"
        for name, plan in documents.items()
        for sentence in plan[key]
    ]
    return list(dict.fromkeys(rows))
