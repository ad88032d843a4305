"""README and documentation cannot drift: commands, recipes, links, paths, keys and variables are those of the code."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt

from infra.dev.docs import FOLDER, PAGES
from requant.flows.cli.main import cli
from requant.flows.report.report import RunReport
from requant.flows.watching import WatchDocument
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import repair
from requant.tasks.hub.verify import ReleaseCheck
from requant.tasks.planning.document import PlanDocument
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.recipe import Gates, Recipe
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.comparison import ComparisonDocument
from requant.tasks.validating.document import ValidationDocument
from requant.tasks.validating.gates import judge
from tests.factories.command_lines import check_requant, commands_in, leaves
from tests.factories.measured import good
from tests.factories.paths import ROOT, TINY

DOCS = ROOT / "docs"
PAGE_PATHS = sorted(DOCS.rglob("*.md"))
PATHS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/README.md")),
    *sorted((ROOT / "infra").rglob("README.md")),
    *sorted((ROOT / "tasks").rglob("README.md")),
    *PAGE_PATHS,
]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):(?!=)", MAKEFILE, re.MULTILINE))
TOPS = ("flows/", "tasks/", "infra/", "deployments/", "tests/", "docs/", "requant/", ".ci/", ".github/")
# Programs of others that blocks call. What belongs to this project is looked at more closely.
OTHERS = {"docker", "prefect", "cp", "chmod", "hf"}
# Options in running text that are not ours: those of Prefect's worker, of pytest and of vLLM's server.
FOREIGN_OPTIONS = {"--pool", "--name", "--limit", "--dtype", "--enforce-eager", "--no-enable-prefix-caching", "--model"}
FOREIGN_OPTIONS |= {"--tokens", "--no-mtp", "--vision", "--places", "--port", "--strict-markers"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its file, its first line, its language, its text."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.path)}:{self.line}"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(path: Path) -> Iterator[Block]:
    for token in MarkdownIt("commonmark").parse(path.read_text()):
        if token.type == "fence" and token.map is not None:
            yield Block(path, token.map[0] + 1, token.info.strip(), token.content)


BLOCKS = [block for path in PATHS for block in blocks_of(path)]
EVERY_PATH = pytest.mark.parametrize("path", PATHS, ids=name_of)


def prose_of(path: Path) -> str:
    """A file without its fenced blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def code_of(path: Path) -> list[str]:
    """The inline code of a file."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(path))


def blocks(*languages: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


def test_every_block_says_what_it_is() -> None:
    assert [str(b) for b in BLOCKS if b.language not in {"", "bash", "yaml", "text", "python"}] == []
    unmarked = [b for b in BLOCKS if b.language == ""]
    assert [str(b) for b in unmarked if not b.text.startswith(("$ requant ", "requant/"))] == []


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_a_file_that_lint_checks(block: Block) -> None:
    """mypy checks the file with all others: it takes a minute for one alone."""
    assert block.text == block.path.with_suffix(".py").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert name_of(block.path.with_suffix(".py")) in settings["tool"]["mypy"]["files"]


def check_command(words: list[str]) -> None:
    program, *rest = words
    name = program.removeprefix(".venv/bin/")
    if name == "requant":
        check_requant(rest)
    elif name == "make":
        named = [word for word in rest if "=" not in word]
        assert named and set(named) <= TARGETS, f"make has no target {named}"
    elif name == "export":
        assert rest and all("=" in word for word in rest)
    elif name == "python":
        check_python(rest)
    elif name == ".":
        assert rest[0].startswith(("build/", "~/")), rest
    elif name == "pip":
        check_pip(rest)
    elif name == "pre-commit":
        assert rest[0] == "install" and (ROOT / ".pre-commit-config.yaml").exists()
    elif name.startswith(("infra/", ".ci/")):
        assert (ROOT / name).stat().st_mode & 0o100, f"{name} cannot be run"
    else:
        assert name in OTHERS, f"unknown program {name}"


def check_python(words: list[str]) -> None:
    assert words[0] == "-m"
    assert find_spec(words[1]) is not None, f"there is no module {words[1]}"
    if words[1] == "infra.dev.plan":
        check_command(words[2:])


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[:3] == ["install", "-c", "constraints.txt"]
    named = re.findall(r"\[(\w+)\]", words[-1])
    assert words[-1].startswith(".") and set(named) <= set(extras)


@pytest.mark.parametrize("block", blocks("bash"))
def test_every_command_of_a_block_exists_with_its_options(block: Block) -> None:
    commands = list(commands_in(block.text))
    assert commands
    for words in commands:
        check_command(words)
    for word in re.findall(r"[^\s='\"]+", re.sub(r"#.*", "", block.text)):
        if word.startswith(TOPS):
            assert (ROOT / word).exists() or word == "infra/compose.env", word


@pytest.mark.parametrize("block", blocks(""))
def test_every_command_of_a_session_exists_with_its_options(block: Block) -> None:
    for line in block.text.splitlines():
        if line.startswith("$ "):
            for words in commands_in(line.removeprefix("$ ")):
                check_command(words)


@EVERY_PATH
def test_every_command_and_option_in_running_text_exists(path: Path) -> None:
    every = {option for command in leaves(cli) for each in command.params for option in each.opts} | {"--help"}
    for code in code_of(path):
        words = re.sub(r"[\[\]]", " ", code).split()
        options = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        if re.match(r"requant [a-z]", code):
            command: click.Command = cli
            for word in words[1:]:
                if isinstance(command, click.Group) and re.fullmatch(r"[a-z-]+", word):
                    assert word in command.commands, code
                    command = command.commands[word]
            known = {option for each in leaves(command) for p in each.params for option in p.opts} | {"--help"}
            assert options <= (known if command.name != "worker" else known | FOREIGN_OPTIONS), code
        elif words[:1] == ["make"] and len(words) > 1:
            assert {word for word in words[1:] if re.fullmatch(r"[a-z0-9-]+", word)} <= TARGETS, code
        elif words and words[0].startswith("--"):
            assert options <= every | FOREIGN_OPTIONS, code


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_or_part_of_one_is_valid(block: Block) -> None:
    document = yaml.safe_load(block.text)
    if "jobs" in document:
        return  # a workflow of GitHub, which tests/unit/infra/test_action.py checks
    recipe = parse_recipe({"base": {"repo_id": "owner/name"}, **document})
    assert recipe.each


def test_the_large_recipe_names_every_group_and_has_the_defaults() -> None:
    block = next(blocks_of(DOCS / "how-to" / "recipe.md"))
    document = yaml.safe_load(block.text)
    recipe = parse_recipe(document)
    assert set(document) == set(Recipe.model_fields)
    assert recipe.quantize == type(recipe.quantize)() and recipe.gates == type(recipe.gates)()


def test_recipes_in_the_project_are_valid() -> None:
    paths = [*(ROOT / "deployments" / "recipes").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")]
    assert len(paths) >= 10
    for path in paths:
        load_recipe(path)


def anchors_of(path: Path) -> set[str]:
    """Where a link into a file may lead: headings that are named alike on the site and on the forge."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    on_site = [re.sub(r"[-\s]+", "-", each) for each in words]
    on_forge = [each.replace(" ", "-") for each in words]
    return {site for site, forge in zip(on_site, on_forge, strict=True) if site == forge}


@EVERY_PATH
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{target} does not exist"
        assert not path.is_relative_to(DOCS) or there.is_relative_to(DOCS), f"{target} is not part of the site"
        assert not anchor or anchor in anchors_of(there), f"{target}: no heading of this name"


@EVERY_PATH
def test_every_path_that_is_named_exists(path: Path) -> None:
    for code in code_of(path):
        for word in code.split():
            named = word.removesuffix(":").rstrip(",;")
            if named.startswith(TOPS) and not re.search(r"[{}<>]|NAME", named):
                assert list(ROOT.glob(named.rstrip("/"))), f"{named} does not exist"
            elif re.fullmatch(r"\w+\.py", named) and "/" not in named:
                assert any(ROOT.glob(f"{top}**/{named}") for top in TOPS[:5]), f"{named} does not exist"


def test_every_path_in_the_file_tree_exists_and_every_folder_of_code_is_in_it() -> None:
    tree = (DOCS / "explanation" / "architecture.md").read_text().split("## File tree")[1].split("```")[1]
    parents: list[str] = []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        assert ROOT.joinpath(*parents).is_dir(), line
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert list(ROOT.glob(f"*/{name}")), name
    folders = {path.parent.name for top in ("flows", "tasks") for path in (ROOT / top).glob("*/*.py")}
    assert {f"{folder}/" for folder in folders} <= set(tree.split())


def test_the_readme_is_short_and_has_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 10_000
    for name, command in cli.commands.items():
        subs = command.commands if isinstance(command, click.Group) else {"": command}
        assert all(f"`requant {name} {sub}".rstrip() in readme for sub in subs), name


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    def pages(part: Any) -> Iterator[str]:
        for entry in part:
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(path.relative_to(DOCS).as_posix() for path in PAGE_PATHS)


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_pages_are_those_of_the_code(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run make docs-reference"


def keys_of(command: str) -> set[str]:
    """The keys that the page of the JSON documents names for a command."""
    section = (FOLDER / "json.md").read_text().split(f"\n## requant {command}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_every_command_with_a_json_document_is_on_its_page() -> None:
    page = (FOLDER / "json.md").read_text()
    store = cli.commands["store"]
    assert isinstance(store, click.Group)
    commands = {**cli.commands, **{f"store {name}": command for name, command in store.commands.items()}}
    named = {name for name, each in commands.items() if any("--json" in p.opts for p in each.params)}
    assert len(named) > 10
    for name in named:
        assert f"\n## requant {name}\n" in page or f"`requant {name}` has the same keys" in page, name


def test_the_keys_of_json_documents_are_those_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"base": {"repo_id": "owner/name"}, "outputs": [{}]})
    assert keys_of("run") == set(RunReport(recipe).document().to_json())
    assert keys_of("plan") == set(PlanDocument.model_fields)
    assert keys_of("inspect") == set(inspect_checkpoint(TINY).to_json())
    assert keys_of("mtp-fix") == set(repair(TINY, None, precision="keep", dry_run=True).to_json())
    assert keys_of("validate") == set(ValidationDocument.model_fields)
    assert keys_of("compare") == set(ComparisonDocument.model_fields)
    assert keys_of("bench") == set(BenchmarkResult.model_fields)
    assert keys_of("watch") == set(WatchDocument.model_fields)
    assert keys_of("verify") == {*ReleaseCheck.model_fields}
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    for command in ("store ls", "store verify", "store gc"):
        outcome = CliRunner().invoke(cli, [*command.split(), "--json"])
        assert keys_of(command) == set(yaml.safe_load(outcome.stdout)), command


def test_every_measured_value_is_explained() -> None:
    recorded = json.loads((ROOT / "tests" / "unit" / "tasks" / "validating" / "measured.json").read_text())
    section = (DOCS / "reference" / "json.md").read_text().split("## Measured values\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    missing = {key for document in recorded.values() for key in document if key.removeprefix("base_") not in named}
    assert missing == set()


def test_every_gate_and_every_limit_is_explained() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", (DOCS / "explanation" / "gates.md").read_text()))
    assert {gate.name for gate in judge(good(worst_task_recovery=1.0, tasks={}), Gates())} <= named
    assert set(Gates.model_fields) <= named


@pytest.mark.parametrize("path", ["README.md", "tests/README.md", ".github/workflows/test.yaml", ".ci/run"])
def test_the_make_targets_that_are_named_exist(path: str) -> None:
    named = set(re.findall(r"(?:^|`|: |' )make ([a-z][a-z0-9-]*)", (ROOT / path).read_text(), re.MULTILINE))
    assert named and named <= TARGETS


def test_every_target_is_explained_by_make_help() -> None:
    explained = re.findall(r"^## ([a-z0-9-]+): .+\n\1:", MAKEFILE, re.MULTILINE)
    assert TARGETS - set(explained) == {"all-unit"}  # a part of test-all
    assert len(explained) == len(re.findall("^## ", MAKEFILE, re.MULTILINE))


def test_every_marker_is_explained_where_the_tests_are() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    text = (ROOT / "tests" / "README.md").read_text()
    assert all(f"`{line.split(':')[0]}`" in text for line in declared)


def test_every_extra_and_its_version_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        re.split("==", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    for extra, names in project["optional-dependencies"].items():
        for name in names:
            assert re.split(r"[<>=]", name)[0].lower().replace("_", "-") in pins, f"{extra}: {name}"


def test_the_licenses_are_there_and_every_file_that_the_notice_names() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for name in re.findall(r"[\w./-]+/[\w.-]+", (ROOT / "NOTICE").read_text()):
        if name.startswith(TOPS):
            assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("path", [".github/ISSUE_TEMPLATE/bug.yaml", ".github/ISSUE_TEMPLATE/feature.yaml"])
def test_an_issue_form_has_what_the_forge_needs(path: str) -> None:
    form = yaml.safe_load((ROOT / path).read_text())
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["attributes"]["label"] and re.fullmatch("[a-z-]+", field["id"])
