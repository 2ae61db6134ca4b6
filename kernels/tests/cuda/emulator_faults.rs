//! The emulator finds each fault of a kernel, says what it is, and goes on.

use super::emulator::{Launch, Library, Options, emulator_folder, is_there};
use super::emulator_instructions::run_small;

/// A kernel of `small.cu`, its blocks and threads, and a part of what is said of it.
const FAULTS: [(&str, u32, u32, &str); 27] = [
    ("load_out_of_bounds", 1, 32, "a load of 4 bytes at byte 1024 of an allocation of 1024 bytes is out of bounds"),
    ("store_out_of_bounds", 1, 32, "of an allocation of 1024 bytes is out of bounds"),
    ("null_pointer", 1, 32, "a store of 4 bytes at address 0 is out of bounds"),
    ("unaligned_load", 1, 32, "is unaligned"),
    ("copy_from_unaligned", 1, 32, "is unaligned"),
    ("copy_to_unaligned", 1, 32, "is unaligned"),
    ("copy_from_out_of_bounds", 1, 32, "is out of bounds"),
    ("copy_not_waited_for", 1, 32, "ended before its asynchronous copies were waited for"),
    ("copy_read_too_early", 1, 32, "read before its copy was waited for"),
    ("shared_out_of_bounds", 1, 32, "is out of bounds (1024)"),
    ("read_of_nothing", 1, 32, "read before it was written"),
    ("read_of_half_a_word", 1, 32, "read before it was written"),
    ("race_in_a_warp", 1, 32, "a race with"),
    ("race_of_warps", 1, 64, ""),
    ("race_of_writes", 1, 64, "a race with a write"),
    ("race_of_a_read", 1, 64, "a race with"),
    ("race_of_ldmatrix", 1, 32, "a race with a write"),
    ("race_of_blocks", 2, 32, "a race of blocks"),
    ("race_of_blocks_in_bytes", 2, 32, "a race of blocks"),
    ("read_of_another_block", 2, 32, "a race of blocks"),
    ("different_instructions", 1, 32, "different instructions"),
    ("some_lanes_only", 1, 32, "lanes 0000ffff came to an instruction"),
    ("some_lanes_at_the_barrier", 1, 32, "lanes 0000ffff wait at __syncthreads"),
    ("some_threads_end", 1, 64, "32 threads ended while 32 wait at __syncthreads"),
    ("endless_recursion", 1, 32, "overflowed"),
    ("no_such_kernel", 1, 32, "no such kernel"),
    ("race_of_warps", 1, 32, "it has 64 threads, not 32"),
];

#[test]
fn every_fault_is_found() {
    if !is_there() {
        return;
    }
    for (kernel, grid, threads, expected) in FAULTS {
        for seed in 0..4 {
            for eager in [false, true] {
                let options = Options { seed, eager, threads: 1, ..Options::default() };
                let mut numbers = Aligned([0.0; 256]);
                let found = run_small(kernel, (grid, threads), &mut numbers.0, 256, &options).unwrap_err();
                assert!(found.starts_with(kernel) && found.contains(expected), "seed {seed}, eager {eager}: {found}");
            }
        }
    }
}

/// Numbers whose address is a multiple of 16, as copies need it.
#[repr(align(256))]
struct Aligned([f32; 256]);

#[test]
fn what_is_right_passes() {
    if !is_there() {
        return;
    }
    for (kernel, grid) in [("no_race_in_a_warp", 1), ("no_race_of_blocks_in_bytes", 8), ("deep_recursion", 1)] {
        for seed in 0..4 {
            let mut numbers = Aligned([0.0; 256]);
            let options = Options { seed, ..Options::default() };
            run_small(kernel, (grid, 32), &mut numbers.0, 256, &options).unwrap();
        }
    }
}

#[test]
fn bounds_are_checked_without_the_other_checks() {
    if !is_there() {
        return;
    }
    for (kernel, fails) in [("store_out_of_bounds", true), ("shared_out_of_bounds", true), ("race_in_a_warp", false)] {
        let options = Options { check: false, ..Options::default() };
        let result = run_small(kernel, (1, 32), &mut Aligned([0.0; 256]).0, 256, &options);
        assert_eq!(result.is_err(), fails, "{kernel}: {result:?}");
    }
}

#[test]
fn the_argument_must_have_the_size_of_the_kernels() {
    if !is_there() {
        return;
    }
    let library = Library::open(&emulator_folder().join("kernels/small.cu"), &[]).unwrap();
    let launch = Launch { kernel: "shuffles", grid: 1, threads: 32, shared_bytes: 0, problem: &[0; 24], regions: &[] };
    let found = library.launch(&launch, &Options::default()).unwrap_err();
    assert_eq!(found, "shuffles: its problem has 16 bytes, not 24");
}

#[test]
fn a_source_that_does_not_compile_is_an_error() {
    if !is_there() {
        return;
    }
    let source = emulator_folder().join("kernels/small.cu");
    let found = Library::open(&source, &["KERNEL=1".into()]).err().unwrap();
    assert!(found.contains("small.cu") && found.contains("error"), "{found}");
}
