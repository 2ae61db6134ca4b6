//! Invalid configs, and configs in JSON.

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryEmbedding, RotaryScaling, Yarn};
use candle_attention::{CrossAttention, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::layers::{assert_candle_error_says, assert_error_says, everything, scalings};

fn builder(dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu)
}

/// Checks that a config is refused by its own check and by both layers, with all these parts in the text.
#[track_caller]
fn refused(change: impl FnOnce(&mut SelfAttentionConfig), parts: &[&str]) {
    let mut config = SelfAttentionConfig::new(8, 2);
    change(&mut config);
    assert_error_says(config.validate(), parts);
    assert_error_says(SelfAttention::new(&config, builder(DType::F32)), parts);
    if config.rotary.is_none() {
        assert_error_says(CrossAttention::new(&config, builder(DType::F32)), parts);
    }
}

const NOT_FINITE: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

#[test]
fn sizes_of_zero_are_refused() {
    let expected = ["expected at least 1", "got 0"];
    refused(|c| c.embed_dim = 0, &[&["embed_dim"], &expected[..]].concat());
    refused(|c| c.num_heads = 0, &[&["num_heads"], &expected[..]].concat());
    refused(|c| c.num_kv_heads = Some(0), &[&["num_kv_heads"], &expected[..]].concat());
    refused(|c| c.head_dim = Some(0), &[&["head_dim"], &expected[..]].concat());
    refused(|c| c.value_dim = Some(0), &[&["value_dim"], &expected[..]].concat());
    refused(|c| c.kv_dim = Some(0), &[&["kv_dim"], &expected[..]].concat());
    refused(|c| c.value_input_dim = Some(0), &[&["value_input_dim"], &expected[..]].concat());
    refused(|c| c.sliding_window = Some(0), &[&["sliding_window"], &expected[..]].concat());
}

#[test]
fn single_head_of_size_zero_is_refused() {
    for (d_in, d_k, d_v) in [(0, 2, 2), (2, 0, 2), (2, 2, 0), (0, 0, 0)] {
        assert_error_says(SelfAttentionConfig::single_head(d_in, d_k, d_v).validate(), &["at least 1", "got 0"]);
    }
}

#[test]
fn heads_that_do_not_divide_embed_dim_are_refused() {
    refused(|c| c.num_heads = 3, &["embed_dim", "a multiple of num_heads 3", "got 8"]);
    refused(|c| c.num_heads = 16, &["embed_dim", "a multiple of num_heads 16", "got 8"]);
}

#[test]
fn heads_that_do_not_share_key_heads_evenly_are_refused() {
    refused(|c| c.num_kv_heads = Some(3), &["num_heads 2", "num_kv_heads 3"]);
    refused(|c| (c.num_heads, c.num_kv_heads) = (4, Some(3)), &["num_heads 4", "num_kv_heads 3"]);
    refused(|c| c.num_kv_heads = Some(usize::MAX), &["num_heads 2", "num_kv_heads"]);
}

#[test]
fn scale_that_is_not_finite_is_refused() {
    for scale in NOT_FINITE {
        refused(|c| c.scale = Some(scale), &["scale", "a finite number", &format!("got {scale}")]);
    }
}

#[test]
fn softcap_below_zero_is_refused() {
    for softcap in [-1.0, -f64::MIN_POSITIVE].into_iter().chain(NOT_FINITE) {
        refused(|c| c.softcap = Some(softcap), &["softcap", "above 0", &format!("got {softcap}")]);
    }
}

#[test]
fn epsilon_that_is_not_above_zero_is_refused() {
    for eps in [0.0, -1e-6].into_iter().chain(NOT_FINITE) {
        refused(|c| c.qk_norm_eps = Some(eps), &["qk_norm_eps", "above 0", &format!("got {eps}")]);
    }
}

#[test]
fn dropout_that_is_no_probability_below_one_is_refused() {
    for p in [1.0, 1.5, -0.1].into_iter().chain(NOT_FINITE) {
        refused(|c| c.dropout_p = p, &["dropout_p", "[0, 1)", &format!("got {p}")]);
    }
}

#[test]
fn rotary_dim_that_is_odd_zero_or_too_large_is_refused() {
    for dim in [0, 1, 3, 5, 6, usize::MAX, usize::MAX - 1] {
        let rotary = RotaryConfig { dim: Some(dim), ..Default::default() };
        let expected = ["rotary.dim", "an even number from 2 to head_dim 4", &format!("got {dim}")];
        assert_error_says(RotaryEmbedding::new(&rotary, 4), &expected);
        refused(|c| c.rotary = Some(rotary), &expected);
    }
    // All entries of a head of odd size.
    refused(|c| (c.head_dim, c.rotary) = (Some(3), Some(RotaryConfig::default())), &["rotary.dim", "even", "got 3"]);
}

#[test]
fn rotary_base_that_is_not_above_zero_is_refused() {
    for base in [0.0, -1.0].into_iter().chain(NOT_FINITE) {
        let rotary = RotaryConfig { base, ..Default::default() };
        let expected = ["rotary.base", "above 0", &format!("got {base}")];
        assert_error_says(RotaryEmbedding::new(&rotary, 4), &expected);
        refused(|c| c.rotary = Some(rotary), &expected);
    }
}

/// Checks that a rotary embedding with this scaling is refused, for base 100 and four entries.
#[track_caller]
fn scaling_refused(scaling: RotaryScaling, parts: &[&str]) {
    let rotary = RotaryConfig { base: 100.0, scaling: Some(scaling), ..Default::default() };
    assert_error_says(RotaryEmbedding::new(&rotary, 4), parts);
    refused(|c| c.rotary = Some(rotary), parts);
}

fn llama3(factor: f64, low: f64, high: f64, original: usize) -> RotaryScaling {
    RotaryScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    }
}

fn longrope(factors: &[f64], factor: f64, original: usize, attention_factor: Option<f64>) -> RotaryScaling {
    let (factors, original_max_position_embeddings) = (factors.to_vec(), original);
    RotaryScaling::LongRope { factors, factor, original_max_position_embeddings, attention_factor }
}

#[test]
fn scaling_factor_below_one_is_refused() {
    for factor in [0.0, -4.0, 0.999].into_iter().chain(NOT_FINITE) {
        let expected = ["rotary.scaling.factor", "at least 1", &format!("got {factor}")];
        scaling_refused(RotaryScaling::Linear { factor }, &expected);
        scaling_refused(llama3(factor, 1.0, 4.0, 8192), &expected);
        scaling_refused(RotaryScaling::Yarn(Yarn::new(factor, 4096)), &expected);
        scaling_refused(longrope(&[1.0, 2.0], factor, 4096, Some(1.0)), &expected);
    }
}

#[test]
fn original_length_that_is_none_is_refused() {
    let field = "rotary.scaling.original_max_position_embeddings";
    scaling_refused(llama3(8.0, 1.0, 4.0, 0), &[field, "at least 1", "got 0"]);
    scaling_refused(RotaryScaling::Yarn(Yarn::new(4.0, 0)), &[field, "at least 1", "got 0"]);
    for original in [0, 1] {
        let expected = [field, "at least 2", &format!("got {original}")];
        scaling_refused(longrope(&[1.0, 2.0], 4.0, original, None), &expected);
    }
}

#[test]
fn numbers_of_turns_in_the_wrong_order_are_refused() {
    for low in [-1.0].into_iter().chain(NOT_FINITE) {
        scaling_refused(llama3(8.0, low, 4.0, 8192), &["low_freq_factor", "at least 0", &format!("got {low}")]);
        let yarn = Yarn { beta_slow: low, ..Yarn::new(4.0, 4096) };
        scaling_refused(RotaryScaling::Yarn(yarn), &["beta_slow", "above 0", &format!("got {low}")]);
    }
    for high in [1.0, 0.5, -4.0].into_iter().chain(NOT_FINITE) {
        let expected = ["high_freq_factor", "above low_freq_factor", &format!("got {high}")];
        scaling_refused(llama3(8.0, 1.0, high, 8192), &expected);
        let yarn = Yarn { beta_fast: high, ..Yarn::new(4.0, 4096) };
        scaling_refused(RotaryScaling::Yarn(yarn), &["beta_fast", "above beta_slow", &format!("got {high}")]);
    }
}

#[test]
fn attention_factor_that_is_not_above_zero_is_refused() {
    for factor in [0.0, -1.0].into_iter().chain(NOT_FINITE) {
        let expected = ["rotary.scaling.attention_factor", "above 0", &format!("got {factor}")];
        scaling_refused(
            RotaryScaling::Yarn(Yarn { attention_factor: Some(factor), ..Yarn::new(4.0, 4096) }),
            &expected,
        );
        scaling_refused(longrope(&[1.0, 2.0], 4.0, 4096, Some(factor)), &expected);
    }
    for mscale in [-1.0].into_iter().chain(NOT_FINITE) {
        let expected = ["at least 0", &format!("got {mscale}")];
        let yarn = Yarn { mscale: Some(mscale), mscale_all_dim: Some(1.0), ..Yarn::new(4.0, 4096) };
        scaling_refused(RotaryScaling::Yarn(yarn), &[&["rotary.scaling.mscale:"], &expected[..]].concat());
        let yarn = Yarn { mscale: Some(1.0), mscale_all_dim: Some(mscale), ..Yarn::new(4.0, 4096) };
        scaling_refused(RotaryScaling::Yarn(yarn), &[&["rotary.scaling.mscale_all_dim:"], &expected[..]].concat());
    }
    // The attention factor of these finite numbers is infinite.
    let yarn = Yarn { mscale: Some(f64::MAX), mscale_all_dim: Some(1.0), ..Yarn::new(f64::MAX, 4096) };
    scaling_refused(RotaryScaling::Yarn(yarn), &["rotary.scaling.attention_factor", "finite", "got inf"]);
}

#[test]
fn longrope_factors_that_do_not_fit_the_pairs_are_refused() {
    for count in [0, 1, 3] {
        let expected = ["rotary.scaling.factors", "one for each of 2 pairs", &format!("got {count}")];
        scaling_refused(longrope(&vec![1.0; count], 4.0, 4096, None), &expected);
    }
    for factor in [0.0, -1.0].into_iter().chain(NOT_FINITE) {
        let expected = ["rotary.scaling.factors", "finite numbers above 0", &format!("got {factor}")];
        scaling_refused(longrope(&[1.0, factor], 4.0, 4096, None), &expected);
    }
}

#[test]
fn yarn_needs_a_base_above_one() {
    for base in [1.0, 0.5] {
        let scaling = Some(RotaryScaling::Yarn(Yarn::new(4.0, 4096)));
        let rotary = RotaryConfig { base, scaling, ..Default::default() };
        assert_error_says(RotaryEmbedding::new(&rotary, 4), &["rotary.base", "above 1", &format!("got {base}")]);
    }
}

/// The largest and the smallest numbers that are allowed give finite results.
#[test]
fn extreme_scalings_give_numbers() -> Result<()> {
    let yarn = |base: f64, yarn: Yarn| (base, RotaryScaling::Yarn(yarn));
    let cases = [
        (100.0, RotaryScaling::Linear { factor: f64::MAX }),
        (100.0, llama3(f64::MAX, 0.0, f64::MAX, usize::MAX)),
        (100.0, llama3(2.0, 0.0, f64::from_bits(1), 1)),
        (100.0, longrope(&[f64::MAX, 1.0], f64::MAX, usize::MAX, None)),
        yarn(1.0 + f64::EPSILON, Yarn::new(2.0, 4096)),
        yarn(f64::MAX, Yarn::new(f64::MAX, usize::MAX)),
        yarn(100.0, Yarn { beta_fast: f64::MAX, beta_slow: f64::from_bits(1), ..Yarn::new(2.0, 1) }),
        yarn(100.0, Yarn { beta_fast: f64::from_bits(2), beta_slow: f64::from_bits(1), ..Yarn::new(2.0, 4096) }),
        yarn(100.0, Yarn { beta_fast: f64::MAX, beta_slow: f64::MAX / 2.0, truncate: false, ..Yarn::new(2.0, 4096) }),
    ];
    for (base, scaling) in cases {
        let rotary = RotaryConfig { base, scaling: Some(scaling), ..Default::default() };
        let x = Tensor::ones((1, 1, 3, 4), DType::F64, &Device::Cpu)?;
        let rotated = RotaryEmbedding::new(&rotary, 4)?.apply(&x, 1000)?;
        let rotated = rotated.flatten_all()?.to_vec1::<f64>()?;
        assert!(rotated.iter().all(|x| x.is_finite()), "{rotary:?}: {rotated:?}");
    }
    Ok(())
}

#[test]
fn self_attention_refuses_a_kv_dim_of_its_own() -> Result<()> {
    let config = SelfAttentionConfig { kv_dim: Some(6), ..SelfAttentionConfig::new(8, 2) };
    config.validate()?;
    assert_error_says(SelfAttention::new(&config, builder(DType::F32)), &["kv_dim", "embed_dim 8", "got 6"]);
    CrossAttention::new(&config, builder(DType::F32))?;
    let config = SelfAttentionConfig { value_input_dim: Some(6), ..SelfAttentionConfig::new(8, 2) };
    assert_error_says(SelfAttention::new(&config, builder(DType::F32)), &["value_input_dim", "embed_dim 8", "got 6"]);
    CrossAttention::new(&config, builder(DType::F32))?;
    Ok(())
}

#[test]
fn extra_keys_have_no_place_for_alibi() {
    refused(|c| (c.alibi, c.add_bias_kv) = (true, true), &["add_bias_kv", "false with alibi", "got true"]);
    refused(|c| (c.alibi, c.add_zero_attn) = (true, true), &["add_zero_attn", "false with alibi", "got true"]);
}

#[test]
fn cross_attention_refuses_a_rotary_embedding() -> Result<()> {
    let config = SelfAttentionConfig { rotary: Some(RotaryConfig::default()), ..SelfAttentionConfig::new(8, 2) };
    config.validate()?;
    assert_error_says(CrossAttention::new(&config, builder(DType::F32)), &["rotary", "expected none", "got one"]);
    SelfAttention::new(&config, builder(DType::F32))?;
    Ok(())
}

#[test]
fn sizes_that_no_memory_can_hold_are_refused() {
    const MAX: usize = usize::MAX;
    let expected = ["parameters that memory can address"];
    refused(|c| c.embed_dim = MAX - 1, &expected);
    refused(|c| (c.embed_dim, c.num_heads) = (1 << 31, 1 << 31), &["memory"]);
    refused(|c| c.head_dim = Some(MAX), &expected);
    refused(|c| c.value_dim = Some(MAX), &expected);
    // The error names the size that is too large.
    refused(|c| c.head_dim = Some(MAX - 2), &["got 2 heads of 18446744073709551613"]);
    refused(|c| c.value_dim = Some(MAX - 2), &["18446744073709551613"]);
    refused(|c| (c.num_heads, c.head_dim) = (MAX, Some(2)), &expected);
    refused(|c| (c.num_heads, c.head_dim) = (1 << 40, Some(1 << 40)), &expected);
    let config = SelfAttentionConfig { kv_dim: Some(MAX), ..SelfAttentionConfig::new(8, 2) };
    assert_error_says(CrossAttention::new(&config, builder(DType::F32)), &expected);
    assert_error_says(SelfAttentionConfig::single_head(MAX, MAX, MAX).validate(), &expected);
}

/// The accessors return sizes for any config, even for an invalid one.
#[test]
fn accessors_of_a_bad_config_do_not_panic() {
    for size in [0, 1, usize::MAX] {
        let config = SelfAttentionConfig {
            num_heads: size,
            out_proj: false,
            sliding_window: Some(size),
            value_dim: Some(usize::MAX),
            ..SelfAttentionConfig::new(size, size)
        };
        let _ = (config.head_dim(), config.value_dim(), config.kv_dim(), config.num_kv_heads());
        let _ = (config.output_dim(), config.mask(), config.validate());
    }
}

#[test]
fn parameters_of_integers_are_refused() {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let expected = ["parameters", "expected dtype F16, BF16, F32 or F64", &format!("got {dtype:?}")];
        assert_error_says(SelfAttention::new(&SelfAttentionConfig::new(8, 2), builder(dtype)), &expected);
        assert_error_says(CrossAttention::new(&SelfAttentionConfig::new(8, 2), builder(dtype)), &expected);
    }
}

#[test]
fn unknown_fields_of_a_json_config_are_named() {
    let parse = |json: &str| serde_json::from_str::<SelfAttentionConfig>(json).map_err(candle_core::Error::wrap);
    assert_candle_error_says(parse(r#"{"embed_dim": 8, "num_heads": 2, "causal": true}"#), &["unknown field `causal`"]);
    let rotary = r#"{"embed_dim": 8, "num_heads": 2, "rotary": {"theta": 10000}}"#;
    assert_candle_error_says(parse(rotary), &["unknown field `theta`"]);
    assert_candle_error_says(parse(r#"{"num_heads": 2}"#), &["missing field `embed_dim`"]);
    assert_candle_error_says(
        parse(r#"{"embed_dim": 8, "num_heads": 2, "rotary": {"pairing": "neox"}}"#),
        &["neox", "half_split"],
    );
    let scaled = |scaling| format!(r#"{{"embed_dim": 8, "num_heads": 2, "rotary": {{"scaling": {scaling}}}}}"#);
    let cases = [
        (r#"{"rope_type": "dynamic", "factor": 2.0}"#, ["dynamic", "linear"]),
        (r#"{"factor": 2.0}"#, ["missing field", "rope_type"]),
        (r#"{"rope_type": "linear"}"#, ["missing field", "factor"]),
        (r#"{"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}"#, ["unknown field", "rope_theta"]),
        (r#"{"rope_type": "yarn", "factor": 2.0, "beta": 1.0}"#, ["unknown field", "beta"]),
        (r#"{"rope_type": "yarn", "factor": 2.0}"#, ["missing field", "original_max_position_embeddings"]),
        (r#"{"rope_type": "longrope", "short_factor": [1.0]}"#, ["unknown field", "short_factor"]),
    ];
    for (scaling, parts) in cases {
        assert_candle_error_says(parse(&scaled(scaling)), &parts);
    }
}

#[test]
fn config_comes_back_from_json_as_it_went_in() -> anyhow::Result<()> {
    let odd = SelfAttentionConfig {
        kv_dim: Some(3),
        out_proj: false,
        qkv_bias: false,
        out_bias: false,
        softcap: Some(f64::MIN_POSITIVE),
        scale: Some(-0.1),
        dropout_p: 0.1 + 0.2,
        seed: u64::MAX,
        ..everything()
    };
    let scaled = scalings(2).into_iter().map(|scaling| {
        let rotary = Some(RotaryConfig { scaling: Some(scaling), ..Default::default() });
        SelfAttentionConfig { rotary, ..SelfAttentionConfig::new(8, 2) }
    });
    for config in [SelfAttentionConfig::new(8, 2), SelfAttentionConfig::single_head(5, 3, 2), everything(), odd]
        .into_iter()
        .chain(scaled)
    {
        let json = serde_json::to_string(&config)?;
        assert_eq!(serde_json::from_str::<SelfAttentionConfig>(&json)?, config, "{json}");
        assert_eq!(serde_json::from_value::<SelfAttentionConfig>(serde_json::to_value(&config)?)?, config);
    }
    Ok(())
}

/// A JSON config needs only two sizes. All other fields are as in `new`.
#[test]
fn fields_that_json_leaves_out_are_those_of_new() -> anyhow::Result<()> {
    let config: SelfAttentionConfig = serde_json::from_str(r#"{"embed_dim": 8, "num_heads": 2}"#)?;
    assert_eq!(config, SelfAttentionConfig::new(8, 2));
    let json = r#"{"embed_dim": 8, "num_heads": 2, "rotary": {"pairing": "interleaved"}}"#;
    let config: SelfAttentionConfig = serde_json::from_str(json)?;
    let rotary = config.rotary.expect("a rotary embedding");
    assert_eq!((rotary.base, rotary.dim, rotary.pairing), (10_000.0, None, Pairing::Interleaved));
    Ok(())
}
