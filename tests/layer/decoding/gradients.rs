//! A cache is for inference only: its output has no gradient at all, not even for some of the parameters.

use candle_attention::{ForwardOptions, Result, ScoreStage};
use candle_core::DType;

use crate::common::{randn, var};
use crate::layers::self_attention;

use super::setup::{EMBED_DIM, config};

/// W_O has no gradient either, although a graph could reach it: training only some parameters would go unnoticed.
#[test]
fn cached_output_is_detached_from_everything() -> Result<()> {
    let layer = self_attention(&config("everything"), DType::F64)?;
    let x = var(1, (2, 4, EMBED_DIM), DType::F64)?;
    let bias = var(2, (4, 4), DType::F64)?;
    let options = ForwardOptions {
        attn_bias: Some(bias.as_tensor().clone()),
        return_weights: true,
        return_scores: Some(ScoreStage::Masked),
        return_logsumexp: true,
        ..Default::default()
    };
    let output = layer.forward_cached_with(x.as_tensor(), &mut layer.kv_cache(2)?, &options)?;
    let results = [output.weights, output.scores, output.logsumexp].map(|result| result.expect("every result"));
    for result in results.into_iter().chain([output.output]) {
        assert!(!result.track_op());
        let grads = result.sum_all()?.backward()?;
        assert!(layer.vars().iter().chain([&x, &bias]).all(|var| grads.get(var.as_tensor()).is_none()));
    }
    Ok(())
}

/// A cache doesn't keep the graphs of the passes that filled it, and doesn't change the gradients of training.
#[test]
fn training_between_cached_calls_is_as_without() -> Result<()> {
    let layer = self_attention(&config("plain"), DType::F64)?;
    let x = randn(1, (1, 6, EMBED_DIM), DType::F64)?;
    let weight = layer.q_proj().weight().clone();
    let gradient = || -> Result<Vec<f64>> {
        let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
        Ok(grads.get(&weight).expect("a gradient").flatten_all()?.to_vec1()?)
    };
    let before = gradient()?;
    layer.forward_cached(&x, &mut layer.kv_cache(1)?)?;
    assert_eq!(gradient()?, before);
    Ok(())
}
