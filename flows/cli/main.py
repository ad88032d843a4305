"""The command line: `requant COMMAND ... [--json]`.

With --json, stdout is one JSON document and nothing else. Exit status: 0 done, 1 a gate failed or the work failed,
2 wrong usage or recipe, 130 interrupted. Heavy imports happen inside the commands that need them.
"""

from __future__ import annotations

import json
import logging
import os
import sys

import click

import requant
from requant.flows import api
from requant.flows.cli.bench import bench
from requant.flows.cli.command import QUIET, VERBOSE, OrderedGroup
from requant.flows.cli.compare import compare
from requant.flows.cli.deploy import deploy
from requant.flows.cli.init import init
from requant.flows.cli.inspect import inspect
from requant.flows.cli.mtp_fix import mtp_fix
from requant.flows.cli.plan import plan
from requant.flows.cli.publish import publish, rollback
from requant.flows.cli.run import run
from requant.flows.cli.schema import schema
from requant.flows.cli.store import store
from requant.flows.cli.validate import validate
from requant.flows.cli.verify import verify
from requant.flows.cli.watch import watch
from requant.flows.cli.webhook import webhook
from requant.flows.cli.worker import worker
from requant.startup import INTERRUPTED, interruptible
from requant.tasks.environment import bypass_proxy_on_loopback
from requant.tasks.errors import RecipeError, RequantError, explain_os_error, redact
from requant.tasks.pipeline.log import StderrHandler, set_up_logging, set_verbosity
from requant.tasks.progress import show


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(requant.__version__)
@QUIET
@VERBOSE
def cli() -> None:
    """Quantize a Hugging Face base model, prove that the result works, publish it.

    Exit status: 0 done, 1 a gate or the work failed, 2 wrong usage or recipe, 130 interrupted.
    """


# The help lists the commands in this order, which is that of the README's table.
for subcommand in (
    init,
    run,
    plan,
    validate,
    compare,
    inspect,
    mtp_fix,
    bench,
    verify,
    rollback,
    publish,
    watch,
    webhook,
    schema,
    deploy,
    worker,
    store,
):
    cli.add_command(subcommand)


def main() -> None:
    """Run the command line. Every expected failure is one sentence on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StderrHandler()])
    set_verbosity("normal")
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        show("bars")
    bypass_proxy_on_loopback(os.environ)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    set_up_logging()
    try:
        with interruptible():
            cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.NoSuchOption as error:
        _fail(_unknown_option(error), 2)
    except click.UsageError as error:
        _fail(_with_help(error), 2)
    except RecipeError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail(INTERRUPTED, 130)
    except RequantError as error:
        _fail(str(error), 1)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        _fail(str(explained), 1)


def _unknown_option(error: click.NoSuchOption) -> str:
    """Return the sentence of an option that a command does not have. It may be a key of the recipe."""
    from requant.tasks.recipe.loader import places_of

    takes_keys = error.ctx is not None and any(one.name == "overrides" for one in error.ctx.command.params)
    places = places_of(error.option_name.lstrip("-").replace("-", "_")) if takes_keys else []
    if not places:
        return _with_help(error)
    keys = " or ".join(f"--set {place}=VALUE" for place in places)
    return f"No such option '{error.option_name}': set this key of the recipe with {keys}"


def _with_help(error: click.UsageError) -> str:
    return error.format_message() + (f" ({error.ctx.command_path} --help)" if error.ctx else "")


def _fail(sentence: str, status: int) -> None:
    """Print an error, with --json as a document too, and exit."""
    sentence = redact(sentence)
    if "--json" in sys.argv:
        click.echo(json.dumps(api.error_document(sentence)))
    click.echo(f"requant: {sentence}", err=True)
    sys.exit(status)
