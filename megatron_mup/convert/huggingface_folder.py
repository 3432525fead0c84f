"""The files of a Hugging Face folder: config.json, and safetensors files with their index.

Owns which files count and that they and the index say the same. Knows neither what the
configuration means nor which tensors a model has, and needs neither transformers nor the
safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mup.convert.safetensors_shards import INDEX_FILE, SINGLE_FILE, SafetensorsFile
from megatron_mup.errors import CheckpointError

CONFIG_FILE = "config.json"
CURE = "fetch the folder again, or export it again"

_SHOWN = 3


class HuggingFaceFolder:
    """The tensors of a folder by their headers, each read when asked for.

    A folder with one file and an index is read as transformers does: the one file counts.

    Args:
        folder: holds model.safetensors, or an index and the files that it names.
        problems: collects what is wrong, as sentences, and the rest of the folder is taken; unset
            means that the first fault is raised.

    Attributes:
        folder: as given.
        files: the file of each tensor, by the tensor's name.

    Raises:
        CheckpointError: no safetensors files, a damaged one, or an index that says otherwise.
    """

    def __init__(self, folder: Path, *, problems: list[str] | None = None) -> None:
        self.folder, self._problems = folder, problems
        self.files: Mapping[str, SafetensorsFile] = {}
        if (folder / SINGLE_FILE).exists():
            file = self._open(SINGLE_FILE)
            self.files = {} if file is None else dict.fromkeys(file.tensors, file)
        elif (folder / INDEX_FILE).exists():
            self.files = self._indexed(self._index())
        else:
            self._fault(_nothing(folder))

    def read(self, name: str) -> Tensor:
        """Read a tensor, in its own dtype.

        Raises:
            CheckpointError: no file has it, or it cannot be read.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder}: no file holds the tensor {name}; {CURE}")
        return self.files[name].read(name)

    def _indexed(self, places: Mapping[str, str]) -> dict[str, SafetensorsFile]:
        opened = {name: self._open(name) for name in sorted(set(places.values()))}
        files = {name: file for name, file in opened.items() if file is not None}
        found, lacking = {}, set()
        for tensor, name in places.items():
            if name in files and tensor in files[name].tensors:
                found[tensor] = files[name]
            elif name in files and name not in lacking:
                # One sentence a file: a folder of two versions would fill the screen.
                lacking.add(name)
                self._fault(
                    f"{self.folder / name} has no tensor {tensor}, which {INDEX_FILE} says it has; "
                    f"{CURE}"
                )
        # Tensors that the index does not name would be read by nobody.
        unlisted = [t for file in files.values() for t in file.tensors if t not in places]
        if unlisted:
            self._fault(f"{self.folder / INDEX_FILE} does not name {several(unlisted)}; {CURE}")
        return found

    def _index(self) -> dict[str, str]:
        """The file of each tensor by the index."""
        path = self.folder / INDEX_FILE
        try:
            places = read_json(path).get("weight_map")
            if not isinstance(places, dict) or not all(map(is_file_name, places.values())):
                raise CheckpointError(
                    f"{path} is damaged: it has no map of tensors to files; {CURE}"
                )
        except CheckpointError as error:
            self._fault(str(error), error)
            return {}
        return places

    def _open(self, name: str) -> SafetensorsFile | None:
        try:
            return SafetensorsFile(self.folder / name)
        except CheckpointError as error:
            self._fault(str(error), error)
            return None

    def _fault(self, problem: str, cause: CheckpointError | None = None) -> None:
        if self._problems is None:
            raise cause or CheckpointError(problem)
        self._problems.append(problem)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; a Hugging Face model is a folder with "
            f"{CONFIG_FILE} and safetensors files"
        ) from error
    # Brackets in brackets without end are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {CURE}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object; {CURE}")
    return contents


def is_file_name(name: Any) -> bool:
    """Whether something names a file of the folder itself, and no way out of it."""
    return isinstance(name, str) and name not in ("", "..") and name == Path(name).name


def several(names: list[str]) -> str:
    """Names of tensors for a message: the first ones, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"the tensors {shown} and {more} more" if more > 0 else f"the tensors {shown}"


def _nothing(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder} holds {pickled[0]} and no safetensors files; pickled weights can run code "
            "when they are read, so save the model with transformers first: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; {CURE}"
