"""Which model an adapter was trained on: recorded beside it, in base.json, and checked before it is loaded.

PEFT's adapter_config.json has one name for the base model and nothing to know it by. An adapter on other weights than
it was trained on answers with nonsense.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from config import ModelConfig, UserError, check
from files import checksum, read_json, write_json
from hub.config_json import hub_config, parse_config

ADAPTER_CONFIG, BASE = "adapter_config.json", "base.json"


class Base(NamedTuple):
    """A model directory, what its weights can be told by, and the configuration that the adapter is trained with."""

    directory: Path
    weights: dict[str, dict[str, Any]]
    config: ModelConfig


def describe_base(directory: str | Path, config: ModelConfig) -> Base:
    """Takes as long as reading all of the weights."""
    files = sorted(Path(directory).glob("*.safetensors"))
    weights = {file.name: {"sha256": checksum(file), **size_and_time(file)} for file in files}
    return Base(Path(directory), weights, config)


def size_and_time(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}


def record_base(adapter: Path, base: Base) -> None:
    """Write base.json into an adapter's directory."""
    absolute = base.directory.resolve()
    relative = os.path.relpath(absolute, adapter.resolve())
    places = {"absolute": str(absolute), "relative": relative}
    write_json(adapter / BASE, places | {"weights": base.weights, "config": hub_config(base.config)})


def publish_base(adapter: Path, name: str) -> None:
    """Have an adapter's files say what its base is called on the Hub, and no longer where it lies here."""
    write_json(adapter / ADAPTER_CONFIG, read_json(adapter / ADAPTER_CONFIG) | {"base_model_name_or_path": name})
    if (adapter / BASE).is_file():
        write_json(adapter / BASE, read_json(adapter / BASE) | {"absolute": name, "relative": name})


def find_base(adapter: Path) -> tuple[Path, ModelConfig | None]:
    """The directory of the model that an adapter was trained on, and the configuration it was trained with; None where
    only PEFT's file tells of it. Raises UserError where the model is missing, or is no longer the same."""
    name = str(read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path"))
    path = adapter / BASE
    if not path.is_file():
        check(Path(name).is_dir(), f"{adapter}: its base model is missing: there is no directory {name}")
        return Path(name), None
    record = read_json(path)
    try:
        places = [Path(record["absolute"]), Path(os.path.normpath(adapter / record["relative"])), Path(name)]
        there = [place for place in dict.fromkeys(places) if place.is_dir()]
        looked = ", ".join(str(place) for place in dict.fromkeys(places))
        check(bool(there), f"{adapter}: its base model is missing: there is no directory {looked}")
        for place in there:
            changed = changed_weights(place, record["weights"])
            if not changed:
                return place, parse_config(path, record["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of an adapter's base model: {error!r}") from error
    raise UserError(
        f"{adapter}: its base model {place} has changed ({', '.join(changed)}); the adapter only fits the weights that "
        "it was trained on: put them back, or train it again"
    )


def model_directory(checkpoint: Path) -> Path:
    """A checkpoint's own, or of an adapter the base's. Raises UserError as `find_base` does."""
    return find_base(checkpoint)[0] if (checkpoint / ADAPTER_CONFIG).is_file() else checkpoint


def changed_weights(directory: Path, recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the files that are not as they were recorded. One of the same size and time is not read again."""

    def same(file: Path, known: dict[str, Any]) -> bool:
        return file.is_file() and (known | size_and_time(file) == known or checksum(file) == known["sha256"])

    return [name for name, known in recorded.items() if not same(directory / name, known)]
