"""Requant's own environment variables, each with its meaning.

A recipe says what to make; these settings say where, and on which machine. They are read at each call, so that a test
or a notebook can change them. Other variables (HF_TOKEN, HF_ENDPOINT, AWS_*, PREFECT_*, proxies, certificates) are read
by the libraries that they belong to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from requant.tasks.errors import RecipeError

PREFIX = "REQUANT_"


class Settings(BaseSettings):
    """The variables, each named REQUANT_ and its field in capitals. An empty one counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    store: str | None = Field(
        None,
        description="where results are kept: `/data/requant` or `file:///data/requant` for a folder on this machine, "
        "`s3://bucket/prefix` for S3 or any server that speaks its protocol. Unset: `~/.cache/requant/store`",
    )
    s3_sse: str | None = Field(
        None,
        description="encryption by the S3 server: `AES256`, `aws:kms` or `aws:kms:dsse`. Unset: the bucket decides",
    )
    s3_sse_kms_key_id: str | None = Field(
        None, description="the KMS key for `aws:kms` or `aws:kms:dsse`. Unset: the account's own key"
    )
    s3_storage_class: str | None = Field(
        None,
        description="the storage class of the files, such as `STANDARD_IA`. Classes that cannot be read at once are "
        "refused. Unset: the bucket decides",
    )
    gpu_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="the most GPU memory that quantizing and measuring use, in GB of 10^9 bytes. Unset: all",
    )
    deterministic: bool = Field(
        False,
        description="`1`: the same bits in every run. On a GPU, blocks are then not compiled, which is slower",
    )
    profile: Path | None = Field(
        None, description="a folder for a profile of each tuned block, which costs a few percent of the time"
    )
    vllm: str | None = Field(
        None,
        description="the command that starts vLLM's server; the model and the flags are appended. Unset: `vllm serve`",
    )
    api_key: SecretStr | None = Field(None, description="the key of a server that `benchmark.engine: url:...` names")
    webhook_secret: SecretStr | None = Field(
        None, description="the secret of the Hub's webhook, at least 16 characters; `requant webhook` requires it"
    )


def read_settings() -> Settings:
    """Read the environment. Raises RecipeError with the name of a variable that is wrong, and what it must be."""
    try:
        return Settings()
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + "_".join(str(part) for part in problem["loc"]).upper()
        raise RecipeError(f"{name} cannot be used ({problem['msg']}): correct or unset it") from error


def rows() -> list[tuple[str, str]]:
    """List each variable with its meaning, for the documentation."""
    return [(PREFIX + name.upper(), field.description or "") for name, field in Settings.model_fields.items()]
