//! Inputs, memories, masks, biases and positions that don't fit the layer.

use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
use candle_attention::{Error, ForwardOptions, Mask, Result, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};

use crate::common::{assert_finite, randn};
use crate::layers::{assert_error_says, cross_attention, everything, self_attention};

fn input(dims: &[usize]) -> Result<Tensor> {
    Ok(randn(1, dims, DType::F32)?)
}

#[test]
fn input_of_another_rank_is_refused() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    for dims in [&[][..], &[8], &[2, 3, 5, 8], &[1, 1, 1, 1, 8]] {
        let got = format!("rank {} with shape {dims:?}", dims.len());
        let expected = ["input", "2 axes (len, dim) or 3 (batch, len, dim)", &got];
        assert_error_says(layer.forward(&input(dims)?), &expected);
        assert_error_says(layer.forward_with_weights(&input(dims)?), &expected);
    }
    Ok(())
}

#[test]
fn input_of_another_width_is_refused() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    for dims in [&[5, 7][..], &[5, 9], &[8, 5], &[2, 5, 0], &[2, 8, 5], &[0, 16]] {
        let expected = ["input", "(len, 8) or (batch, len, 8)", &format!("got {dims:?}")];
        assert_error_says(layer.forward(&input(dims)?), &expected);
    }
    Ok(())
}

#[test]
fn input_of_another_dtype_is_refused() -> Result<()> {
    let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
    for layer_dtype in dtypes {
        let layer = self_attention(&SelfAttentionConfig::new(8, 2), layer_dtype)?;
        for dtype in dtypes.into_iter().chain([DType::U8, DType::U32, DType::I64]) {
            if dtype != layer_dtype {
                let x = Tensor::ones((5, 8), dtype, &Device::Cpu)?;
                let expected = ["input", &format!("expected dtype {layer_dtype:?}"), &format!("got {dtype:?}")];
                assert_error_says(layer.forward(&x), &expected);
            }
        }
    }
    Ok(())
}

#[test]
fn memory_that_does_not_fit_is_refused() -> Result<()> {
    let config = SelfAttentionConfig { kv_dim: Some(6), ..SelfAttentionConfig::new(8, 2) };
    let layer = cross_attention(&config, DType::F32)?;
    let x = input(&[2, 5, 8])?;
    let refuses = |memory: &Tensor, parts: &[&str]| assert_error_says(layer.forward(&x, memory), parts);
    for batch in [0, 3] {
        let got = format!("got [{batch}, 4, 6]");
        refuses(&input(&[batch, 4, 6])?, &["memory", "the batch of the input", "[2, 5, 8]", &got]);
    }
    refuses(&input(&[4, 6])?, &["memory", "the batch of the input", "[2, 5, 8]", "got [4, 6]"]);
    refuses(&input(&[2, 4, 8])?, &["memory", "(len, 6) or (batch, len, 6)", "got [2, 4, 8]"]);
    refuses(&input(&[6])?, &["memory", "2 axes", "rank 1"]);
    refuses(&input(&[1, 2, 4, 6])?, &["memory", "2 axes", "rank 4"]);
    refuses(&input(&[2, 4, 6])?.to_dtype(DType::F64)?, &["memory", "expected dtype F32", "got F64"]);
    assert_error_says(layer.forward(&input(&[5, 8])?, &input(&[2, 4, 6])?), &["memory", "got [2, 4, 6]"]);
    Ok(())
}

fn masked(attn_mask: Mask) -> ForwardOptions {
    ForwardOptions { attn_mask, ..Default::default() }
}

#[test]
fn mask_of_another_size_is_refused() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let x = input(&[2, 5, 8])?;
    let table = |dims: &[usize]| Mask::from_tensor(&Tensor::ones(dims, DType::U8, &Device::Cpu)?);
    let scores = "(batch, num_heads, q_len, kv_len) = [2, 2, 5, 5]";
    for (mask, parts) in [
        (Mask::key_lengths(&[5]), ["one for each of 2 sequences", "got 1"]),
        (Mask::key_lengths(&[5, 6]), ["at most kv_len 5", "got 6"]),
        (Mask::documents(&[2, 2]), ["documents of 5 keys together", "got 4"]),
        (table(&[5, 4])?, [scores, "got [5, 4]"]),
        (table(&[3, 1, 5, 5])?, [scores, "got [3, 1, 5, 5]"]),
        (table(&[2, 4, 5, 5])?, [scores, "got [2, 4, 5, 5]"]),
    ] {
        assert_error_says(layer.forward_with(&x, &masked(mask.clone())), &parts);
        assert_error_says(layer.forward_with(&x, &masked(mask & Mask::causal())), &parts);
    }
    // An input without a batch axis is one sequence.
    assert_error_says(
        layer.forward_with(&x.get(0)?, &masked(Mask::key_lengths(&[5, 5]))),
        &["one for each of 1", "got 2"],
    );
    Ok(())
}

#[test]
fn bias_that_does_not_fit_is_refused() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let x = input(&[2, 5, 8])?;
    let biased = |bias: Tensor| ForwardOptions { attn_bias: Some(bias), ..Default::default() };
    for dims in [&[4][..], &[5, 4], &[4, 5], &[3, 5, 5], &[3, 1, 5, 5], &[1, 1, 1, 5, 5]] {
        let got = format!("got {dims:?}");
        let expected = ["attn_bias", "(batch, num_heads, q_len, kv_len) = [2, 2, 5, 5]", &got];
        assert_error_says(layer.forward_with(&x, &biased(input(dims)?)), &expected);
    }
    let integers = Tensor::zeros((5, 5), DType::U8, &Device::Cpu)?;
    assert_error_says(layer.forward_with(&x, &biased(integers)), &["attn_bias", "F16, BF16, F32 or F64", "got U8"]);
    Ok(())
}

#[test]
fn positions_that_can_not_be_counted_are_refused() -> Result<()> {
    let at = |position_offset| ForwardOptions { position_offset, ..Default::default() };
    for dtype in [DType::F32, DType::F64] {
        let layer = self_attention(&everything(), dtype)?;
        let x = randn(1, (5, 10), dtype)?;
        for offset in [usize::MAX, usize::MAX - 4] {
            let expected = ["position_offset", "room to count the positions", "got 1844674407370955"];
            assert_error_says(layer.forward_with(&x, &at(offset)), &expected);
        }
        // The last positions that don't overflow. Afterwards the layer works as before.
        assert_finite(&layer.forward_with(&x, &at(usize::MAX - 5))?.output, "output");
        assert_finite(&layer.forward(&x)?, "output");
    }
    Ok(())
}

#[test]
fn memories_of_keys_and_values_that_do_not_fit_are_refused() -> Result<()> {
    let config = SelfAttentionConfig { kv_dim: Some(6), value_input_dim: Some(3), ..SelfAttentionConfig::new(8, 2) };
    let layer = cross_attention(&config, DType::F32)?;
    let (x, key) = (input(&[2, 5, 8])?, input(&[2, 4, 6])?);
    let refuses = |value: &Tensor, parts: &[&str]| {
        assert_error_says(layer.forward_key_value(&x, &key, value, &ForwardOptions::default()), parts);
    };
    refuses(&input(&[2, 5, 3])?, &["memory of the values", "batch and len", "[2, 4, 6]", "got [2, 5, 3]"]);
    refuses(&input(&[1, 4, 3])?, &["memory of the values", "batch and len", "[2, 4, 6]", "got [1, 4, 3]"]);
    refuses(&input(&[4, 3])?, &["memory of the values", "[2, 4, 6]", "got [4, 3]"]);
    refuses(&input(&[2, 4, 6])?, &["memory of the values", "(len, 3) or (batch, len, 3)", "got [2, 4, 6]"]);
    // One memory can't have two token sizes.
    assert_error_says(layer.forward(&x, &key), &["memory of the values", "(len, 3)"]);
    layer.forward_key_value(&x, &key, &input(&[2, 4, 3])?, &ForwardOptions::default())?;
    Ok(())
}

/// A bias is for the given keys. The keys that the layer appends have none.
#[test]
fn bias_for_extra_keys_is_refused() -> Result<()> {
    let config = SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, ..SelfAttentionConfig::new(8, 2) };
    let layer = self_attention(&config, DType::F32)?;
    let x = input(&[2, 5, 8])?;
    let with_bias = |dims: &[usize]| {
        let attn_bias = Some(input(dims)?);
        layer.forward_with(&x, &ForwardOptions { attn_bias, ..Default::default() })
    };
    for dims in [&[5, 7][..], &[5, 6], &[2, 2, 5, 7], &[7], &[0]] {
        let expected = "broadcasts to (batch, num_heads, q_len, kv_len) = [2, 2, 5, 5]";
        assert_error_says(with_bias(dims), &["attn_bias", expected, &format!("got {dims:?}")]);
    }
    for dims in [&[5, 5][..], &[5, 1], &[5], &[1], &[], &[2, 2, 5, 5]] {
        with_bias(dims)?;
    }
    Ok(())
}

#[test]
fn offsets_for_another_number_of_sequences_are_refused() -> Result<()> {
    let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 4)?;
    let x = input(&[3, 2, 5, 4])?;
    for offsets in [&[][..], &[1, 2], &[1; 4]] {
        let expected = format!("{} sequences, one for each offset", offsets.len());
        assert_error_says(rotary.apply_each(&x, offsets), &["rotary input", &expected, "got [3, 2, 5, 4]"]);
    }
    let expected = ["position_offset", "room to count the positions"];
    assert_error_says(rotary.apply_each(&x, &[0, usize::MAX, 0]), &expected);
    assert_eq!(rotary.apply_each(&input(&[0, 2, 5, 4])?, &[])?.dims(), [0, 2, 5, 4]);
    Ok(())
}

/// A part of an empty tensor may begin behind the end of its storage, where candle can't read it.
#[test]
fn parts_of_empty_tensors_have_empty_outputs() -> Result<()> {
    let part = |dims: [usize; 3]| Ok::<_, Error>(input(&dims)?.narrow(2, 9, 10)?);
    let layer = self_attention(&everything(), DType::F32)?;
    for dims in [[0, 5, 20], [2, 0, 20]] {
        let output = layer.forward_with_weights(&part(dims)?)?.0;
        assert_eq!(output.dims()[..2], dims[..2]);
    }
    let config = SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, ..SelfAttentionConfig::new(10, 2) };
    let layer = cross_attention(&config, DType::F32)?;
    let bias = input(&[2, 2, 3, 0])?.transpose(2, 3)?.narrow(3, 1, 2)?.transpose(2, 3)?;
    let options = ForwardOptions { attn_bias: Some(bias), ..Default::default() };
    let (x, memory) = (input(&[2, 2, 10])?, part([2, 0, 20])?);
    assert_finite(&layer.forward_with(&x, &memory, &options)?.output, "output");
    assert_finite(&layer.forward_projected(&x, &layer.project(&memory)?)?, "output");
    let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 10)?;
    assert_eq!(rotary.apply(&part([1, 0, 20])?.unsqueeze(0)?, 3)?.dims(), [1, 1, 0, 10]);
    let causal = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(10, 2) };
    let layer = self_attention(&causal, DType::F32)?;
    assert_eq!(layer.forward_cached(&part([2, 0, 20])?, &mut layer.kv_cache(2)?)?.dims(), [2, 0, 10]);
    Ok(())
}
