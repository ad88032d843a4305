"""The process that quantizes: `python -m requant.tasks.quantizing.child JOB.json FOLDER`.

It imports auto-round, torch and transformers, but neither Prefect nor the store. So it runs in any GPU image with
Python 3.11 or 3.12 and torch 2.11 or later. It writes into FOLDER:

    events.jsonl   its progress, one event per line (events.py)
    out/           auto-round's output
    resume/        auto-round's resume state
    result.json    the result (job.py), written last

It ends when its standard input is closed, so that it does not outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.architecture import architecture_problem
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.exclusions import FULL_PRECISION
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.quantizing import resume
from requant.tasks.quantizing.auto_round import PeerDone, TuningRun, patched, patches, refuse_other_versions
from requant.tasks.quantizing.auto_settings import choose, unknown_layer
from requant.tasks.quantizing.events import EventSink, EventWriter, Failed, JobRefused, SettingsChosen
from requant.tasks.quantizing.failures import FailureKind, classify
from requant.tasks.quantizing.job import Job, JobResult
from requant.tasks.quantizing.peers import Team, count_gpus, start_peers
from requant.tasks.quantizing.samples import calibration_samples
from requant.tasks.settings import read_settings


def main(job_path: str, folder_path: str, rank: str = "0", count: str = "1", rendezvous: str = "") -> int:
    """Do the job. Returns exit status 0 with result.json written, or 1 with the error as the last event.

    A process with another rank than 0 is a peer (peers.py), and writes no result.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, team = Path(folder_path), Team(int(rank), int(count), rendezvous)
    report = EventWriter(team.folder(folder) / "events.jsonl").write
    os.environ["AR_RESUME_DIR"] = str(folder / "resume")
    os.environ["AR_WORK_SPACE"] = str(team.folder(folder) / "offload")
    os.environ["AR_MALLOC_TRIM_EVERY"] = "1"  # `NextBlock` lets memory be cleared once a block.
    try:
        result = quantize(Path(job_path), folder, report, team)
    except JobRefused as error:
        report(Failed(kind=FailureKind.REFUSED, text=str(error)))
        return 1
    except SystemExit as error:  # auto-round exits if the calibration reached no layer.
        report(Failed(kind=FailureKind.FAILED, text=f"auto-round gave up (exit {error.code}): see log.txt"))
        return 1
    except Exception as error:
        logging.getLogger("requant").exception("quantization failed")
        first_line = next(iter(str(error).splitlines()), "")
        report(Failed(kind=classify(error), text=f"{type(error).__name__}: {first_line[:300]}"))
        return 1
    if result is None:
        return 0
    temporary = folder / "result.json.part"
    temporary.write_text(result.model_dump_json(exclude_unset=True, indent=1))
    os.replace(temporary, folder / "result.json")
    return 0


def quantize(job_path: Path, folder: Path, report: EventSink, team: Team) -> JobResult | None:
    """Load the model, calibrate, tune, and write the checkpoint below `folder`. A peer returns None.

    Raises JobRefused for a job that cannot work as it is.
    """
    # This process may find other packages than the process that started it. With other versions, the imports below
    # could fail.
    refuse_other_versions()
    job = Job.model_validate_json(job_path.read_text())
    settings, rung, scheme = job.settings, job.rung, job.settings.resolved
    import torch
    import transformers
    from auto_round import AutoRound

    from requant.tasks.quantizing.loop.gated_delta_rule import modules_with_reference
    from requant.tasks.quantizing.loop.profile import Profile

    # auto-round collects garbage several times before the first block. Without this, each time takes 0.3 s for what was
    # imported. `NextBlock` does the same for what else there is when a block starts. Python's own collections are as
    # frequent as usual here: only the command line makes them rarer, and it does not run in this process.
    gc.freeze()

    machine = read_settings()
    if machine.deterministic:
        _use_deterministic_kernels()
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    if not team.is_peer and (gpus := count_gpus(settings, device)) > 1:
        team = start_peers(job_path, folder, gpus, report)
    config = _load_config(job.model, job.allow_remote_code)
    sees_images = hasattr(config, "vision_config")
    loader = transformers.AutoModelForImageTextToText if sees_images else transformers.AutoModelForCausalLM
    remote_code = {"trust_remote_code": job.allow_remote_code}
    model = loader.from_pretrained(str(job.model), dtype="auto", use_safetensors=True, **remote_code)
    chosen = choose(job, model, device, _usable_gpu_bytes(device) if on_gpu else None, machine.deterministic)
    delta_rule = modules_with_reference(model) if chosen.fast else []
    reported = SettingsChosen(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        fast=chosen.fast,
        compare_last=chosen.compare_last,
        offload=chosen.offload,
        torch_compile=chosen.torch_compile,
        low_gpu_mem=chosen.low_gpu_mem,
        batch_size=rung.batch_size,
        gradient_accumulate_steps=rung.gradient_accumulate_steps,
        reasons=chosen.reasons,
        torch=torch.__version__,
        transformers=transformers.__version__,
        **({"delta_rule": [module.__name__ for module in delta_rule]} if chosen.fast else {}),
        **({"gpus": team.count} if team.count > 1 else {}),
    )
    report(reported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(job.model), **remote_code)
    samples, uses = calibration_samples(tokenizer, job.sources, settings.nsamples, settings.seqlen, seed=settings.seed)
    # The checkpoint can hold all experts of a layer in one tensor. auto-round splits them only later, so their names
    # are not yet modules of the model.
    expert_names = split_fused_experts(Checkpoint.open(job.model)).modules
    _check_layer_names(settings.layers, [*(name for name, _ in model.named_modules()), *expert_names])
    # Samples are never padded. Without an explicit None, auto-round makes a mask and passes that of the first block to
    # all blocks: a linear-attention block's padding mask, which a full-attention block refuses.
    unmasked = [{"input_ids": sample, "attention_mask": None} for sample in samples]

    if not team.is_peer:
        (folder / "resume").mkdir(exist_ok=True)
        resume.drop_unusable_blocks(folder / "resume")
        resume.clean_unfinished(folder / "out")
    run = TuningRun(
        report=report,
        seed=settings.seed,
        ranks=team.join(torch.device(device)),
        loop=chosen if chosen.fast else None,
        delta_rule=delta_rule,
        clock=Profile(machine.profile) if machine.profile else None,
        load_ahead=torch.device(device) if on_gpu and not chosen.low_gpu_mem else None,
        write_behind=not (on_gpu and chosen.low_gpu_mem),
    )
    with patched(patches(run), report):
        rounder = AutoRound(
            model,
            tokenizer,
            processor=tokenizer if sees_images else None,
            scheme=settings.scheme,
            bits=scheme.bits,
            group_size=scheme.group_size,
            sym=scheme.sym,
            iters=settings.iters,
            lr=settings.lr,
            seqlen=settings.seqlen,
            nsamples=settings.nsamples,
            dataset=samples if sees_images else unmasked,
            batch_size=rung.batch_size,
            gradient_accumulate_steps=rung.gradient_accumulate_steps,
            low_gpu_mem_usage=chosen.low_gpu_mem,
            enable_torch_compile=chosen.torch_compile and not chosen.fast,  # our loop compiles its steps itself
            device_map=device,
            seed=settings.seed,
            layer_config={**{prefix: dict(FULL_PRECISION) for prefix in job.head}, **settings.layers} or None,
        )
        try:
            _, written = rounder.quantize_and_save(str(team.folder(folder) / "out"), format=settings.format)
        except PeerDone:
            return None
        except Exception:
            team.wait_for_watch()
            raise
    bits = {name: int(layer.get("bits", 16)) for name, layer in (rounder.layer_config or {}).items()}
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return JobResult(checkpoint=Path(written), settings=reported, bits=bits, peak_gpu_bytes=peak, calibration=uses)


def _use_deterministic_kernels() -> None:
    """Make torch give the same bits in every run. By default, a GPU sums gradients in any order.

    `choose` does not compile blocks then. With these algorithms, torch 2.11 compiled a full-attention block so that
    the gradients of its queries held foreign memory. Without them, inductor picks the fastest kernel by measuring.
    """
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads this at the first matrix product.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # It costs time.
    # With warn_only, the gradients of flash attention would still be summed in any order.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)


def _usable_gpu_bytes(device: str) -> int:
    """Return the free bytes of the GPU, at most REQUANT_GPU_GB, and limit torch to that too."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if limit_gb := read_settings().gpu_gb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total), torch.device(device, 0))
        free = min(free, int(limit_gb * 1e9))
    return int(free)


def _load_config(model: Path, allow_remote_code: bool) -> Any:
    """Load the model's config. Raises JobRefused if transformers does not know its architecture."""
    import transformers

    described = ModelConfig(json.loads((Path(model) / "config.json").read_text()))
    problem = architecture_problem(described, transformers.CONFIG_MAPPING, allow_remote_code=allow_remote_code)
    if problem:
        raise JobRefused(f"{problem} (transformers {transformers.__version__})")
    return transformers.AutoConfig.from_pretrained(str(model), trust_remote_code=allow_remote_code)


def _check_layer_names(layers: Iterable[str], names: Sequence[str]) -> None:
    """Raise JobRefused if one of the recipe's `layers` matches no module name."""
    problem = unknown_layer(layers, names)
    if problem:
        raise JobRefused(problem)


def _end_with_parent() -> None:
    """Wait until standard input is closed, and exit at once: then the parent has ended or asks for it."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(75)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
