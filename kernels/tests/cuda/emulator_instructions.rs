//! The emulator's instructions and conversions give the right numbers.

use std::sync::Arc;

use half::{bf16, f16};

use super::emulator::{Counters, Launch, Library, Options, Region, emulator_folder, is_there};

/// Runs a kernel of `small.cu` on `numbers`; `count` is what it is told of their number.
pub fn run_small(
    kernel: &str,
    (grid, threads): (u32, u32),
    numbers: &mut [f32],
    count: usize,
    options: &Options,
) -> Result<Counters, String> {
    let library = small();
    let regions = [Region::of(numbers)];
    let words = [regions[0].start, count as u64];
    let problem = words.map(u64::to_le_bytes).concat();
    library.launch(&Launch { kernel, grid, threads, shared_bytes: 1024, problem: &problem, regions: &regions }, options)
}

fn small() -> Arc<Library> {
    Library::open(&emulator_folder().join("kernels/small.cu"), &[]).unwrap()
}

fn options(seed: u64) -> Options {
    Options { seed, ..Options::default() }
}

/// The nearest number of `bits` bits that isn't farther from zero.
fn truncated(x: f64, bits: u32) -> f64 {
    f64::from_bits(x.to_bits() & !((1u64 << (53 - bits)) - 1))
}

#[test]
fn tf32_ignores_the_last_bits_and_rounds_toward_zero() {
    if !is_there() {
        return;
    }
    let mut numbers: Vec<f32> = (0..320).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1.2345678).collect();
    let before = numbers.clone();
    run_small("tf32", (1, 32), &mut numbers, 0, &options(1)).unwrap();
    let (a, rest) = before.split_at(128);
    let (b, c) = rest.split_at(64);
    let operand = |x: f32| truncated(f64::from(x), 11);
    for (i, &got) in numbers[192..].iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let product: f64 = (0..8).map(|k| operand(a[row * 8 + k]) * operand(b[k * 8 + column])).sum();
        assert_eq!(f64::from(got), truncated(product + f64::from(c[i]), 24), "row {row}, column {column}");
    }
    assert_eq!(numbers[..192], before[..192]);
}

#[test]
fn shuffles_bring_the_numbers_of_other_lanes() {
    if !is_there() {
        return;
    }
    for seed in 0..4 {
        let mut numbers: Vec<f32> = (0..32).map(|lane| lane as f32).collect();
        run_small("shuffles", (1, 32), &mut numbers, 32, &options(seed)).unwrap();
        for (lane, &got) in numbers.iter().enumerate() {
            let up = lane.saturating_sub(1);
            let expected = (lane ^ 3) + 100 * ((lane + 5) % 32) + 10_000 * up + 1_000_000 * 11;
            assert_eq!(got, expected as f32, "lane {lane}");
        }
    }
}

#[test]
fn a_barrier_can_say_whether_any_thread_has_something() {
    if !is_there() {
        return;
    }
    for (seed, at) in [(0, 0), (1, 63), (2, 31), (3, 64)] {
        let mut numbers = [0.0; 65];
        numbers[at] = 1.0;
        run_small("any_of_a_block", (1, 64), &mut numbers, 64, &options(seed)).unwrap();
        assert_eq!(numbers[..64], [f32::from(at < 64); 64], "seed {seed}");
    }
}

#[test]
fn a_seed_draws_the_order_of_warps() {
    if !is_there() {
        return;
    }
    let order = |seed| {
        let mut numbers = [f32::NAN; 4];
        run_small("order", (1, 128), &mut numbers, 4, &options(seed)).unwrap();
        numbers
    };
    assert_eq!(order(0), [0.0, 1.0, 2.0, 3.0]);
    assert!((1..10).any(|seed| order(seed) != order(0)));
    assert_eq!(order(3), order(3));
}

#[test]
fn conversions_round_to_the_nearest() {
    if !is_there() {
        return;
    }
    // Every sign and exponent, with fractions at and beside the ties of both types.
    let fractions =
        [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x2a_aaaa, 0x7f_ffff];
    let every = (0..512u32).flat_map(|high| fractions.map(|low| f32::from_bits(high << 23 | low)));
    let mut numbers: Vec<f32> = every.collect();
    let count = numbers.len();
    numbers.resize(3 * count, 0.0);
    run_small("conversions", (1, 32), &mut numbers, count, &options(0)).unwrap();
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    for i in 0..count {
        let x = numbers[i];
        assert!(same(numbers[count + i], bf16::from_f32(x).to_f32()), "bf16 of {x:e}: {:e}", numbers[count + i]);
        assert!(same(numbers[2 * count + i], f16::from_f32(x).to_f32()), "f16 of {x:e}: {:e}", numbers[2 * count + i]);
    }
}

#[test]
fn two_threads_may_write_the_halves_of_a_word() {
    if !is_there() {
        return;
    }
    for seed in 0..4 {
        let mut numbers = [0.0; 64];
        run_small("halves_of_a_word", (1, 64), &mut numbers, 64, &options(seed)).unwrap();
        assert!(numbers.iter().enumerate().all(|(i, &x)| x == (63 - i) as f32), "{numbers:?}");
    }
}
