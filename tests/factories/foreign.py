"""What lies in place of files and of checkpoints: pointers, error pages, other formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4998049632\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>503</title></head></html>\n"
# What may lie in place of any file, and what is said of it.
IN_PLACE = {
    "pointer": (POINTER, "is a Git LFS pointer, not the file: git lfs pull or hf download fetches the file"),
    "old pointer": (POINTER.replace(b"git-lfs.github.com", b"hawser.github.com"), "is a Git LFS pointer"),
    "empty": (b"", "is empty: download it again"),
    "page": (PAGE, "is a web page, not the file: download it again"),
    "page with a mark": (b"\xef\xbb\xbf\n " + PAGE.lower(), "is a web page, not the file: download it again"),
    "error in XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page, not the file"),
}


@dataclass(frozen=True)
class OtherKind:
    """A repo that is no checkpoint: its files, and what is said of it behind its name."""

    files: dict[str, bytes]
    said: str

    def write(self, folder: Path) -> Path:
        for path, content in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


def _json(**content: object) -> bytes:
    return json.dumps(content).encode()


CONFIG = {"config.json": _json(model_type="llama", architectures=["LlamaForCausalLM"])}
CARD = {"README.md": b"---\nlicense: mit\nbase_model:\n- Qwen/Qwen3.6-27B\n---\n# made of it\n"}
NAMED = ": name the original model, by its card Qwen/Qwen3.6-27B"
SAVE = ": name a revision or a repo with safetensors, or save the model again with transformers (save_pretrained)"
PICKLED = "has no safetensors, only pickled weights, which Requant never opens "
KINDS = {
    "gguf": OtherKind(
        {**CARD, "q4.gguf": b"GGUF", "q8/q8.gguf": b"GGUF"},
        f"has no safetensors, only GGUF files (q4.gguf and 1 more){NAMED}",
    ),
    "gguf without a card": OtherKind(
        {**CONFIG, "q4.gguf": b"GGUF"}, "has no safetensors, only GGUF files (q4.gguf): name the original model"
    ),
    "adapter": OtherKind(
        {
            "adapter_config.json": _json(peft_type="LORA", base_model_name_or_path="Qwen/Qwen3.6-27B"),
            "adapter_model.safetensors": b"",
        },
        "is an adapter (LORA) of Qwen/Qwen3.6-27B, not a model: name Qwen/Qwen3.6-27B as the base of a recipe, and "
        "this as its adapter",
    ),
    "adapter alone": OtherKind(
        {"adapter_model.safetensors": b""},
        "is an adapter, not a model: name its model as the base of a recipe, and this as its adapter",
    ),
    "pickles": OtherKind(
        {**CONFIG, **CARD, "pytorch_model.bin": b"PK\x03\x04", "training_args.bin": b"PK"},
        f"{PICKLED}(pytorch_model.bin){SAVE}",
    ),
    "pickles beside gguf": OtherKind(
        {**CONFIG, "a.gguf": b"GGUF", "model.pt": b"PK"}, f"{PICKLED}(model.pt) and GGUF files (a.gguf){SAVE}"
    ),
    "onnx": OtherKind(
        {**CARD, "onnx/model.onnx": b"1", "onnx/model.onnx_data": b"1"},
        f"has no safetensors, only ONNX files (onnx/model.onnx and 1 more){NAMED}",
    ),
    "openvino": OtherKind({**CARD, "openvino_model.bin": b"1"}, f"only OpenVINO files (openvino_model.bin){NAMED}"),
    "flax": OtherKind({"flax_model.msgpack": b"1"}, f"only Flax files (flax_model.msgpack){SAVE}"),
    "vendor's own": OtherKind(
        {**CARD, "params.json": b"{}", "consolidated.safetensors": b"1"},
        "has no safetensors, only weights under the names of the vendor's own loader (consolidated.safetensors): "
        "name a repo in the layout of transformers",
    ),
    "diffusers": OtherKind(
        {"model_index.json": _json(_class_name="FluxPipeline"), "vae/model.safetensors": b"1"},
        "is a pipeline of diffusers (FluxPipeline), not a language model: name the repo of a language model",
    ),
    "below": OtherKind(
        {"README.md": b"# two", "v2/model.safetensors": b"1"},
        "has its checkpoint in the folder v2, not at its top: name that folder",
    ),
    "tokenizer alone": OtherKind(
        {**CONFIG, "tokenizer.json": b"{}"}, "has no weights: name a checkpoint in safetensors"
    ),
}
