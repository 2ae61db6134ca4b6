//! Rotary embedding from the cosines and sines of another program.

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryEmbedding};
use candle_attention::{Layout, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, check_gradients, numbers, randn, var};
use crate::layers::{assert_error_says, frequencies, self_attention};
use crate::positions::rotaries;

const PAIRINGS: [Pairing; 2] = [Pairing::HalfSplit, Pairing::Interleaved];

/// The tables of the config for this many positions, for heads of 6.
fn tables(config: &RotaryConfig, max_position: usize) -> Result<(Tensor, Tensor)> {
    let dim = config.dim.unwrap_or(6);
    let (frequencies, magnitude) = frequencies(config, dim);
    let table = |f: fn(f64) -> f64| {
        let angles = (0..max_position).flat_map(|p| frequencies.iter().map(move |frequency| p as f64 * frequency));
        let values: Vec<_> = angles.map(|angle| magnitude * f(angle)).collect();
        Tensor::from_vec(values, (max_position, dim / 2), &Device::Cpu)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

fn from_config(config: &RotaryConfig, max_position: usize) -> Result<RotaryEmbedding> {
    let (cos, sin) = tables(config, max_position)?;
    RotaryEmbedding::from_tables(&cos, &sin, 6, config.pairing)
}

#[test]
fn tables_of_a_config_rotate_as_the_config() -> Result<()> {
    let ids = Tensor::new(&[[5u32, 0, 11, 5], [1, 2, 3, 4], [0, 0, 0, 1]], &Device::Cpu)?;
    for config in rotaries() {
        let (rotary, expected) = (from_config(&config, 12)?, RotaryEmbedding::new(&config, 6)?);
        let x = randn(1, (3, 2, 4, 6), DType::F64)?;
        let what = format!("{config:?}");
        // The last position is that of the last row.
        for offset in [0, 3, 8] {
            assert_close(&rotary.apply(&x, offset)?, &expected.apply(&x, offset)?, 1e-12, &what);
        }
        assert_close(&rotary.apply_each(&x, &[8, 0, 3])?, &expected.apply_each(&x, &[8, 0, 3])?, 1e-12, &what);
        assert_close(&rotary.apply_positions(&x, &ids)?, &expected.apply_positions(&x, &ids)?, 1e-12, &what);
    }
    Ok(())
}

/// The formula as loops, for tables of any numbers: (a cos - b sin, a sin + b cos).
#[test]
fn tables_of_each_sequence_are_read_at_its_positions() -> Result<()> {
    let (heads, len, head_dim, pairs, max_position) = (2, 4, 6, 2, 5);
    let positions = [[0usize, 1, 2, 3], [4, 4, 0, 2], [1, 2, 3, 4]];
    let ids = Tensor::from_iter(positions.iter().flatten().map(|&p| p as i64), &Device::Cpu)?.reshape((3, len))?;
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::BF16, 3e-2)] {
        for pairing in PAIRINGS {
            let x = randn(1, (3, heads, len, head_dim), dtype)?;
            let cos = randn(2, (3, max_position, pairs), DType::F32)?;
            let sin = randn(3, (3, max_position, pairs), DType::F32)?;
            let rotary = RotaryEmbedding::from_tables(&cos, &sin, head_dim, pairing)?;
            let mut expected = numbers(&x)?;
            let (cos, sin) = (numbers(&cos)?, numbers(&sin)?);
            for (row, head) in expected.chunks_mut(head_dim).enumerate() {
                let (b, i) = (row / (heads * len), row % len);
                for pair in 0..pairs {
                    let (first, second) = match pairing {
                        Pairing::HalfSplit => (pair, pair + pairs),
                        Pairing::Interleaved => (2 * pair, 2 * pair + 1),
                    };
                    let at = (b * max_position + positions[b][i]) * pairs + pair;
                    let (x, y) = (head[first], head[second]);
                    (head[first], head[second]) = (x * cos[at] - y * sin[at], x * sin[at] + y * cos[at]);
                }
            }
            let expected = Tensor::from_vec(expected, x.shape(), &Device::Cpu)?;
            let rotated = rotary.apply_positions(&x, &ids)?;
            assert_eq!(rotated.dtype(), dtype);
            assert_close(&rotated, &expected, tolerance, &format!("{pairing:?}, {dtype:?}"));
        }
    }
    Ok(())
}

/// As ONNX's RotaryEmbedding without position ids: row `i` is that of token `i`.
#[test]
fn tables_of_each_sequence_equal_each_alone() -> Result<()> {
    let (cos, sin) = (randn(1, (3, 4, 3), DType::F64)?, randn(2, (3, 4, 3), DType::F64)?);
    let x = randn(3, (3, 2, 4, 6), DType::F64)?;
    for pairing in PAIRINGS {
        let rotated = RotaryEmbedding::from_tables(&cos, &sin, 6, pairing)?.apply(&x, 0)?;
        for b in 0..3 {
            let alone = RotaryEmbedding::from_tables(&cos.get(b)?, &sin.get(b)?, 6, pairing)?;
            let expected = alone.apply(&x.narrow(0, b, 1)?, 0)?;
            assert_same_bits(&rotated.narrow(0, b, 1)?, &expected, &format!("{pairing:?}, sequence {b}"));
        }
        let shared = RotaryEmbedding::from_tables(&cos.narrow(0, 1, 1)?, &sin.narrow(0, 1, 1)?, 6, pairing)?;
        let alone = RotaryEmbedding::from_tables(&cos.get(1)?, &sin.get(1)?, 6, pairing)?;
        assert_same_bits(&shared.apply(&x, 0)?, &alone.apply(&x, 0)?, "one table for all sequences");
    }
    Ok(())
}

#[test]
fn input_gets_a_gradient_and_tables_get_none() -> Result<()> {
    for pairing in PAIRINGS {
        let x: Var = var(1, (2, 1, 3, 6), DType::F64)?;
        let (cos, sin) = (var(2, (4, 2), DType::F64)?, var(3, (4, 2), DType::F64)?);
        let rotary = RotaryEmbedding::from_tables(&cos, &sin, 6, pairing)?;
        let factors = randn(4, (2, 1, 3, 6), DType::F64)?;
        let loss = || -> candle_core::Result<Tensor> { (rotary.apply(&x, 1)? * &factors)?.sum_all() };
        check_gradients(&[("x", &x)], loss, 1e-8, &format!("{pairing:?}"));
        let grads = loss()?.backward()?;
        assert!(grads.get(cos.as_tensor()).is_none() && grads.get(sin.as_tensor()).is_none());
    }
    Ok(())
}

fn config(rotary: Option<RotaryConfig>) -> SelfAttentionConfig {
    SelfAttentionConfig { rotary, is_causal: true, ..SelfAttentionConfig::new(12, 2) }
}

/// A layer with the rotary embedding of a config, and the same layer with tables.
fn layers() -> Result<(SelfAttention, SelfAttention)> {
    let rotary = RotaryConfig { base: 50.0, ..RotaryConfig::default() };
    let layer = self_attention(&config(Some(rotary.clone())), DType::F64)?;
    let with_tables = layer.clone().with_rotary(from_config(&rotary, 12)?)?;
    Ok((layer, with_tables))
}

#[test]
fn layer_with_tables_equals_the_layer_with_their_config() -> Result<()> {
    let (layer, with_tables) = layers()?;
    let x = randn(1, (2, 9, 12), DType::F64)?;
    let expected = layer.forward(&x)?;
    assert_close(&with_tables.forward(&x)?, &expected, 1e-12, "forward");
    let copy = with_tables.trainable()?;
    assert_close(&copy.forward(&x)?, &expected, 1e-12, "a trainable copy");
    let mut cache = with_tables.kv_cache(2)?;
    let first = with_tables.forward_cached(&x.narrow(1, 0, 7)?, &mut cache)?;
    let rest = with_tables.forward_cached(&x.narrow(1, 7, 2)?, &mut cache)?;
    assert_close(&Tensor::cat(&[first, rest], 1)?, &expected, 1e-12, "decoding");
    // The tables end at position 11.
    let parts = ["position: expected less than 12, the number of rows of cos and sin, got 12"];
    assert_error_says(with_tables.forward_cached(&x.narrow(1, 0, 4)?, &mut cache), &parts);
    assert_eq!(cache.lengths(), [9, 9]);
    Ok(())
}

/// A file has the config and no tables. Loaded again, the layer would have no rotary embedding.
#[test]
fn layer_with_tables_is_saved_by_its_parameters_only() -> Result<()> {
    let (layer, with_tables) = layers()?;
    assert_eq!(with_tables.config().rotary, None);
    assert_error_says(with_tables.to_bytes(), &["config, rotary", "a file holds no tables", "got tables"]);
    let path = std::env::temp_dir().join("no_file_is_written");
    assert_error_says(with_tables.trainable()?.save(path), &["config, rotary"]);
    assert_eq!(with_tables.to_layout(Layout::Own)?.len(), layer.to_layout(Layout::Own)?.len());

    let rotary = RotaryConfig { base: 50.0, ..RotaryConfig::default() };
    let plain = self_attention(&config(None), DType::F64)?;
    let again = plain.with_rotary(RotaryEmbedding::new(&rotary, 6)?)?;
    assert_eq!(again.config().rotary, Some(rotary));
    let loaded = SelfAttention::from_bytes(&again.to_bytes()?, &Device::Cpu)?;
    let x = randn(1, (2, 5, 12), DType::F64)?;
    assert_same_bits(&loaded.forward(&x)?, &again.forward(&x)?, "loaded");
    Ok(())
}

#[test]
fn tables_that_do_not_fit_are_refused() -> Result<()> {
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let make = |cos: &Tensor, sin: &Tensor| RotaryEmbedding::from_tables(cos, sin, 6, Pairing::HalfSplit);
    let f32 = |dims: &[usize]| zeros(dims, DType::F32);
    for dims in [&[3][..], &[1, 1, 4, 3], &[]] {
        assert_error_says(make(&f32(dims), &f32(dims)), &["cos", "2 axes (max_position, dim / 2)", "rank"]);
    }
    for dims in [&[4, 0][..], &[4, 4], &[2, 4, 6]] {
        let parts = ["cos", "dim / 2 from 1 to 3, half of head_dim 6", &format!("got {dims:?}")];
        assert_error_says(make(&f32(dims), &f32(dims)), &parts);
    }
    assert_error_says(make(&f32(&[4, 3]), &f32(&[4, 2])), &["sin", "[4, 3], that of cos", "got [4, 2]"]);
    let ints = zeros(&[4, 3], DType::U32);
    assert_error_says(make(&ints, &f32(&[4, 3])), &["cos", "expected dtype F16, BF16, F32 or F64", "got U32"]);
    assert_error_says(make(&f32(&[4, 3]), &ints), &["sin", "expected dtype F16, BF16, F32 or F64", "got U32"]);
    let of_two = RotaryEmbedding::from_tables(&f32(&[2, 4, 3]), &f32(&[2, 4, 3]), 6, Pairing::HalfSplit)?;
    let parts = ["cos", "batch 3, that of the rotary input", "got [2, 4, 3]"];
    assert_error_says(of_two.apply(&f32(&[3, 1, 4, 6]), 0), &parts);
    let parts = ["position: expected less than 4, the number of rows of cos and sin, got 4"];
    assert_error_says(of_two.apply(&f32(&[2, 1, 4, 6]), 1), &parts);
    assert_error_says(of_two.apply(&f32(&[2, 1, 4, 6]), usize::MAX), &["position_offset"]);
    let none = RotaryEmbedding::from_tables(&f32(&[0, 3]), &f32(&[0, 3]), 6, Pairing::HalfSplit)?;
    assert_error_says(none.apply(&f32(&[2, 1, 1, 6]), 0), &["position: expected less than 0"]);

    let layer = self_attention(&config(None), DType::F32)?;
    let other = RotaryEmbedding::new(&RotaryConfig::default(), 4)?;
    assert_error_says(layer.with_rotary(other), &["config, rotary", "one for head_dim 6", "got one for 4"]);
    Ok(())
}
