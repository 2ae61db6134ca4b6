//! What the mask hides may hold anything, on both backends and in every gradient.

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{Random, assert_same_bits, gradients, numbers, randn};

use super::masks::MaskKind;
use super::problem::{Bias, Case, Inputs, Named, Sizes};

const SPECIAL: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
const BACKENDS: [Backend; 2] = [Backend::Reference, Backend::Fused];

/// Grouped-query attention with awkward sizes.
const SIZES: Sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 21, kv_len: 37, dim: 6, value_dim: 5 };

/// Masks that cut through the scores, and masks with keys that nobody sees.
fn masks() -> Vec<MaskKind> {
    use MaskKind::*;
    vec![
        Causal,
        Window(Some(4), Some(2)),
        Sliding(5),
        Documents.and(Causal),
        DocumentIds,
        Allowed("bhqk"),
        Blocked("qk"),
        KeyLengths,
        Padding,
        Prefix(9),
        Prefix(0),
        Causal.and(KeyLengths),
        KeyLengths.and(Allowed("k")).with_extra_keys(2),
    ]
}

/// Every option in turn, then all together.
fn cases(mask: &MaskKind) -> Vec<Case> {
    let plain = Case { mask: mask.clone(), ..Case::plain(SIZES) };
    let bias = Some(Bias::Trained("hqk"));
    vec![
        plain.clone(),
        Case { softcap: Some(3.0), scale: Some(0.5), ..plain.clone() },
        Case { bias, alibi: true, ..plain.clone() },
        Case { sinks: true, ..plain.clone() },
        Case { softcap: Some(3.0), bias, alibi: true, sinks: true, ..plain },
    ]
}

/// The mask of a case for every pair, in row-major order over (batch, num_heads, q_len, kv_len).
fn table(case: &Case, inputs: &Inputs) -> Result<Vec<bool>> {
    let Sizes { batch, heads, q_len, kv_len, .. } = SIZES;
    let mask =
        case.options(inputs, Backend::Reference)?.attn_mask.to_tensor((batch, heads, q_len, kv_len), &Device::Cpu)?;
    Ok(numbers(&mask.broadcast_as((batch, heads, q_len, kv_len))?)?.into_iter().map(|allowed| allowed != 0.0).collect())
}

/// For each row (sequence, head, token) of query, key and value: whether it takes part in a visible pair.
fn seen_rows(table: &[bool]) -> [Vec<bool>; 3] {
    let Sizes { batch, heads, kv_heads, q_len, kv_len, .. } = SIZES;
    let (mut queries, mut keys) = (vec![false; batch * heads * q_len], vec![false; batch * kv_heads * kv_len]);
    for (pair, _) in table.iter().enumerate().filter(|(_, allowed)| **allowed) {
        let (query, key) = (pair / kv_len, pair % kv_len);
        let (sequence, head) = (query / q_len / heads, query / q_len % heads);
        queries[query] = true;
        keys[(sequence * kv_heads + head / (heads / kv_heads)) * kv_len + key] = true;
    }
    [queries, keys.clone(), keys]
}

/// The inputs with `number(row)` in one entry of each row (input, index) for which it is some number.
fn with_numbers(inputs: &Inputs, number: impl Fn(usize, usize) -> Option<f64>) -> Result<Inputs> {
    let changed = inputs.to_dtype(inputs.stored[0].dtype())?;
    for (input, var) in changed.stored.iter().enumerate() {
        let (mut entries, dim) = (numbers(var)?, var.dim(3)?);
        for (row, entries) in entries.chunks_mut(dim).enumerate() {
            if let Some(number) = number(input, row) {
                entries[row % dim] = number;
            }
        }
        var.set(&Tensor::from_vec(entries, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?)?;
    }
    Ok(changed)
}

/// How a loss uses the results.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// Σ results · c: the gradient of every result is finite.
    Linear,
    /// Σ results²: the gradient of a result that is NaN is NaN.
    Squares,
}

/// Context, log-sum-exp, weights, and the gradients of a loss over all three.
fn run(case: &Case, inputs: &Inputs, backend: Backend, loss: Loss) -> Result<Vec<Named>> {
    let options = AttentionOptions { return_weights: true, ..case.options(inputs, backend)? };
    run_with(&options, inputs, loss)
}

fn run_with(options: &AttentionOptions, inputs: &Inputs, loss: Loss) -> Result<Vec<Named>> {
    let [q, k, v] = &inputs.stored;
    let output = scaled_dot_product_attention(q, k, v, options)?;
    let logsumexp = output.logsumexp.expect("log-sum-exp");
    // The sum leaves out the log-sum-exp of queries without keys, which is minus infinity.
    let empty = logsumexp.eq(f64::NEG_INFINITY)?;
    let finite = empty.where_cond(&logsumexp.zeros_like()?, &logsumexp)?;
    let all = [("context", output.context), ("weights", output.weights.expect("weights")), ("logsumexp", finite)];
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for (seed, (_, x)) in all.iter().enumerate() {
        let factor = match loss {
            Loss::Linear => randn(seed as u64, x.shape(), x.dtype())?,
            Loss::Squares => x.clone(),
        };
        sum = (sum + (x * factor)?.sum_all()?.to_dtype(DType::F64)?)?;
    }
    let mut named = vec![("query", q), ("key", k), ("value", v)];
    named.extend(
        inputs.bias.as_ref().filter(|_| options.attn_bias.as_ref().is_some_and(Tensor::track_op)).map(|x| ("bias", x)),
    );
    named.extend(inputs.sinks.as_ref().map(|x| ("sinks", x)));
    let vars = named.iter().map(|(_, var)| *var).collect::<Vec<_>>();
    let [context, weights, _] = all;
    let mut results = vec![context, weights, ("logsumexp", logsumexp)];
    results.iter_mut().for_each(|(_, x)| *x = x.detach());
    results.extend(named.iter().map(|(name, _)| *name).zip(gradients(&sum, &vars)?));
    Ok(results)
}

/// Panics unless both are finite in the same places, and there close, and NaN in the same places. A gradient may be NaN
/// where the other is infinite, since that depends on the order of a sum.
fn assert_agree(a: &[Named], b: &[Named], tolerance: f64, what: &str) -> Result<()> {
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let (a, b) = (numbers(a)?, numbers(b)?);
        let largest = b.iter().filter(|b| b.is_finite()).fold(0.1, |largest: f64, b| largest.max(b.abs()));
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let same_kind = a.is_nan() == b.is_nan() || !matches!(*name, "context" | "weights" | "logsumexp");
            let agree =
                a == b || (a - b).abs() < tolerance * largest || (same_kind && !a.is_finite() && !b.is_finite());
            assert!(agree, "{name}, entry {i}: {a} and {b}: {what}");
        }
    }
    Ok(())
}

/// Special numbers in a few rows of one input. Some queries see them and some don't.
#[test]
fn both_backends_give_special_numbers_to_the_same_results() -> Result<()> {
    let mut random = Random::new(1);
    for (mask, dtype) in masks().iter().flat_map(|mask| [DType::F64, DType::F32].map(|dtype| (mask, dtype))) {
        for case in cases(mask) {
            let inputs = case.inputs(dtype)?;
            for (special, loss) in SPECIAL.into_iter().flat_map(|x| [(x, Loss::Linear), (x, Loss::Squares)]) {
                let (input, start) = (random.below(3), random.below(40));
                let inputs = with_numbers(&inputs, |i, row| (i == input && row % 40 == start).then_some(special))?;
                let [reference, fused] = BACKENDS.map(|backend| run(&case, &inputs, backend, loss));
                let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-4 };
                let what = format!("{special} in input {input}, rows {start} + 40 n, {loss:?}, {dtype:?}, {case:?}");
                assert_agree(&fused?, &reference?, tolerance, &what)?;
            }
        }
    }
    Ok(())
}

/// With dropout too, whose dropped weights are zero although their pairs are visible.
#[test]
fn rows_that_nobody_sees_may_hold_anything() -> Result<()> {
    for mask in masks() {
        for case in cases(&mask).into_iter().flat_map(|case| [case.clone(), Case { dropout_p: 0.3, ..case }]) {
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                let inputs = case.inputs(dtype)?;
                let seen = seen_rows(&table(&case, &inputs)?);
                for backend in BACKENDS {
                    let [zero, special] = [|_| 0.0, |row: usize| SPECIAL[row % 3]].map(|number: fn(usize) -> f64| {
                        let hidden = |input: usize, row: usize| (!seen[input][row]).then(|| number(row));
                        run(&case, &with_numbers(&inputs, hidden)?, backend, Loss::Linear)
                    });
                    let (zero, special) = (zero?, special?);
                    let tolerance = if dtype == DType::BF16 { 3e-2 } else { 1e-5 };
                    let what = format!("{backend:?}, {dtype:?}, {case:?}");
                    assert!(special.iter().all(|(name, x)| *name == "logsumexp" || is_finite(x)), "{what}");
                    assert_agree(&special, &zero, tolerance, &what)?;
                }
            }
        }
    }
    Ok(())
}

fn is_finite(x: &Tensor) -> bool {
    numbers(x).unwrap().iter().all(|x| x.is_finite())
}

#[test]
fn queries_without_keys_get_zeros_whatever_the_inputs_hold() -> Result<()> {
    for case in cases(&MaskKind::Prefix(0)) {
        let inputs = with_numbers(&case.inputs(DType::F32)?, |_, _| Some(f64::NAN))?;
        for backend in BACKENDS {
            for (name, x) in run(&case, &inputs, backend, Loss::Linear)? {
                let zeros = numbers(&x)?.iter().all(|&x| x == 0.0);
                let expected = match name {
                    "logsumexp" if case.sinks => is_finite(&x),
                    "logsumexp" => numbers(&x)?.iter().all(|&x| x == f64::NEG_INFINITY),
                    "sinks" => is_finite(&x),
                    _ => zeros,
                };
                assert!(expected, "{name} of {backend:?}, {case:?}: {x}");
            }
        }
    }
    Ok(())
}

/// A bias of minus infinity where the mask hides, and of zero elsewhere.
fn as_bias(case: &Case, inputs: &Inputs) -> Result<Tensor> {
    let Sizes { batch, heads, q_len, kv_len, .. } = SIZES;
    let bias = table(case, inputs)?.into_iter().map(|allowed| if allowed { 0.0 } else { f32::NEG_INFINITY });
    Tensor::from_iter(bias, &Device::Cpu)?.reshape((batch, heads, q_len, kv_len))
}

fn check_bias_of_minus_infinity(backend: Backend) -> Result<()> {
    let mut random = Random::new(2);
    for mask in masks() {
        let plain = Case { mask, softcap: Some(3.0), ..Case::plain(SIZES) };
        let inputs = plain.inputs(DType::F32)?;
        let options = AttentionOptions { return_weights: true, ..plain.options(&inputs, backend)? };
        let attn_bias = Some(as_bias(&plain, &inputs)?);
        let biased = AttentionOptions { attn_mask: Mask::full(), attn_bias, ..options.clone() };
        for special in SPECIAL.into_iter().chain([1.0]) {
            let (input, start) = (random.below(3), random.below(40));
            let inputs = with_numbers(&inputs, |i, row| (i == input && row % 40 == start).then_some(special))?;
            let [masked, biased] = [&options, &biased].map(|options| run_with(options, &inputs, Loss::Linear));
            let what = format!("{special} in input {input}, rows {start} + 40 n, {backend:?}, {plain:?}");
            assert_agree(&biased?, &masked?, 1e-5, &what)?;
        }
    }
    Ok(())
}

#[test]
fn bias_of_minus_infinity_hides_as_a_mask_does() -> Result<()> {
    check_bias_of_minus_infinity(Backend::Reference)
}

#[test]
fn bias_of_minus_infinity_hides_as_a_mask_does_on_the_fused_path() -> Result<()> {
    check_bias_of_minus_infinity(Backend::Fused)
}

/// Slopes that want a gradient are computed by the reference.
#[test]
fn trained_slopes_see_nothing_that_the_mask_hides() -> Result<()> {
    let device = &Device::Cpu;
    let slopes = Var::new(&[0.5f32, 0.25], device)?;
    let run = |hidden: f32| -> Result<Vec<Tensor>> {
        let x = randn(3, (1, 2, 4, 3), DType::F32)?;
        let row = (Tensor::ones((1, 2, 1, 3), DType::F32, device)? * f64::from(hidden))?;
        let [q, k, v] = [
            x.clone(),
            x.slice_assign(&[0..1, 0..2, 3..4, 0..3], &row)?,
            x.slice_assign(&[0..1, 0..2, 3..4, 0..3], &row)?,
        ];
        let vars = [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
        let options = AttentionOptions {
            attn_mask: Mask::prefix(3),
            alibi_slopes: Some(slopes.as_tensor().clone()),
            ..Default::default()
        };
        let context = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?.context;
        let mut all = gradients(&context.sqr()?.sum_all()?, &[&slopes, &vars[0], &vars[1], &vars[2]])?;
        all.push(context.detach());
        Ok(all)
    };
    let expected = run(1.0)?;
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (a, b) in run(special)?.iter().zip(&expected) {
            assert_same_bits(a, b, &format!("{special}"));
        }
    }
    Ok(())
}

/// The smallest case: one visible key and one hidden key.
#[test]
fn context_of_one_visible_key_is_its_value() -> Result<()> {
    let device = &Device::Cpu;
    for backend in BACKENDS {
        for hidden in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let q = Var::new(&[[2f32], [2.]], device)?;
            let k = Var::new(&[[2f32], [hidden]], device)?;
            let v = Var::new(&[[3f32], [hidden]], device)?;
            let options = AttentionOptions { attn_mask: Mask::prefix(1), backend, ..Default::default() };
            let context = scaled_dot_product_attention(&q, &k, &v, &options)?.context;
            assert_eq!(numbers(&context)?, [3.0, 3.0], "{backend:?}, {hidden}");
            let [dq, dk, dv] = &gradients(&context.sum_all()?, &[&q, &k, &v])?[..] else { panic!("three gradients") };
            assert_eq!((numbers(dq)?, numbers(dk)?), (vec![0.0; 2], vec![0.0; 2]), "{backend:?}, {hidden}");
            assert_eq!(numbers(dv)?, [2.0, 0.0], "{backend:?}, {hidden}");
        }
    }
    Ok(())
}

/// Queries and keys that are large enough to overflow are computed another way, which a hidden NaN must not prevent.
#[test]
fn hidden_nan_beside_huge_scores_changes_nothing() -> Result<()> {
    let device = &Device::Cpu;
    let run = |hidden: f32| -> Result<Vec<Tensor>> {
        let q = Var::new(&[[1e20f32, 1e20], [1., 2.]], device)?;
        let k = Var::new(&[[1e20f32, -1e20], [1e20, 1e19], [hidden, 1.]], device)?;
        let v = Var::new(&[[1f32], [10.], [hidden]], device)?;
        let options = AttentionOptions {
            scale: Some(1.0),
            attn_mask: Mask::prefix(2),
            backend: Backend::Reference,
            return_logsumexp: true,
            ..Default::default()
        };
        let output = scaled_dot_product_attention(&q, &k, &v, &options)?;
        let mut all = gradients(&output.context.sum_all()?, &[&q, &k, &v])?;
        all.extend([output.context.detach(), output.logsumexp.expect("log-sum-exp").detach()]);
        Ok(all)
    };
    let expected = run(1.0)?;
    assert_eq!(numbers(&expected[3])?, [10.0, 10.0]);
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (a, b) in run(special)?.iter().zip(&expected) {
            assert_same_bits(a, b, &format!("{special}"));
        }
    }
    Ok(())
}
