//! Cross-attention to a memory that was projected once.

use candle_attention::{Backend, ForwardOptions, Mask, Result, SelfAttentionConfig};
use candle_core::{DType, Tensor};

use crate::common::{assert_close, assert_same_bits, gradients, numbers, randn, var};
use crate::layers::{assert_error_says, cross_attention};

fn config() -> SelfAttentionConfig {
    SelfAttentionConfig {
        kv_dim: Some(6),
        num_kv_heads: Some(2),
        value_dim: Some(3),
        qk_norm_eps: Some(1e-3),
        softcap: Some(2.0),
        alibi: true,
        sinks: true,
        ..SelfAttentionConfig::new(8, 4)
    }
}

#[test]
fn projected_equals_unprojected() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        for backend in [Backend::Reference, Backend::Fused] {
            let layer = cross_attention(&config(), dtype)?;
            for kv_len in [1, 7, 150] {
                let memory = randn(2, (3, kv_len, 6), dtype)?;
                let projected = layer.project(&memory)?;
                for (seed, q_len) in [(3, 1), (4, 5), (5, 1)] {
                    let x = randn(seed, (3, q_len, 8), dtype)?;
                    let attn_mask = Mask::key_lengths(&[kv_len, kv_len / 2, 1]);
                    let options = ForwardOptions { attn_mask, backend, return_weights: true, ..Default::default() };
                    let expected = layer.forward_with(&x, &memory, &options)?;
                    let output = layer.forward_projected_with(&x, &projected, &options)?;
                    let what = format!("{dtype:?}, {backend:?}, {q_len} x {kv_len}");
                    assert_same_bits(&output.output, &expected.output, &what);
                    assert_same_bits(&output.weights.unwrap(), &expected.weights.unwrap(), &what);
                }
            }
        }
    }
    Ok(())
}

/// Keys and values from two memories, with extra keys.
#[test]
fn projected_memories_of_keys_and_values_equal_unprojected_ones() -> Result<()> {
    let config = SelfAttentionConfig {
        value_input_dim: Some(5),
        alibi: false,
        add_bias_kv: true,
        add_zero_attn: true,
        ..config()
    };
    let layer = cross_attention(&config, DType::F32)?;
    let (x, options) = (randn(1, (2, 3, 8), DType::F32)?, ForwardOptions::default());
    let (key, value) = (randn(2, (2, 7, 6), DType::F32)?, randn(3, (2, 7, 5), DType::F32)?);
    let output = layer.forward_projected(&x, &layer.project_key_value(&key, &value)?)?;
    assert_same_bits(&output, &layer.forward_key_value(&x, &key, &value, &options)?.output, "output");
    assert_error_says(layer.project(&key), &["memory of the values", "(len, 5)"]);
    Ok(())
}

#[test]
fn memory_without_batch_axis_serves_input_without_one() -> Result<()> {
    let layer = cross_attention(&config(), DType::F64)?;
    let (x, memory) = (randn(1, (2, 8), DType::F64)?, randn(2, (5, 6), DType::F64)?);
    let output = layer.forward_projected(&x, &layer.project(&memory)?)?;
    assert_same_bits(&output, &layer.forward(&x, &memory)?, "output");
    Ok(())
}

/// Several calls attend to one projected memory. The memory, W_K and W_V get the gradients of all calls.
#[test]
fn gradients_flow_through_a_projected_memory() -> Result<()> {
    let layer = cross_attention(&config(), DType::F64)?;
    let memory = var(2, (2, 5, 6), DType::F64)?;
    let steps = [randn(3, (2, 1, 8), DType::F64)?, randn(4, (2, 3, 8), DType::F64)?];
    let loss = |attend: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Tensor> {
        Ok((attend(&steps[0])?.sqr()?.sum_all()? + attend(&steps[1])?.sqr()?.sum_all()?)?)
    };
    let vars = layer.vars();
    let vars: Vec<_> = vars.iter().chain([&memory]).collect();
    let expected = gradients(&loss(&|x| layer.forward(x, memory.as_tensor()))?, &vars)?;
    let projected = layer.project(memory.as_tensor())?;
    let found = gradients(&loss(&|x| layer.forward_projected(x, &projected))?, &vars)?;
    for (found, expected) in found.iter().zip(&expected) {
        assert_close(found, expected, 1e-12, "gradient");
    }
    Ok(())
}

#[test]
fn selected_memories_are_those_of_their_sequences() -> Result<()> {
    let layer = cross_attention(&config(), DType::F64)?;
    let (x, memory) = (randn(1, (3, 1, 8), DType::F64)?, randn(2, (2, 5, 6), DType::F64)?);
    let selected = layer.project(&memory)?.select(&[1, 0, 1])?;
    let output = layer.forward_projected(&x, &selected)?;
    for (beam, sequence) in [1, 0, 1].into_iter().enumerate() {
        let expected = layer.forward(&x.get(beam)?, &memory.get(sequence)?)?;
        assert_close(&output.get(beam)?, &expected, 1e-14, &format!("beam {beam}"));
    }
    assert_error_says(layer.project(&memory)?.select(&[2]), &["sequence", "one of the 2", "got 2"]);
    Ok(())
}

/// No tokens, or no sequences: a training step finds a gradient of zeros for every parameter that attended to nothing.
#[test]
fn selecting_from_an_empty_memory_keeps_the_gradients() -> Result<()> {
    let layer = cross_attention(&config(), DType::F32)?;
    for (dims, sequences) in [((2, 0, 6), &[1, 0][..]), ((2, 5, 6), &[]), ((0, 5, 6), &[])] {
        let x = randn(1, (sequences.len(), 3, 8), DType::F32)?;
        let projected = layer.project(&randn(2, dims, DType::F32)?)?.select(sequences)?;
        let grads = layer.forward_projected(&x, &projected)?.sum_all()?.backward()?;
        for ((name, _), var) in layer.parameters().into_iter().zip(layer.vars()) {
            let gradient = grads.get(&var).unwrap_or_else(|| panic!("{dims:?}, {sequences:?}: no gradient of {name}"));
            if name.starts_with("k_") || name.starts_with("v_") {
                assert_eq!(numbers(gradient)?, vec![0.0; gradient.elem_count()], "{name}");
            }
        }
    }
    Ok(())
}

#[test]
fn memory_that_does_not_fit_is_refused() -> Result<()> {
    let layer = cross_attention(&config(), DType::F32)?;
    assert_error_says(
        layer.project(&randn(1, (2, 5, 7), DType::F32)?),
        &["memory", "(batch, len, 6)", "got [2, 5, 7]"],
    );
    let projected = layer.project(&randn(1, (2, 5, 6), DType::F32)?)?;
    for dims in [&[3, 1, 8][..], &[1, 8]] {
        let result = layer.forward_projected(&randn(1, dims, DType::F32)?, &projected);
        assert_error_says(result, &["input", "batch 1 or 2, that of the memory", &format!("got {dims:?}")]);
    }
    let single = layer.project(&randn(1, (5, 6), DType::F32)?)?;
    let result = layer.forward_projected(&randn(1, (1, 1, 8), DType::F32)?, &single);
    assert_error_says(result, &["input", "no batch axis", "got [1, 1, 8]"]);

    let x = randn(1, (2, 1, 8), DType::F32)?;
    let other = cross_attention(&SelfAttentionConfig { num_kv_heads: Some(4), ..config() }, DType::F32)?;
    assert_error_says(other.forward_projected(&x, &projected), &["key", "(batch, kv_len, 4, 2)", "got [2, 5, 2, 2]"]);
    let other = cross_attention(&SelfAttentionConfig { value_dim: Some(4), ..config() }, DType::F32)?;
    assert_error_says(other.forward_projected(&x, &projected), &["value", "(batch, kv_len, 2, 4)"]);
    let other = cross_attention(&config(), DType::F64)?;
    let x = x.to_dtype(DType::F64)?;
    assert_error_says(other.forward_projected(&x, &projected), &["key", "expected dtype F64", "got F32"]);
    Ok(())
}
