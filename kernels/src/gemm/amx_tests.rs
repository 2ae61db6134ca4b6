//! Products of tiles against naive loops.

use half::bf16;

use super::*;
use crate::gemm::microkernel::tests::{check_guard, numbers};
use crate::matrix::{Matrix, MatrixMut};

#[test]
fn products_and_their_sums_are_naive_loops() {
    let Some(amx) = Amx::new() else { return eprintln!("SKIPPED: there is no AMX") };
    let registers = amx.tile_registers();
    for (rows, columns) in [(TILE, TILE), (TILE, BLOCK), (BLOCK, TILE), (BLOCK, BLOCK)] {
        for depth in [DEPTH, 3 * DEPTH] {
            let ([left_stride, right_stride], stride) = ([depth + 6, columns + 4], columns + 3);
            let bits = |seed: u64, count: usize| -> Vec<u16> {
                numbers::<f32>(seed, count).into_iter().map(|x| bf16::from_f32(x).to_bits()).collect()
            };
            let (left, right) = (bits(1, rows * left_stride), bits(2, 2 * depth / 2 * right_stride));
            let pairs: Vec<u32> = right.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect();
            let before = numbers::<f32>(3, rows * stride);
            let mut sums = before.clone();
            let operands =
                (Matrix::new(&left, rows, depth, left_stride), Matrix::new(&pairs, depth / 2, columns, right_stride));
            registers.multiply(
                operands.0,
                operands.1,
                MatrixMut::new(&mut sums, rows, columns, stride),
                std::ptr::null(),
            );
            registers.multiply_add(
                operands.0,
                operands.1,
                MatrixMut::new(&mut sums, rows, columns, stride),
                std::ptr::null(),
            );
            let value = |bits: u16| bf16::from_bits(bits).to_f64();
            for (r, c) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
                let right = |k: usize| value(right[2 * (k / 2 * right_stride + c) + k % 2]);
                let product: f64 = (0..depth).map(|k| value(left[r * left_stride + k]) * right(k)).sum();
                let expected = 2.0 * product;
                assert!((f64::from(sums[r * stride + c]) - expected).abs() <= 1e-4, "{rows} x {columns}, {r}, {c}");
            }
            check_guard(&sums, &before, rows, columns, stride);
        }
    }
}

#[test]
fn registers_stay_configured_while_others_come_and_go() {
    let Some(amx) = Amx::new() else { return eprintln!("SKIPPED: there is no AMX") };
    let registers = amx.tile_registers();
    drop(amx.tile_registers());
    let (left, right) = ([bf16::ONE.to_bits(); TILE * DEPTH], [0x3F80_3F80; PAIRS * TILE]);
    let mut sums = [0.0; TILE * TILE];
    let operands = (Matrix::new(&left, TILE, DEPTH, DEPTH), Matrix::new(&right, PAIRS, TILE, TILE));
    registers.multiply(operands.0, operands.1, MatrixMut::new(&mut sums, TILE, TILE, TILE), std::ptr::null());
    assert_eq!(sums, [DEPTH as f32; TILE * TILE]);
}
