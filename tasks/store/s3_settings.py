"""Settings of uploads to S3: encryption by the server, and the storage class of files."""

from __future__ import annotations

import re

from requant.tasks.errors import RecipeError
from requant.tasks.settings import Settings

ENCRYPTION = ("AES256", "aws:kms", "aws:kms:dsse")
# Only classes whose objects can be read at once: those of GLACIER and DEEP_ARCHIVE must be restored for hours.
STORAGE_CLASSES = (
    "STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "REDUCED_REDUNDANCY",
    "EXPRESS_ONEZONE", "OUTPOSTS",
)  # fmt: skip


def write_settings(settings: Settings) -> tuple[dict[str, str], dict[str, str]]:
    """Return arguments of PutObject: those for every object, and additional ones for files. Raises RecipeError."""
    encryption, key = settings.s3_sse or "", settings.s3_sse_kms_key_id or ""
    storage = settings.s3_storage_class or ""
    if encryption and encryption not in ENCRYPTION:
        raise RecipeError(f"REQUANT_S3_SSE={encryption!r} is not known: use one of {', '.join(ENCRYPTION)}")
    if key and not encryption.startswith("aws:kms"):
        raise RecipeError("REQUANT_S3_SSE_KMS_KEY_ID names a key that nothing uses: set REQUANT_S3_SSE=aws:kms too")
    if key and not re.fullmatch(r"[\w:/.-]{1,2048}", key, re.ASCII):
        raise RecipeError(f"REQUANT_S3_SSE_KMS_KEY_ID={key[:80]!r} is no KMS key: use its id, alias or ARN")
    if storage and storage not in STORAGE_CLASSES:
        raise RecipeError(
            f"REQUANT_S3_STORAGE_CLASS={storage!r} cannot be read at once or is not known: "
            f"use one of {', '.join(STORAGE_CLASSES)}"
        )
    for_all = {"ServerSideEncryption": encryption, "SSEKMSKeyId": key}
    for_files = {"StorageClass": storage}
    return {k: v for k, v in for_all.items() if v}, {k: v for k, v in for_files.items() if v}
