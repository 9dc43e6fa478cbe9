# SPDX-License-Identifier: BSD-3-Clause
"""Says what dgg is beside the torch that runs this, and makes the steps that a file asks for.

tests/test_cuda_torch.py runs it beside CUDA builds of torch and beside the one of the tests. It
needs torch and dgg alone.

    python cuda_torch_worker.py INPUT OUTPUT
"""

from __future__ import annotations

import pathlib
import sys
import warnings

import torch

import dgg
from dgg import backends
from dgg.backends import libraries, native

CUDA = torch.device("cuda")
NUMBERS = {"int": 0, "float": 0.5, "bool": False}


def mapped(pattern: str) -> list[str]:
    """Returns the libraries of this process whose names have the pattern."""
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    paths = {pathlib.Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}
    return sorted(str(path) for path in paths if path.match(pattern))


def kernels(key: str) -> list[str]:
    """Returns dgg's operators that have a kernel for a dispatch key."""
    return [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dgg::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    ]


def refusal(function, *args, **kwargs) -> str:
    """Returns the error that a call ends in, with its class."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def called_without_a_device(name: str) -> str:
    """Returns what the CUDA kernel of an operator ends in, given tensors of the CPU."""
    operator = getattr(torch.ops.dgg, name).default
    positional, named = [], {}
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if kind == "Tensor":
            value = torch.zeros(3, 14, dtype=torch.float64)
        else:
            value = NUMBERS.get(kind)  # None for what is optional
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return refusal(operator.redispatch, keys, *positional, **named)


def trained(rule: str, options: dict, work: dict) -> list[torch.Tensor]:
    """Returns parameters and state after some steps of the C++ backend."""
    params = [torch.nn.Parameter(p.clone()) for p in work["params"]]
    opt = getattr(dgg, rule)(params, **options, seed=7, backend="cpp")
    opt.set_anchor()
    for grads in work["grads"]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        opt.step()
    state = [opt.state[p] for p in params]
    return [
        *(p.detach() for p in params),
        *(each[key] for each in state for key in sorted(each) if torch.is_tensor(each[key])),
    ]


def main() -> None:
    source, target = sys.argv[1:]
    work = torch.load(source, weights_only=True)
    names = [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("dgg::")]
    launches = sorted(x for x in names if "launch" in x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = {
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "dgg": dgg.__file__,
            "libraries": mapped("*/_C*.so") + mapped("*/libtorch_cuda.so"),
            "schemas": {
                x: str(getattr(torch.ops.dgg, x.removeprefix("dgg::")).default._schema)
                for x in names
            },
            "kernels": {key: sorted(kernels(key)) for key in ("CPU", "CUDA")},
            "native gradients": native.load() is not None,
            "config": dgg.show_config(),
            "missing": libraries.cuda_error,
            "unavailable": backends.unavailable("cpp", CUDA),
            "chosen": backends.choose(None, CUDA),
            "demanded": refusal(backends.choose, "cpp", CUDA),
        }
        if libraries.cuda_error is None:
            found["calls"] = {x: called_without_a_device(x.removeprefix("dgg::")) for x in launches}
        found["steps"] = {
            name: trained(rule, options, work) for name, (rule, options) in work["cases"].items()
        }
        found["warnings"] = [f"{w.category.__name__}: {w.message}" for w in warned]
    torch.save(found, target)


if __name__ == "__main__":
    main()
