//! Each layer compared with its formula in plain loops, in f64, where they differ only by rounding.

use candle_attention::{ForwardOptions, Result, SelfAttentionConfig};
use candle_core::{DType, Tensor};

use crate::common::{assert_close, randn};
use crate::layers::{Formula, cross_attention, everything, self_attention};

const TOLERANCE: f64 = 1e-12;

fn with_weights() -> ForwardOptions {
    ForwardOptions { return_weights: true, ..Default::default() }
}

/// Compares a layer with its formula, for a batch of two sequences of five tokens.
fn check_self(what: &str, config: &SelfAttentionConfig, allowed: &dyn Fn(usize, usize) -> bool) -> Result<()> {
    let layer = self_attention(config, DType::F64)?;
    let x = randn(2, (2, 5, config.embed_dim), DType::F64)?;
    let result = layer.forward_with(&x, &with_weights())?;
    let weights = result.weights.expect("weights");
    for b in 0..2 {
        let formula = Formula { allowed, ..Formula::of(&layer) };
        let (output, expected) = formula.compute(&x.get(b)?, &x.get(b)?)?;
        assert_close(&weights.get(b)?, &expected, TOLERANCE, &format!("{what}, weights"));
        assert_close(&result.output.get(b)?, &output, TOLERANCE, &format!("{what}, output"));
    }
    Ok(())
}

/// As [`check_self`], with keys and values from a memory of seven tokens.
fn check_cross(what: &str, config: &SelfAttentionConfig, allowed: &dyn Fn(usize, usize) -> bool) -> Result<()> {
    let layer = cross_attention(config, DType::F64)?;
    let x = randn(2, (2, 5, config.embed_dim), DType::F64)?;
    let memory = randn(3, (2, 7, config.kv_dim()), DType::F64)?;
    let result = layer.forward_with(&x, &memory, &with_weights())?;
    let weights = result.weights.expect("weights");
    for b in 0..2 {
        let formula = Formula { allowed, ..Formula::of(&layer) };
        let (output, expected) = formula.compute(&x.get(b)?, &memory.get(b)?)?;
        assert_close(&weights.get(b)?, &expected, TOLERANCE, &format!("{what}, weights"));
        assert_close(&result.output.get(b)?, &output, TOLERANCE, &format!("{what}, output"));
    }
    Ok(())
}

#[test]
fn single_head_layer_equals_its_formula() -> Result<()> {
    for (d_in, d_k, d_v) in [(3, 2, 4), (5, 5, 5), (1, 1, 1), (4, 7, 2)] {
        let config = SelfAttentionConfig::single_head(d_in, d_k, d_v);
        check_self(&format!("{d_in} -> {d_k}, {d_v}"), &config, &|_, _| true)?;
    }
    Ok(())
}

/// softmax(X W_Qᵀ (X W_Kᵀ)ᵀ / sqrt(d_k)) X W_Vᵀ, from the layer's accessors.
#[test]
fn single_head_layer_is_three_matrices_and_a_softmax() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::single_head(3, 2, 4), DType::F64)?;
    assert!(layer.o_proj().is_none());
    let x = randn(1, (6, 3), DType::F64)?;
    let [q, k, v] = [layer.q_proj(), layer.k_proj(), layer.v_proj()].map(|proj| x.matmul(&proj.weight().t()?));
    let scores = (q?.matmul(&k?.t()?)? / 2f64.sqrt())?;
    let exponentials = scores.exp()?;
    let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(1)?)?;
    assert_close(&layer.forward(&x)?, &weights.matmul(&v?)?, TOLERANCE, "output");
    Ok(())
}

#[test]
fn multi_head_layer_equals_its_formula() -> Result<()> {
    for (embed_dim, heads) in [(8, 2), (8, 8), (6, 1), (12, 3)] {
        let config = SelfAttentionConfig::new(embed_dim, heads);
        check_self(&format!("{embed_dim}, {heads} heads"), &config, &|_, _| true)?;
    }
    Ok(())
}

#[test]
fn biases_enter_where_they_are_asked_for() -> Result<()> {
    for (qkv_bias, out_bias) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = SelfAttentionConfig { qkv_bias, out_bias, ..SelfAttentionConfig::new(6, 2) };
        check_self(&format!("{qkv_bias}, {out_bias}"), &config, &|_, _| true)?;
    }
    Ok(())
}

#[test]
fn heads_are_merged_by_w_o_or_left_side_by_side() -> Result<()> {
    let config = SelfAttentionConfig {
        head_dim: Some(4),
        value_dim: Some(5),
        out_proj: false,
        ..SelfAttentionConfig::new(6, 3)
    };
    assert_eq!(config.output_dim(), 15);
    check_self("side by side", &config, &|_, _| true)?;
    let config = SelfAttentionConfig { out_proj: true, ..config };
    assert_eq!(config.output_dim(), 6);
    check_self("merged", &config, &|_, _| true)
}

#[test]
fn each_group_of_query_heads_shares_its_key_head() -> Result<()> {
    for kv_heads in [1, 2, 3, 6] {
        let config =
            SelfAttentionConfig { num_kv_heads: Some(kv_heads), value_dim: Some(3), ..SelfAttentionConfig::new(12, 6) };
        check_self(&format!("{kv_heads} key heads"), &config, &|_, _| true)?;
        check_cross(&format!("{kv_heads} key heads, cross"), &config, &|_, _| true)?;
    }
    Ok(())
}

#[test]
fn scale_of_any_sign_replaces_the_default() -> Result<()> {
    for scale in [1.0, 0.1, -0.7, 0.0] {
        let config = SelfAttentionConfig { scale: Some(scale), ..SelfAttentionConfig::new(6, 2) };
        check_self(&format!("scale {scale}"), &config, &|_, _| true)?;
    }
    Ok(())
}

#[test]
fn softcap_bounds_the_scores() -> Result<()> {
    for softcap in [0.3, 2.0, 50.0] {
        let config = SelfAttentionConfig { softcap: Some(softcap), scale: Some(3.0), ..SelfAttentionConfig::new(6, 2) };
        check_self(&format!("softcap {softcap}"), &config, &|_, _| true)?;
    }
    Ok(())
}

#[test]
fn sink_of_each_head_takes_its_share_of_the_softmax() -> Result<()> {
    let config = SelfAttentionConfig { sinks: true, num_kv_heads: Some(2), ..SelfAttentionConfig::new(8, 4) };
    check_self("sinks", &config, &|_, _| true)?;
    let layer = self_attention(&config, DType::F64)?;
    let (_, weights) = layer.forward_with_weights(&randn(4, (5, 8), DType::F64)?)?;
    let sums = weights.sum(2)?.flatten_all()?.to_vec1::<f64>()?;
    assert!(sums.iter().all(|&sum| sum > 0.0 && sum < 1.0), "{sums:?}");
    Ok(())
}

#[test]
fn queries_and_keys_are_normalised_each_by_its_own_weight() -> Result<()> {
    for eps in [1e-6, 0.5] {
        let config = SelfAttentionConfig { qk_norm_eps: Some(eps), ..SelfAttentionConfig::new(8, 2) };
        check_self(&format!("epsilon {eps}"), &config, &|_, _| true)?;
        check_cross(&format!("epsilon {eps}, cross"), &config, &|_, _| true)?;
    }
    Ok(())
}

#[test]
fn cross_attention_equals_its_formula() -> Result<()> {
    check_cross("plain", &SelfAttentionConfig::new(8, 2), &|_, _| true)?;
    let config = SelfAttentionConfig { kv_dim: Some(5), ..SelfAttentionConfig::new(8, 2) };
    check_cross("kv_dim", &config, &|_, _| true)?;
    check_cross("one head", &SelfAttentionConfig::single_head(4, 3, 2), &|_, _| true)
}

/// Five queries are aligned with the last five of seven keys.
#[test]
fn causal_cross_attention_is_aligned_at_the_last_key() -> Result<()> {
    let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) };
    check_cross("causal", &config, &|i, j| j <= i + 2)
}

#[test]
fn layer_with_everything_equals_its_formula() -> Result<()> {
    let config = everything();
    let layer = self_attention(&config, DType::F64)?;
    let x = randn(2, (7, config.embed_dim), DType::F64)?;
    for position_offset in [0, 11] {
        let options = ForwardOptions { position_offset, ..with_weights() };
        let result = layer.forward_with(&x, &options)?;
        let formula = Formula {
            layer: &layer,
            allowed: &|i, j| j <= i && i - j < 4,
            slopes: &[0.25, 0.0625, 0.015625, 0.00390625],
            position_offset,
        };
        let (output, weights) = formula.compute(&x, &x)?;
        assert_close(&result.weights.expect("weights"), &weights, TOLERANCE, "weights");
        assert_close(&result.output, &output, TOLERANCE, "output");
    }
    Ok(())
}

/// The log-sum-exp is that of the scores: weights = exp(scores - logsumexp), so a second key of equal score doubles the
/// sum.
#[test]
fn logsumexp_counts_every_key() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(6, 2), DType::F64)?;
    let token = randn(2, (1, 6), DType::F64)?;
    let options = ForwardOptions { return_logsumexp: true, ..Default::default() };
    let logsumexp = |len: usize| -> Result<Tensor> {
        let output = layer.forward_with(&token.repeat((len, 1))?, &options)?;
        Ok(output.logsumexp.expect("logsumexp").narrow(1, 0, 1)?)
    };
    assert_eq!(logsumexp(4)?.dims(), [2, 1]);
    assert_close(
        &(logsumexp(4)? - logsumexp(1)?)?,
        &Tensor::full(4f64.ln(), (2, 1), token.device())?,
        TOLERANCE,
        "ln 4",
    );
    Ok(())
}
