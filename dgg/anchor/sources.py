# SPDX-License-Identifier: BSD-3-Clause
"""Sources of anchors θ* in files: named tensors that are read when they are looked up."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import sharding
from dgg.anchor.memory import Part

_ADAPTER_FILE = "adapter_model.safetensors"
_MODEL_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_FSDP_FOLDER = "pytorch_model_fsdp_0"
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "C64": torch.complex64, "C128": torch.complex128,
}  # fmt: skip


class Stored(Mapping):
    """Named tensors in files; a tensor is read when it is looked up.

    Attributes:
        path: Path of the file or directory.
        words: Words that may stand before names there, besides those of wrappers.
    """

    words: Sequence[str] = ()

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._names: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def kind(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Returns a tensor's shape and dtype (a file's own name for one that torch lacks)."""
        raise NotImplementedError

    def read(self, name: str, param: Tensor) -> Tensor:
        """Returns a tensor, of a DTensor parameter's only what belongs to its local shard."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.kind(name)
        whole = torch.empty(shape, dtype=dtype, device="meta")
        return Part(self, name, whole, shape, dtype).read()


class _Safetensors(Stored):
    """Tensors of safetensors files, which are mapped into memory."""

    def __init__(self, path: pathlib.Path, files: Mapping[str, pathlib.Path] | None = None) -> None:
        super().__init__(path)
        self._open: dict[pathlib.Path, Any] = {}
        names = dict.fromkeys(self._file(path).keys(), path) if files is None else files
        self._names = dict(names)

    def _file(self, path: pathlib.Path):
        if path not in self._open:
            try:
                from safetensors import SafetensorError, safe_open
            except ImportError as error:
                raise ImportError(
                    f"reading {str(path)!r} needs safetensors: pip install safetensors"
                ) from error
            if not path.is_file():
                raise FileNotFoundError(
                    f"{str(self.path)!r} names the file {path.name}, which is not there; copy the "
                    "whole directory that save_pretrained() wrote"
                )
            try:
                with torch.device("cpu"):
                    self._open[path] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(
                    f"{str(path)!r} is no whole safetensors file ({error}); save it again"
                ) from None
        return self._open[path]

    def _slice(self, name: str):
        file = self._file(self._names[name])
        try:
            return file.get_slice(name)
        except Exception as error:
            raise KeyError(
                f"{self._names[name].name} has no tensor {name!r}, which {str(self.path)!r} says "
                "is there; copy the whole directory that save_pretrained() wrote"
            ) from error

    def kind(self, name: str) -> tuple[tuple[int, ...], Any]:
        tensor = self._slice(name)
        dtype = tensor.get_dtype()
        return tuple(tensor.get_shape()), _DTYPES.get(dtype, dtype)

    def read(self, name: str, param: Tensor) -> Tensor:
        box = sharding.box_of(param)
        if any(side.start == side.stop for side in box):
            sizes = [side.stop - side.start for side in box]
            return torch.empty(sizes, dtype=self.kind(name)[1], device="cpu")
        return self._slice(name)[box]


class _Distributed(Stored):
    """Tensors of a checkpoint of torch.distributed.checkpoint, read without any collective."""

    words = ("state_dict.",)

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, True)
        self._names = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def kind(self, name: str) -> tuple[tuple[int, ...], Any]:
        entry = self._names[name]
        return tuple(entry.size), entry.properties.dtype

    def read(self, name: str, param: Tensor) -> Tensor:
        from torch.distributed.checkpoint import DefaultLoadPlanner

        shape, dtype = sharding.local(param).shape, self.kind(name)[1]
        shard = torch.empty(shape, dtype=dtype, device="cpu")
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: sharding.like(shard, param)}, self._metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return shard


def open_path(path: str | os.PathLike, what: str = "anchor") -> Stored:
    """Opens the named tensors that lie at a path; none is read yet.

    Args:
        path: A safetensors file or the index of several, a directory that ``save_pretrained``
            wrote (of a model or an adapter), a checkpoint of the Trainer at the end of its
            training, or a directory of torch.distributed.checkpoint.
        what: What the tensors are for, in errors; or ``"importance"``.

    Raises:
        FileNotFoundError: There is nothing that can be read.
        ImportError: safetensors is not installed.
        ValueError: A file is broken or of a kind that is not read, or the checkpoint is one from
            the middle of a training.
    """
    path = pathlib.Path(path)
    _refuse_mid_task(path, what)
    by_name = "what importance_dict() returned" if what == "importance" else "the tensors by name"
    if path.is_file():
        if path.name.endswith(".safetensors.index.json"):
            return _indexed(path)
        if path.suffix == ".safetensors":
            return _Safetensors(path)
        raise ValueError(
            f"the {what} {str(path)!r} is no safetensors file; pass "
            f"torch.load(path, weights_only=True, mmap=True) of it instead, {by_name}"
        )
    for name in (_ADAPTER_FILE, _MODEL_FILE):
        if (path / name).is_file():
            return _Safetensors(path / name)
    if (path / _INDEX_FILE).is_file():
        return _indexed(path / _INDEX_FILE)
    for folder in (path, path / _FSDP_FOLDER):
        if (folder / ".metadata").is_file():
            return _Distributed(folder)
    pickled = [name for name in _PICKLED if (path / name).is_file()]
    if pickled:
        raise ValueError(
            f"the {what} {str(path)!r} has {pickled[0]}, which is pickled; save the model with "
            "save_pretrained(), or pass torch.load(file, weights_only=True, mmap=True), the "
            "tensors by name"
        )
    if path.is_dir() and any(path.glob("global_step*")) or (path / "zero_to_fp32.py").is_file():
        raise ValueError(
            f"the {what} {str(path)!r} is a DeepSpeed checkpoint, whose weights lie in pieces; "
            "make one of them (python zero_to_fp32.py . model --safe_serialization), and pass that "
            "directory"
        )
    if what == "importance":
        raise FileNotFoundError(
            f"no importance at {str(path)!r}; pass {by_name}, or the path of a file in which "
            "safetensors.torch.save_file() has saved it"
        )
    raise FileNotFoundError(
        f"no anchor at {str(path)!r}: no {_ADAPTER_FILE}, {_MODEL_FILE} or {_INDEX_FILE} there, "
        "and no distributed checkpoint; pass what model.save_pretrained() wrote for the previous "
        "task"
    )


def _indexed(index: pathlib.Path) -> Stored:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in files.items()}
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{str(index)!r} is no index of safetensors files ({error!r}); save the model again"
        ) from None
    return _Safetensors(index, files)


def _refuse_mid_task(path: pathlib.Path, what: str) -> None:
    """Raises a ValueError for weights that a Trainer saved before its training was over."""
    inner = path.is_file() or path.name.startswith("pytorch_model_fsdp")
    file = (path.parent if inner else path) / "trainer_state.json"
    if not file.is_file():
        return
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        done, wanted = int(state["global_step"]), int(state["max_steps"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{str(file)!r} cannot be read ({error!r}), so nobody knows whether these are the "
            "weights at the end of a task; name the directory of the finished model"
        ) from None
    if done < wanted:
        raise ValueError(
            f"the {what} {str(path)!r} is a checkpoint from the middle of a training (step {done} "
            f"of {wanted}): its weights are not those a task ended with. Name the directory of the "
            "finished model (trainer.save_model() or model.save_pretrained()), or, if that "
            "training ended early on purpose, load the tensors and pass them"
        )
