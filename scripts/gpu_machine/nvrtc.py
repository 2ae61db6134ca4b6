"""NVRTC, the compiler for CUDA C++ in a library, through ctypes: a source and its defines become a cubin."""

import ctypes
import os
from pathlib import Path


class CompileError(Exception):
    """The log of the compiler."""


def library():
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    folder = os.environ.get("CUDA_HOME")
    paths = [*([f"{folder}/lib/libnvrtc.so.13"] if folder else []), *names]
    for path in paths:
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            last = error
    raise SystemExit(f"expected NVRTC, a part of CUDA and of PyTorch's wheels, on LD_LIBRARY_PATH, got: {last}")


def compile(source, architecture, defines, headers):
    """The cubin and the log of ptxas. `headers` is the folder of the headers."""
    nvrtc, program = library(), ctypes.c_void_p()

    def text(size, get):
        count = ctypes.c_size_t()
        size(program, ctypes.byref(count))
        buffer = ctypes.create_string_buffer(count.value)
        get(program, buffer)
        return buffer.raw

    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", "-default-device", f"-I{headers}"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    source = Path(source)
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompileError(f"{source} for {architecture}, {defines}:\n{log}")
        return text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
