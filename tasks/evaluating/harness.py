"""lm-eval with one checkpoint: in torch with all weights in memory, or served by vLLM as the benchmark serves it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import EngineFailed, EvaluationFailed, HubUnavailable, RequantError
from requant.tasks.evaluating.definitions import task_manager
from requant.tasks.evaluating.outcomes import Outcomes, Samples, read_outcomes
from requant.tasks.evaluating.rounds import Wanted
from requant.tasks.http import http_client
from requant.tasks.recipe.recipe import Benchmark, Eval
from requant.tasks.serving.client import Server, api_key_header
from requant.tasks.serving.flags import can_draft, serving_flags
from requant.tasks.serving.vllm import serve_vllm
from requant.tasks.versions import installed_version

if TYPE_CHECKING:
    from requant.tasks.validating.model import RunSettings

SEED = 1234  # of few-shot examples and bootstrap
BOOTSTRAP_DRAWS = 1000  # for the standard error of metrics that are not a mean
ANSWER_TIMEOUT_S = 3600  # a long generation waits for others in the engine
CLIENT_PACKAGES = ("aiohttp", "tenacity")  # lm-eval's client for servers needs these, beside what it always needs
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _no_engine(error: Exception) -> RequantError | None:
    """Make no error: there is no engine that could have failed."""
    return None


@dataclass(frozen=True)
class Harness:
    """lm-eval, the tasks of a recipe, and the model that answers.

    lm: lm-eval's LM; engine: what runs it, with its version; engine_failure: makes the error if the engine is the cause
    of an exception, else None.
    """

    settings: Eval
    lm: Any
    engine: str
    engine_failure: Callable[[Exception], RequantError | None] = _no_engine

    def outcomes(self) -> Outcomes:
        """Run all tasks, each on all items or on as many as the recipe says.

        A group that lm-eval aggregates counts as one task; other groups, and tags, count as their members. Raises
        EvaluationFailed, EngineFailed, or HubUnavailable if a data set cannot be fetched at the moment.
        """
        results = self._evaluate(list(self.settings.tasks), limit=self.settings.limit)
        return read_outcomes(results, self.engine)

    def answers(self, wanted: Wanted) -> Samples:
        """Run some items, and return what lm-eval logs of them. Raises the same errors."""
        tasks = [self._single_tasks[name] for name in wanted]
        samples: Samples = self._evaluate(tasks, samples={name: list(places) for name, places in wanted.items()})[
            "samples"
        ]
        return samples

    @cached_property
    def _single_tasks(self) -> dict[str, Any]:
        """The tasks as lm-eval's objects, by name: those of groups, too. Loading them reads their data sets."""
        with self._errors():
            tasks: dict[str, Any] = task_manager(self.settings).load(list(self.settings.tasks))["tasks"]
            return tasks

    def _evaluate(self, tasks: list[Any], **which: Any) -> Any:
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise lm-eval forks this process for each bootstrap
        from lm_eval import simple_evaluate

        with self._errors(), contextlib.redirect_stdout(sys.stderr):  # lm-eval prints, and stdout may be for JSON alone
            return simple_evaluate(
                self.lm,
                tasks=tasks,
                **which,
                num_fewshot=self.settings.num_fewshot,
                apply_chat_template=self.settings.chat_template,
                task_manager=task_manager(self.settings),
                log_samples=True,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RequantError, MemoryError):
            raise
        except Exception as error:  # a task, its data set and its metric may raise anything
            if type(error).__name__ == "OutOfMemoryError":
                raise
            if (failure := self.engine_failure(error)) is not None:
                raise failure from error
            raised = HubUnavailable if isinstance(error, ConnectionError) else EvaluationFailed
            raise raised(f"lm-eval failed on {', '.join(self.settings.tasks)} ({_words(error)})") from error


def _words(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line[:300]}"


@contextlib.contextmanager
def run_in_torch(folder: Path, settings: Eval, run_settings: RunSettings) -> Iterator[Harness]:
    """Load a checkpoint with all of its weights. Raises CheckpointError."""
    from lm_eval.models.huggingface import HFLM

    from requant.tasks.validating.loaded import skeleton_of
    from requant.tasks.validating.model import free, load_tokenizer

    skeleton = skeleton_of(Checkpoint.open(folder).loadable(), run_settings)
    skeleton.hold()
    model = skeleton.model
    tokenizer = load_tokenizer(folder, remote_code=run_settings.remote_code)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch_size)
    try:
        yield Harness(settings, lm, f"transformers {installed_version('transformers')}")
    finally:
        del skeleton, model, lm
        free(run_settings.device)


def has_client() -> bool:
    """Check whether lm-eval can ask a server."""
    return all(importlib.util.find_spec(package) is not None for package in CLIENT_PACKAGES)


@contextlib.contextmanager
def run_in_vllm(
    folder: Path, settings: Eval, asked: Benchmark, log_path: Path, *, remote_code: bool
) -> Iterator[Harness]:
    """Serve a checkpoint with vLLM. Raises EngineFailed if it does not start."""
    checkpoint = Checkpoint.open(folder)
    flags = serving_flags(checkpoint.config, asked, drafts=can_draft(checkpoint, asked))
    with serve_vllm(folder, flags, log_path, chat=settings.chat_template, remote_code=remote_code) as running:
        yield harness_of_server(running.server, folder, settings, f"vLLM {running.version}", remote_code=remote_code)


def harness_of_server(server: Server, folder: Path, settings: Eval, engine: str, *, remote_code: bool) -> Harness:
    """Let lm-eval ask a server, which serves the checkpoint in `folder`, for completions of tokens.

    The chat template is applied here, since the server's requests for chats give no log-likelihoods of answers. So both
    engines of this module ask the same tokens. Raises EngineFailed.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=server.model,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        trust_remote_code=remote_code,
        add_bos_token=not settings.chat_template,  # as HFLM: a template writes it itself
        num_concurrent=max(2, settings.batch_size),  # with 1, another client is used, which goes through proxies
        max_length=_max_tokens(server),
        timeout=ANSWER_TIMEOUT_S,
        seed=SEED,
        header=api_key_header() or {"Accept": "application/json"},  # without a header it sends OPENAI_API_KEY
    )

    def engine_failure(error: Exception) -> RequantError | None:
        if isinstance(error, TimeoutError) or type(error).__module__.startswith("aiohttp"):
            return server.failure(f"{server.url} failed while lm-eval asked it ({_words(error)})")
        return None

    return Harness(settings, lm, engine, engine_failure)


def _max_tokens(server: Server) -> int:
    """Ask a server how many tokens a request may have. Raises EngineFailed if it does not say."""
    try:
        with http_client(server.url, 60) as client:
            models = client.get(f"{server.url}/v1/models", headers=api_key_header()).json()["data"]
        return int(next(model["max_model_len"] for model in models if model["id"] == server.model))
    except (httpx.HTTPError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise EngineFailed(f"{server.url}/v1/models does not say how long a request may be ({error!r})") from error
