"""What runs the kernels: the GPU, through the driver's own interface, or the emulator of the tests on a CPU."""

import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from variants import CUBINS, DEVICE, HERE

SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Gpu:
    device = "cuda"

    def __init__(self):
        torch.zeros(1, device="cuda")  # PyTorch makes the context that the kernels are loaded into.
        self.driver, self.kernels = ctypes.CDLL("libcuda.so.1"), {}
        self.capability = torch.cuda.get_device_capability()
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.compiled = Path(tempfile.mkdtemp())

    def check(self, code, what):
        if code:
            name = ctypes.c_char_p()
            self.driver.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"{what}: {(name.value or b'?').decode()}")

    def architectures(self, engine):
        """Whose rows of the table serve: those of sm_80 on every GPU without rows of its own."""
        return ["sm_90a" if engine == "wgmma" else "sm_90"] if self.capability == (9, 0) else ["sm_80"]

    def cubin(self, variant):
        """As it was packed, or compiled here."""
        own = "sm_" + "".join(map(str, self.capability)) + "a" * variant.hopper
        packed = CUBINS / f"{variant.name}.{own}.cubin"
        return packed if packed.exists() else variant.cubin(own, self.compiled)

    def prepare(self, variants):
        """Compiles what wasn't packed, on all processors. What fails here fails again where it is needed."""
        rows = {name for engine in ("wgmma", "mma") for name in self.architectures(engine)}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(self.cubin, v) for v in variants if rows & set(v.architectures)]:
                done.exception()

    def kernel(self, variant, name, shared):
        key = (variant.name, name)
        if key not in self.kernels:
            module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
            self.check(self.driver.cuModuleLoadData(ctypes.byref(module), self.cubin(variant).read_bytes()), f"loading {variant.name}")
            self.check(self.driver.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()), f"{name} of {variant.name}")
            if shared > 48 << 10:
                self.check(self.driver.cuFuncSetAttribute(kernel, SHARED_BYTES, shared), f"{shared} bytes of shared memory for {name}")
            self.kernels[key] = kernel
        return self.kernels[key]

    def launch(self, variant, name, grid, threads, shared, problem, _tensors):
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        kernel = self.kernel(variant, name, shared)
        self.check(self.driver.cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, shared, stream, arguments, None), f"starting {name}")

    def wait(self):
        torch.cuda.synchronize()


class Options(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64), ("eager", ctypes.c_int32), ("check", ctypes.c_int32), ("threads", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32), ("counters", ctypes.c_void_p),
    ]  # fmt: skip


class Region(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class Emulator:
    """For trying the check itself without a GPU. Each variant becomes a shared library."""

    device, capability, multiprocessors = "cpu", (9, 0), 3

    def __init__(self):
        self.headers = Path(os.environ.get("EMULATOR", HERE.parents[1] / "kernels/tests/cuda/emulator"))
        self.folder, self.libraries = Path(tempfile.mkdtemp()), {}

    def architectures(self, engine):
        return ["sm_90a" if engine == "wgmma" else "sm_80"]

    def prepare(self, _variants):
        pass

    def compile(self, source, to, *options):
        """As kernels/tests/cuda/emulator/compiler.rs does."""
        always = ["-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DCUDA_ON_CPU"]
        subprocess.run(["c++", *always, *options, "-x", "c++", str(source), "-o", str(to)], check=True)

    def library(self, variant):
        if variant.name not in self.libraries:
            core, path = self.folder / "emulator.o", self.folder / f"{variant.name}.so"
            if not core.exists():
                self.compile(self.headers / "emulator.cpp", core, "-O3", "-c")
            defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
            self.compile(DEVICE / variant.source, path, "-O2", "-shared", str(core), f"-I{self.headers}", f"-I{DEVICE}", *defines)
            self.libraries[variant.name] = ctypes.CDLL(str(path))
        return self.libraries[variant.name]

    def launch(self, variant, name, grid, threads, shared, problem, tensors):
        storages = {s.data_ptr(): s for s in (x.untyped_storage() for x in tensors)}
        regions = (Region * len(storages))(*(Region(start, s.nbytes()) for start, s in storages.items()))
        options, message = Options(seed=1, eager=0, check=1, threads=os.cpu_count()), ctypes.create_string_buffer(1000)
        failed = self.library(variant).emulated_launch(
            name.encode(), ctypes.c_uint32(grid), ctypes.c_uint32(threads), ctypes.c_uint64(shared), ctypes.byref(problem),
            ctypes.c_uint64(ctypes.sizeof(problem)), ctypes.byref(options), regions, ctypes.c_uint64(len(storages)),
            message, ctypes.c_uint64(len(message)),
        )  # fmt: skip
        if failed:
            raise RuntimeError(f"{name}: {message.value.decode(errors='replace')}")

    def wait(self):
        pass


def machine():
    return Emulator() if os.environ.get("DEVICE") == "cpu" else Gpu()
