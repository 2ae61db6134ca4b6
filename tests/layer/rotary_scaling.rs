//! Scaled rotary embeddings: the frequencies of real models are those of transformers and of the papers' formulas.

use candle_attention::Result;
use candle_attention::rotary::{RotaryConfig, RotaryEmbedding, RotaryScaling, Yarn};
use candle_core::{DType, Device, Tensor};

use crate::common::{assert_close, assert_same_bits, numbers, randn};
use crate::layers::{assert_candle_error_says, frequencies, scalings};

fn scaled(base: f64, scaling: RotaryScaling) -> RotaryConfig {
    RotaryConfig { base, scaling: Some(scaling), ..RotaryConfig::default() }
}

fn llama3(factor: f64) -> RotaryScaling {
    let original_max_position_embeddings = 8192;
    RotaryScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings }
}

/// The rotation of each pair in radians per position, and its magnitude, from the rotation of (1, 0) at position 1.
fn observed(config: &RotaryConfig, dim: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let ones = Tensor::ones((1, 1, 1, dim / 2), DType::F64, &Device::Cpu)?;
    let rotated = RotaryEmbedding::new(config, dim)?.apply(&Tensor::cat(&[&ones, &ones.zeros_like()?], 3)?, 1)?;
    let rotated = numbers(&rotated)?;
    let (cos, sin) = rotated.split_at(dim / 2);
    Ok(cos.iter().zip(sin).map(|(cos, sin)| (sin.atan2(*cos), sin.hypot(*cos))).unzip())
}

#[track_caller]
fn assert_relative(got: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((got / expected - 1.0).abs() < tolerance, "{what}: {got:e}, expected {expected:e}");
}

/// Name, head_dim, config, and what transformers 5.23 computes in f32: the attention factor, and the frequencies of
/// some pairs.
type Model = (&'static str, usize, RotaryConfig, f64, [(usize, f64); 4]);

fn models() -> [Model; 6] {
    let deepseek = Yarn { mscale: Some(0.707), mscale_all_dim: Some(0.5), ..Yarn::new(40.0, 4096) };
    let gpt_oss = Yarn { truncate: false, ..Yarn::new(32.0, 4096) };
    [
        (
            "Llama 3.1 8B",
            128,
            scaled(5e5, llama3(8.0)),
            1.0,
            [
                (16, 0.03760603070259094),
                (30, 0.0013718936825171113),
                (35, 9.556212171446532e-5),
                (63, 3.068925877869333e-7),
            ],
        ),
        (
            "Llama 3.2 1B",
            64,
            scaled(5e5, llama3(32.0)),
            1.0,
            [
                (8, 0.03760603070259094),
                (16, 0.000429556705057621),
                (24, 1.6619674170215148e-6),
                (31, 9.418306490260875e-8),
            ],
        ),
        (
            "gpt-oss",
            64,
            scaled(1.5e5, RotaryScaling::Yarn(gpt_oss)),
            1.3465735902799727,
            [
                (8, 0.05081327259540558),
                (14, 0.002093792660161853),
                (16, 0.0004564839182421565),
                (24, 4.099978468730114e-6),
            ],
        ),
        (
            "Qwen 2.5 for 131072 tokens",
            128,
            scaled(1e6, RotaryScaling::Yarn(Yarn::new(4.0, 32768))),
            1.138629436111989,
            [
                (16, 0.03162277862429619),
                (30, 0.0010643609566614032),
                (35, 0.0002462583943270147),
                (63, 3.102344408034696e-7),
            ],
        ),
        (
            "DeepSeek, with other mscales",
            64,
            scaled(1e4, RotaryScaling::Yarn(deepseek)),
            1.064468903941252,
            [
                (8, 0.10000000149011612),
                (14, 0.012447956018149853),
                (19, 0.0013705134624615312),
                (31, 3.3338035336782923e-6),
            ],
        ),
        (
            "Gemma 3",
            256,
            scaled(1e6, RotaryScaling::Linear { factor: 8.0 }),
            1.0,
            [(0, 0.125), (32, 0.0039528473280370235), (67, 9.042426972882822e-5), (127, 1.3924673680776323e-7)],
        ),
    ]
}

#[test]
fn frequencies_of_real_models_are_those_of_transformers() -> Result<()> {
    for (name, dim, config, attention_factor, pairs) in models() {
        let (frequencies, magnitudes) = observed(&config, dim)?;
        for (pair, expected) in pairs {
            assert_relative(frequencies[pair], expected, 1e-6, &format!("{name}, pair {pair}"));
        }
        for magnitude in magnitudes {
            assert_relative(magnitude, attention_factor, 1e-12, &format!("{name}, attention factor"));
        }
    }
    Ok(())
}

#[test]
fn frequencies_are_those_of_the_formulas() -> Result<()> {
    // All pairs make so many turns that the upper bound of the interpolated pairs would be beyond the last pair.
    let far = Yarn { beta_fast: 100.0, ..Yarn::new(4.0, 1000) };
    let far = ("a small base", 8, scaled(2.0, RotaryScaling::Yarn(far)));
    let small = scalings(4).into_iter().map(|scaling| ("few tokens", 8, scaled(50.0, scaling))).chain([far]);
    for (name, dim, config) in models().map(|(name, dim, config, ..)| (name, dim, config)).into_iter().chain(small) {
        let (got, magnitudes) = observed(&config, dim)?;
        let (expected, magnitude) = frequencies(&config, dim);
        for (pair, (got, expected)) in got.into_iter().zip(expected).enumerate() {
            assert_relative(got, expected, 1e-12, &format!("{name}, {config:?}, pair {pair}"));
        }
        assert_relative(magnitudes[0], magnitude, 1e-12, name);
    }
    Ok(())
}

#[test]
fn linear_scaling_is_position_interpolation() -> Result<()> {
    let plain = RotaryEmbedding::new(&RotaryConfig::default(), 8)?;
    let linear = RotaryEmbedding::new(&scaled(1e4, RotaryScaling::Linear { factor: 4.0 }), 8)?;
    let x = randn(1, (1, 2, 1, 8), DType::F64)?;
    for position in [0, 1, 7, 1000] {
        assert_same_bits(&linear.apply(&x, 4 * position)?, &plain.apply(&x, position)?, "interpolated");
    }
    Ok(())
}

#[test]
fn factor_of_one_changes_nothing() -> Result<()> {
    let longrope = RotaryScaling::LongRope {
        factors: vec![1.0; 8],
        factor: 1.0,
        original_max_position_embeddings: 64,
        attention_factor: None,
    };
    let x = randn(1, (1, 2, 5, 16), DType::F64)?;
    let plain = RotaryEmbedding::new(&RotaryConfig::default(), 16)?.apply(&x, 90)?;
    let yarn = RotaryScaling::Yarn(Yarn::new(1.0, 4096));
    for scaling in [RotaryScaling::Linear { factor: 1.0 }, llama3(1.0), yarn, longrope] {
        let same = RotaryEmbedding::new(&scaled(1e4, scaling.clone()), 16)?.apply(&x, 90)?;
        assert_same_bits(&same, &plain, &format!("{scaling:?}"));
    }
    Ok(())
}

/// YaRN without interpolated pairs: either all pairs make enough turns to be kept, or none does.
#[test]
fn yarn_without_pairs_between_scales_all_or_none() -> Result<()> {
    let (plain, _) = observed(&RotaryConfig { base: 4.0, ..RotaryConfig::default() }, 8)?;
    for truncate in [true, false] {
        for (original, factor) in [(1_000_000_000, 1.0), (1, 4.0)] {
            let yarn = Yarn { truncate, ..Yarn::new(4.0, original) };
            let (got, _) = observed(&scaled(4.0, RotaryScaling::Yarn(yarn)), 8)?;
            // The lower bound of the interpolated pairs is at least 0, so that pair 0 is never scaled.
            for (pair, (got, plain)) in got.iter().zip(&plain).enumerate().skip(1) {
                assert_relative(*got, plain / factor, 1e-12, &format!("original length {original}, pair {pair}"));
            }
        }
    }
    Ok(())
}

#[test]
fn attention_factor_that_is_given_is_the_one_taken() -> Result<()> {
    let magnitude = |yarn: Yarn| -> Result<f64> { Ok(observed(&scaled(1e4, RotaryScaling::Yarn(yarn)), 8)?.1[0]) };
    let yarn = Yarn::new(40.0, 4096);
    let by_factor = 0.1 * 40f64.ln() + 1.0;
    let cases = [
        (yarn.clone(), by_factor),
        (Yarn { attention_factor: Some(1.25), mscale: Some(2.0), mscale_all_dim: Some(1.0), ..yarn.clone() }, 1.25),
        (Yarn { mscale: Some(0.707), mscale_all_dim: Some(0.707), ..yarn.clone() }, 1.0),
        // As in transformers: both mscales, or none of them.
        (Yarn { mscale: Some(0.707), ..yarn.clone() }, by_factor),
        (Yarn { mscale: Some(0.707), mscale_all_dim: Some(0.0), ..yarn.clone() }, by_factor),
        (Yarn { mscale: Some(0.0), mscale_all_dim: Some(0.707), ..yarn }, by_factor),
    ];
    for (yarn, expected) in cases {
        assert_relative(magnitude(yarn.clone())?, expected, 1e-14, &format!("{yarn:?}"));
    }
    Ok(())
}

/// Angles are computed in f64, so that results in f32 and half types are precise at far positions, too.
#[test]
fn scaled_angles_keep_their_precision_at_far_positions() -> Result<()> {
    for scaling in scalings(4) {
        let rotary = RotaryEmbedding::new(&scaled(50.0, scaling.clone()), 8)?;
        let x = randn(1, (1, 2, 3, 8), DType::F64)?;
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 3e-3), (DType::BF16, 2e-2)] {
            let rotated = rotary.apply(&x.to_dtype(dtype)?, 1_000_000)?;
            assert_eq!(rotated.dtype(), dtype);
            let expected = rotary.apply(&x.to_dtype(dtype)?.to_dtype(DType::F64)?, 1_000_000)?;
            assert_close(&rotated, &expected, tolerance, &format!("{scaling:?}, {dtype:?}"));
        }
    }
    Ok(())
}

/// The fields have the names and the meaning of those in a `config.json` of transformers.
#[test]
fn scaling_reads_the_json_of_transformers() -> anyhow::Result<()> {
    let cases = [
        (r#"{"rope_type": "linear", "factor": 8.0}"#, RotaryScaling::Linear { factor: 8.0 }),
        (
            r#"{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3"}"#,
            llama3(8.0),
        ),
        (
            r#"{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}"#,
            RotaryScaling::Yarn(Yarn::new(4.0, 32768)),
        ),
        (
            r#"{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": false}"#,
            RotaryScaling::Yarn(Yarn { truncate: false, ..Yarn::new(32.0, 4096) }),
        ),
        (
            r#"{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "rope_type": "yarn"}"#,
            RotaryScaling::Yarn(Yarn { mscale: Some(0.707), mscale_all_dim: Some(1.0), ..Yarn::new(40.0, 4096) }),
        ),
    ];
    for (json, expected) in cases {
        assert_eq!(serde_json::from_str::<RotaryScaling>(json)?, expected, "{json}");
    }
    Ok(())
}

/// Configs of real models: the length as a float (DeepSeek, saved again), the older name of the type (Qwen 2.5, Yarn-Llama
/// 2), both names (transformers 4.43 and later write both), null for a field that isn't given.
#[test]
fn older_forms_of_the_json_are_the_same_scaling() -> anyhow::Result<()> {
    let yarn = || RotaryScaling::Yarn(Yarn::new(4.0, 32768));
    let cases = [
        (r#"{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}"#, yarn()),
        (r#"{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768.0}"#, yarn()),
        (
            r#"{"type": "yarn", "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 3.2768e4,
                "attention_factor": null}"#,
            yarn(),
        ),
        (r#"{"type": "linear", "factor": 8.0}"#, RotaryScaling::Linear { factor: 8.0 }),
        (
            r#"{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192.0, "type": "llama3"}"#,
            llama3(8.0),
        ),
        (
            r#"{"type": "longrope", "factors": [1, 2.5], "factor": 32, "original_max_position_embeddings": 4096.0}"#,
            RotaryScaling::LongRope {
                factors: vec![1.0, 2.5],
                factor: 32.0,
                original_max_position_embeddings: 4096,
                attention_factor: None,
            },
        ),
    ];
    for (json, expected) in cases {
        assert_eq!(serde_json::from_str::<RotaryScaling>(json)?, expected, "{json}");
        let config: RotaryConfig = serde_json::from_str(&format!(r#"{{"scaling": {json}}}"#))?;
        assert_eq!(config.scaling, Some(expected), "{json}");
    }
    Ok(())
}

#[test]
fn default_type_is_no_scaling() -> anyhow::Result<()> {
    for scaling in ["null", r#"{"rope_type": "default"}"#, r#"{"type": "default", "rope_type": "default"}"#] {
        let config: RotaryConfig = serde_json::from_str(&format!(r#"{{"base": 500.0, "scaling": {scaling}}}"#))?;
        assert_eq!(config, RotaryConfig { base: 500.0, ..Default::default() }, "{scaling}");
    }
    Ok(())
}

#[test]
fn json_that_is_no_scaling_is_refused() {
    for (json, parts) in [
        (r#"{"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768.5}"#, ["whole number", "32768.5"]),
        (r#"{"type": "yarn", "factor": 4, "original_max_position_embeddings": -1}"#, ["whole number", "-1"]),
        (r#"{"type": "yarn", "factor": 4, "original_max_position_embeddings": 1e300}"#, ["whole number", "e+300"]),
        (r#"{"type": "yarn", "factor": 4, "original_max_position_embeddings": "4096"}"#, ["string", "4096"]),
        (r#"{"type": "linear", "rope_type": "yarn", "factor": 4.0}"#, ["yarn", "linear"]),
        (r#"{"type": "linear", "factor": 2.0, "factor": 4.0}"#, ["`factor`", "twice"]),
        (r#"{"rope_type": "default", "mrope_section": [16, 24, 24]}"#, ["unknown field", "mrope_section"]),
        (r#"{"type": "dynamic", "factor": 2.0}"#, ["dynamic", "linear"]),
    ] {
        let config = serde_json::from_str::<RotaryConfig>(&format!(r#"{{"scaling": {json}}}"#));
        assert_candle_error_says(config.map_err(candle_core::Error::wrap), &parts);
    }
}
