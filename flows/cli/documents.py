"""The documents that `requant publish`, `deploy` and `store ...` print with `--json`. Sizes are in bytes."""

from __future__ import annotations

from pydantic import Field

from requant.flows.report.store import BaseSize, NamedArtifact, StoredArtifact
from requant.tasks.documents import Document
from requant.tasks.hub.release import Release


class PublishDocument(Document):
    """The document of `requant rollback` and `requant publish`."""

    published: Release = Field(
        description="The release that main holds now; with --dry-run the one that it would hold, and the commit of now"
    )
    would_change: list[str] | None = Field(
        None, description="With --dry-run, paths of the files that main would get, lose or have changed; otherwise null"
    )
    releases: list[str] = Field([], description="Tags of the releases that main can be moved to, newest first")


class InitialBase(Document):
    """The base of a new recipe."""

    repo_id: str = Field(description="Its repo on the Hub, or the name of its folder")
    sha: str | None = Field(
        description="The commit that its revision is at now; null for a folder, which is not hashed"
    )


class InitDocument(Document):
    """The document of `requant init`."""

    recipe: str = Field(description="Path of the recipe")
    schema_file: str = Field(description="Path of the JSON schema for editors")
    base: InitialBase = Field(description="The base")


class DeployDocument(Document):
    """The document of `requant deploy`."""

    deployments: list[str] = Field([], description="Names of the deployments")
    automations: list[str] = Field([], description="Names of the automations")
    changed: list[str] = Field([], description="Those that this command created or changed")
    notes: list[str] = Field([], description="Sentences, for instance about a work pool without a worker")
    written: list[str] = Field([], description="The files that --example wrote")


class StoreListDocument(Document):
    """The document of `requant store ls`."""

    store: str = Field(description="Address of the store")
    artifacts: list[StoredArtifact] = Field(description="The artifacts; the longest unused one is first")
    damaged: list[str] = Field(description="Sentences about manifests that cannot be read")


class StoreSizeDocument(Document):
    """The document of `requant store du`."""

    store: str = Field(description="Address of the store")
    bases: list[BaseSize] = Field(description="The artifacts of each base; the largest is first")
    stored_bytes: int = Field(description="Bytes of all blobs in the store, those that no artifact names included")


class DeletedArtifact(NamedArtifact):
    """An artifact that gc deleted, or would delete."""

    bytes: int = Field(description="Bytes of its files")


class DeletedBlobs(Document):
    """The blobs that gc deleted, or would delete."""

    count: int = Field(description="How many there are")
    bytes: int = Field(description="Bytes of all of them")


class LocalFiles(Document):
    """Files of this machine that gc deleted, or would delete."""

    paths: list[str] = Field(description="Files and folders")
    bytes: int = Field(description="Bytes that this frees")


class RemainingBlobs(Document):
    """The blobs that remain in the store."""

    bytes: int = Field(description="Bytes of all of them")


class CollectionDocument(Document):
    """The document of `requant store gc`."""

    store: str = Field(description="Address of the store")
    dry_run: bool = Field(description="Whether nothing was deleted")
    artifacts: list[DeletedArtifact] = Field(description="Deleted artifacts")
    blobs: DeletedBlobs = Field(description="Deleted blobs")
    records: int = Field(description="How many other objects were deleted")
    leftovers: list[str] = Field(description="Remains of killed uploads")
    on_this_machine: LocalFiles = Field(description="Deleted files of the local cache")
    stays: RemainingBlobs = Field(description="What remains")
    fits: bool = Field(description="Whether what remains fits --max-size")


class CheckoutDocument(Document):
    """The document of `requant store checkout`."""

    digest: str = Field(description="Digest of the artifact")
    path: str = Field(description="The folder with its files")


class CopiedArtifact(NamedArtifact):
    """An artifact that was copied."""

    bytes_moved: int = Field(description="Bytes of the blobs that the target lacked")


class CopyDocument(Document):
    """The document of `requant store export` and `requant store import`."""

    source: str = Field(description="Address of the store that was read")
    store: str = Field(description="Address of the store that was written")
    artifacts: list[CopiedArtifact] = Field(description="The artifacts")
    bytes_moved: int = Field(description="Bytes of all blobs that the target lacked")
