"""Results in the schema of the files of PEFT's method_comparison (MetaMathQA/results), so that one chart can hold both.

A file per run. What PEFT measures and a run here does not is null; where its reader needs a number that there is not,
as times of a machine that was not quiet, it is 0.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moa.files import write_json

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_peft_results(folder: Path, results: Sequence[Any], quiet_machine: bool) -> None:
    """Write FOLDER/METHOD--MODEL-lrRATE-sSEED.json of each run of the finished lines."""
    for result in results:
        for i in range(len(result.folders)):
            content = peft_result(result, i, quiet_machine)
            name = content["run_info"]["experiment_name"].replace("/", "--").replace(":", "-")
            write_json(folder / f"{name}.json", content)


def peft_result(result: Any, i: int, quiet_machine: bool) -> dict[str, Any]:
    """The file of a line's i-th run (`exps.study_page.Result`)."""
    folder, run = result.folders[i], result.runs[i]
    record, numbers = folder.record, folder.numbers
    settings, memory = record["settings"], int(numbers["peak_memory_bytes"])
    model, seconds = Path(settings["ckpt_dir"]).name, numbers["seconds"] if quiet_machine else 0.0
    steps, rows = int(numbers["steps"]), int(numbers["rows_per_step"])
    return {
        "run_info": {
            "created_at": record["started"],
            "total_time": seconds,
            "experiment_name": f"{result.name}/{model}-lr{run.lr:g}-s{run.seed}",
            "peft_branch": record["git_revision"],
            "train_config": {
                "model_id": model,
                "dtype": "bfloat16" if settings["bf16"] else "float32",
                "max_seq_length": settings["max_seq_len"],
                "batch_size": rows,
                "batch_size_eval": None,
                "max_steps": steps,
                "eval_steps": steps,
                "compile": False,
                "use_gc": settings["activation_checkpointing"] not in ("auto", "none"),
                "query_template": settings["template"],
                "seed": run.seed,
                "grad_norm_clip": settings["grad_clip"] or 0,
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": run.lr, "weight_decay": settings["weight_decay"]},
                "lr_scheduler": settings["lr_schedule"],
                "use_amp": False,
                "autocast_adapter_dtype": True,
                "generation_kwargs": {"do_sample": False},
                "attn_implementation": None,
                "init_kv_cache_prefix": None,
            },
            "peft_config": {"peft_type": record["adapter"]["method"].upper(), **record["adapter"]},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": seconds,
            "file_size": int(numbers["adapter_bytes"]),
            "num_trainable_params": int(numbers["trainable_parameters"]),
            "num_total_params": None,
            "status": "success",
            "metrics": [
                {
                    "step": steps,
                    "test accuracy": result.by_seed("demo")[i] / 100,
                    "test loss": result.by_seed("loss")[i],
                    "valid loss": result.val_losses[i],
                    "train loss": numbers["final_loss"],
                    "train samples": steps * rows,
                    "train total tokens": round(numbers["tokens_per_s"] * numbers["seconds"]),
                }
            ],
        },
        "meta_info": {
            "model_info": {"sha": record["base_fingerprint"], "created_at": None},
            "dataset_info": {"demo": {"sha": record["data_sha256"], "created_at": None}},
            "package_info": {
                key: value
                for name in PACKAGES
                for key, value in ((f"{name}-version", _version(name)), (f"{name}-commit-hash", None))
            },
            "system_info": {
                **{name: getattr(platform, name)() for name in ("system", "release", "version", "machine")},
                "processor": record["machine"]["processor"],
                "accelerator": settings["device"],
            },
            "pytorch_info": record["versions"]["torch"],
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
