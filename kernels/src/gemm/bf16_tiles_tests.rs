//! The products by tiles against naive loops over numbers rounded to bf16.

use half::bf16;

use super::*;
use crate::gemm::amx::Sums;
use crate::gemm::microkernel::tests::{check_guard, numbers};

#[cfg(all(target_arch = "x86_64", not(miri)))]
fn with_tiles(body: impl FnOnce(pulp::x86::V4, Bf16Tiles)) {
    let mut registers = None;
    let tiles = pulp::x86::V4::try_new().zip(Bf16Tiles::new::<pulp::x86::V4>(&mut registers));
    match tiles {
        Some((simd, tiles)) => body(simd, tiles),
        None => eprintln!("SKIPPED: there is no AMX"),
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
fn with_tiles(_: impl FnOnce(pulp::Scalar, Bf16Tiles)) {}

fn rounded(seed: u64, count: usize) -> (Vec<u16>, Vec<f64>) {
    let numbers = numbers::<f32>(seed, count).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    (numbers.iter().map(|x| x.to_bits()).collect(), numbers.iter().map(|x| x.to_f64()).collect())
}

/// \[rows\]\[columns\] as \[pairs\]\[columns\] of pairs of rows; zeros where there are no rows.
fn interleaved(bits: &[u16], columns: usize, pairs: usize) -> Vec<u32> {
    let bit = |row: usize, c: usize| u32::from(bits.get(row * columns + c).copied().unwrap_or(0));
    let pair = |i: usize| bit(i / columns * 2, i % columns) | bit(i / columns * 2 + 1, i % columns) << 16;
    (0..pairs * columns).map(pair).collect()
}

fn close(x: f32, expected: f64) -> bool {
    (f64::from(x) - expected).abs() <= 1e-4
}

/// Scratch of any content: NaN shows what should not be read.
fn scratch(size: usize) -> Vec<u32> {
    vec![u32::MAX; size]
}

#[test]
fn dot_products_are_naive_loops() {
    with_tiles(|simd, tiles| {
        for (count, skip, d) in [(1, 0, 2), (5, 3, 33), (16, 0, 64), (35, 2, 80), (64, 5, 128)] {
            let columns = BLOCK;
            let ((rows, x), (panel, y)) = (rounded(1, (skip + count) * d), rounded(2, d * columns));
            let mut room = scratch(copy_size(skip + count, d));
            let rows = tiles.copy(Matrix::new(&rows, skip + count, d, d), &mut room).skip(skip);
            let panel = interleaved(&panel, columns, padded_depth(d) / 2);
            let before = numbers::<f32>(3, count * 2 * BLOCK);
            let mut scores = vec![Sums([0.0; BLOCK * BLOCK]); (2 * count).div_ceil(BLOCK)];
            let scores: &mut [f32] = flat(&mut scores);
            let scores = &mut scores[..before.len()];
            scores.copy_from_slice(&before);
            let mut largest = [f32::splat(simd, 0.5); VECTORS];
            let target = MatrixMut::new(scores, count, BLOCK, 2 * BLOCK);
            tiles.dot_products::<_, true>(simd, 0.3, &panel, (rows, count), target, &mut largest);
            let largest: &[f32] = pulp::bytemuck::cast_slice(&largest);
            for w in 0..columns {
                let mut greatest = 0.5f64;
                for j in 0..count {
                    let sum: f64 = (0..d).map(|i| x[(skip + j) * d + i] * y[i * columns + w]).sum();
                    greatest = greatest.max(0.3 * sum);
                    assert!(close(scores[j * 2 * BLOCK + w], 0.3 * sum), "{count} x {d}, {j}, {w}");
                }
                assert!(close(largest[w], greatest));
            }
            check_guard(scores, &before, count, BLOCK, 2 * BLOCK);
        }
    });
}

#[test]
fn accumulate_is_a_naive_loop() {
    with_tiles(|simd, tiles| {
        // A sum over `count` of `all` keys, from key `skip` on.
        for (all, skip, count, dim) in
            [(1, 0, 1, 1), (7, 2, 5, 17), (32, 0, 32, 64), (96, 1, 95, 80), (70, 33, 37, 128)]
        {
            let ((rows, x), weights) = (rounded(1, all * dim), numbers::<f32>(2, count * BLOCK));
            let mut room = scratch(transposed_size(all, dim));
            let rows = tiles.transpose(simd, Matrix::new(&rows, all, dim, dim), &mut room).skip(skip);
            let before = numbers::<f32>(3, dim * BLOCK);
            let mut panel = vec![Sums([0.0; BLOCK * BLOCK]); dim.div_ceil(BLOCK)];
            let panel = flat(&mut panel);
            panel[..before.len()].copy_from_slice(&before);
            let mut narrowed = weights.clone();
            let narrowed = tiles.dot().narrow_down(MatrixMut::new(&mut narrowed, count, BLOCK, BLOCK));
            let factor = [f32::splat(simd, 0.7); VECTORS];
            tiles.accumulate(simd, panel, factor, rows, narrowed.as_ref());
            for (c, w) in (0..dim).flat_map(|c| (0..BLOCK).map(move |w| (c, w))) {
                let weight = |j: usize| bf16::from_f32(weights[j * BLOCK + w]).to_f64();
                let sum: f64 = (0..count).map(|j| x[(skip + j) * dim + c] * weight(j)).sum();
                let expected = 0.7 * f64::from(before[c * BLOCK + w]) + sum;
                assert!(close(panel[c * BLOCK + w], expected), "{count} x {dim}, {c}, {w}");
            }
            assert!(panel[dim * BLOCK..].iter().all(|&x| x == 0.0), "what lies behind the panel is not written");
        }
    });
}

#[test]
fn outer_products_are_naive_loops() {
    with_tiles(|simd, tiles| {
        for (count, columns, inner) in [(1, 16, 32), (16, 48, 64), (21, 80, 128), (32, 64, 32), (77, 128, 96)] {
            let (weights, (rows, x)) = (rounded(1, count * inner), rounded(2, inner * columns));
            let before = numbers::<f32>(3, count * columns);
            let mut out = vec![Sums([0.0; BLOCK * BLOCK]); (count * columns).div_ceil(BLOCK * BLOCK)];
            let out = &mut flat(&mut out)[..before.len()];
            out.copy_from_slice(&before);
            let pairs: Vec<u32> = weights.0.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect();
            let rows = interleaved(&rows, columns, inner / 2);
            let target = MatrixMut::new(out, count, columns, columns);
            let weights_of = Matrix::new(&pairs, count, inner / 2, inner / 2);
            tiles.outer_products(simd, 0.3, target, weights_of, Matrix::new(&rows, inner / 2, columns, columns));
            for (j, c) in (0..count).flat_map(|j| (0..columns).map(move |c| (j, c))) {
                let sum: f64 = (0..inner).map(|i| weights.1[j * inner + i] * x[i * columns + c]).sum();
                let expected = f64::from(before[j * columns + c]) + 0.3 * sum;
                assert!(close(out[j * columns + c], expected), "{count} x {columns}, {j}, {c}");
            }
        }
    });
}

/// Numbers that are aligned as the kernels' scratch is.
fn flat(sums: &mut [Sums]) -> &mut [f32] {
    // SAFETY: a `Sums` is so many f32 and nothing else.
    unsafe { std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast(), sums.len() * BLOCK * BLOCK) }
}
