"""What the environment of a machine says to Requant: every variable of ours once, with its meaning.

A recipe says what to make, and these say where and on what. They are read anew at each call, so that a test or a
notebook may change them. The variables of others that Requant honours (HF_TOKEN, HF_ENDPOINT, AWS_*, PREFECT_*,
proxies, certificates) are read by the libraries that they belong to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from requant.tasks.errors import RecipeError

PREFIX = "REQUANT_"


class Settings(BaseSettings):
    """The variables, each named REQUANT_ and its field in capitals. An empty one counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    store: str | None = Field(
        None, description="The store: `file:///dir` or `s3://bucket/prefix`. Unset: a folder in the user's cache."
    )
    s3_sse: str | None = Field(
        None,
        description="Encryption by the S3 server: `AES256`, `aws:kms` or `aws:kms:dsse`. Unset: as the bucket does it.",
    )
    s3_sse_kms_key_id: str | None = Field(
        None, description="The KMS key for `aws:kms` or `aws:kms:dsse`. Unset: the account's own."
    )
    s3_storage_class: str | None = Field(
        None, description="Storage class of blobs and of unfinished work; small objects stay in the bucket's own class."
    )
    vllm: str | None = Field(
        None, description="The command that serves a model, as `/opt/vllm/bin/vllm serve`. Unset: `vllm` on the PATH."
    )
    api_key: SecretStr | None = Field(None, description="The key of a server that is benchmarked by its `url:`.")
    gpu_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="GPU memory to use, in GB of 10^9 bytes, where a card is shared. Unset: what is free."
    )
    deterministic: bool = Field(
        False, description="Quantize to the same bits on each run on a GPU too, which takes longer."
    )
    profile: Path | None = Field(
        None, description="Write a profile of the tuning loop to this file. It costs time, and is for development."
    )
    webhook_secret: SecretStr | None = Field(
        None, description="The secret of the Hub's webhooks, of 16 characters or more (`requant webhook`)."
    )


def read_settings() -> Settings:
    """Read the environment. Raises RecipeError that names the variable and what it must be."""
    try:
        return Settings()
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + "_".join(str(part) for part in problem["loc"]).upper()
        raise RecipeError(f"{name} cannot be used ({problem['msg']}): correct or unset it") from error


def rows() -> list[tuple[str, str]]:
    """List each variable with its meaning, for the documentation."""
    fields: dict[str, Any] = Settings.model_fields
    return [(PREFIX + name.upper(), field.description) for name, field in fields.items()]
