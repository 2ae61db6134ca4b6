//! The numbers of the lecture notes, and two errors in the notes.

use candle_attention::simplified::{Normalization, SimplifiedAttention, normalize, simplified_attention};
use candle_attention::{AttentionOptions, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, gradients, numbers, randn};

/// "Your journey starts with one step", an embedding of three numbers for each word (notes 002 and 004).
const JOURNEY: [[f64; 3]; 6] = [
    [0.43, 0.15, 0.89],
    [0.55, 0.87, 0.66],
    [0.57, 0.85, 0.64],
    [0.22, 0.58, 0.33],
    [0.77, 0.25, 0.10],
    [0.05, 0.80, 0.55],
];

/// "The cat sat" (note 003).
const CAT: [[f64; 4]; 3] = [[1., 0., 1., 0.], [0., 1., 0., 1.], [1., 1., 1., 1.]];

/// Attention of the sentence to itself.
fn journey(normalization: Normalization) -> Result<SimplifiedAttention> {
    Ok(simplified_attention(&Tensor::new(&JOURNEY, &Device::Cpu)?, normalization)?)
}

/// Panics unless the numbers of `x`, rounded to `digits` decimals, are those that the notes print.
#[track_caller]
fn assert_printed_as(x: &Tensor, printed: &[f64], digits: i32) {
    let (numbers, half_a_unit) = (numbers(x).unwrap(), 0.501 * 10f64.powi(-digits));
    assert_eq!(numbers.len(), printed.len());
    let close = numbers.iter().zip(printed).all(|(x, y)| (x - y).abs() < half_a_unit);
    assert!(close, "{numbers:?}, printed as {printed:?}");
}

#[test]
fn journey_has_the_scores_of_the_notes() -> Result<()> {
    let scores = journey(Normalization::Softmax)?.scores;
    assert_printed_as(&scores.get(1)?, &[0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865], 4);
    Ok(())
}

#[test]
fn journey_has_the_softmax_weights_of_the_notes() -> Result<()> {
    let printed = [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581];
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax] {
        assert_printed_as(&journey(normalization)?.weights.get(1)?, &printed, 4);
    }
    Ok(())
}

#[test]
fn journey_has_the_sum_normalised_weights_of_the_notes() -> Result<()> {
    let weights = journey(Normalization::SumNormalized)?.weights;
    assert_printed_as(&weights.get(1)?, &[0.1455, 0.2278, 0.2249, 0.1285, 0.1077, 0.1656], 4);
    Ok(())
}

#[test]
fn journey_has_the_contexts_of_the_notes() -> Result<()> {
    let printed = [
        [0.4421, 0.5931, 0.5790],
        [0.4419, 0.6515, 0.5683],
        [0.4431, 0.6496, 0.5671],
        [0.4304, 0.6298, 0.5510],
        [0.4671, 0.5910, 0.5266],
        [0.4177, 0.6503, 0.5645],
    ];
    let context = journey(Normalization::default())?.context;
    assert_printed_as(&context, printed.as_flattened(), 4);
    Ok(())
}

/// Note 002 gives the context of "journey" as 0.4371 six times. Its loop runs over the three entries of the query
/// instead of the inputs. Its result has one number for each word, but a context has one number for each feature of an
/// embedding.
#[test]
fn note_002_loops_over_the_query_instead_of_the_inputs() -> Result<()> {
    let attention = journey(Normalization::Softmax)?;
    let (query, weights) = (JOURNEY[1], numbers(&attention.weights.get(1)?)?);

    // The loop of the note: for i, x_i in enumerate(query): context += weights[i] * x_i, into six zeros.
    let mut wrong = [0.0; 6];
    for (i, x) in query.iter().enumerate() {
        wrong.iter_mut().for_each(|entry| *entry += weights[i] * x);
    }
    assert!(wrong.iter().all(|entry| (entry - 0.4371f64).abs() < 5e-5), "{wrong:?}");

    // Over the inputs: three entries, each within the range of that feature.
    let mut right = [0.0; 3];
    for (weight, input) in weights.iter().zip(JOURNEY) {
        right.iter_mut().zip(input).for_each(|(entry, x)| *entry += weight * x);
    }
    let right = Tensor::new(&right, &Device::Cpu)?;
    assert_close(&attention.context.get(1)?, &right, 1e-12, "context");
    assert_printed_as(&right, &[0.4419, 0.6515, 0.5683], 4);
    Ok(())
}

/// "The cat sat" with W_Q = W_K = W_V = I: embeddings are queries, keys and values, scaled by sqrt(4).
fn cat() -> Result<(Tensor, Tensor)> {
    let words = Tensor::new(&CAT, &Device::Cpu)?;
    let options = AttentionOptions { return_weights: true, ..Default::default() };
    let output = scaled_dot_product_attention(&words, &words, &words, &options)?;
    Ok((output.weights.expect("weights").get(0)?, output.context.get(0)?))
}

#[test]
fn the_cat_sat_has_the_weights_of_note_003() -> Result<()> {
    let (weights, _) = cat()?;
    assert_printed_as(&weights, &[0.4223, 0.1554, 0.4223], 4);
    // Scores [2, 0, 2] / sqrt(4) = [1, 0, 1].
    let e = std::f64::consts::E;
    assert_close(
        &weights,
        &Tensor::new(&[e, 1.0, e], &Device::Cpu)?.affine(1.0 / (2.0 * e + 1.0), 0.0)?,
        1e-12,
        "weights",
    );
    Ok(())
}

/// Note 003 gives the context of "The" as [1.2669, 0.9999, ...]. But weights that sum to 1 give a context within the
/// range of the values, here 0 to 1. The note's own weights give [0.8446, 0.5777, 0.8446, 0.5777].
#[test]
fn note_003_has_a_context_outside_the_range_of_the_values() -> Result<()> {
    let (weights, context) = cat()?;
    assert_printed_as(&context, &[0.8446, 0.5777, 0.8446, 0.5777], 4);
    let weights = numbers(&weights)?;
    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    for (feature, entry) in numbers(&context)?.into_iter().enumerate() {
        let by_hand: f64 = weights.iter().zip(CAT).map(|(weight, word)| weight * word[feature]).sum();
        assert!((entry - by_hand).abs() < 1e-12);
        let values = CAT.map(|word| word[feature]);
        let least = values.into_iter().fold(f64::INFINITY, f64::min);
        let greatest = values.into_iter().fold(f64::NEG_INFINITY, f64::max);
        assert!((least..=greatest).contains(&entry));
        let noted = [1.2669, 0.9999][feature % 2];
        assert!((entry - noted).abs() > 0.4);
    }
    // The note's first entry is 3 · 0.4223 instead of 2 · 0.4223.
    assert!((3.0 * weights[0] - 1.2669).abs() < 5e-4);
    Ok(())
}

#[test]
fn context_stays_within_the_range_of_the_values() -> Result<()> {
    let inputs = randn(1, (7, 5), DType::F64)?;
    let context = simplified_attention(&inputs, Normalization::Softmax)?.context;
    assert_eq!(numbers(&context.broadcast_lt(&inputs.min_keepdim(0)?)?)?, [0.0; 35]);
    assert_eq!(numbers(&context.broadcast_gt(&inputs.max_keepdim(0)?)?)?, [0.0; 35]);
    Ok(())
}

#[test]
fn scaled_scores_have_softer_weights() -> Result<()> {
    let softmax = |scores: [f64; 2]| normalize(&Tensor::new(&scores, &Device::Cpu)?, Normalization::Softmax);
    assert_printed_as(&softmax([6., 4.])?, &[0.88, 0.12], 2);
    assert_printed_as(&softmax([3., 2.])?, &[0.73, 0.27], 2);
    Ok(())
}

#[test]
fn one_extreme_score_tells_the_normalizations_apart() -> Result<()> {
    let scores = Tensor::new(&[1f32, 3., 4., 400.], &Device::Cpu)?;
    let by_sum = normalize(&scores, Normalization::SumNormalized)?;
    assert_printed_as(&by_sum, &[0.0025, 0.0074, 0.0098, 0.9804], 4);
    assert_eq!(normalize(&scores, Normalization::Softmax)?.to_vec1::<f32>()?, [0., 0., 0., 1.]);
    let naive = normalize(&scores, Normalization::NaiveSoftmax)?.to_vec1::<f32>()?;
    assert!(naive[3].is_nan(), "exp(400) is infinite, and infinity / infinity not a number: {naive:?}");
    // f64 can hold exp(400), and the two agree.
    let scores = scores.to_dtype(DType::F64)?;
    let [softmax, naive] = [Normalization::Softmax, Normalization::NaiveSoftmax].map(|n| normalize(&scores, n));
    assert_close(&naive?, &softmax?, 1e-12, "softmax");
    Ok(())
}

#[test]
fn steps_are_those_of_plain_matrix_products() -> Result<()> {
    let inputs = randn(2, (5, 4), DType::F64)?;
    let attention = simplified_attention(&inputs, Normalization::Softmax)?;
    let x = inputs.to_vec2::<f64>()?;
    for (i, query) in x.iter().enumerate() {
        let scores: Vec<f64> = x.iter().map(|key| query.iter().zip(key).map(|(a, b)| a * b).sum()).collect();
        let sum: f64 = scores.iter().map(|score| score.exp()).sum();
        let weights: Vec<f64> = scores.iter().map(|score| score.exp() / sum).collect();
        let context: Vec<f64> = (0..4).map(|c| weights.iter().zip(&x).map(|(w, value)| w * value[c]).sum()).collect();
        for (result, expected) in
            [(&attention.scores, scores), (&attention.weights, weights), (&attention.context, context)]
        {
            assert_close(&result.get(i)?, &Tensor::new(expected, &Device::Cpu)?, 1e-12, "row");
        }
    }
    Ok(())
}

#[test]
fn simplified_attention_is_attention_of_a_tensor_with_itself() -> Result<()> {
    let inputs = randn(3, (2, 5, 4), DType::F64)?;
    let options = AttentionOptions { scale: Some(1.0), ..Default::default() };
    let full = scaled_dot_product_attention(&inputs, &inputs, &inputs, &options)?.context;
    assert_close(&simplified_attention(&inputs, Normalization::Softmax)?.context, &full, 1e-12, "context");
    Ok(())
}

#[test]
fn batch_equals_each_of_its_sequences_alone() -> Result<()> {
    let batch = randn(4, (3, 5, 4), DType::F32)?;
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax, Normalization::SumNormalized] {
        let together = simplified_attention(&batch, normalization)?;
        for b in 0..3 {
            let alone = simplified_attention(&batch.get(b)?, normalization)?;
            assert_same_bits(&together.scores.get(b)?, &alone.scores, "scores");
            assert_same_bits(&together.weights.get(b)?, &alone.weights, "weights");
            assert_same_bits(&together.context.get(b)?, &alone.context, "context");
        }
    }
    Ok(())
}

#[test]
fn strides_do_not_matter() -> Result<()> {
    let inputs = randn(5, (3, 5, 4), DType::F32)?;
    let view = inputs.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
    assert!(!view.is_contiguous());
    let [a, b] = [&inputs, &view].map(|x| simplified_attention(x, Normalization::Softmax).unwrap());
    assert_same_bits(&a.context, &b.context, "context");
    Ok(())
}

/// A sum of 1,024 numbers in bf16, or of 4,096 in f16, would stop at a fraction of its value.
#[test]
fn weights_of_equal_scores_sum_to_one_in_half_types() -> Result<()> {
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax, Normalization::SumNormalized] {
        for (dtype, len) in [(DType::BF16, 1024), (DType::F16, 4096)] {
            let scores = Var::from_tensor(&Tensor::ones(len, dtype, &Device::Cpu)?)?;
            let weights = normalize(&scores, normalization)?;
            assert_eq!(weights.dtype(), dtype);
            assert_eq!(numbers(&weights)?.iter().sum::<f64>(), 1.0, "{normalization:?}, {dtype:?}");
            // The sum of the weights is 1 whatever the scores, so its gradient is 0.
            let gradient = &gradients(&weights.sum_all()?, &[&scores])?[0];
            let largest = numbers(gradient)?.into_iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
            assert!(largest < 1e-6, "{normalization:?}, {dtype:?}: gradient {largest:e}");
        }
    }
    Ok(())
}

/// Each step in a half type is that in f64, rounded once.
#[test]
fn steps_in_half_types_are_as_precise_as_the_type() -> Result<()> {
    for (dtype, roundoff) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        for len in [1, 700] {
            let inputs = randn(6, (len, 64), DType::F64)?.affine(0.2, 0.0)?.to_dtype(dtype)?;
            let rounded = simplified_attention(&inputs, Normalization::Softmax)?;
            let exact = simplified_attention(&inputs.to_dtype(DType::F64)?, Normalization::Softmax)?;
            for (what, rounded, exact) in [
                ("scores", rounded.scores, exact.scores),
                ("weights", rounded.weights, exact.weights),
                ("context", rounded.context, exact.context),
            ] {
                assert_close(&rounded.to_dtype(DType::F64)?, &exact, 1.01 * roundoff, &format!("{dtype:?}, {what}"));
            }
        }
    }
    Ok(())
}

#[test]
fn inputs_of_another_rank_are_refused() -> Result<()> {
    for dims in [&[][..], &[4], &[2, 2, 5, 4]] {
        let inputs = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
        let text = simplified_attention(&inputs, Normalization::Softmax).unwrap_err().to_string();
        let got = format!("got rank {} with shape {dims:?}", dims.len());
        assert!(text.contains("inputs: expected 2 axes (len, dim) or 3 (batch, len, dim)"), "{text}");
        assert!(text.contains(&got), "{text}");
    }
    Ok(())
}

#[test]
fn no_tokens_have_no_context() -> Result<()> {
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax, Normalization::SumNormalized] {
        for (dims, scores) in [(&[0, 4][..], &[0, 0][..]), (&[2, 0, 4], &[2, 0, 0]), (&[0, 3, 4], &[0, 3, 3])] {
            let attention = simplified_attention(&Tensor::zeros(dims, DType::F32, &Device::Cpu)?, normalization)?;
            assert_eq!((attention.scores.dims(), attention.weights.dims()), (scores, scores));
            assert_eq!(attention.context.dims(), dims);
        }
    }
    Ok(())
}

#[test]
fn scores_of_integers_are_refused() -> Result<()> {
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax, Normalization::SumNormalized] {
        let scores = Tensor::new(&[1u32, 2], &Device::Cpu)?;
        let text = normalize(&scores, normalization).unwrap_err().to_string();
        assert!(text.contains("F16, BF16, F32 or F64") && text.contains("got U32"), "{text}");
    }
    Ok(())
}

#[test]
fn inputs_of_integers_are_refused() -> Result<()> {
    let inputs = Tensor::new(&[[1u32, 2], [3, 4]], &Device::Cpu)?;
    let text = simplified_attention(&inputs, Normalization::Softmax).unwrap_err().to_string();
    assert!(text.contains("F16, BF16, F32 or F64") && text.contains("got U32"), "{text}");
    Ok(())
}

#[test]
fn scores_without_axes_are_refused() -> Result<()> {
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax, Normalization::SumNormalized] {
        assert!(normalize(&Tensor::new(1f32, &Device::Cpu)?, normalization).is_err());
    }
    Ok(())
}
