"""A make-believe CUDA device in a CPU build of torch: `device.type` is "cuda", CPU kernels compute.

Import it before torch, in a process of its own. Tensors of different devices don't mix, memory that was not written is
poison, and what the host would wait for on a GPU is counted: `counts()`. It can't see asynchrony, NCCL, Triton, CUDA's
rounding or the limits of memory. `fake_cuda.cpp` registers kernels at private interfaces of torch: one version only.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

TORCH = "2.13."  # the version whose private interfaces fake_cuda.cpp uses
SOURCE = Path(__file__).with_suffix(".cpp")


def build_folder() -> Path:
    """Outside the sources, one for each torch and each state of the source."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (
        cache / "gptb-ds-tests" / f"fake-cuda-{version('torch')}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    )


_library = build_folder() / "fake_cuda.so"
if _library.exists():  # torch looks CUDA's hooks up once, while it is imported: ours must be there by then
    _torch = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib"
    for _name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libshm.so", "libtorch_python.so"):
        if (_torch / _name).exists():
            ctypes.CDLL(str(_torch / _name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_library))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils.cpp_extension import load  # noqa: E402

from gptb_ds.atomic_files import replace_file  # noqa: E402
from gptb_ds.extension_builds import wait_for_lock  # noqa: E402

build_folder().mkdir(parents=True, exist_ok=True)
wait_for_lock(build_folder(), print)  # of tests that were killed while they built
# From a copy there: ninja builds anew for a checkout at another place.
_source = build_folder() / SOURCE.name
if not _source.exists():
    replace_file(_source, SOURCE.read_bytes())
_device = load("fake_cuda", [str(_source)], build_directory=str(build_folder()), extra_cflags=["-O1", "-w"])
_synchronized: collections.Counter[str] = collections.Counter()


def counts() -> dict[str, dict[str, int] | int]:
    """Since the last `reset`: what the host waited for, copies between host and device, and launches."""
    return {
        "waits": dict(_device.waits()) | dict(_synchronized),
        "copies": dict(_device.copies()),
        "launches": _device.launches(),
        "replays": _replayed["replays"],
    }


def reset() -> None:
    _device.reset()
    _synchronized.clear()
    _replayed.clear()


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, *args, **options):
        pass

    def synchronize(self):
        _synchronized["stream.synchronize"] += 1

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class Event:
    def __init__(self, *args, **options):
        pass

    def record(self, stream=None):
        pass

    def synchronize(self):
        _synchronized["event.synchronize"] += 1

    def query(self):
        return True

    def wait(self, stream=None):
        pass

    def elapsed_time(self, other):
        return 1.0


class Properties:
    name, total_memory, major, minor, multi_processor_count = "make-believe H100", 80 * 2**30, 9, 0, 132
    # Each process sees a GPU of its own, unless a test says which.
    uuid = os.environ.get("FAKE_CUDA_UUID") or f"GPU-{os.getpid()}"


class CUDAGraph:
    """Records the operations of a capture and does them again at a replay, into the same tensors.

    What did not go through a recorded operation (a new tensor in an old one's place, a number on the host) is as it was
    at the capture, as on a GPU.
    """

    def __init__(self, keep_graph=False):
        self.operations = []

    def replay(self):
        with torch.no_grad():
            for function, args, options, outputs in self.operations:
                again = function(*args, **options)
                if not _writes_or_views(function):
                    for old, new in zip(_tensors(outputs), _tensors(again), strict=True):
                        old.copy_(new)
        _replayed["replays"] += 1


def _tensors(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _writes_or_views(function):
    return any(result.alias_info is not None for result in function._schema.returns) or not function._schema.returns


_FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
_replayed: collections.Counter[str] = collections.Counter()


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        moved = [t for t in _tensors((args, kwargs)) if t.device.type != "cuda" and t.dim()]
        if function._schema.name in _FORBIDDEN or (moved and "copy" in function._schema.name):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {function}")
        outputs = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, outputs))
        return outputs


class graph:  # noqa: N801
    capturing = False

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        self.recorder = _Recorder(cuda_graph)

    def __enter__(self):
        graph.capturing = True
        self.recorder.__enter__()

    def __exit__(self, *error):
        self.recorder.__exit__(*error)
        graph.capturing = False


def _get_rng_state(device=None):
    if graph.capturing:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing: random state")
    return torch.get_rng_state()


def _set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal ({index})")


def _synchronize(device=None):
    _synchronized["device synchronize"] += 1


_stream = Stream()
_MEMORY = dict.fromkeys(
    ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda device=None: 0
)
_REPLACED = _MEMORY | {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": _set_device,
    "synchronize": _synchronize,
    "Stream": Stream,
    "Event": Event,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: _stream,
    "default_stream": lambda device=None: _stream,
    "get_rng_state": _get_rng_state,
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "_is_in_bad_fork": lambda: False,
    "is_bf16_supported": lambda *args, **options: True,
    "get_device_properties": lambda device=None: Properties,
    "get_device_name": lambda device=None: Properties.name,
    "get_device_capability": lambda device=None: (9, 0),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
    "device": lambda device: contextlib.nullcontext(),
    "is_current_stream_capturing": lambda: graph.capturing,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "graph_pool_handle": lambda: (0, 1),
    "_initialized": True,
}
for _name, _value in _REPLACED.items():
    setattr(torch.cuda, _name, _value)
for _name in ("range_push", "range_pop", "mark"):
    setattr(torch.cuda.nvtx, _name, lambda *args: None)
torch.Tensor.record_stream = lambda self, stream: None
torch.version.cuda = "13.0"

# A product with a wider result exists only in CUDA's libraries.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("mm.dtype", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype), "CUDA")

# NCCL's collectives go over gloo: a copy to the host and back.
_init_process_group, _new_group = dist.init_process_group, dist.new_group
dist.init_process_group = lambda backend=None, *args, **options: _init_process_group("gloo", *args, **options)
dist.new_group = lambda *args, backend=None, **options: _new_group(*args, backend="gloo", **options)


class _Done:
    def wait(self, *args):
        return True

    def is_completed(self):
        return True

    def synchronize(self):
        pass


def _on_device(value):
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _over_gloo(name):
    real = getattr(dist, name)

    @functools.wraps(real)
    def call(*args, **options):
        if not any(map(_on_device, [*args, *options.values()])):
            return real(*args, **options)
        hosts = []

        def to_host(value):
            if not _on_device(value):
                return value
            host = torch.empty(value.shape, dtype=value.dtype)
            hosts.append((value, host.copy_(value, non_blocking=True)))
            return host

        options.pop("async_op", None)
        real(*map(to_host, args), **{key: to_host(value) for key, value in options.items()})
        for value, host in hosts:
            value.copy_(host, non_blocking=True)
        return _Done()

    setattr(dist, name, call)


for _name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce"):
    _over_gloo(_name)
