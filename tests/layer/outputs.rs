//! The outputs of a layer: a request for weights or log-sum-exp changes no other number.

use candle_attention::{ForwardOptions, ForwardOutput, Result, ScoreStage, SelfAttentionConfig};
use candle_core::{D, DType};
use candle_nn::Module;

use crate::common::{assert_close, assert_same_bits, randn};
use crate::layers::{cross_attention, everything, self_attention};

#[test]
fn asking_for_weights_or_logsumexp_changes_no_number() -> Result<()> {
    for dtype in [DType::F32, DType::F16] {
        for config in [SelfAttentionConfig::new(8, 2), everything()] {
            let layer = self_attention(&config, dtype)?;
            let x = randn(1, (2, 5, config.embed_dim), dtype)?;
            let ask = |return_weights, return_logsumexp| -> Result<ForwardOutput> {
                // The same dropout each time.
                layer.set_dropout_calls(0);
                let options = ForwardOptions { train: true, return_weights, return_logsumexp, ..Default::default() };
                layer.forward_with(&x, &options)
            };
            let [none, weights, logsumexp, both] =
                [ask(false, false)?, ask(true, false)?, ask(false, true)?, ask(true, true)?];
            for other in [&weights, &logsumexp, &both] {
                assert_same_bits(&other.output, &none.output, "output");
            }
            assert!(none.weights.is_none() && none.logsumexp.is_none());
            assert!(weights.logsumexp.is_none() && logsumexp.weights.is_none());
            assert_same_bits(&both.weights.unwrap(), &weights.weights.unwrap(), "weights");
            assert_same_bits(&both.logsumexp.unwrap(), &logsumexp.logsumexp.unwrap(), "logsumexp");
        }
    }
    Ok(())
}

/// Also in decoding, in cross-attention, and without a batch axis. The everything-config has sinks, which take their
/// share of the weights and have no score.
#[test]
fn weights_are_the_softmax_of_the_masked_scores() -> Result<()> {
    let masked = ForwardOptions {
        return_weights: true,
        return_scores: Some(ScoreStage::Masked),
        return_logsumexp: true,
        ..Default::default()
    };
    let check = |output: ForwardOutput, what: &str| -> Result<()> {
        let (scores, logsumexp) = (output.scores.expect("scores"), output.logsumexp.expect("log-sum-exp"));
        let weights = scores.broadcast_sub(&logsumexp.unsqueeze(D::Minus1)?)?.exp()?;
        assert_close(&weights, &output.weights.expect("weights"), 1e-12, what);
        Ok(())
    };
    let extra_keys = SelfAttentionConfig { add_bias_kv: true, ..SelfAttentionConfig::new(8, 2) };
    for config in [extra_keys.clone(), everything()] {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(1, (2, 7, config.embed_dim), DType::F64)?;
        check(layer.forward_with(&x, &masked)?, "batch")?;
        check(layer.forward_with(&x.get(0)?, &masked)?, "no batch axis")?;
        if config.is_causal {
            let mut cache = layer.kv_cache(2)?;
            layer.prefill(&x.narrow(1, 0, 5)?, &[5, 2], &mut cache)?;
            check(layer.forward_cached_with(&x.narrow(1, 5, 2)?, &mut cache, &masked)?, "decoding")?;
        }
    }
    let layer = cross_attention(&extra_keys, DType::F64)?;
    let (x, memory) = (randn(1, (2, 3, 8), DType::F64)?, randn(2, (2, 5, 8), DType::F64)?);
    let output = layer.forward_with(&x, &memory, &masked)?;
    assert_eq!(output.scores.as_ref().expect("scores").dims(), [2, 2, 3, 6]);
    check(output, "cross-attention")
}

#[test]
fn forward_with_weights_gives_the_output_of_forward() -> Result<()> {
    let config = SelfAttentionConfig { num_kv_heads: Some(2), ..SelfAttentionConfig::new(8, 4) };
    let x = randn(1, (2, 5, 8), DType::F32)?;
    let layer = self_attention(&config, DType::F32)?;
    let (output, weights) = layer.forward_with_weights(&x)?;
    assert_same_bits(&output, &layer.forward(&x)?, "output");
    assert_eq!(weights.dims(), [2, 4, 5, 5]);
    assert_close(&weights.sum(3)?, &weights.sum(3)?.ones_like()?, 1e-6, "sums of rows");

    let memory = randn(2, (2, 3, 8), DType::F32)?;
    let layer = cross_attention(&config, DType::F32)?;
    let (output, weights) = layer.forward_with_weights(&x, &memory)?;
    assert_same_bits(&output, &layer.forward(&x, &memory)?, "cross, output");
    assert_eq!(weights.dims(), [2, 4, 5, 3]);
    Ok(())
}

#[test]
fn closure_makes_a_module_of_a_layer() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let x = randn(1, (2, 5, 8), DType::F32)?;
    let expected = layer.forward(&x)?;
    let module = candle_nn::func(move |x| Ok(layer.forward(x)?));
    assert_same_bits(&module.forward(&x)?, &expected, "output");
    Ok(())
}

/// The same input gives the same bits, again and again.
#[test]
fn forward_is_reproducible() -> Result<()> {
    let config = everything();
    let layer = self_attention(&config, DType::F32)?;
    let x = randn(1, (3, 17, config.embed_dim), DType::F32)?;
    let first = layer.forward(&x)?;
    for _ in 0..5 {
        assert_same_bits(&layer.forward(&x)?, &first, "output");
    }
    Ok(())
}
