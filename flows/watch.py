"""The watch as a flow: it starts one run for each recipe whose base has a new commit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed

from requant.flows.start import start_on_server
from requant.flows.watching import watch_pass
from requant.tasks.errors import RequantError
from requant.tasks.pipeline.log import log_into_runs

log = logging.getLogger(__name__)

log_into_runs()


@flow(name="watch", persist_result=False)
def watch(folder: str = "deployments/recipes") -> Any:
    """Compare the base of every recipe in a folder with that of the recipe's last run, and start the runs that are due.

    If a base cannot be read, the others still are. The flow run then ends in the state Problems, and its table names
    them.
    """
    try:
        done = watch_pass(Path(folder), start_on_server)
    except RequantError as error:  # The message is the sentence alone, without the words that Prefect adds.
        return Failed(message=str(error), data=error)
    document = done.document().to_json()
    log.info(done.text)
    create_table_artifact(
        [*document["started"], *document["problems"]], key="requant-watch", description=f"Of {done.checked} recipes"
    )
    if done.problems:
        return Completed(name="Problems", message=f"{len(done.problems)} of {done.checked} recipes", data=document)
    return document
