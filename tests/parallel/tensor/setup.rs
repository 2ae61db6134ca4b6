//! A call on one process, and which part of its gradients each rank has.

use candle_attention::{ForwardOptions, Result, SelfAttentionConfig};
use candle_core::{DType, Tensor, Var};

use crate::Ranks;
use crate::common::{assert_close, assert_finite, randn};

pub const BATCH: usize = 2;
pub const LEN: usize = 7;
/// Divided by 1, 2, 3 and 4 ranks.
pub const HEADS: usize = 12;

pub fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-12 } else { 1e-5 }
}

/// A call's output, and the gradients of its input and of everything that is trained, with names.
pub struct Step {
    pub output: Tensor,
    pub gradients: Vec<(String, Tensor)>,
}

/// A step of training with the first of `inputs` as x.
pub fn step<'a>(
    x: &Tensor,
    parameters: impl IntoIterator<Item = (String, &'a Tensor)>,
    forward: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Step> {
    let x = Var::from_tensor(x)?;
    let output = forward(&x)?;
    let grads = (&output * randn(8, output.shape(), output.dtype())?)?.sum_all()?.backward()?;
    let of = |name: &str, x: &Tensor| (name.to_string(), grads.get(x).unwrap_or_else(|| panic!("{name}")).clone());
    let mut gradients = vec![of("x", &x)];
    gradients.extend(parameters.into_iter().map(|(name, parameter)| of(&name, parameter)));
    Ok(Step { output: output.detach(), gradients })
}

/// This rank's part of a tensor of the whole attention, by the parameter's name.
pub fn own(ranks: Ranks, config: &SelfAttentionConfig, name: &str, whole: &Tensor) -> Result<Tensor> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let heads = config.num_heads / size;
    let group = config.num_heads / config.num_kv_heads();
    let (first, last) = (rank * heads / group, ((rank + 1) * heads - 1) / group);
    let rows = |first: usize, count: usize, dim: usize| whole.narrow(0, first * dim, count * dim);
    let kv = |dim| rows(first, last + 1 - first, dim);
    Ok(match name {
        "q_proj.weight" | "q_proj.bias" => rows(rank * heads, heads, config.head_dim())?,
        "sinks" => rows(rank * heads, heads, 1)?,
        "k_proj.weight" | "k_proj.bias" | "bias_k" => kv(config.head_dim())?,
        "v_proj.weight" | "v_proj.bias" | "bias_v" => kv(config.value_dim())?,
        "o_proj.weight" => {
            let dim = config.value_dim();
            whole.narrow(1, rank * heads * dim, heads * dim)?
        }
        _ => whole.clone(),
    })
}

/// Whether the ranks can share the heads.
pub fn fits(ranks: Ranks, config: &SelfAttentionConfig) -> bool {
    let (size, kv_heads) = (ranks.size(), config.num_kv_heads());
    config.num_heads.is_multiple_of(size) && (kv_heads.is_multiple_of(size) || size.is_multiple_of(kv_heads))
}

/// Panics unless a rank has what one process has, or its part of it.
pub fn assert_part(what: &str, got: &Step, expected: &Step, own: impl Fn(&str, &Tensor) -> Result<Tensor>) {
    let tolerance = tolerance(expected.output.dtype());
    assert_close(&got.output, &expected.output, tolerance, &format!("{what}, output"));
    assert_eq!(got.gradients.len(), expected.gradients.len());
    for ((name, got), (other, expected)) in got.gradients.iter().zip(&expected.gradients) {
        assert_eq!(name, other);
        let expected = own(name, expected).unwrap();
        assert_eq!(got.dims(), expected.dims(), "{what}, {name}");
        assert_finite(got, &format!("{what}, {name}"));
        assert_close(got, &expected, tolerance, &format!("{what}, gradient of {name}"));
    }
}

pub fn training() -> ForwardOptions {
    ForwardOptions { train: true, ..Default::default() }
}
