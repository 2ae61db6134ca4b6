//! What holds of every call of the CUDA path.

use candle_attention::{AttentionOptions, Backend, Error, Mask, Result, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};

use super::on;
use crate::check::tolerance;
use crate::common::{assert_close, assert_same_bits, gradients, numbers, randn, var};
use crate::emulator::{self, AMPERE, HOPPER, Options};
use crate::layers::assert_error_says;
use crate::masks::MaskKind;
use crate::problem::{Bias, Case, Inputs, Named, Sizes, error};

/// A case in which everything wants a gradient.
fn everything() -> Case {
    let sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 70, kv_len: 90, dim: 64, value_dim: 64 };
    Case {
        mask: MaskKind::Causal,
        bias: Some(Bias::Trained("hqk")),
        softcap: Some(2.0),
        alibi: true,
        train_slopes: true,
        sinks: true,
        dropout_p: 0.2,
        ..Case::plain(sizes)
    }
}

fn run(case: &Case, dtype: DType, options: Options) -> Result<Vec<Named>> {
    let inputs = case.inputs(dtype)?;
    Ok(on(HOPPER, options, || case.run(&inputs, Backend::Fused))?)
}

#[test]
fn the_order_of_execution_changes_no_bit() -> Result<()> {
    if !emulator::is_there() {
        return Ok(());
    }
    let plain = Case { mask: MaskKind::Causal, ..Case::plain(everything().sizes) };
    let decoding = Case::plain(Sizes { q_len: 2, kv_len: 700, ..everything().sizes });
    for case in [plain, everything(), decoding] {
        let first = run(&case, DType::BF16, Options::default())?;
        for seed in 1..=10 {
            let again = run(&case, DType::BF16, Options { seed, eager: seed % 2 == 0, ..Options::default() })?;
            for ((name, a), (_, b)) in first.iter().zip(&again) {
                assert_same_bits(a, b, &format!("{name}, seed {seed}"));
            }
        }
    }
    Ok(())
}

/// Of a call in which bias, slopes and sinks are trained: context, log-sum-exp, and all that wants a gradient.
fn trained() -> Result<(Tensor, Tensor, Vec<Var>)> {
    let vars = vec![
        var(1, (1, 2, 20, 8), DType::F32)?,
        var(2, (1, 2, 30, 8), DType::F32)?,
        var(3, (1, 2, 30, 8), DType::F32)?,
        var(4, (2, 20, 30), DType::F32)?,
        var(5, 2, DType::F32)?,
        var(6, 2, DType::F32)?,
    ];
    let option = |i: usize| Some(vars[i].as_tensor().clone());
    let options = AttentionOptions {
        attn_bias: option(3),
        alibi_slopes: option(4),
        sinks: option(5),
        return_logsumexp: true,
        backend: Backend::Fused,
        ..Default::default()
    };
    let output = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?;
    Ok((output.context, output.logsumexp.expect("asked for"), vars))
}

#[test]
fn gradients_of_both_results_add_up_and_can_be_taken_again() -> Result<()> {
    if !emulator::is_there() {
        return Ok(());
    }
    on(AMPERE, Options::default(), || {
        let (context, logsumexp, vars) = trained()?;
        let vars = vars.iter().collect::<Vec<_>>();
        let (of_context, of_logsumexp) = (context.sqr()?.sum_all()?, logsumexp.sqr()?.sum_all()?);
        let both = gradients(&(&of_context + &of_logsumexp)?, &vars)?;
        let parts = [gradients(&of_context, &vars)?, gradients(&of_logsumexp, &vars)?];
        let again = gradients(&(&of_context + &of_logsumexp)?, &vars)?;
        for (i, both) in both.iter().enumerate() {
            assert_close(both, &(&parts[0][i] + &parts[1][i])?, 1e-4, &format!("gradient {i}"));
            assert_same_bits(both, &again[i], &format!("gradient {i}, again"));
        }
        Ok(())
    })
}

#[test]
fn calls_that_the_kernels_dont_serve_are_refused() -> Result<()> {
    on(AMPERE, Options::default(), || {
        let options = AttentionOptions { backend: Backend::Fused, ..Default::default() };
        let attend = |x: &Tensor| scaled_dot_product_attention(x, x, x, &options);
        assert_error_says(attend(&randn(1, (1, 2, 3, 4), DType::F64)?), &["backend Fused", "F64"]);
        assert_error_says(attend(&randn(1, (1, 2, 3, 257), DType::F32)?), &["backend Fused", "256"]);
        assert_error_says(attend(&Tensor::zeros((1, 2, 0, 4), DType::F32, &Device::Cpu)?), &["backend Fused", "empty"]);
        Ok(())
    })
}

/// An error of the machine says what it is, and no gradient comes of it.
#[test]
fn a_machine_with_too_little_shared_memory_is_an_error() -> Result<()> {
    let small = attention_kernels::cuda::Limits { shared_bytes: 16 << 10, ..AMPERE };
    on(small, Options::default(), || {
        let x = randn(1, (1, 2, 3, 256), DType::F32)?;
        let options = AttentionOptions { backend: Backend::Fused, ..Default::default() };
        let error = scaled_dot_product_attention(&x, &x, &x, &options).unwrap_err();
        assert!(matches!(error, Error::Attention(candle_attention::AttentionError::Gpu(_))), "{error}");
        assert!(error.to_string().contains("shared memory"), "{error}");
        Ok(())
    })
}

/// Other backends and other threads don't see the machine.
#[test]
fn only_the_fused_backend_uses_a_machine() -> Result<()> {
    let x = randn(1, (1, 2, 9, 300), DType::F32)?;
    let attend = |backend| {
        let options = AttentionOptions { backend, attn_mask: Mask::causal(), ..Default::default() };
        scaled_dot_product_attention(&x, &x, &x, &options).map(|output| output.context)
    };
    let outside = attend(Backend::Fused)?;
    let inside = on(AMPERE, Options::default(), || {
        assert!(attend(Backend::Fused).is_err());
        attend(Backend::Auto)
    })?;
    assert_same_bits(&inside, &outside, "on the CPU");
    assert_same_bits(&attend(Backend::Fused)?, &outside, "afterwards");
    Ok(())
}

/// Decoding splits the keys. A split whose only visible key holds NaN shows it, and hides it from rows that may not see the key.
#[test]
fn nan_in_the_only_visible_key_of_a_split_shows() -> Result<()> {
    if !emulator::is_there() {
        return Ok(());
    }
    let mut keys = vec![0.5f32; 1024 * 8];
    keys[63 * 8] = f32::NAN;
    let key = Tensor::from_vec(keys, (1, 1, 1024, 8), &Device::Cpu)?;
    let query = Tensor::ones((1, 1, 2, 8), DType::F32, &Device::Cpu)?;
    let value = randn(1, (1, 1, 1024, 8), DType::F32)?;
    // The first query sees the keys from 63 on, the second those from 64 on.
    let options = AttentionOptions {
        attn_mask: Mask::window(Some(959), None).with_offset(1022),
        backend: Backend::Fused,
        ..Default::default()
    };
    let attend = || scaled_dot_product_attention(&query, &key, &value, &options);
    let context = on(AMPERE, Options::default(), attend)?.context.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
    assert!(context[0].iter().all(|x| x.is_nan()) && context[1].iter().all(|x| x.is_finite()), "{context:?}");
    Ok(())
}

/// The inputs of a case with a query and a key that are `magnitude` times as large.
fn magnified(case: &Case, dtype: DType, magnitude: f64) -> Result<Inputs> {
    let mut inputs = case.inputs(dtype)?;
    for i in 0..2 {
        inputs.stored[i] = Var::from_tensor(&(inputs.stored[i].as_detached_tensor() * magnitude)?)?;
    }
    Ok(inputs)
}

/// Scores whose neighbours in f32 are far apart, scores around the greatest f32, and products beyond it, without a mask or an option: in
/// the kernels with all options (head_dim 8) and in the plain ones.
#[test]
fn huge_plain_scores_give_what_they_give_on_the_cpu() -> Result<()> {
    if !emulator::is_there() {
        return Ok(());
    }
    for (limits, dtype, dim) in [(AMPERE, DType::F32, 8), (AMPERE, DType::F32, 64), (HOPPER, DType::BF16, 64)] {
        let sizes = Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 5, kv_len: 7, dim, value_dim: dim };
        // A log-sum-exp would widen bf16.
        let case = Case { logsumexp: dtype == DType::F32, ..Case::plain(sizes) };
        for magnitude in [1e15, 1.5e19, 2e19, 1e20, 1e25] {
            let inputs = magnified(&case, dtype, magnitude)?;
            let cpu = case.run(&inputs, Backend::Auto)?;
            let results = on(limits, Options::default(), || case.run(&inputs, Backend::Fused))?;
            for ((name, result), (_, cpu)) in results.iter().zip(&cpu) {
                let (what, of_cpu) = (format!("{name}, {dtype:?}, {dim}, {magnitude:e}"), numbers(cpu)?);
                assert!(numbers(result)?.iter().all(|x| x.is_finite()), "{what}: {result}");
                if !of_cpu.iter().all(|x| x.is_finite()) {
                    // A gradient of the reference overflows on its way, where a score is just below the greatest f32.
                    assert!(["query", "key"].contains(name) && magnitude < 1e20, "{what}: {of_cpu:?}");
                    continue;
                }
                // Gradients of query and key are sums of numbers of this magnitude, which cancel.
                let floor = if ["query", "key"].contains(name) { magnitude } else { 1e-30 };
                let off = error(result, cpu, floor)?;
                assert!(off <= tolerance(dtype), "{what}: {off:e}");
            }
        }
    }
    Ok(())
}

/// Products of query and key beyond the range of f32: the careful pass computes what the reference computes in f64. Gradients of query
/// and key are differences of nearly equal numbers, times 1e20, so that only their being finite can be asked.
#[test]
fn huge_scores_give_what_they_give_on_the_cpu() -> Result<()> {
    if !emulator::is_there() {
        return Ok(());
    }
    for axes in ["bhqk", "hq", "bk"] {
        let case = Case { bias: Some(Bias::Trained(axes)), softcap: None, ..everything() };
        let inputs = magnified(&case, DType::F32, 1e20)?;
        let cpu = case.run(&inputs, Backend::Auto)?;
        let results = on(AMPERE, Options::default(), || case.run(&inputs, Backend::Fused))?;
        for ((name, result), (_, cpu)) in results.iter().zip(&cpu) {
            match *name {
                "context" | "value" | "bias" | "sinks" => {
                    let off = error(result, cpu, 1.0)?;
                    assert!(off < 1e-5, "{name}, {axes}: {off:e}");
                }
                "query" | "key" => assert!(numbers(result)?.iter().all(|x| x.is_finite()), "{name}, {axes}"),
                _ => {}
            }
        }
    }
    Ok(())
}
