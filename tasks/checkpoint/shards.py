"""Finds the weight files of a checkpoint that its index does not name, or all of them if it has no index.

Which files an engine reads: those that the index names; without an index every `*.safetensors` of the folder. If there
are files `consolidated*.safetensors`, which Mistral's own loader reads, they are no part of the checkpoint here.
Sources: vLLM 0.32.0, model_executor/model_loader/default_loader.py (_prepare_weights) and weight_utils.py
(filter_duplicate_safetensors_files); SGLang 0.5.23, srt/model_loader/weight_utils.py. transformers 5 reads
`model.safetensors` alone if it is there, and needs an index otherwise (5.23.0, modeling_utils.py,
_get_resolved_checkpoint_files).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from requant.tasks.checkpoint.advice import FIX_INDEX
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.header import Tensor, read_header
from requant.tasks.checkpoint.heads.layout import LAYER_NAME, HeadName
from requant.tasks.checkpoint.mtp import find_head
from requant.tasks.checkpoint.other_kinds import CHECKPOINT_FILES
from requant.tasks.checkpoint.untrusted import MAX_SHARDS, shown
from requant.tasks.errors import CheckpointError

SINGLE = CHECKPOINT_FILES[1]
STALE = "which the index does not name"
MOVE = "move it out of this folder"
NUMBERED = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)
# First components of the names of tensors of a language model whose architecture is not known.
ROOTS = frozenset({"model", "language_model", "lm_head", "transformer", "backbone"})
# The same of other parts of a model, by the part of the config without which a model has none.
PARTS = {
    "vision_config": ("visual", "vision_tower", "vision_model", "multi_modal_projector"),
    "audio_config": ("audio_tower", "multi_modal_projector"),
    "thinker_config": ("thinker",),
    "talker_config": ("talker",),
}
READ_BY_SGLANG = frozenset({"mtp.safetensors"})  # beside any index of a GLM-4 MoE: weight_utils.py
EXPERT = re.compile(r"\.experts\.(\d+\.)?(gate_up_proj|gate_proj|up_proj|down_proj)\b")
ADAPTER = re.compile(r"(^|\.)lora_|^base_model\.")

Headers = Mapping[str, Mapping[str, Tensor]]  # the tensors of each file, by name


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files in a folder, without those of Mistral's own loader."""
    return without_vendors_own(path.name for path in folder.glob("*.safetensors"))


def without_vendors_own(names: Iterable[str]) -> list[str]:
    """Return names of weight files in order, without those that Mistral's own loader reads."""
    return sorted(name for name in names if not name.startswith("consolidated"))


def lost_numbers(names: Iterable[str]) -> list[str]:
    """Return the names of shards that are missing from a series `-00001-of-0000N`; at most MAX_SHARDS."""
    present = set(names)
    lost: list[str] = []
    for stem, width, total in sorted({(m[1], len(m[2]), m[3]) for n in present if (m := NUMBERED.fullmatch(n))}):
        wanted = (
            f"{stem}-{number:0{width}d}-of-{total}.safetensors" for number in range(1, min(int(total), MAX_SHARDS) + 1)
        )
        lost += [name for name in wanted if name not in present]
    return lost[:MAX_SHARDS]


@dataclass
class Stray:
    """A weight file that the index does not name, or any file if there is no index.

    `own`: names of its tensors that belong to the model and that no other file has. `copied`: those that another file
    has, in the same dtype and shape or not. `foreign`: those that the model has in another form, or cannot have.
    `problem`: why its header cannot be read.
    """

    name: str
    own: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    problem: str | None = None

    def sentence(self) -> str:
        """Say what the file is beside an index, and a remedy if there is one that loses nothing."""
        what = f"{shown(self.name)} is a shard {STALE}"
        if self.problem is not None:
            return f"{what}, and {self.problem}"
        if self.own:
            more = f" and {len(self.own) - 1:,} more tensors" if len(self.own) > 1 else ""
            return f"{what}, and no other shard has {shown(self.own[0])}{more}: {FIX_INDEX}"
        if self.foreign:
            what += f", and {shown(self.foreign[0])} in it is no tensor of this model as the index describes it"
        elif self.differing:
            what += f", and {shown(self.differing[0])} in it has another dtype or shape than in the named shards"
        else:
            what += f", and the shards that it names have all {len(self.copied):,} tensors of it"
        return what if self.name in READ_BY_SGLANG and not self.copied else f"{what}: {MOVE}"


@dataclass
class Contents:
    """What a folder's weight files hold, whatever its index says.

    `tensors`: all tensors of the model, by name, in the order of the files. `counts`: the number of all tensors of each
    file. `lost`: names that only the index knows. `absent`: names that it places in shards that are missing or cannot
    be read. `twice`: names that several shards have, of which none counts more than the others. `named`: the shards
    that the index names; none without an index. `strays`: all other files.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    named: frozenset[str] = frozenset()
    strays: list[Stray] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether an index of these tensors loses nothing."""
        return not self.lost and not self.twice


def contents_of(
    folder: Path,
    config: ModelConfig,
    weight_map: Mapping[str, object],
    headers: Headers,
    removed: Collection[str] = (),
) -> Contents:
    """Collect the tensors of a checkpoint from all weight files of its folder.

    `headers`: those of the shards that the index names and that can be read. `weight_map`: of the index; empty if there
    is none. Without an index, `model.safetensors` counts more than other files, as it does for transformers.
    `removed`: files that count as not there.
    """
    named = frozenset(shard for shard in weight_map.values() if isinstance(shard, str))
    contents = Contents(counts={shard: len(header) for shard, header in headers.items()}, named=named)
    for header in headers.values():
        contents.twice += [name for name in header if name in contents.tensors]
        contents.tensors.update(header)
    files = [name for name in weight_files(folder) if name not in {*named, *removed}][:MAX_SHARDS]
    known = _KnownNames(config)
    if files:
        known.add(contents.tensors)
    for file in sorted(files, key=lambda name: name != SINGLE):
        stray = Stray(file)
        contents.strays.append(stray)
        try:
            header = read_header(folder / file)
        except FileNotFoundError:  # a link that leads nowhere
            stray.problem = "it leads to no file"
            continue
        except CheckpointError as error:
            stray.problem = str(error)
            continue
        contents.counts[file] = len(header)
        trusted = not weight_map and (file == SINGLE or NUMBERED.fullmatch(file) is not None or len(files) == 1)
        for name, tensor in header.items():
            there = contents.tensors.get(name)
            if there is not None:
                same = (there.dtype, there.shape) == (tensor.dtype, tensor.shape)
                (stray.copied if same else stray.differing).append(name)
            elif name in weight_map or known.allow(name, any_root=trusted):
                stray.own.append(name)
            else:
                stray.foreign.append(name)
        contents.tensors |= {name: header[name] for name in stray.own}
        known.add(stray.own)
    contents.absent = [name for name, s in weight_map.items() if not isinstance(s, str) or s not in headers]
    contents.lost = [name for name in weight_map if name not in contents.tensors]
    if not weight_map and SINGLE not in contents.counts:
        contents.twice = [name for stray in contents.strays for name in (*stray.copied, *stray.differing)]
    return contents


def missed_by_transformers(contents: Contents, config: ModelConfig) -> str | None:
    """Return a tensor that transformers misses as it reads `model.safetensors` alone beside an index; None if none.

    It does not read a head.
    """
    single = next((stray for stray in contents.strays if stray.name == SINGLE), None)
    if single is None or not contents.named:
        return None
    there = {*single.own, *single.copied, *single.differing}
    missed = [name for name in contents.tensors if name not in there]
    head = find_head(contents.tensors, config) if missed else None
    ignored = set(head.names if head else ())
    return next((name for name in missed if name not in ignored), None)


class _KnownNames:
    """The names of a model's tensors, and which other names can belong to it too.

    Another one can if it begins as the model's own do or as those that its architecture needs, behind the prefixes that
    loaders add and remove. An engine refuses to load a tensor of any other part.
    """

    def __init__(self, config: ModelConfig) -> None:
        from requant.tasks.checkpoint.completeness.needs import Needs  # which imports this module

        layers = config.text.integer("num_hidden_layers")
        self.layers = None if layers is None else layers + config.mtp_layers
        needs = Needs.of(config)
        self.any_of = ROOTS if needs is None else frozenset()
        self.parts = {part for key, parts in PARTS.items() if config.child(key) is not None for part in parts}
        self.parts |= {_part_of(name) for name in (needs.names if needs else ())}
        self.forms: dict[str, str] = {}

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            self.parts.add(_part_of(name))
            self.forms.update(_forms(name))

    def allow(self, name: str, *, any_root: bool) -> bool:
        """Check whether a tensor can be one of the model's. `any_root`: whatever its name begins with."""
        is_of_model = _part_of(name) in self.parts or name.partition(".")[0] in self.any_of or HeadName.of(name, None)
        if ADAPTER.search(name) or not (any_root or is_of_model):
            return False
        layer = LAYER_NAME.match(name)
        if layer and self.layers is not None and (len(layer[1]) > 8 or int(layer[1]) >= self.layers):
            return False
        return all(self.forms.get(key, form) == form for key, form in _forms(name))


def _part_of(name: str) -> str:
    """Return the first component of a name behind the prefixes that loaders add and remove."""
    from requant.tasks.checkpoint.completeness.names import without_leading  # which imports this module

    return without_leading(name).partition(".")[0]


def _forms(name: str) -> Iterator[tuple[str, str]]:
    """Yield keys of which a model has only one form, with the form that this name has.

    A module's weight is packed or not, and the experts of a layer are fused or stored one by one.
    """
    if match := EXPERT.search(name):
        yield f"{name[: match.start()]}.experts", "split" if match[1] else "fused"
    module, _, part = name.rpartition(".")
    if part in {"qweight", "weight_packed", "weight"}:
        yield module, "plain" if part == "weight" else "packed"
