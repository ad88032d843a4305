"""The section `base` of a recipe, and `adapter`: a repo of the Hub at a revision, or a folder."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import Field, ValidationError, WithJsonSchema, model_validator

from requant.tasks.documents import is_none
from requant.tasks.recipe.quantize_section import REPO_ID, Section

FOLDER_BEGINS = (".", "/", "~")  # of a path where a repo could stand


class Base(Section):
    """The base: a Hub repo at a revision, or a folder. It is resolved to a commit or a digest before anything else.

    A recipe may have `owner/name[@revision]`, or a path that begins with `.`, `/` or `~`, in place of this section.
    """

    # A form shows a plain field of text for it, and a base in a folder comes without the key.
    repo_id: Annotated[
        Annotated[str, Field(pattern=REPO_ID)] | None, WithJsonSchema({"type": "string", "pattern": REPO_ID})
    ] = Field(
        None,
        exclude_if=is_none,
        description="Hub repo of the base checkpoint; with a folder, the repo that the card names as base_model",
    )
    revision: str = Field("main", min_length=1, max_length=255, description="Branch, tag or commit")
    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="Folder of a base that is not on the Hub, relative to the recipe's file"
    )

    @model_validator(mode="before")
    @classmethod
    def written_as_a_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("folder") is None and value.get("repo_id") is None:
            problem = "string_type" if "repo_id" in value else "missing"
            raise ValidationError.from_exception_data(
                "Base", [{"type": problem, "loc": ("repo_id",), "input": value.get("repo_id", value)}]
            )
        if isinstance(value, Base | dict):
            return value
        if isinstance(value, str) and value.startswith(FOLDER_BEGINS):
            return {"folder": value}
        repo_id, at, revision = value.partition("@") if isinstance(value, str) else ("", "", "")
        if not re.fullmatch(REPO_ID, repo_id) or (at and not revision):
            raise ValueError("write the base as owner/name or owner/name@revision, or a folder as ./folder")
        return {"repo_id": repo_id, "revision": revision} if at else {"repo_id": repo_id}

    @model_validator(mode="after")
    def a_folder_has_no_revision(self) -> Base:
        if self.folder is not None and self.revision != "main":
            raise ValueError(f"the folder {self.folder} has no revision {self.revision}: leave it out")
        return self

    @property
    def name(self) -> str:
        """What people call the base: its repo, or the name of its folder without the folders above it."""
        if self.folder is None:
            assert self.repo_id is not None, "one of the two is there"
            return self.repo_id
        return PurePath(self.folder).name or "base"
