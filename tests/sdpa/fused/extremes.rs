//! Large, small and special numbers: finite inputs give finite results, and a special number (NaN or infinity) affects
//! only the queries that may attend to it.

use std::collections::HashSet;

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, numbers, randn};

use super::masks::MaskKind;
use super::problem::{Bias, Case, Inputs, Named, Sizes, results};

/// Several panels of queries and blocks of keys, the last ones partial.
const SIZES: Sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 150, kv_len: 210, dim: 12, value_dim: 10 };
const SPECIAL: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
const BACKENDS: [Backend; 2] = [Backend::Fused, Backend::Reference];
const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Scores between -1e4 and 1e4 for one query. With one feature and a query of 1, the scores are the keys themselves.
fn check_scores_of_ten_thousand(dtype: DType, greatest: usize, second: usize) -> Result<()> {
    let keys = (0..SIZES.kv_len).map(|j| match j {
        _ if j == greatest => 1e4,
        _ if j == second => 1e4 - 1.0,
        _ if j % 2 == 0 => -1e4,
        _ => 0.0,
    });
    let var = |x: Tensor| Var::from_tensor(&x.reshape((1, 1, (), 1))?.to_dtype(dtype)?);
    let vars = [
        var(Tensor::new(&[1f64], &Device::Cpu)?)?,
        var(Tensor::from_iter(keys, &Device::Cpu)?)?,
        var(Tensor::arange(0f64, SIZES.kv_len as f64, &Device::Cpu)?)?,
    ];
    let run = |vars: &[Var; 3], backend| {
        let options = AttentionOptions { backend, return_logsumexp: true, ..Default::default() };
        let output = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?;
        results(output, &["query", "key", "value"].into_iter().zip(vars).collect::<Vec<_>>())
    };
    let fused = run(&vars, Backend::Fused)?;
    // softmax([0, -1]) = [0.7310586, 0.2689414]
    let expected = 0.731_058_578_6 * greatest as f64 + 0.268_941_421_4 * second as f64;
    let context = numbers(&fused[0].1)?[0];
    assert!((context / expected - 1.0).abs() < 1e-6, "{context}, expected {expected}, {dtype:?}");
    let exact = run(&vars.map(|x| Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap()), Backend::Reference)?;
    for ((name, fused), (_, exact)) in fused.iter().zip(&exact) {
        // Near 1e4, f32 numbers are 1e-3 apart, and the rounding of the log-sum-exp affects every weight.
        assert_close(&fused.to_dtype(DType::F64)?, exact, 1e-3, &format!("{name}, {dtype:?}"));
    }
    Ok(())
}

#[test]
fn scores_of_ten_thousand_do_not_overflow() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        // Both keys in one block of keys, then in two blocks, in either order.
        for (greatest, second) in [(3, 5), (5, 3), (7, 150), (150, 7)] {
            check_scores_of_ten_thousand(dtype, greatest, second)?;
        }
    }
    Ok(())
}

/// Factors of query, key and value, and dtypes that can hold the products.
fn sizes_of_numbers() -> Vec<(DType, [f64; 3])> {
    let mut all = Vec::new();
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        for size in [1e30, 1e-30] {
            all.extend([[size; 3], [size, 1.0, 1.0], [1.0, size, 1.0], [1.0, 1.0, size]].map(|sizes| (dtype, sizes)));
        }
        all.extend([(dtype, [1e30, 1e-30, 1.0]), (dtype, [1e4, 1.0, 1.0])]);
    }
    all.extend([[200.0; 3], [1e-7; 3], [1e4, 1e4, 1.0], [1.0, 1.0, 1e4]].map(|sizes| (DType::F16, sizes)));
    all
}

fn scaled(inputs: &Inputs, factors: [f64; 3]) -> Result<Inputs> {
    let mut scaled = inputs.to_dtype(DType::F64)?;
    for (x, factor) in scaled.stored.iter_mut().zip(factors) {
        *x = Var::from_tensor(&(x.as_tensor() * factor)?)?;
    }
    scaled.to_dtype(inputs.stored[0].dtype())
}

fn assert_no_nan(results: &[Named], what: &str) -> Result<()> {
    for (name, x) in results {
        let nan = numbers(x)?.iter().filter(|x| x.is_nan()).count();
        assert_eq!(nan, 0, "NaN in {name}: {what}");
        let finite = *name != "context" || numbers(x)?.iter().all(|x| x.is_finite());
        assert!(finite, "{name} isn't finite: {what}");
    }
    Ok(())
}

#[test]
fn finite_input_never_gives_nan() -> Result<()> {
    let masked = Case { mask: MaskKind::Causal.and(MaskKind::KeyLengths), ..Case::plain(SIZES) };
    let full = Case { logsumexp: false, ..Case::plain(SIZES) };
    let capped = Case { softcap: Some(20.0), dropout_p: 0.2, logsumexp: false, ..masked.clone() };
    let biased = Case { bias: Some(Bias::Trained("hqk")), sinks: true, ..masked.clone() };
    for (dtype, factors) in sizes_of_numbers() {
        for case in [&full, &masked, &capped, &biased] {
            let what = format!("{dtype:?} times {factors:?}, {case:?}");
            let inputs = scaled(&case.inputs(dtype)?, factors)?;
            match case.run(&inputs, Backend::Fused) {
                Ok(results) => assert_no_nan(&results, &what)?,
                // If scores overflow, only the reference can serve the call, and `Auto` uses it.
                Err(error) => {
                    assert!(error.to_string().contains("inputs so large"), "{error}: {what}");
                    assert!(factors[0] * factors[1] > 1e35 && dtype != DType::F64, "refused without reason: {what}");
                    assert_no_nan(&case.run(&inputs, Backend::Auto)?, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// A row of one input, (sequence, head, token), that is filled with a special number.
#[derive(Clone, Copy, Debug)]
struct SpecialRow {
    input: usize,
    row: (usize, usize, usize),
}

impl SpecialRow {
    fn inputs(&self, inputs: &Inputs, special: f64) -> Result<Inputs> {
        let changed = inputs.to_dtype(inputs.stored[0].dtype())?;
        let (b, h, i) = self.row;
        let var = &changed.stored[self.input];
        let dim = var.dim(3)?;
        let row = (Tensor::ones((1, 1, 1, dim), DType::F32, &Device::Cpu)? * special)?.to_dtype(var.dtype())?;
        var.set(&var.as_detached_tensor().slice_assign(&[b..b + 1, h..h + 1, i..i + 1, 0..dim], &row)?)?;
        Ok(changed)
    }

    /// The queries that the special number reaches, and the keys to which such a query may attend.
    fn reach(&self, allowed: impl Fn(usize, usize, usize, usize) -> bool) -> [HashSet<(usize, usize, usize)>; 2] {
        let (b, head, token) = self.row;
        let group = SIZES.heads / SIZES.kv_heads;
        let is_reached = |h: usize, i: usize| match self.input {
            0 => (h, i) == (head, token),
            _ => h / group == head && allowed(b, h, i, token),
        };
        let all_queries = (0..SIZES.heads).flat_map(|h| (0..SIZES.q_len).map(move |i| (h, i)));
        let queries = all_queries.filter(|&(h, i)| is_reached(h, i)).collect::<Vec<_>>();
        let visible_keys = |&(h, i): &(usize, usize)| {
            let keys = (0..SIZES.kv_len).filter(|&j| allowed(b, h, i, j));
            keys.map(|j| (b, h / group, j)).collect::<Vec<_>>()
        };
        let keys = queries.iter().flat_map(visible_keys).collect();
        [queries.into_iter().map(|(h, i)| (b, h, i)).collect(), keys]
    }
}

/// Panics unless both have the same bits, except in the rows in `reached`.
fn assert_untouched(
    name: &str,
    a: &Tensor,
    b: &Tensor,
    reached: &HashSet<(usize, usize, usize)>,
    what: &str,
) -> Result<()> {
    let (_, heads, len) = (a.dim(0)?, a.dim(1)?, a.dim(2)?);
    let (a, b) = (numbers(a)?, numbers(b)?);
    let dim = a.len() / (SIZES.batch * heads * len);
    for (row, (a, b)) in a.chunks(dim).zip(b.chunks(dim)).enumerate() {
        let at = (row / len / heads, row / len % heads, row % len);
        let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same || reached.contains(&at), "{name} of row {at:?}: {a:?}, without it {b:?}: {what}");
    }
    Ok(())
}

/// Which results a special number must not change.
#[derive(Clone, Copy, PartialEq)]
enum Untouched {
    /// All results of other sequences and heads; for a special query, also those of other queries.
    OtherHeads,
    /// Also context and log-sum-exp of the queries that may not attend to it.
    Unseen,
    /// Also the gradients that it reaches neither directly nor through other rows.
    UnseenGradients,
}

/// Fills some rows of one input with special numbers, and checks that the results that must not change keep every bit.
fn check_special(input: usize, case: &Case, dtype: DType, backend: Backend, untouched: Untouched) -> Result<()> {
    let inputs = case.inputs(dtype)?;
    let whole = case.run(&inputs, backend)?;
    let Sizes { batch, heads: num_heads, q_len, kv_len, .. } = SIZES;
    let mask = case.options(&inputs, backend)?.attn_mask;
    let shape = (batch, num_heads, q_len, kv_len);
    let table = mask.to_tensor(shape, &Device::Cpu)?.broadcast_as((batch, num_heads, q_len, kv_len))?;
    let table = numbers(&table)?;
    let allowed = |b: usize, h: usize, i: usize, j: usize| table[((b * num_heads + h) * q_len + i) * kv_len + j] != 0.0;
    for (special, row) in SPECIAL.into_iter().zip([(0, 1, 0), (1, 0, 68), (1, 1, 149)]) {
        let special_row = SpecialRow { input, row };
        let what = format!("{special} in {special_row:?}, {dtype:?}, {backend:?}, {:?}", case.mask);
        let results = case.run(&special_row.inputs(&inputs, special)?, backend)?;
        let [reached_queries, _] = special_row.reach(allowed);
        let [queries, keys] = match untouched {
            Untouched::OtherHeads => special_row.reach(|_, _, _, _| true),
            _ => special_row.reach(allowed),
        };
        let no_rows = HashSet::new();
        for ((name, result), (_, whole)) in results.iter().zip(&whole) {
            let reached = match *name {
                "query" | "key" | "value" if untouched == Untouched::Unseen => continue,
                // Neither the scores nor the gradient of the values depend on the values.
                "logsumexp" | "value" if input == 2 => &no_rows,
                "context" | "logsumexp" | "query" => &queries,
                _ => &keys,
            };
            assert_untouched(name, result, whole, reached, &what)?;
        }
        for row in reached_queries.iter().filter(|_| special.is_nan()) {
            let context = results[0].1.get(row.0)?.get(row.1)?.get(row.2)?;
            assert!(numbers(&context)?.iter().all(|x| x.is_nan()), "NaN is passed on to {row:?}: {what}");
        }
    }
    Ok(())
}

fn check_masks(inputs: &[usize], masks: &[MaskKind], untouched: Untouched) -> Result<()> {
    for dtype in DTYPES {
        for mask in masks {
            // A log-sum-exp widens half types before the computation. One of them is checked with it, the other
            // without.
            let case = Case { mask: mask.clone(), logsumexp: dtype != DType::F16, ..Case::plain(SIZES) };
            // The reference widens half types, so that it is checked in the others only.
            let backends = if dtype.size_in_bytes() == 2 { &BACKENDS[..1] } else { &BACKENDS };
            for &backend in backends {
                inputs.iter().try_for_each(|&input| check_special(input, &case, dtype, backend, untouched))?;
            }
        }
    }
    Ok(())
}

/// Masks that cut through tiles of scores.
fn cutting() -> [MaskKind; 4] {
    [MaskKind::Causal, MaskKind::Sliding(5), MaskKind::Allowed("qk"), MaskKind::DocumentIds]
}

#[test]
fn special_number_stays_in_its_head() -> Result<()> {
    check_masks(&[0, 1, 2], &[MaskKind::Full, MaskKind::Causal], Untouched::OtherHeads)
}

#[test]
fn special_query_touches_no_other() -> Result<()> {
    check_masks(&[0], &cutting(), Untouched::Unseen)
}

#[test]
fn special_key_touches_no_query_that_may_not_see_it() -> Result<()> {
    check_masks(&[1], &cutting(), Untouched::Unseen)
}

/// Padding is a key to which no query may attend.
#[test]
fn padding_may_hold_anything() -> Result<()> {
    let masks = [MaskKind::KeyLengths, MaskKind::Padding, MaskKind::Prefix(60)];
    check_masks(&[1, 2], &masks, Untouched::UnseenGradients)
}

#[test]
fn special_value_touches_no_query_that_may_not_see_it() -> Result<()> {
    check_masks(&[2], &cutting(), Untouched::Unseen)
}

#[test]
fn special_number_touches_no_gradient_of_those_that_may_not_see_it() -> Result<()> {
    check_masks(&[0, 1, 2], &cutting(), Untouched::UnseenGradients)
}

/// Hidden keys in the middle are whole blocks for one pass, but part of a block for another pass or for the decoding
/// kernel.
#[test]
fn keys_that_nobody_sees_may_hold_anything() -> Result<()> {
    let (batch, heads, kv_len, dim) = (1, 2, 400, 16);
    let hidden = |key: &u32| (100..150).contains(key) || (190..200).contains(key);
    let visible = (0..kv_len as u32).map(|key| u8::from(!hidden(&key)));
    let attn_mask = Mask::from_tensor(&Tensor::from_iter(visible, &Device::Cpu)?.unsqueeze(0)?)?;
    for (q_len, dtype) in [1, 8, 9, 70].into_iter().flat_map(|q_len| DTYPES.map(|dtype| (q_len, dtype))) {
        let random = |len, seed| randn(seed, (batch, heads, len, dim), dtype);
        let inputs = [random(q_len, 0)?, random(kv_len, 1)?, random(kv_len, 2)?];
        let run = |special: Option<f64>, backend| {
            let attn_mask = attn_mask.clone();
            let options = AttentionOptions { attn_mask, softcap: Some(20.0), backend, ..Default::default() };
            let with_special = |x: &Tensor| match special {
                Some(special) => {
                    let row = (Tensor::ones((batch, heads, 50, dim), DType::F64, &Device::Cpu)? * special)?;
                    x.slice_assign(&[0..batch, 0..heads, 100..150, 0..dim], &row.to_dtype(dtype)?)
                }
                None => Ok(x.clone()),
            };
            let [query, key, value] = [inputs[0].clone(), with_special(&inputs[1])?, with_special(&inputs[2])?];
            let vars = [Var::from_tensor(&query)?, Var::from_tensor(&key)?, Var::from_tensor(&value)?];
            let output = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?;
            results(output, &["query", "key", "value"].into_iter().zip(&vars).collect::<Vec<_>>())
        };
        for backend in BACKENDS {
            let whole = run(None, backend)?;
            for special in SPECIAL {
                for ((name, result), (_, whole)) in run(Some(special), backend)?.iter().zip(&whole) {
                    let what = format!("{name}, {special} in hidden keys, {dtype:?}, {q_len} queries, {backend:?}");
                    if dtype == DType::BF16 && backend == Backend::Fused {
                        // If inputs aren't finite, weights and gradients of scores stay in f32, which rounds differently.
                        assert_close(&result.to_dtype(DType::F64)?, &whole.to_dtype(DType::F64)?, 2e-2, &what);
                    } else {
                        assert_same_bits(result, whole, &what);
                    }
                }
            }
        }
    }
    Ok(())
}
