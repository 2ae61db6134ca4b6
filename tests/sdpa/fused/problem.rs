//! A problem that is described by plain values, so that it can be sampled, printed and built for either backend in any
//! dtype.

use candle_attention::{AttentionOptions, AttentionOutput, Backend, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{gradients, numbers, randn};

use super::masks::MaskKind;

/// The memory layout of an input (batch, heads, len, dim).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Memory {
    Contiguous,
    /// Stored (batch, len, heads, dim), as the result of a projection.
    ByToken,
    /// A part of a tensor that is larger along all axes but the batch.
    Narrow,
    /// One sequence for all.
    SharedBatch,
    /// One head for all.
    SharedHead,
    /// Stored (batch, heads, dim, len): the last axis has a stride.
    ByColumn,
}

impl Memory {
    /// The shape of the stored tensor.
    fn stored(self, [batch, heads, len, dim]: [usize; 4]) -> [usize; 4] {
        match self {
            Memory::Contiguous => [batch, heads, len, dim],
            Memory::ByToken => [batch, len, heads, dim],
            Memory::Narrow => [batch, heads + 1, len + 2, dim + 3],
            Memory::SharedBatch => [1, heads, len, dim],
            Memory::SharedHead => [batch, 1, len, dim],
            Memory::ByColumn => [batch, heads, dim, len],
        }
    }

    /// The input, as a view of the stored tensor.
    fn view(self, x: &Tensor, [batch, heads, len, dim]: [usize; 4]) -> Result<Tensor> {
        match self {
            Memory::Contiguous => Ok(x.clone()),
            Memory::ByToken => x.transpose(1, 2),
            Memory::Narrow => x.narrow(1, 1, heads)?.narrow(2, 1, len)?.narrow(3, 2, dim),
            Memory::SharedBatch | Memory::SharedHead => x.broadcast_as((batch, heads, len, dim)),
            Memory::ByColumn => x.t(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub dim: usize,
    pub value_dim: usize,
}

impl Sizes {
    /// (batch, heads, q_len, kv_len), with 1 for each axis that isn't named.
    pub fn scores(&self, axes: &str) -> [usize; 4] {
        let sizes = [('b', self.batch), ('h', self.heads), ('q', self.q_len), ('k', self.kv_len)];
        sizes.map(|(axis, size)| if axes.contains(axis) { size } else { 1 })
    }
}

/// A bias over some of the axes (b, h, q, k).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    Constant(&'static str),
    Trained(&'static str),
}

#[derive(Clone, Debug)]
pub struct Case {
    pub sizes: Sizes,
    /// The memory layouts of query, key and value.
    pub memory: [Memory; 3],
    pub mask: MaskKind,
    pub bias: Option<Bias>,
    pub scale: Option<f64>,
    pub softcap: Option<f64>,
    pub alibi: bool,
    /// Whether the slopes of ALiBi want a gradient.
    pub train_slopes: bool,
    pub sinks: bool,
    pub dropout_p: f64,
    /// Whether to request the log-sum-exp, which widens half types before the computation.
    pub logsumexp: bool,
}

impl Case {
    pub fn plain(sizes: Sizes) -> Self {
        Self {
            sizes,
            memory: [Memory::Contiguous; 3],
            mask: MaskKind::Full,
            bias: None,
            scale: None,
            softcap: None,
            alibi: false,
            train_slopes: false,
            sinks: false,
            dropout_p: 0.0,
            logsumexp: true,
        }
    }

    fn shapes(&self) -> [[usize; 4]; 3] {
        let Sizes { batch, heads, kv_heads, q_len, kv_len, dim, value_dim } = self.sizes;
        [[batch, heads, q_len, dim], [batch, kv_heads, kv_len, dim], [batch, kv_heads, kv_len, value_dim]]
    }

    /// The inputs of the case, rounded to `dtype`.
    pub fn inputs(&self, dtype: DType) -> Result<Inputs> {
        let Sizes { heads, .. } = self.sizes;
        let draw = |seed, shape: &[usize]| Var::from_tensor(&randn(seed, shape, dtype)?);
        let shapes = self.shapes();
        let stored = |i: usize| draw(i as u64, &self.memory[i].stored(shapes[i]));
        let bias = self.bias.map(|bias| match bias {
            Bias::Constant(axes) | Bias::Trained(axes) => draw(3, &self.sizes.scores(axes)),
        });
        Ok(Inputs {
            stored: [stored(0)?, stored(1)?, stored(2)?],
            bias: bias.transpose()?,
            slopes: if self.alibi { Some(Var::from_tensor(&(randn(4, heads, dtype)?.abs()? * 0.1)?)?) } else { None },
            sinks: if self.sinks { Some(draw(5, &[heads])?) } else { None },
        })
    }

    pub fn options(&self, inputs: &Inputs, backend: Backend) -> Result<AttentionOptions> {
        self.options_from(inputs, backend, 0)
    }

    /// Options for a part of a larger batch that begins with the sequence `first`.
    pub fn options_from(&self, inputs: &Inputs, backend: Backend, first: usize) -> Result<AttentionOptions> {
        let trained = matches!(self.bias, Some(Bias::Trained(_)));
        let bias = |bias: &Var| if trained { bias.as_tensor().clone() } else { bias.as_detached_tensor() };
        let slopes = |slopes: &Var| {
            if self.train_slopes { slopes.as_tensor().clone() } else { slopes.as_detached_tensor() }
        };
        Ok(AttentionOptions {
            scale: self.scale,
            softcap: self.softcap,
            attn_mask: self.mask.build(&self.sizes, first)?,
            attn_bias: inputs.bias.as_ref().map(bias),
            alibi_slopes: inputs.slopes.as_ref().map(slopes),
            sinks: inputs.sinks.as_ref().map(|sinks| sinks.as_tensor().clone()),
            dropout_p: self.dropout_p,
            dropout_seed: 11,
            first_sequence: first,
            backend,
            return_weights: false,
            return_scores: None,
            return_logsumexp: self.logsumexp,
            parallel: None,
        })
    }

    /// Query, key and value.
    pub fn views(&self, inputs: &Inputs) -> Result<[Tensor; 3]> {
        let shapes = self.shapes();
        let view = |i: usize| self.memory[i].view(&inputs.stored[i], shapes[i]);
        Ok([view(0)?, view(1)?, view(2)?])
    }

    pub fn run(&self, inputs: &Inputs, backend: Backend) -> Result<Vec<Named>> {
        let [q, k, v] = self.views(inputs)?;
        results(scaled_dot_product_attention(&q, &k, &v, &self.options(inputs, backend)?)?, &inputs.trained(self))
    }
}

/// The inputs of a case.
pub struct Inputs {
    /// Query, key and value as they are stored.
    pub stored: [Var; 3],
    pub bias: Option<Var>,
    pub slopes: Option<Var>,
    pub sinks: Option<Var>,
}

impl Inputs {
    /// The same numbers in another dtype.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.map(|x| x.to_dtype(dtype))
    }

    /// The same numbers on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|x| x.to_device(device))
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let var = |x: &Var| Var::from_tensor(&f(&x.as_detached_tensor())?);
        Ok(Self {
            stored: [var(&self.stored[0])?, var(&self.stored[1])?, var(&self.stored[2])?],
            bias: self.bias.as_ref().map(var).transpose()?,
            slopes: self.slopes.as_ref().map(var).transpose()?,
            sinks: self.sinks.as_ref().map(var).transpose()?,
        })
    }

    fn trained(&self, case: &Case) -> Vec<(&'static str, &Var)> {
        let mut all = ["query", "key", "value"].into_iter().zip(&self.stored).collect::<Vec<_>>();
        if let (Some(Bias::Trained(_)), Some(bias)) = (case.bias, &self.bias) {
            all.push(("bias", bias));
        }
        all.extend(self.slopes.iter().filter(|_| case.train_slopes).map(|slopes| ("slopes", slopes)));
        all.extend(self.sinks.iter().map(|sinks| ("sinks", sinks)));
        all
    }
}

/// A result with its name.
pub type Named = (&'static str, Tensor);

/// Context, log-sum-exp if there is one, and the gradients of a random sum of both.
pub fn results(output: AttentionOutput, vars: &[(&'static str, &Var)]) -> Result<Vec<Named>> {
    let AttentionOutput { context, logsumexp, .. } = output;
    // Rounded to a half type, so that the loss of every dtype is the same.
    let factors = |seed, x: &Tensor| randn(seed, x.shape(), DType::BF16)?.to_dtype(x.dtype())?.to_device(x.device());
    let mut loss = (&context * factors(21, &context)?)?.sum_all()?.to_dtype(DType::F64)?;
    let mut all = vec![("context", context.detach())];
    if let Some(logsumexp) = logsumexp {
        // The log-sum-exp of a query without keys is minus infinity. The sum leaves it out.
        let seen = logsumexp.detach().gt(f64::NEG_INFINITY)?;
        let finite = seen.where_cond(&logsumexp, &logsumexp.zeros_like()?)?;
        loss = (loss + (&finite * factors(22, &finite)?)?.sum_all()?.to_dtype(DType::F64)?)?;
        all.push(("logsumexp", logsumexp.detach()));
    }
    let vars_only = vars.iter().map(|(_, var)| *var).collect::<Vec<_>>();
    all.extend(vars.iter().map(|(name, _)| *name).zip(gradients(&loss, &vars_only)?));
    Ok(all)
}

/// max |a - b|, relative to the largest |b|, or to `floor` if that is larger, since the terms of a gradient may cancel.
/// Infinities must be equal.
pub fn error(a: &Tensor, b: &Tensor, floor: f64) -> Result<f64> {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let (a, b) = (numbers(a)?, numbers(b)?);
    let largest = b.iter().filter(|b| b.is_finite()).fold(floor, |largest, b| largest.max(b.abs()));
    let differences = a.iter().zip(&b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() / largest });
    Ok(differences.fold(0.0, |worst: f64, d| if d > worst || d.is_nan() { d } else { worst }))
}
