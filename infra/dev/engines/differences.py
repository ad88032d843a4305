"""Compare the rules about engines with the newest engines.

    python -m infra.dev.engines.differences [ENGINE[=SOURCE]...]

ENGINE is vllm, sglang or transformers (default: all), SOURCE a wheel or the folder in which the package is. Without a
source, the newest wheel that the registry has is downloaded. Its Python files are read and not imported. Prints the
differences as Markdown, for an issue. Exit status: 0 there are none, 1 there are some, 2 a source cannot be had.

Compared are the tables that `tasks/checkpoint/compat` has copied, and the functions that its rules follow: their code
must be that of the version whose rules they are, which `sources.json` records. `--record ENGINE=SOURCE...` writes it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from infra.dev.engines.source import Source
from requant.tasks.checkpoint.compat import VERSIONS, auto_round, gptq, modelopt, sglang, transformers, vllm
from requant.tasks.checkpoint.heads.layouts import LAYOUTS

RECORD = Path(__file__).parent / "sources.json"
V = "vllm/model_executor/layers/quantization"
S = "sglang/srt/layers/quantization"


@dataclass(frozen=True)
class Table:
    """A table of an engine that is copied here. `ours`: its entries, as Python writes them."""

    engine: str
    file: str
    name: str
    ours: frozenset[str]
    where: str = ""


def _written(values: Iterable[object]) -> frozenset[str]:
    return frozenset(map(repr, values))


def _fused(name: str) -> frozenset[str]:
    return _written(vllm.ARCHITECTURES[name].tree.fused)


TABLES = (
    Table("vllm", f"{V}/__init__.py", "QuantizationMethods", _written(vllm.METHODS)),
    Table("vllm", f"{V}/__init__.py", "DEPRECATED_QUANTIZATION_METHODS", _written(vllm.DEPRECATED)),
    Table("vllm", f"{V}/auto_gptq.py", "AutoGPTQConfig.TYPE_MAP", _written(gptq.GPTQ_SCHEMES)),
    Table("vllm", f"{V}/auto_awq.py", "AutoAWQConfig.TYPE_MAP", _written(gptq.AWQ_BITS)),
    Table("vllm", f"{V}/inc/inc.py", "INCConfig.SUPPORTED_BITS", _written(auto_round.BITS)),
    Table("vllm", f"{V}/inc/inc.py", "INCConfig.SUPPORTED_DTYPES", _written(auto_round.DATA_TYPES)),
    Table("vllm", f"{V}/inc/inc.py", "INCConfig.SUPPORTED_FORMATS", _written(auto_round.PACKINGS)),
    Table("vllm", f"{V}/inc/inc.py", "INCConfig.SUPPORTED_BACKENDS", _written(auto_round.BACKENDS)),
    Table("vllm", f"{V}/modelopt.py", "LINEAR_ALGOS", _written(modelopt.LINEAR_ALGOS)),
    Table(
        "vllm",
        "vllm/model_executor/models/qwen3_next.py",
        "Qwen3NextForCausalLM.packed_modules_mapping",
        _fused("Qwen3NextForCausalLM"),
    ),
    Table(
        "vllm",
        "vllm/model_executor/models/glm4_moe.py",
        "Glm4MoeForCausalLM.packed_modules_mapping",
        _fused("Glm4MoeForCausalLM"),
    ),
    Table("sglang", f"{S}/__init__.py", "BASE_QUANTIZATION_METHODS", _written(sglang.METHODS), "is_cuda"),
    Table("sglang", f"{S}/gptq/gptq.py", "GPTQMarlinConfig.TYPE_MAP", _written(map(tuple, sglang.GPTQ_SCHEMES))),
    Table("sglang", f"{S}/marlin_utils.py", "MARLIN_SUPPORTED_GROUP_SIZES", _written(sglang.MARLIN_GROUP_SIZES)),
    Table("sglang", f"{S}/auto_round.py", "AutoRoundConfig.SUPPORTED_BITS", _written(sglang.BITS)),
    Table("sglang", f"{S}/auto_round.py", "AutoRoundConfig.SUPPORTED_FORMATS", _written(sglang.PACKINGS)),
    Table("sglang", f"{S}/auto_round.py", "AutoRoundConfig.SUPPORTED_BACKENDS", _written(auto_round.BACKENDS)),
    Table(
        "transformers",
        "transformers/quantizers/auto.py",
        "AUTO_QUANTIZER_MAPPING",
        _written(transformers.METHODS - {"bitsandbytes"}),  # becomes one of the two that the table has
    ),
)

# The functions that the rules follow, by engine and file: what the modules of tasks/checkpoint/compat name as sources.
FUNCTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vllm": {
        "vllm/config/model.py": ("ModelConfig._verify_quantization",),
        "vllm/config/speculative.py": ("SpeculativeConfig.hf_config_override",),
        "vllm/transformers_utils/model_arch_config_convertor.py": (
            "ModelArchConfigConvertorBase._normalize_quantization_config",
            "ModelArchConfigConvertorBase.get_quantization_config",
        ),
        "vllm/model_executor/model_loader/utils.py": ("configure_quant_config",),
        f"{V}/utils/quant_utils.py": ("is_layer_skipped",),
        f"{V}/utils/gptq_utils.py": ("get_dynamic_override", "is_layer_gptq_quantized", "get_linear_quant_method"),
        f"{V}/utils/config_utils.py": ("find_matching_patterns", "is_equal_or_regex_match"),
        f"{V}/inc/inc.py": ("INCConfig",),
        f"{V}/inc/config_parser.py": ("INCConfigParser",),
        f"{V}/auto_gptq.py": ("AutoGPTQConfig",),
        f"{V}/auto_awq.py": ("AutoAWQConfig",),
        f"{V}/fp8.py": ("Fp8Config",),
        f"{V}/compressed_tensors/compressed_tensors.py": (
            "CompressedTensorsConfig.from_config",
            "CompressedTensorsConfig.get_quant_method",
            "CompressedTensorsConfig.apply_vllm_mapper",
        ),
        f"{V}/compressed_tensors/utils.py": ("should_ignore_layer", "find_matched_target", "_match_fused_layer"),
        f"{V}/modelopt.py": (
            "ModelOptQuantConfigBase",
            "ModelOptFp8Config",
            "ModelOptNvFp4Config",
            "ModelOptMxFp8Config",
            "ModelOptMixedPrecisionConfig",
        ),
        f"{V}/quark/quark.py": (
            "QuarkConfig.from_config",
            "QuarkConfig.apply_vllm_mapper",
            "QuarkConfig.get_quant_method_target",
        ),
        f"{V}/quark/utils.py": ("should_ignore_layer",),
        "vllm/models/deepseek_v41/quant_config.py": ("DeepseekV4FP8Config.override_quantization_method",),
        "vllm/model_executor/models/qwen3_5_mtp.py": ("Qwen3_5MultiTokenPredictor", "Qwen3_5MTP"),
        "vllm/model_executor/models/qwen3_next_mtp.py": ("Qwen3NextMultiTokenPredictor", "Qwen3NextMTP"),
        "vllm/model_executor/models/deepseek_mtp.py": ("DeepSeekMultiTokenPredictorLayer", "DeepSeekMTP"),
        "vllm/model_executor/models/glm4_moe_mtp.py": ("Glm4MoeMultiTokenPredictorLayer", "Glm4MoeMTP"),
    },
    "sglang": {
        "sglang/srt/configs/model_config.py": (
            "ModelConfig._verify_quantization",
            "ModelConfig._parse_quant_hf_config",
            "ModelConfig._parse_modelopt_quant_config",
            "ModelConfig._config_draft_model",
        ),
        f"{S}/auto_round.py": ("AutoRoundConfig",),
        f"{S}/gptq/gptq.py": ("check_marlin_format", "GPTQMarlinConfig"),
        f"{S}/gptq/schemes/gptq_linear.py": ("GPTQLinearScheme",),
        f"{S}/awq/awq.py": ("AWQConfig", "AWQMarlinConfig"),
        f"{S}/fp8.py": ("Fp8Config",),
        f"{S}/utils.py": ("is_layer_skipped", "get_dynamic_override", "get_linear_quant_method"),
        f"{S}/mlx.py": ("MlxQuantizationConfig.override_quantization_method",),
        f"{S}/compressed_tensors/compressed_tensors.py": (
            "CompressedTensorsConfig.from_config",
            "CompressedTensorsConfig.get_quant_method",
        ),
        "sglang/srt/models/qwen3_5_mtp.py": ("Qwen3_5ForCausalLMMTP",),
    },
}
PACKAGES = {"vllm": "vllm", "sglang": "sglang", "transformers": "transformers"}


def differences(engine: str, source: Source, recorded: Mapping[str, str | None]) -> Iterator[str]:
    """Yield what differs in an engine from what is copied or followed here, as sentences in Markdown."""
    for table in TABLES:
        if table.engine != engine:
            continue
        theirs = source.table(table.file, table.name, table.where)
        if theirs is None:
            yield f"`{table.file}` has no `{table.name}` any more"
            continue
        new, gone = sorted(theirs - table.ours), sorted(table.ours - theirs)
        yield from (f"`{table.name}` (`{table.file}`) has {entry}, which is unknown here" for entry in new)
        yield from (f"`{table.name}` (`{table.file}`) has {entry} no more" for entry in gone)
    for place, digest in digests(engine, source).items():
        file, _, name = place.partition(":")
        if digest is None:
            yield (
                f"`{file}` has no `{name}` any more, which a rule follows"
                if name
                else f"`{file}` is not there any more"
            )
        elif digest != recorded.get(place):
            code = f"`{name}` (`{file}`)" if name else f"`{file}`"
            yield f"{code} is not the code any more that a rule follows"


def digests(engine: str, source: Source) -> dict[str, str | None]:
    """Return a digest of each function that the rules about an engine follow, by `file:name`, and of draft models.

    Those are whole files, which the table of MTP heads names, by `file:`.
    """
    return {f"{file}:{name}": source.digest(file, name) for file, name in followed(engine)}


def followed(engine: str) -> list[tuple[str, str]]:
    """Return the files and names of what the rules about an engine follow; a whole file has no name."""
    functions = [(file, name) for file, names in FUNCTIONS.get(engine, {}).items() for name in names]
    return [*functions, *((file, "") for file in draft_models(engine))]


def draft_models(engine: str) -> list[str]:
    """Return the files of an engine's draft models for MTP heads. vLLM has those in folders of a family elsewhere."""
    drafters = (layout.engines[engine] for layout in LAYOUTS if engine in layout.engines)
    named = sorted({file for drafter in drafters for file in drafter.source.split(", ")})
    if engine == "sglang":
        return [f"sglang/srt/models/{file}" for file in named]
    return [f"vllm/models/{file}" if "/" in file else f"vllm/model_executor/models/{file}" for file in named]


def report(sources: Mapping[str, Source], record: Mapping[str, Mapping[str, str | None]]) -> tuple[str, int]:
    """Return the differences of all engines as Markdown, and how many there are."""
    lines, count = [], 0
    for engine, source in sources.items():
        found = list(differences(engine, source, record.get(engine, {})))
        count += len(found)
        lines += [f"### {' '.join([engine, source.version]).strip()}: {len(found)} differences", ""]
        lines += [f"The rules are those of {engine} {VERSIONS[engine]}.", "", *(f"- {one}" for one in found), ""]
    return "\n".join(lines), count


def download(package: str, folder: Path) -> Source:
    """Download the newest wheel of a package. Raises CalledProcessError."""
    options = ("-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder))
    command = [sys.executable, "-m", "pip", "download", *options, package]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return Source(next(folder.glob(f"{package}-*.whl")))


def main(arguments: list[str]) -> int:
    """Run the command. Returns the exit status."""
    given = dict(one.split("=", 1) for one in arguments if "=" in one)
    unknown = [one for one in arguments if one != "--record" and one.partition("=")[0] not in PACKAGES]
    if unknown:
        print(f"{unknown[0]} is no engine: it takes {', '.join(PACKAGES)}, each with =SOURCE", file=sys.stderr)
        return 2
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if "--record" in arguments:
        record |= {engine: digests(engine, Source(Path(place))) for engine, place in given.items()}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return 0
    with TemporaryDirectory(prefix="requant-engines-") as temporary:
        try:
            named = [one for one in arguments if "=" not in one]
            wanted = [*given, *named] or list(PACKAGES)
            sources = {
                engine: Source(Path(given[engine])) if engine in given else download(PACKAGES[engine], Path(temporary))
                for engine in wanted
            }
            text, count = report(sources, record)
        except (OSError, subprocess.CalledProcessError, SyntaxError) as error:
            print(f"an engine's source cannot be read: {error}", file=sys.stderr)
            return 2
    print(text)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
