//! The scores at each stage: scaled, softcapped, biased, masked.

use candle_attention::{AttentionOptions, AttentionOutput, Backend, ScoreStage, scaled_dot_product_attention};
use candle_core::{D, DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, check_gradients, gradients, numbers, randn};

use super::setup::{
    F64, SIZES, Sizes, assert_same_output, attend, attend_vars, everything, logsumexp, random_sum, var64, weights,
};

const STAGES: [ScoreStage; 4] = [ScoreStage::Scaled, ScoreStage::Softcapped, ScoreStage::Biased, ScoreStage::Masked];
const BACKENDS: [Backend; 2] = [Backend::Reference, Backend::Fused];

fn at(stage: ScoreStage, backend: Backend, options: &AttentionOptions) -> AttentionOptions {
    AttentionOptions { return_scores: Some(stage), backend, ..options.clone() }
}

fn scores(output: &AttentionOutput) -> &Tensor {
    output.scores.as_ref().expect("scores")
}

/// The scores of all stages from the formula, number by number.
fn by_formula(sizes: &Sizes, [query, key, _]: &[Tensor; 3], options: &AttentionOptions) -> Result<[Tensor; 4]> {
    let key = key.unsqueeze(2)?.repeat((1, 1, sizes.heads / sizes.kv_heads, 1, 1))?;
    let key = key.reshape((sizes.batch, sizes.heads, sizes.kv_len, sizes.head_dim))?;
    let scaled = (query.matmul(&key.t()?)? * options.scale.expect("a scale"))?;
    let cap = options.softcap.expect("a softcap");
    let softcapped = ((&scaled / cap)?.tanh()? * cap)?;
    let distance = |row: usize| {
        let (i, j) = (row / sizes.kv_len % sizes.q_len, row % sizes.kv_len);
        (i as f64 + sizes.kv_len as f64 - sizes.q_len as f64 - j as f64).abs()
    };
    let slopes = numbers(options.alibi_slopes.as_ref().expect("slopes"))?;
    let alibi = (0..scaled.elem_count()).map(|row| {
        let head = row / (sizes.q_len * sizes.kv_len) % sizes.heads;
        slopes[head] * distance(row)
    });
    let alibi = Tensor::from_iter(alibi, &Device::Cpu)?.reshape(scaled.shape())?;
    let biased = (softcapped.broadcast_add(options.attn_bias.as_ref().expect("a bias"))? - alibi)?;
    let allowed = options.attn_mask.to_tensor((sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len), &Device::Cpu)?;
    let hidden = Tensor::full(f64::NEG_INFINITY, biased.shape(), &Device::Cpu)?;
    let masked = allowed.broadcast_as(biased.shape())?.where_cond(&biased, &hidden)?;
    Ok([scaled, softcapped, biased, masked])
}

#[test]
fn each_stage_is_its_step_of_the_formula() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F64);
    let options = everything(&SIZES, 3, DType::F64);
    for (stage, expected) in STAGES.into_iter().zip(by_formula(&SIZES, &inputs, &options)?) {
        for backend in BACKENDS {
            let output = attend(&inputs, &at(stage, backend, &options))?;
            assert_close(scores(&output), &expected, F64, &format!("{stage:?}, {backend:?}"));
        }
    }
    Ok(())
}

/// Without the option of a step, its stage equals the one before.
#[test]
fn steps_that_are_not_asked_for_change_no_score() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    let scaled = attend(&inputs, &at(ScoreStage::Scaled, Backend::Auto, &AttentionOptions::default()))?;
    for stage in STAGES {
        let output = attend(&inputs, &at(stage, Backend::Auto, &AttentionOptions::default()))?;
        assert_same_bits(scores(&output), scores(&scaled), &format!("{stage:?}"));
    }
    Ok(())
}

#[test]
fn weights_are_the_softmax_of_the_masked_scores() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F64);
    for backend in BACKENDS {
        let output = attend(&inputs, &at(ScoreStage::Masked, backend, &everything(&SIZES, 3, DType::F64)))?;
        let softmax = scores(&output).broadcast_sub(&logsumexp(&output).unsqueeze(D::Minus1)?)?.exp()?;
        assert_close(&softmax, weights(&output), F64, &format!("{backend:?}"));
    }
    Ok(())
}

#[test]
fn asking_for_scores_changes_no_other_number() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        for backend in BACKENDS {
            let vars = SIZES.vars(2, dtype);
            let options = AttentionOptions { backend, ..everything(&SIZES, 3, dtype) };
            let grads_of = |context: &Tensor| gradients(&random_sum(context, 4).unwrap(), &vars.each_ref());
            let without = attend_vars(&vars, &options)?;
            assert!(without.scores.is_none());
            let expected = grads_of(&without.context)?;
            for stage in STAGES {
                let output = attend_vars(&vars, &at(stage, backend, &options))?;
                assert_same_output(&output, &without);
                for (a, b) in grads_of(&output.context)?.iter().zip(&expected) {
                    assert_same_bits(a, b, "gradient");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_scores_are_right_at_each_stage() -> Result<()> {
    let sizes = Sizes { q_len: 2, kv_len: 3, head_dim: 2, ..SIZES };
    let vars = sizes.vars(2, DType::F64);
    let (bias, slopes) = (var64(5, &[sizes.heads, 1, sizes.kv_len]), var64(6, &[sizes.heads]));
    let tensor = |var: &Var| Some(var.as_tensor().clone());
    let options = AttentionOptions {
        attn_bias: tensor(&bias),
        alibi_slopes: tensor(&slopes),
        ..everything(&sizes, 3, DType::F64)
    };
    for stage in STAGES {
        let options = at(stage, Backend::Auto, &options);
        // exp(-∞) is 0, and so is its gradient.
        let loss = || random_sum(&scores(&attend_vars(&vars, &options)?).exp()?, 7);
        let mut checked = vec![("query", &vars[0]), ("key", &vars[1])];
        if stage >= ScoreStage::Biased {
            checked.extend([("bias", &bias), ("slopes", &slopes)]);
        }
        check_gradients(&checked, loss, 1e-7, &format!("{stage:?}"));
    }
    Ok(())
}

/// A score can be too large for f16.
#[test]
fn scores_of_half_types_are_wide() -> Result<()> {
    for (dtype, wide) in [(DType::F16, DType::F32), (DType::BF16, DType::F32), (DType::F64, DType::F64)] {
        let [query, key, value] = SIZES.tensors(1, dtype);
        let inputs = [(query * 1e4)?, (key * 1e2)?, value];
        let output = attend(&inputs, &at(ScoreStage::Scaled, Backend::Auto, &AttentionOptions::default()))?;
        assert_eq!((scores(&output).dtype(), scores(&output).dims()), (wide, &SIZES.scores()[..]));
        let largest = scores(&output).abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        assert!(largest > 65504.0 && largest.is_finite(), "{largest}");
    }
    Ok(())
}

#[test]
fn scores_lack_the_axes_that_the_inputs_lack() -> Result<()> {
    let options = at(ScoreStage::Masked, Backend::Auto, &AttentionOptions::default());
    for (query, key, expected) in [(&[2, 5, 6][..], &[2, 7, 6][..], &[2, 5, 7][..]), (&[5, 6], &[7, 6], &[5, 7])] {
        let (query, key) = (randn(1, query, DType::F32)?, randn(2, key, DType::F32)?);
        let output = scaled_dot_product_attention(&query, &key, &key, &options)?;
        assert_eq!(scores(&output).dims(), expected);
    }
    Ok(())
}

#[test]
fn scores_of_empty_inputs_are_empty_and_have_gradients() -> Result<()> {
    for dtype in [DType::F16, DType::F64] {
        for sizes in [Sizes { batch: 0, ..SIZES }, Sizes { q_len: 0, ..SIZES }, Sizes { kv_len: 0, ..SIZES }] {
            for stage in STAGES {
                let vars = sizes.vars(1, dtype);
                let output = attend_vars(&vars, &at(stage, Backend::Auto, &AttentionOptions::default()))?;
                assert_eq!(scores(&output).dims(), sizes.scores());
                assert_eq!(scores(&output).dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
                for gradient in gradients(&scores(&output).sum_all()?, &[&vars[0], &vars[1]])? {
                    assert!(numbers(&gradient)?.iter().all(|&x| x == 0.0));
                }
            }
        }
    }
    Ok(())
}
