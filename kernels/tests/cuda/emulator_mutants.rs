//! A kernel made as the attention kernels are passes with the same bits in every order, and each of its mutants is found.

use super::emulator::{Counters, Launch, Library, Options, Region, Replacement, emulator_folder, is_there};

use half::{bf16, f16};

const SIDE: usize = 64;
const TILES: usize = 3;
const BLOCKS: usize = 3;

/// An engine and a type: macros of `tiles.cu`.
const VARIANTS: [&[&str]; 6] = [
    &["KIND=1"],
    &["KIND=2", "B_TRANSPOSED"],
    &["KIND=1", "B_TRANSPOSED"],
    &["HOPPER", "KIND=1"],
    &["HOPPER", "KIND=2", "B_TRANSPOSED"],
    &["HOPPER", "KIND=1", "B_TRANSPOSED"],
];

fn defines(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.into()).collect()
}

/// Numbers that every type holds, and whose products and sums f32 holds.
fn numbers(seed: usize) -> Vec<f32> {
    (0..BLOCKS * TILES * SIDE * SIDE).map(|i| ((i * 7919 + seed * 31 + i / 64 * 13) % 17) as f32 / 4.0 - 2.0).collect()
}

/// The results of `sum_of_products`: c and the sums of its rows.
#[derive(PartialEq, Debug)]
struct Results {
    c: Vec<f32>,
    sums: Vec<f32>,
}

fn expected(transposed: bool) -> Results {
    let (a, b) = (numbers(1), numbers(2));
    let mut c = vec![0.0; BLOCKS * SIDE * SIDE];
    for (tile, (a, b)) in a.chunks(SIDE * SIDE).zip(b.chunks(SIDE * SIDE)).enumerate() {
        let c = &mut c[tile / TILES * SIDE * SIDE..];
        for row in 0..SIDE {
            for column in 0..SIDE {
                let of_b = |k| if transposed { b[k * SIDE + column] } else { b[column * SIDE + k] };
                c[row * SIDE + column] += (0..SIDE).map(|k| a[row * SIDE + k] * of_b(k)).sum::<f32>();
            }
        }
    }
    let sums = c.chunks(SIDE).map(|row| row.iter().sum()).collect();
    Results { c, sums }
}

fn run(library: &Library, defines: &[&str], options: &Options) -> Result<(Results, Counters), String> {
    // Copies need addresses that are multiples of 16.
    let halves = |numbers: Vec<f32>| -> Vec<u128> {
        let bits = |&x: &f32| match defines.contains(&"KIND=1") {
            true => bf16::from_f32(x).to_bits(),
            false => f16::from_f32(x).to_bits(),
        };
        let whole = |x: &[f32]| x.iter().rev().fold(0, |all, x| all << 16 | u128::from(bits(x)));
        numbers.chunks(8).map(whole).collect()
    };
    let (mut a, mut b) = (halves(numbers(1)), halves(numbers(2)));
    let mut results = Results { c: vec![f32::NAN; BLOCKS * SIDE * SIDE], sums: vec![f32::NAN; BLOCKS * SIDE] };
    let regions = [Region::of(&mut a), Region::of(&mut b), Region::of(&mut results.c), Region::of(&mut results.sums)];
    let words = [regions[0].start, regions[1].start, regions[2].start, regions[3].start, TILES as u64];
    let launch = Launch {
        kernel: "sum_of_products",
        grid: BLOCKS as u32,
        threads: 128,
        shared_bytes: 4 * 64 * 128 + 256,
        problem: &words.map(u64::to_le_bytes).concat(),
        regions: &regions,
    };
    let counters = library.launch(&launch, options)?;
    Ok((results, counters))
}

#[test]
fn every_order_gives_the_same_right_numbers() {
    if !is_there() {
        return;
    }
    for names in VARIANTS {
        let library = Library::open(&emulator_folder().join("kernels/tiles.cu"), &defines(names)).unwrap();
        let expected = expected(names.contains(&"B_TRANSPOSED"));
        for seed in 0..10 {
            for eager in [false, true] {
                let options = Options { seed, eager, ..Options::default() };
                let (results, counters) = run(&library, names, &options).unwrap();
                assert!(results == expected, "{names:?}, seed {seed}, eager {eager}");
                assert_eq!(counters.bank_conflicts, 0);
                assert_eq!(counters.products, (BLOCKS * TILES * 4 * 4 * 8) as u64);
                assert_eq!(counters.copies, (BLOCKS * TILES * 2 * SIDE * 8) as u64);
            }
        }
    }
}

const MMA: &[&str] = &["KIND=1"];
const WGMMA: &[&str] = &["HOPPER", "KIND=1"];
const TRANSPOSED: &[&str] = &["HOPPER", "KIND=1", "B_TRANSPOSED"];

/// Macros, a text, what it becomes, and a part of what is said. No text: the numbers are wrong. `CONFLICTS`: that many.
type Mutant = (&'static str, &'static [&'static str], &'static str, &'static str, &'static str);
const CONFLICTS: &str = "bank conflicts";
const MUTANTS: [Mutant; 24] = [
    ("lost barrier after copies", MMA, "__syncthreads();  // after the copies", "", ""),
    ("lost barrier after copies", WGMMA, "__syncthreads();  // after the copies", "", ""),
    ("lost barrier before copies", MMA, "__syncthreads();  // before the stage", "//", "a race"),
    ("lost barrier before copies", WGMMA, "__syncthreads();  // before the stage", "//", ""),
    ("lost barrier of sums", MMA, "__syncthreads();  // before the sums are read", "", ""),
    ("barrier of a warp", MMA, "__syncthreads();  // before the sums are read", "__syncwarp();", ""),
    ("lost fence", WGMMA, "emulated::fence_async();", "", "without a fence_async"),
    (
        "fence before the wait",
        WGMMA,
        "emulated::wait_for_copies(1);\n        emulated::fence_async();",
        "emulated::fence_async();\n        emulated::wait_for_copies(1);",
        "without a fence_async",
    ),
    ("lost wait for copies", MMA, "emulated::wait_for_copies(1);", "", "before its copy was waited for"),
    ("lost wait for copies", WGMMA, "emulated::wait_for_copies(1);", "", "before its copy was waited for"),
    ("short wait for copies", MMA, "emulated::wait_for_copies(1);", "emulated::wait_for_copies(2);", "waited for"),
    ("lost wait for wgmma", WGMMA, "emulated::wgmma_wait<KIND>(0);", "", "while a wgmma reads it"),
    ("short wait for wgmma", WGMMA, "emulated::wgmma_wait<KIND>(0);", "emulated::wgmma_wait<KIND>(1);", ""),
    ("lost begin of wgmma", WGMMA, "emulated::wgmma_begin();", "", "no wgmma_begin"),
    (
        "register of wgmma",
        WGMMA,
        "emulated::wgmma_wait<KIND>(0);",
        "c[3] = 0; emulated::wgmma_wait<KIND>(0);",
        "wrote to a register",
    ),
    (
        "wrong offset of k",
        WGMMA,
        "descriptor(a_tile + k * 32), descriptor(b_tile + k * 32)",
        "descriptor(a_tile + k * 32), descriptor(b_tile + k * 16)",
        "",
    ),
    ("wrong offset of k", TRANSPOSED, "k * 16 * ROW_BYTES", "k * 8 * ROW_BYTES", ""),
    ("wrong offset of a row", MMA, "row + lane % 16, 2 * k", "row + lane % 8, 2 * k", ""),
    ("wrong swizzle", WGMMA, "(chunk ^ (row % 8))", "(chunk ^ (row % 4))", ""),
    ("no swizzle", MMA, "(chunk ^ (row % 8))", "(chunk)", CONFLICTS),
    ("a tile too many", MMA, "if (tile + 1 < p.tiles) {", "if (tile + 1 <= p.tiles) {", ""),
    (
        "diverged shuffle",
        MMA,
        "sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);",
        "if (lane < 30) sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);",
        "lanes",
    ),
    ("diverged barrier", MMA, "__syncthreads();  // before the sums", "if (row < 32) __syncthreads();  //", ""),
    ("one place for all blocks", MMA, "p.c + blockIdx.x * SIDE * SIDE", "p.c", "a race of blocks"),
];

/// What is wrong with a mutant, if it is found.
fn found(library: &Library, names: &[&str], options: &Options) -> Option<String> {
    match run(library, names, options) {
        Err(message) => Some(message),
        Ok((results, _)) if results != expected(names.contains(&"B_TRANSPOSED")) => Some("wrong numbers".into()),
        Ok((_, counters)) if counters.bank_conflicts > 0 => Some(CONFLICTS.into()),
        Ok(_) => None,
    }
}

#[test]
fn every_mutant_is_found() {
    if !is_there() {
        return;
    }
    let source = emulator_folder().join("kernels/tiles.cu");
    for (name, names, from, to, expected) in MUTANTS {
        let replacement = Replacement { file: "tiles.cu", from, to, nth: 1 };
        let library = Library::open_mutant(&source, &[replacement], &defines(names)).unwrap();
        for (seed, eager) in [(0, false), (1, true), (2, false), (3, true)] {
            let options = Options { seed, eager, threads: 1, ..Options::default() };
            let found = found(&library, names, &options);
            let is_found = found.as_ref().is_some_and(|found| found.contains(expected));
            assert!(is_found, "{name} {names:?}, seed {seed}, eager {eager}: {found:?}");
        }
    }
}

#[test]
fn a_text_that_is_not_there_makes_no_mutant() {
    if !is_there() {
        return;
    }
    let source = emulator_folder().join("kernels/tiles.cu");
    for (from, nth) in [("no such text", 1), ("__syncthreads();", 99), ("no such text", 0)] {
        let replacement = Replacement { file: "tiles.cu", from, to: "", nth };
        let error = Library::open_mutant(&source, &[replacement], &defines(MMA)).err().unwrap();
        assert!(error.contains("isn't there"), "{error}");
    }
}
