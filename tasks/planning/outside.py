"""Find what would stop a run outside of this project: the tasks of lm-eval, the engine, and the repo to publish to."""

from __future__ import annotations

from collections.abc import Collection

from requant.tasks.errors import EngineFailed, HubError, HubUnavailable
from requant.tasks.evaluating.definitions import has_lm_eval, task_problems
from requant.tasks.hub.publish_target import Account, check_target
from requant.tasks.hub.revision import Revision
from requant.tasks.planning.findings import Findings
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.serving.vllm import VLLM_VARIABLE, find_server, find_vllm


def task_findings(recipe: Recipe, to_run: Collection[str], delegated: Collection[str]) -> Findings:
    """Say why the tasks of `eval` cannot be run here.

    Where a worker of the gpu pool runs them, this machine needs no lm-eval, and checks them if it has it.
    """
    if recipe.eval is None or "validate" not in to_run or ("validate" in delegated and not has_lm_eval()):
        return Findings()
    return Findings.of("validate", task_problems(recipe.eval))


def engine_findings(recipe: Recipe, to_run: Collection[str], delegated: Collection[str]) -> Findings:
    """Say that vLLM is missing for the benchmark, or which server does not answer yet."""
    asked = recipe.benchmark
    if "benchmark" not in to_run or "benchmark" in delegated:
        return Findings()
    if asked.engine == "vllm" and find_vllm() is None:
        remedy = f"install vLLM, name its command in {VLLM_VARIABLE}, or set benchmark.engine to auto"
        return Findings.of("benchmark", [f"there is no vllm on the PATH: {remedy}"])
    waiting = []
    for engine in (asked.engine, asked.base_engine or ""):
        if engine.startswith("url:"):
            try:
                find_server(engine.removeprefix("url:"), chat=False)
            except EngineFailed as error:
                waiting.append(f"this server must be up by then: {error}")
    return Findings.of("benchmark", warnings=waiting)


def target_findings(recipe: Recipe, base: Revision, *, starts: bool) -> Findings:
    """Say why the results of a recipe could not be published.

    `starts`: a run begins, which may create repos, and which a Hub that does not answer stops: raises HubUnavailable.
    """
    targets = [(one.publish, one.quantize.asked.bits) for one in recipe.each.values() if one.publish is not None]
    if not targets:
        return Findings()
    found = Findings()
    try:
        account = Account.of_token(targets[0][0].repo_id)
        for publish, bits in targets:
            checked = check_target(publish, base, account, bits=bits, create=starts)
            found += Findings.of("publish", checked.problems, checked.unchecked)
    except HubUnavailable as error:
        if starts:
            raise
        found += Findings.of("publish", warnings=[f"not checked: {error}"])
    except HubError as error:  # What else is wrong, only an account that may write sees.
        found += Findings.of("publish", [str(error)])
    return found
