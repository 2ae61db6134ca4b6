//! Masks and biases of any number of axes, and memories and inputs with a batch of 1.

use candle_attention::{Backend, ForwardOptions, Mask, Result, SelfAttentionConfig};
use candle_core::{DType, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, gradients, randn, var};
use crate::layers::{assert_error_says, cross_attention, self_attention};

const BACKENDS: [Backend; 2] = [Backend::Reference, Backend::Fused];

/// Six heads of 4.
fn config() -> SelfAttentionConfig {
    SelfAttentionConfig { num_kv_heads: Some(3), ..SelfAttentionConfig::new(24, 6) }
}

/// A mask and a bias of the same shape.
#[derive(Clone)]
struct Extras {
    allowed: Tensor,
    bias: Tensor,
}

impl Extras {
    fn new(dims: &[usize]) -> Result<Self> {
        Ok(Self { allowed: randn(7, dims, DType::F64)?.gt(-0.4)?, bias: randn(8, dims, DType::F64)? })
    }

    fn reshape(&self, dims: &[usize]) -> Result<Self> {
        Ok(Self { allowed: self.allowed.reshape(dims)?, bias: self.bias.reshape(dims)? })
    }

    fn options(&self, backend: Backend) -> Result<ForwardOptions> {
        let (attn_mask, attn_bias) = (Mask::from_tensor(&self.allowed)?, Some(self.bias.clone()));
        Ok(ForwardOptions { attn_mask, attn_bias, backend, ..Default::default() })
    }
}

/// Shapes for 2 sequences of 6 heads with `q_len` x `kv_len` scores, and the four axes that they stand for.
fn shapes(q_len: usize, kv_len: usize) -> Vec<(Vec<usize>, [usize; 4])> {
    vec![
        (vec![2, q_len, kv_len], [2, 1, q_len, kv_len]),
        (vec![6, q_len, kv_len], [1, 6, q_len, kv_len]),
        (vec![12, q_len, kv_len], [2, 6, q_len, kv_len]),
        (vec![1, q_len, kv_len], [1, 1, q_len, kv_len]),
        (vec![2, 1, kv_len], [2, 1, 1, kv_len]),
        (vec![12, q_len, 1], [2, 6, q_len, 1]),
        (vec![kv_len], [1, 1, 1, kv_len]),
        (vec![], [1, 1, 1, 1]),
    ]
}

/// `nn.MultiheadAttention` takes (batch · num_heads, q_len, kv_len), others (batch, q_len, kv_len).
#[test]
fn first_of_three_axes_counts_sequences_heads_or_both() -> Result<()> {
    let extra_keys = SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, ..config() };
    let x = randn(1, (2, 5, 24), DType::F64)?;
    for (own, four) in shapes(5, 5) {
        let extras = Extras::new(&own)?;
        let four = extras.reshape(&four)?;
        for config in [config(), extra_keys.clone()] {
            let layer = self_attention(&config, DType::F64)?;
            for backend in BACKENDS {
                let output = layer.forward_with(&x, &extras.options(backend)?)?.output;
                let expected = layer.forward_with(&x, &four.options(backend)?)?.output;
                assert_same_bits(&output, &expected, &format!("{own:?}, {backend:?}"));
            }
        }
    }
    Ok(())
}

#[test]
fn first_of_three_axes_counts_the_same_in_cross_attention() -> Result<()> {
    let layer = cross_attention(&config(), DType::F64)?;
    let (x, memory) = (randn(1, (2, 3, 24), DType::F64)?, randn(2, (2, 7, 24), DType::F64)?);
    let projected = layer.project(&memory)?;
    for (own, four) in shapes(3, 7) {
        let extras = Extras::new(&own)?;
        let four = extras.reshape(&four)?.options(Backend::Auto)?;
        let own = extras.options(Backend::Auto)?;
        let expected = layer.forward_with(&x, &memory, &four)?.output;
        assert_same_bits(&layer.forward_with(&x, &memory, &own)?.output, &expected, "memory");
        assert_same_bits(&layer.forward_projected_with(&x, &projected, &own)?.output, &expected, "projected");
    }
    Ok(())
}

/// With ALiBi, sequences of different lengths have a bias of their own, to which that of the call is added.
#[test]
fn first_of_three_axes_counts_the_same_with_a_cache() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig { is_causal: true, alibi: true, ..config() }, DType::F64)?;
    let (prompts, x) = (randn(1, (2, 4, 24), DType::F64)?, randn(2, (2, 3, 24), DType::F64)?);
    for lengths in [[4, 4], [4, 2]] {
        for (own, four) in shapes(3, 7) {
            let run = |extras: &Extras| -> Result<Tensor> {
                let mut cache = layer.kv_cache(2)?;
                layer.prefill(&prompts, &lengths, &mut cache)?;
                Ok(layer.forward_cached_with(&x, &mut cache, &extras.options(Backend::Auto)?)?.output)
            };
            let extras = Extras::new(&own)?;
            assert_same_bits(&run(&extras)?, &run(&extras.reshape(&four)?)?, &format!("{own:?}, {lengths:?}"));
        }
    }
    Ok(())
}

#[test]
fn bias_for_each_sequence_gets_its_gradient() -> Result<()> {
    let layer = self_attention(&config(), DType::F64)?;
    let x = randn(1, (2, 5, 24), DType::F64)?;
    for (own, four) in shapes(5, 5) {
        let bias = var(3, own.as_slice(), DType::F64)?;
        let grad = |attn_bias: Tensor| -> Result<Tensor> {
            let options = ForwardOptions { attn_bias: Some(attn_bias), ..Default::default() };
            let output = layer.forward_with(&x, &options)?.output;
            Ok(gradients(&output.sqr()?.sum_all()?, &[&bias])?.remove(0))
        };
        assert_same_bits(&grad(bias.as_tensor().clone())?, &grad(bias.reshape(&four)?)?, &format!("{own:?}"));
    }
    Ok(())
}

#[test]
fn first_of_three_axes_that_could_count_sequences_or_heads_is_refused() -> Result<()> {
    let layer = self_attention(&config(), DType::F64)?;
    let x = randn(1, (6, 5, 24), DType::F64)?;
    let extras = Extras::new(&[6, 5, 5])?;
    let mask = ForwardOptions { attn_mask: Mask::from_tensor(&extras.allowed)?, ..Default::default() };
    let bias = ForwardOptions { attn_bias: Some(extras.bias.clone()), ..Default::default() };
    let expected = "of 4 axes, since batch and num_heads are both 6: (6, 1, q_len, kv_len) for each sequence \
                    or (1, 6, q_len, kv_len) for each head, got [6, 5, 5]";
    assert_error_says(layer.forward_with(&x, &mask), &["tensor: expected a shape ", expected]);
    assert_error_says(layer.forward_with(&x, &bias), &["attn_bias: expected shape ", expected]);
    for four in [[6, 1, 5, 5], [1, 6, 5, 5]] {
        layer.forward_with(&x, &extras.reshape(&four)?.options(Backend::Auto)?)?;
    }
    // One sequence of six heads, with and without a batch axis, can only have a mask for each head.
    for x in [x.narrow(0, 0, 1)?, x.get(0)?] {
        let own = layer.forward_with(&x, &extras.options(Backend::Auto)?)?.output;
        let four = layer.forward_with(&x, &extras.reshape(&[1, 6, 5, 5])?.options(Backend::Auto)?)?.output;
        assert_same_bits(&own, &four, "one sequence");
    }
    Ok(())
}

#[test]
fn mask_and_bias_that_do_not_fit_are_named_by_their_own_shape() -> Result<()> {
    let extra_keys = SelfAttentionConfig { add_bias_kv: true, ..config() };
    for config in [config(), extra_keys] {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(1, (2, 5, 24), DType::F64)?;
        for dims in [&[3, 5, 5][..], &[2, 4, 5], &[4], &[2, 5], &[2, 3, 5, 5], &[0, 5, 5], &[1, 1, 1, 5, 5][..]] {
            let bias = ForwardOptions { attn_bias: Some(randn(1, dims, DType::F64)?), ..Default::default() };
            let axes = "that broadcasts to (batch, num_heads, q_len, kv_len) = [2, 6, 5, 5], or (n, q_len, kv_len)";
            let got = format!("got {dims:?}");
            assert_error_says(layer.forward_with(&x, &bias), &["attn_bias: expected shape that", axes, &got]);
            if dims.len() <= 4 {
                let attn_mask = Mask::causal() & Mask::from_tensor(&Extras::new(dims)?.allowed)?;
                let mask = ForwardOptions { attn_mask, ..Default::default() };
                assert_error_says(layer.forward_with(&x, &mask), &["tensor: expected a shape that", axes, &got]);
            }
        }
    }
    Ok(())
}

#[test]
fn memory_with_a_batch_of_one_equals_its_copies() -> Result<()> {
    let extra_keys = SelfAttentionConfig { add_bias_kv: true, ..config() };
    for config in [config(), extra_keys] {
        let layer = cross_attention(&config, DType::F64)?;
        for (queries, memories) in [(3, 1), (1, 3)] {
            let (x, memory) = (var(1, (queries, 4, 24), DType::F64)?, var(2, (memories, 5, 24), DType::F64)?);
            let options = ForwardOptions { attn_mask: Mask::key_lengths(&[5, 2, 0]), ..Default::default() };
            let copies = |x: &Var| match x.dims()[0] {
                1 => Tensor::cat(&[x.as_tensor(); 3], 0),
                _ => Ok(x.as_tensor().clone()),
            };
            let output = layer.forward_with(&x, &memory, &options)?.output;
            let expected = layer.forward_with(&copies(&x)?, &copies(&memory)?, &options)?.output;
            assert_close(&output, &expected, 1e-13, "output");
            let projected = layer.forward_projected_with(&x, &layer.project(&memory)?, &options)?.output;
            assert_close(&projected, &expected, 1e-13, "projected");

            let vars = layer.vars();
            let vars: Vec<&Var> = [&x, &memory].into_iter().chain(&vars).collect();
            let grads =
                |output: &Tensor| gradients(&(output * randn(5, output.shape(), DType::F64)?)?.sum_all()?, &vars);
            for (grad, expected) in grads(&output)?.iter().zip(grads(&expected)?) {
                assert_close(grad, &expected, 1e-12, "gradient");
            }
        }
    }
    Ok(())
}
