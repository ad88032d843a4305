"""Which files go to LFS, according to the repository's `.gitattributes`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from infra.dev.hub.repository import Repository
from infra.dev.hub.tree import Tree

LARGE_FILE_BYTES = 10 * 2**20
_LARGE_FILES = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gguf *.gz *.h5 *.jpeg *.jpg *.joblib *.lfs.* *.mlmodel
*.model *.msgpack *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.png *.pt *.pth *.rar
*.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
tokenizer.json
"""
DEFAULT_GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LARGE_FILES.split())


def lfs_patterns(repository: Repository, tree: Tree) -> list[str]:
    """Return the LFS patterns of the `.gitattributes` in this tree, or those of a new repository."""
    entry = tree.get(".gitattributes")
    return parse_lfs_patterns(repository.object_path(entry).read_text() if entry else DEFAULT_GITATTRIBUTES)


def parse_lfs_patterns(text: str) -> list[str]:
    fields = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return [line[0] for line in fields if "filter=lfs" in line[1:]]


def goes_to_lfs(path: str, size: int, patterns: Sequence[str]) -> bool:
    """Check whether a file is stored as a large file. Empty files never are."""
    name = path.rpartition("/")[2]
    matches = any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
    return size > 0 and (size > LARGE_FILE_BYTES or matches)
