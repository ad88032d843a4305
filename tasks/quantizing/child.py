"""The process that quantizes: `python -m requant.tasks.quantizing.child JOB.json FOLDER`.

It knows auto-round, torch and transformers, and neither Prefect nor the store, so that it runs in any GPU image
(Python 3.11 or 3.12, torch from 2.11 on). Below FOLDER it keeps:

    events.jsonl   what it tells of its work, an event a line (events.py)
    out/           what auto-round writes
    resume/        auto-round's resume state
    result.json    written last: where the checkpoint is, and what was done to which layer

It ends when its standard input does, so that it never outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.architecture import architecture_problem
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.quantizing import resume
from requant.tasks.quantizing.auto_round import TuningRun, patched, patches, refuse_other_versions
from requant.tasks.quantizing.auto_settings import LoopSettings, choose, unknown_layer
from requant.tasks.quantizing.events import EventSink, EventWriter, Failed, JobRefused, SettingsChosen, kind_of
from requant.tasks.quantizing.samples import calibration_samples
from requant.tasks.settings import read_settings


def main(job_path: str, folder_path: str) -> int:
    """Quantize as the job says. 0: result.json is there; 1: the last event says what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(folder_path)
    report = EventWriter(folder / "events.jsonl").write
    job = json.loads(Path(job_path).read_text())
    os.environ["AR_RESUME_DIR"] = str(folder / "resume")
    os.environ["AR_WORK_SPACE"] = str(folder / "offload")
    try:
        result = quantize(job, folder, report)
    except JobRefused as error:
        report(Failed(kind="refused", text=str(error)))
        return 1
    except SystemExit as error:  # auto-round's answer to calibration that reached no layer
        report(Failed(kind="failed", text=f"auto-round gave up (exit {error.code}): see log.txt"))
        return 1
    except Exception as error:
        logging.getLogger("requant").exception("quantization failed")
        first_line = next(iter(str(error).splitlines()), "")
        report(Failed(kind=kind_of(error), text=f"{type(error).__name__}: {first_line[:300]}"))
        return 1
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / "result.json")
    return 0


def quantize(job: dict[str, Any], folder: Path, report: EventSink) -> dict[str, Any]:
    """Load, calibrate, tune, write. Returns what result.json holds.

    Raises Refused for a job that cannot work as it is.
    """
    # The search path of this process may lead to other packages than that of the process that started it. With other
    # versions the imports themselves could fail.
    refuse_other_versions()
    import torch
    import transformers
    from auto_round import AutoRound

    from requant.tasks.quantizing.loop.gated_delta_rule import modules_with_reference
    from requant.tasks.quantizing.loop.profile import Profile

    gc.freeze()  # auto-round collects garbage several times a block, each time through all that was imported: 0.3 s

    own = read_settings()
    same_bits = own.deterministic
    if same_bits:
        _same_bits_every_time()
    device = job["device"] if job["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    remote = {"trust_remote_code": job["allow_remote_code"]}
    config = _load_config(job["model"], job["allow_remote_code"])
    loader = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        loader = transformers.AutoModelForImageTextToText
    model = loader.from_pretrained(job["model"], dtype="auto", use_safetensors=True, **remote)
    chosen, reasons = choose(job, model, device, _gpu_bytes(device) if on_gpu else None, same_bits)
    delta_rule = modules_with_reference(model) if chosen["fast"] else []
    settings = SettingsChosen(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        **chosen,
        batch_size=job["batch_size"],
        gradient_accumulate_steps=job["gradient_accumulate_steps"],
        reasons=reasons,
        torch=torch.__version__,
        transformers=transformers.__version__,
        **({"delta_rule": [module.__name__ for module in delta_rule]} if chosen["fast"] else {}),
    )
    report(settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], **remote)
    samples = calibration_samples(
        tokenizer, job["texts"], job["nsamples"], job["seqlen"], mixed=job["mixed"], seed=job["seed"]
    )
    # An expert has a name of its own in the checkpoint, and in the model once auto-round has taken it apart.
    apart = split_fused_experts(Checkpoint.open(Path(job["model"]))).modules
    _check_layer_names(job["layers"], [*(name for name, _ in model.named_modules()), *apart])
    # Samples are never padded. auto-round makes up a mask for them and hands the first block's to every block: the
    # padding mask of a linear-attention block, which a full-attention block then refuses.
    unmasked = [{"input_ids": sample, "attention_mask": None} for sample in samples]

    (folder / "resume").mkdir(exist_ok=True)
    resume.trim(folder / "resume")
    resume.clean_unfinished(folder / "out")
    ours = {name: chosen[name] for name in ("torch_compile", "offload", "compare_last")}
    run = TuningRun(
        report=report,
        seed=job["seed"],
        loop=LoopSettings(**ours) if chosen["fast"] else None,
        delta_rule=delta_rule,
        clock=Profile(own.profile) if own.profile else None,
    )
    with patched(patches(run), report):
        rounder = AutoRound(
            model,
            tokenizer,
            processor=tokenizer if hasattr(config, "vision_config") else None,
            scheme=job["scheme"],
            bits=job["bits"],
            group_size=job["group_size"],
            sym=job["sym"],
            iters=job["iters"],
            lr=job["lr"],
            seqlen=job["seqlen"],
            nsamples=job["nsamples"],
            dataset=samples if hasattr(config, "vision_config") else unmasked,
            batch_size=job["batch_size"],
            gradient_accumulate_steps=job["gradient_accumulate_steps"],
            low_gpu_mem_usage=chosen["low_gpu_mem"],
            enable_torch_compile=chosen["torch_compile"] and not chosen["fast"],  # the fast loop compiles for itself
            device_map=device,
            seed=job["seed"],
            layer_config={**{p: {"bits": 16, "data_type": "fp"} for p in job["head"]}, **job["layers"]} or None,
        )
        _, written = rounder.quantize_and_save(str(folder / "out"), format=job["format"])
    bits = {name: int(layer.get("bits", 16)) for name, layer in (rounder.layer_config or {}).items()}
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return {"checkpoint": str(written), "settings": settings.details(), "bits": bits, "peak_gpu_bytes": peak}


def _same_bits_every_time() -> None:
    """On a GPU gradients are else summed in the order in which they come. `choose` leaves blocks uncompiled then:
    with these algorithms torch 2.11 compiled a full-attention block to gradients of its queries that held foreign
    memory, without them inductor took the kernel that was fastest that day."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first matrix product is made
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    # With warn_only, flash attention's gradients too come in any order: plain products instead.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)


def _gpu_bytes(device: str) -> int:
    """Bytes of the GPU that may be used: what is free, or REQUANT_GPU_GB of it where a card is shared."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if limit_gb := read_settings().gpu_gb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total), torch.device(device, 0))
        free = min(free, int(limit_gb * 1e9))
    return int(free)


def _load_config(model: str, allow_remote_code: bool) -> Any:
    import transformers

    described = json.loads((Path(model) / "config.json").read_text())
    problem = architecture_problem(described, transformers.CONFIG_MAPPING, allow_remote_code=allow_remote_code)
    if problem:
        raise JobRefused(f"{problem} (transformers {transformers.__version__})")
    return transformers.AutoConfig.from_pretrained(model, trust_remote_code=allow_remote_code)


def _check_layer_names(layers: dict[str, Any], names: list[str]) -> None:
    problem = unknown_layer(layers, names)
    if problem:
        raise JobRefused(problem)


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(75)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
