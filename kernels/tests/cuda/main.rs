//! The CUDA kernels, run on the CPU by the emulator, and the emulator itself.

mod emulator;
mod emulator_faults;
mod emulator_instructions;
mod emulator_machine;
mod emulator_mutants;
mod kernel_mutants;
