"""Says what a folder or repo is that has no safetensors checkpoint at its top, and what to name instead.

It goes by the names of the files, and opens none but small ones that say what the rest is made of: the settings of an
adapter or a pipeline, and the model card. Pickles are never opened.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from requant.tasks.checkpoint.config import JsonObject
from requant.tasks.checkpoint.untrusted import parse, shown

CHECKPOINT_FILES = ("model.safetensors.index.json", "model.safetensors")
ADAPTER, PIPELINE, CARD = "adapter_config.json", "model_index.json", "README.md"
MAX_FILES = 10_000  # of a folder; a repo's list is taken whole
MAX_DEPTH = 2  # folders below the folder that are looked into
MAX_READ_BYTES = 1 << 16
MAX_NAMED_FOLDERS = 4
REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
# The front matter of a card names one model or several: https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
STATED_BASE = re.compile(r"""^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?["']?(?P<name>[^\s"']+)""", re.MULTILINE)
ReadBeginning = Callable[[str], bytes]
# What a training leaves beside weights.
NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "*.index.json")


@dataclass(frozen=True)
class WeightFormat:
    """Weights that are not in transformers' safetensors: patterns of their files, what a sentence calls them, a remedy.

    `made_of_another`: whether they are made of another repo's weights, so that the card's `base_model` is that repo.
    """

    patterns: tuple[str, ...]
    name: str
    remedy: str = "name the original model"
    made_of_another: bool = False

    def has(self, path: str) -> bool:
        """Check whether a file is of this format, by its name."""
        return _matches(PurePosixPath(path).name, self.patterns)


SAVE_AGAIN = "name a revision or a repo with safetensors, or save the model again with transformers (save_pretrained)"
VENDOR = WeightFormat(
    ("consolidated*.safetensors",),
    "weights under the names of the vendor's own loader",
    "name a repo in the layout of transformers",
)
# The first format that matches a name counts, and the first that a repo has gives the remedy.
FORMATS = (
    WeightFormat(("openvino_*.bin", "openvino_*.xml"), "OpenVINO files", made_of_another=True),
    WeightFormat(
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"),
        "pickled weights, which Requant never opens",
        SAVE_AGAIN,
    ),
    VENDOR,
    WeightFormat(("*.gguf", "*.ggml"), "GGUF files", made_of_another=True),
    WeightFormat(("*.onnx", "*.onnx_data", "*.onnx.data"), "ONNX files", made_of_another=True),
    WeightFormat(("*.h5", "*.keras", "saved_model.pb", "*.tflite"), "TensorFlow files", SAVE_AGAIN),
    WeightFormat(("*.msgpack",), "Flax files", SAVE_AGAIN),
    WeightFormat(("*.npz", "*.npy"), "NumPy files", made_of_another=True),
    WeightFormat(("*.mlmodel", "weight.bin"), "Core ML files", made_of_another=True),
    WeightFormat(("*.engine", "*.plan"), "TensorRT engines", made_of_another=True),
    WeightFormat(("*.nemo",), "NeMo archives", "name the model in safetensors"),
)


def explain_other_kind(name: str, paths: Sequence[str], read: ReadBeginning, *, is_repo: bool = True) -> str | None:
    """Say what a folder or repo is, if it is recognized as something else than a checkpoint; otherwise return None.

    `name` is what the sentence calls it. `paths` are the paths of its files with slashes. `read` returns at most
    MAX_READ_BYTES of a file, nothing if it cannot be read. Of what is no repo, it names no remedy that takes one.
    """
    top = {path for path in paths if "/" not in path}
    if top & {*CHECKPOINT_FILES}:
        return None
    if PIPELINE in top:
        kind = _object(read(PIPELINE)).string("_class_name")
        of = f" ({shown(kind)})" if kind else ""
        return f"{name} is a pipeline of diffusers{of}, not a language model: name the repo of a language model"
    if ADAPTER in top or "adapter_model.safetensors" in top:
        return _explain_adapter(name, _object(read(ADAPTER)) if ADAPTER in top else JsonObject())
    holders = (path.rpartition("/")[0] for path in paths if PurePosixPath(path).name in CHECKPOINT_FILES)
    if below := list(dict.fromkeys(holders)):
        remedy = ", or put it into a repo of its own" if is_repo else ""
        if len(below) == 1:
            return (
                f"{name} has its checkpoint in the folder {shown(below[0])}, not at its top: name that folder{remedy}"
            )
        more = f" and {len(below) - MAX_NAMED_FOLDERS} more" if len(below) > MAX_NAMED_FOLDERS else ""
        return (
            f"{name} has checkpoints in {len(below)} folders, and none at its top: name one of "
            f"{', '.join(map(shown, below[:MAX_NAMED_FOLDERS]))}{more}{remedy}"
        )
    if any(path.endswith(".safetensors") and not VENDOR.has(path) for path in paths):
        return None
    found: dict[WeightFormat, list[str]] = {}
    for path in paths:
        known = next((one for one in FORMATS if one.has(path)), None)
        if known and not _matches(PurePosixPath(path).name, NO_WEIGHTS):
            found.setdefault(known, []).append(path)
    if not found:
        return f"{name} has no weights: name a checkpoint in safetensors"
    formats = sorted(found, key=FORMATS.index)
    held = " and ".join(f"{one.name} ({_examples(found[one])})" for one in formats[:2])
    original = stated_base(read(CARD)) if CARD in top and formats[0].made_of_another else None
    by_card = f", by its card {original}" if original else ""
    return f"{name} has no safetensors, only {held}: {formats[0].remedy}{by_card}"


def stated_base(card: bytes) -> str | None:
    """Return the first repo that the front matter of a model card names as `base_model`; None if it names none."""
    text = card.decode("utf-8", errors="replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return None
    match = STATED_BASE.search(text[4:].partition("\n---")[0])
    return match["name"] if match and REPO_ID.fullmatch(match["name"]) else None


def explain_folder(folder: Path, name: str | None = None, paths: Sequence[str] | None = None) -> str | None:
    """Say what a folder is, as `explain_other_kind`, which goes by `paths`, or by at most MAX_FILES of its files.

    The sentence calls it `name`, or by its path.
    """

    def read(name: str) -> bytes:
        try:
            if not (folder / name).is_file():
                return b""
            with (folder / name).open("rb") as stream:
                return stream.read(MAX_READ_BYTES)
        except OSError:
            return b""

    listed = [*islice(_files(folder), MAX_FILES)] if paths is None else paths
    return explain_other_kind(shown(name or str(folder)), listed, read, is_repo=False)


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of the files of a folder, without hidden ones, MAX_DEPTH folders deep."""
    for parent, folders, files in os.walk(folder):
        below = Path(parent).relative_to(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if len(below.parts) < MAX_DEPTH else []
        yield from ((below / file).as_posix() for file in sorted(files) if not file.startswith("."))


def _explain_adapter(name: str, settings: JsonObject) -> str:
    kind, model = settings.string("peft_type"), settings.string("base_model_name_or_path")
    of = f" of {shown(model)}" if model else ""
    return (
        f"{name} is an adapter{f' ({shown(kind)})' if kind else ''}{of}, not a model: name "
        f"{shown(model) if model else 'its model'} as the base of a recipe, and this as its adapter"
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _object(raw: bytes) -> JsonObject:
    """Read a JSON object; an empty one if it is none."""
    try:
        document = parse(raw)[0]
    except (ValueError, RecursionError):
        return JsonObject()
    return JsonObject(document if isinstance(document, dict) else {})


def _examples(paths: Sequence[str]) -> str:
    return f"{shown(paths[0])} and {len(paths) - 1} more" if len(paths) > 1 else shown(paths[0])
