//! Positions of each token: a token is rotated by its own position, wherever it stands.

use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
use candle_attention::{ForwardOptions, Mask, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, check_gradients, randn};
use crate::layers::{assert_error_says, cross_attention, self_attention};
use crate::positions::rotaries;

fn ids(rows: &[[i64; 4]]) -> Tensor {
    Tensor::from_slice(&rows.concat(), (rows.len(), 4), &Device::Cpu).unwrap()
}

fn with_ids(position_ids: &Tensor) -> ForwardOptions {
    ForwardOptions { position_ids: Some(position_ids.clone()), ..Default::default() }
}

fn causal_layer(dtype: DType) -> Result<SelfAttention> {
    let rotary = Some(RotaryConfig { base: 100.0, ..RotaryConfig::default() });
    self_attention(&SelfAttentionConfig { rotary, is_causal: true, ..SelfAttentionConfig::new(12, 2) }, dtype)
}

#[test]
fn each_token_is_rotated_by_its_own_position() -> Result<()> {
    let rows = [[5, 0, 1000, 5], [1, 2, 3, 4], [7, 6, 5, 0]];
    for config in rotaries() {
        let rotary = RotaryEmbedding::new(&config, 6)?;
        let x = randn(1, (3, 2, 4, 6), DType::F64)?;
        let rotated = rotary.apply_positions(&x, &ids(&rows))?;
        for (b, row) in rows.into_iter().enumerate() {
            for (i, position) in row.into_iter().enumerate() {
                let token = |x: &Tensor| x.narrow(0, b, 1)?.narrow(2, i, 1);
                let alone = rotary.apply(&token(&x)?, position as usize)?;
                assert_same_bits(&token(&rotated)?, &alone, &format!("{config:?}, sequence {b}, token {i}"));
            }
        }
        let shared = rotary.apply_positions(&x, &ids(&rows[..1]).squeeze(0)?)?;
        assert_same_bits(&shared, &rotary.apply_positions(&x, &ids(&[rows[0]; 3]))?, "one list for all sequences");
    }
    Ok(())
}

/// Every integer dtype, with and without a batch axis.
#[test]
fn ids_that_count_up_equal_an_offset() -> Result<()> {
    let layer = causal_layer(DType::F32)?;
    let x = randn(1, (2, 4, 12), DType::F32)?;
    let at_three = ForwardOptions { position_offset: 3, ..Default::default() };
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let count = ids(&[[3, 4, 5, 6]]).to_dtype(dtype)?;
        for (x, ids) in [
            (&x, count.squeeze(0)?),
            (&x, count.clone()),
            (&x, count.repeat((2, 1))?),
            (&x.get(0)?, count.squeeze(0)?),
            (&x.get(0)?, count),
        ] {
            let output = layer.forward_with(x, &with_ids(&ids))?.output;
            assert_same_bits(&output, &layer.forward_with(x, &at_three)?.output, &format!("{ids:?}"));
        }
    }
    Ok(())
}

/// Position ids and offsets alternate, so that angles kept from an earlier call would give other results.
#[test]
fn positions_do_not_depend_on_earlier_calls() -> Result<()> {
    let used = RotaryEmbedding::new(&RotaryConfig::default(), 6)?;
    let x = randn(1, (2, 1, 4, 6), DType::F32)?;
    let [first, second] = [ids(&[[0, 1, 2, 3]]), ids(&[[0, 1, 2, 9]])];
    for _ in 0..2 {
        for ids in [&first, &second] {
            let fresh = RotaryEmbedding::new(&RotaryConfig::default(), 6)?;
            assert_same_bits(&used.apply_positions(&x, ids)?, &fresh.apply_positions(&x, ids)?, "ids");
            assert_same_bits(&used.apply(&x, 1)?, &fresh.apply(&x, 1)?, "offset");
        }
    }
    Ok(())
}

/// Two sequences of 6 and 4 tokens. The second one has two tokens of padding after its first token, so that the distance
/// of two positions isn't that of their places.
fn padded(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let short = x.narrow(0, 1, 1)?;
    let padding = randn(9, (1, 2, 12), x.dtype())?;
    let short = Tensor::cat(&[&short.narrow(1, 0, 1)?, &padding, &short.narrow(1, 1, 3)?], 1)?;
    let positions = Tensor::new(&[[0i64, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]], &Device::Cpu)?;
    Ok((Tensor::cat(&[x.narrow(0, 0, 1)?, short], 0)?, positions))
}

/// Hides the padding of [`padded`] among the first `kv_len` keys.
fn no_padding(kv_len: usize) -> Result<Mask> {
    let padding = Tensor::new(&[[[[0u8, 0, 0, 0, 0, 0]]], [[[0, 1, 1, 0, 0, 0]]]], &Device::Cpu)?;
    Mask::from_blocked(&padding.narrow(3, 0, kv_len)?)
}

/// Checks the outputs for [`padded`] of the tokens that are no padding.
fn assert_as_alone(layer: &SelfAttention, output: &Tensor, x: &Tensor) -> Result<()> {
    assert_close(&output.get(0)?, &layer.forward(&x.get(0)?)?, 1e-12, "long sequence");
    let short = output.get(1)?;
    let short = Tensor::cat(&[short.narrow(0, 0, 1)?, short.narrow(0, 3, 3)?], 0)?;
    assert_close(&short, &layer.forward(&x.get(1)?.narrow(0, 0, 4)?)?, 1e-12, "short sequence");
    Ok(())
}

#[test]
fn padded_batch_with_positions_equals_each_sequence_alone() -> Result<()> {
    let layer = causal_layer(DType::F64)?;
    let x = randn(1, (2, 6, 12), DType::F64)?;
    let (padded, positions) = padded(&x)?;
    let options = ForwardOptions { attn_mask: no_padding(6)?, ..with_ids(&positions) };
    assert_as_alone(&layer, &layer.forward_with(&padded, &options)?.output, &x)
}

/// The positions differ from the places in the cache, also in the steps that follow the prompt.
#[test]
fn padded_batch_with_positions_decodes_as_each_sequence_alone() -> Result<()> {
    let layer = causal_layer(DType::F64)?;
    let x = randn(1, (2, 6, 12), DType::F64)?;
    let (padded, positions) = padded(&x)?;
    let mut cache = layer.kv_cache(2)?;
    let mut outputs = Vec::new();
    for (start, len) in [(0, 3), (3, 1), (4, 2)] {
        let ids = positions.narrow(1, start, len)?;
        let options = ForwardOptions { attn_mask: no_padding(start + len)?, ..with_ids(&ids) };
        outputs.push(layer.forward_cached_with(&padded.narrow(1, start, len)?, &mut cache, &options)?.output);
    }
    assert_as_alone(&layer, &Tensor::cat(&outputs, 1)?, &x)
}

#[test]
fn gradients_of_tokens_with_positions_are_right() -> Result<()> {
    for config in rotaries() {
        let rotary = RotaryEmbedding::new(&config, 6)?;
        let x = Var::from_tensor(&randn(1, (2, 1, 4, 6), DType::F64)?)?;
        let factors = randn(2, (2, 1, 4, 6), DType::F64)?;
        let loss = || -> candle_core::Result<Tensor> {
            (rotary.apply_positions(&x, &ids(&[[5, 0, 9, 5], [1, 2, 3, 4]]))? * &factors)?.sum_all()
        };
        check_gradients(&[("x", &x)], loss, 1e-8, &format!("{config:?}"));
    }
    Ok(())
}

#[test]
fn empty_batches_have_positions_too() -> Result<()> {
    let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 6)?;
    for (batch, len) in [(0, 4), (2, 0)] {
        let x = Tensor::zeros((batch, 2, len, 6), DType::F32, &Device::Cpu)?;
        let ids = Tensor::zeros((batch, len), DType::U32, &Device::Cpu)?;
        assert_eq!(rotary.apply_positions(&x, &ids)?.dims(), x.dims());
    }
    Ok(())
}

#[test]
fn ids_mean_nothing_without_rotary_embedding() -> Result<()> {
    let config = SelfAttentionConfig::new(12, 2);
    let x = randn(1, (2, 4, 12), DType::F32)?;
    let options = with_ids(&ids(&[[9, 8, 7, 6]]));
    let layer = self_attention(&config, DType::F32)?;
    assert_same_bits(&layer.forward_with(&x, &options)?.output, &layer.forward(&x)?, "self-attention");
    let (layer, memory) = (cross_attention(&config, DType::F32)?, randn(2, (2, 7, 12), DType::F32)?);
    let output = layer.forward_with(&x, &memory, &options)?.output;
    assert_same_bits(&output, &layer.forward(&x, &memory)?, "cross-attention");
    Ok(())
}

#[test]
fn ids_that_do_not_fit_are_refused() -> Result<()> {
    let x = randn(1, (2, 4, 12), DType::F32)?;
    let with_rotary = causal_layer(DType::F32)?;
    let without =
        self_attention(&SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(12, 2) }, x.dtype())?;
    for layer in [&with_rotary, &without] {
        let fails = |options: ForwardOptions, parts: &[&str]| -> Result<()> {
            assert_error_says(layer.forward_with(&x, &options), parts);
            let mut cache = layer.kv_cache(2)?;
            if options.position_offset == 0 {
                assert_error_says(layer.forward_cached_with(&x, &mut cache, &options), parts);
                assert!(cache.is_empty());
            }
            Ok(())
        };
        for dims in [&[3][..], &[5], &[3, 4], &[2, 3], &[4, 2], &[1, 2, 4], &[]] {
            let options = with_ids(&Tensor::zeros(dims, DType::U32, &Device::Cpu)?);
            fails(options, &["position_ids", "(len) = [4] or (batch, len) = [2, 4]", &format!("got {dims:?}")])?;
        }
        let floats = with_ids(&Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?);
        fails(floats, &["position_ids", "expected dtype U32, I64 or another integer", "got F32"])?;
        fails(with_ids(&ids(&[[0, 1, -1, 2]])), &["position: expected at least 0, got -1"])?;
        let both = ForwardOptions { position_offset: 3, ..with_ids(&ids(&[[0, 1, 2, 3]])) };
        fails(both, &["position_offset: expected 0 with position_ids, got 3"])?;
    }
    Ok(())
}
