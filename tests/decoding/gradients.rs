//! A cache is for inference, and says so: no gradient is half there.

use candle_attention::ForwardOptions;
use candle_core::{DType, Result};

use crate::common::{randn, var};
use crate::layers::self_attention;
use crate::setup::{EMBED_DIM, config};

/// Not even that of W_O, which a graph could still reach: training that works in part is worse than none.
#[test]
fn cached_output_is_detached_from_everything() -> Result<()> {
    let layer = self_attention(&config("everything"), DType::F64)?;
    let x = var(1, (2, 4, EMBED_DIM), DType::F64)?;
    let bias = var(2, (4, 4), DType::F64)?;
    let options = ForwardOptions {
        attn_bias: Some(bias.as_tensor().clone()),
        return_weights: true,
        return_logsumexp: true,
        ..Default::default()
    };
    let output = layer.forward_cached_with(x.as_tensor(), &mut layer.kv_cache(2)?, &options)?;
    for result in [output.output, output.weights.expect("weights"), output.logsumexp.expect("log-sum-exp")] {
        assert!(!result.track_op());
        let grads = result.sum_all()?.backward()?;
        assert!(layer.vars().iter().chain([&x, &bias]).all(|var| grads.get(var.as_tensor()).is_none()));
    }
    Ok(())
}

/// A cache doesn't keep the graphs of the passes that filled it, nor does it change what training gives.
#[test]
fn training_between_cached_calls_is_as_without() -> Result<()> {
    let layer = self_attention(&config("plain"), DType::F64)?;
    let x = randn(1, (1, 6, EMBED_DIM), DType::F64)?;
    let weight = layer.q_proj().weight().clone();
    let gradient = || -> Result<Vec<f64>> {
        let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
        grads.get(&weight).expect("a gradient").flatten_all()?.to_vec1()
    };
    let before = gradient()?;
    layer.forward_cached(&x, &mut layer.kv_cache(1)?)?;
    assert_eq!(gradient()?, before);
    Ok(())
}
