"""The adapter on disk: `adapter.pth`, its tensors and nothing else, and `adapter_params.json`, all that rebuilds it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moa import reference_format
from moa.config import AdapterConfig
from moa.files import atomic_write, load_tensors, read_json, write_json, write_torch
from moa.methods import ADDED_LATER
from moa.reading import short_repr
from moa.state import rename_old_keys, require_tensors

PARAMS = "adapter_params.json"
BESIDE = ("base", "template")  # its keys beside the settings: the base's shape, and the template of the training rows


def save_adapter(folder: Path, state: Mapping[str, Tensor], params: Mapping[str, Any]) -> Path:
    """Write both files into `folder`; `params` is `adapter_params` of the adapter. Returns the path of adapter.pth.

    ValueError, before anything is written, where they are not the tensors and settings of an adapter.
    """
    require_tensors(state, "the adapter")
    try:
        AdapterConfig.from_dict({k: v for k, v in params.items() if k not in BESIDE}, params["base"]["n_layers"])
        text = json.dumps(dict(params), indent=1, allow_nan=False) + "\n"
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"the adapter's settings are damaged ({error})") from None
    write_torch(folder / "adapter.pth", dict(state))
    atomic_write(folder / PARAMS, text.encode())
    return folder / "adapter.pth"


def adapter_params(config: AdapterConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """The content of adapter_params.json: every setting by flag name, and the shape of the base it was trained on."""
    return config.to_dict() | {"base": dict(base)}


def adapter_file(path: str | Path) -> Path:
    """The file itself, or the adapter.pth of a folder. ValueError where there is none."""
    path = Path(path)
    file = path / "adapter.pth" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; extract_adapter.py takes an adapter out of a run's checkpoint")
    return file


def recorded_template(path: str | Path | None, default: str) -> str:
    """The template of the rows that an adapter was trained on; default where there is no adapter or it tells none."""
    if path is None:
        return default
    params_file = adapter_file(path).with_name(PARAMS)
    template = read_json(params_file).get("template", default)
    if not isinstance(template, str):
        raise ValueError(f"{params_file}: template must be a name, not {short_repr(template)}")
    return template


def save_reference_adapter(folder: Path, state: Mapping[str, Tensor], config: AdapterConfig) -> Path:
    """As `save_adapter`, in the reference format. ValueError, before anything is written, for a mixture
    that theirs cannot express."""
    params, theirs = reference_format.to_reference_params(config), reference_format.to_reference_state(state, config)
    write_torch(folder / "adapter.pth", theirs)
    write_json(folder / PARAMS, params)
    return folder / "adapter.pth"


class Base(Protocol):
    """The model that an adapter is for."""

    n_layers: int

    def require_fits(self, recorded: Any) -> None:
        """ValueError unless `recorded`, the base that an adapter was trained on, is this model."""


def load_adapter(path: str | Path, base: Base, method: str | None = None) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and whole tensors of an adapter, ours or the authors', for a base.

    method: overrides what the authors' flags tell. Raises ValueError naming the file.
    """
    path = adapter_file(path)
    params_file = path.with_name(PARAMS)
    params, state = read_json(params_file), load_tensors(path)
    if "adapter" in state and "optimizer" in state:
        raise ValueError(f"{path}: is a training checkpoint; extract_adapter.py takes the adapter out of it")
    require_tensors(state, str(path))
    is_reference = reference_format.is_reference(params, state)
    try:
        if is_reference:
            flat = reference_format.from_reference_params(params, state)
            flat["method"] = method or flat["method"]
        else:
            flat = {key: value for key, value in params.items() if key not in BESIDE}
            if method not in (None, flat["method"]):
                raise ValueError(f"this is an adapter of method {flat['method']}, not {method}")
            if "base" in params:
                base.require_fits(params["base"])
        config = AdapterConfig.from_dict(flat, base.n_layers)
        missing = [] if is_reference else sorted(config.active_fields() - params.keys() - ADDED_LATER)
        if missing:  # a preset's value in its place might not be what was trained
            raise ValueError(f"missing setting{'s' * (len(missing) > 1)} {', '.join(missing)}")
    except (ValueError, KeyError, TypeError) as error:
        problem = f"missing setting {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{params_file}: {problem}") from None
    if not is_reference:
        return config, rename_old_keys(state)
    try:
        return config, reference_format.from_reference_state(state, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
