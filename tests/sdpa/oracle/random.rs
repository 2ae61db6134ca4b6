//! Random calls on every backend and in every dtype.

use attention_kernels::Dropout;
use attention_kernels::dropout::kept_by_dropout;
use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

use super::attention::{Call, Sums};
use crate::common::{Random, gradients, numbers};

/// What hides keys.
#[derive(Clone, Copy, Debug)]
enum Hide {
    Nothing,
    Causal,
    Window,
    Prefix,
    Lengths,
    Table,
    Documents,
}

/// What is added to the scores.
#[derive(Clone, Copy, Debug)]
enum Bias {
    None,
    /// Multiples of the distance between two scores.
    Small,
    /// The lowest number for some keys, for whole queries, or for all.
    Lowest,
    /// Minus infinity for some keys, for whole queries, or for all.
    MinusInfinity,
}

#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    backend: Backend,
    counts: (usize, usize, usize),
    lengths: (usize, usize),
    dims: (usize, usize),
    /// Scores are multiples of 2^scale, up to about 2^(scale + 12).
    scale: i32,
    /// The largest value is below 2^value.
    value: i32,
    hide: Hide,
    bias: (Bias, &'static str),
    options: (bool, bool, bool, bool),
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let dtypes = select(vec![DType::F32, DType::F32, DType::F64, DType::F16, DType::BF16]);
    let backends = select(vec![Backend::Auto, Backend::Fused, Backend::Reference]);
    // Decoding and tiles; few keys and many.
    let lengths = prop_oneof![(1..=9usize, 1..=600usize), (1..=9usize, 1..=40usize), (10..=140usize, 1..=220usize)];
    let hides = select(vec![
        Hide::Nothing,
        Hide::Nothing,
        Hide::Causal,
        Hide::Window,
        Hide::Prefix,
        Hide::Lengths,
        Hide::Table,
        Hide::Documents,
    ]);
    let axes = select(vec!["bhqk", "hqk", "qk", "bk", "k", "q", "h"]);
    let biases = (select(vec![Bias::None, Bias::None, Bias::Small, Bias::Lowest, Bias::MinusInfinity]), axes);
    let shape = ((1..=2usize, 1..=2usize, 1..=3usize), lengths, (1..=40usize, 1..=40usize));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let sizes = (-8..=15i32, select(vec![0, 0, 12, 100, 128, 1000, 1024]));
    (dtypes, backends, shape, sizes, hides, biases, flags, any::<u64>()).prop_map(
        |(dtype, backend, (counts, lengths, dims), (scale, value), hide, bias, options, seed)| Case {
            dtype,
            backend,
            counts,
            lengths,
            dims,
            scale,
            value,
            hide,
            bias,
            options,
            seed,
        },
    )
}

impl Case {
    fn mask(&self, random: &mut Random) -> Mask {
        let ((batch, ..), (q_len, kv_len)) = (self.counts, self.lengths);
        match self.hide {
            Hide::Nothing => Mask::full(),
            Hide::Causal => Mask::causal(),
            Hide::Window => Mask::window(Some(random.below(40)), Some(random.below(3))),
            Hide::Prefix => Mask::prefix(random.below(kv_len + 1)),
            Hide::Lengths => Mask::key_lengths(&(0..batch).map(|_| random.below(kv_len + 1)).collect::<Vec<_>>()),
            Hide::Table => {
                let allowed = (0..q_len * kv_len).map(|_| u8::from(random.below(3) == 0)).collect::<Vec<_>>();
                let allowed = Tensor::from_vec(allowed, (q_len, kv_len), &Device::Cpu).unwrap();
                Mask::from_tensor(&allowed).unwrap()
            }
            Hide::Documents if q_len <= kv_len => {
                let first = random.below(kv_len) + 1;
                Mask::documents(&[first, kv_len - first]) & Mask::causal()
            }
            Hide::Documents => Mask::full(),
        }
    }

    /// The numbers of the call, rounded to the dtype.
    fn call(&self, mask: &Mask) -> Call {
        let ((batch, kv_heads, group), (q_len, kv_len), (dim, value_dim)) = (self.counts, self.lengths, self.dims);
        let heads = kv_heads * group;
        let mut random = Random::new(self.seed);
        let (alibi, sinks, softcap, dropout) = self.options;
        // Products of small integers are exact, and so are their sums: scores are the same in every dtype.
        let mut integers = |count: usize| (0..count).map(|_| random.below(9) as f64 - 4.0).collect::<Vec<_>>();
        let (q, k) = (integers(batch * heads * q_len * dim), integers(batch * kv_heads * kv_len * dim));
        let largest = match self.dtype {
            DType::F16 => 15,
            DType::F64 => 1023,
            _ => 127,
        };
        // The reference computes no product that is larger than its result.
        let largest = if matches!(self.backend, Backend::Reference) { largest / 2 } else { largest };
        let value = self.value.min(largest);
        // Terms with a sink are computed by candle's operations.
        let sinks = sinks && value < 100;
        let numbers = |random: &mut Random, count: usize, exponent: i32| {
            let numbers = (0..count).map(|_| (random.uniform() * 2.0 - 1.0) * 2f64.powi(exponent)).collect::<Vec<_>>();
            rounded(&numbers, self.dtype)
        };
        let v = numbers(&mut random, batch * kv_heads * kv_len * value_dim, value);
        // Small scores only, where the distances between them are added exactly.
        let is_small = self.scale <= 0;
        let unit = 2f64.powi(self.scale);
        let dims = [('b', batch), ('h', heads), ('q', q_len), ('k', kv_len)];
        let dims = dims.map(|(axis, size)| if self.bias.1.contains(axis) { size } else { 1 });
        let lowest = if self.dtype == DType::F64 { f64::MIN } else { f64::from(f32::MIN) };
        let low = random.below(3);
        let mut bias = |index: usize| {
            let is_low = match low {
                0 => true,
                1 => (index / dims[3]).is_multiple_of(2),
                _ => random.below(2) == 0,
            };
            match self.bias.0 {
                Bias::None => 0.0,
                Bias::Small => (random.below(9) as f64 - 4.0) * unit,
                Bias::Lowest if is_low => lowest,
                Bias::MinusInfinity if is_low => f64::NEG_INFINITY,
                _ => 0.0,
            }
        };
        let bias: Vec<f64> = (0..dims.iter().product()).map(&mut bias).collect();
        let scores = (batch, heads, q_len, kv_len);
        let allowed = mask.to_tensor(scores, &Device::Cpu).unwrap().broadcast_as(scores).unwrap();
        let kept = kept_by_dropout(Dropout { p: 0.25, seed: self.seed, first: 0 }, scores).unwrap();
        let is_kept = |kept: u8| if dropout { f64::from(kept) / 0.75 } else { 1.0 };
        Call {
            batch,
            heads,
            kv_heads,
            q_len,
            kv_len,
            dim,
            value_dim,
            q,
            k,
            v,
            scale: unit,
            softcap: (softcap && is_small).then_some(8.0),
            bias: (!matches!(self.bias.0, Bias::None)).then_some((dims, bias)),
            slopes: (alibi && is_small).then(|| (0..heads).map(|h| unit * (h + 1) as f64).collect()),
            sinks: sinks.then(|| (0..heads).map(|h| unit * (3 * h) as f64).collect()),
            allowed: numbers_of(&allowed).into_iter().map(|x| x != 0.0).collect(),
            dropout: kept.into_iter().map(is_kept).collect(),
            is_f32: self.dtype != DType::F64,
            // The gradients are computed from the rounded context. The error is compared with the size of the terms.
            least_context: if self.dtype == DType::F16 { 2f64.powi(-24) / self.tolerance() } else { 0.0 },
            grad_context: numbers(&mut random, batch * heads * q_len * value_dim, if value > 50 { -20 } else { 0 }),
            grad_logsumexp: vec![0.0; batch * heads * q_len],
        }
    }

    /// Names, results and what they should be.
    fn run(&self) -> Result<Vec<(&'static str, Vec<f64>, Sums)>> {
        let mut random = Random::new(self.seed ^ 1);
        let mask = self.mask(&mut random);
        let call = self.call(&mask);
        let expected = call.results();
        let Call { batch, heads, kv_heads, q_len, kv_len, dim, value_dim, .. } = call;
        let (mut k, mut v) = (call.k.clone(), call.v.clone());
        // What nobody sees may hold anything.
        for row in call.hidden_rows() {
            let poison = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][row % 3];
            k[row * dim..][..dim].fill(poison);
            v[row * value_dim..][..value_dim].fill(poison);
        }
        let var = |numbers: &[f64], dims: &[usize], dtype: DType| {
            Var::from_tensor(&Tensor::from_slice(numbers, dims, &Device::Cpu)?.to_dtype(dtype)?)
        };
        let q = var(&call.q, &[batch, heads, q_len, dim], self.dtype)?;
        let k = var(&k, &[batch, kv_heads, kv_len, dim], self.dtype)?;
        let v = var(&v, &[batch, kv_heads, kv_len, value_dim], self.dtype)?;
        let compute = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let bias = call.bias.as_ref().map(|(dims, bias)| var(bias, dims, compute)).transpose()?;
        let of_heads = |x: &Option<Vec<f64>>| x.as_ref().map(|x| var(x, &[heads], compute)).transpose();
        let sinks = of_heads(&call.sinks)?;
        let slopes = of_heads(&call.slopes)?;
        let trains_slopes = slopes.is_some() && !matches!(self.backend, Backend::Fused);
        let detached =
            |slopes: &Var| if trains_slopes { slopes.as_tensor().clone() } else { slopes.as_detached_tensor() };
        let options = AttentionOptions {
            scale: Some(call.scale),
            softcap: call.softcap,
            attn_mask: mask,
            attn_bias: bias.as_ref().map(|bias| bias.as_tensor().clone()),
            alibi_slopes: slopes.as_ref().map(detached),
            sinks: sinks.as_ref().map(|sinks| sinks.as_tensor().clone()),
            dropout_p: if self.options.3 { 0.25 } else { 0.0 },
            dropout_seed: self.seed,
            backend: self.backend,
            return_logsumexp: self.seed.is_multiple_of(2),
            ..Default::default()
        };
        let output = scaled_dot_product_attention(&q, &k, &v, &options)?;
        let grad = Tensor::from_slice(&call.grad_context, (batch, heads, q_len, value_dim), &Device::Cpu)?;
        // The loss itself may overflow; its gradient is what counts.
        let loss = (&output.context * grad.to_dtype(self.dtype)?)?.sum_all()?;
        let mut trained = vec![("query", &q, expected.q), ("key", &k, expected.k), ("value", &v, expected.v)];
        trained.extend(bias.as_ref().zip(expected.bias).map(|(bias, sums)| ("bias", bias, sums)));
        trained.extend(sinks.as_ref().zip(expected.sinks).map(|(sinks, sums)| ("sinks", sinks, sums)));
        if trains_slopes {
            trained.extend(slopes.as_ref().zip(expected.slopes).map(|(slopes, sums)| ("slopes", slopes, sums)));
        }
        let grads = gradients(&loss, &trained.iter().map(|(_, var, _)| *var).collect::<Vec<_>>())?;
        let mut all = vec![("context", numbers(&output.context)?, expected.context)];
        if let Some(logsumexp) = &output.logsumexp {
            let size = expected.logsumexp.iter().map(|x| x.abs() + 1.0).collect();
            all.push(("log-sum-exp", numbers(logsumexp)?, Sums { value: expected.logsumexp, size }));
        }
        all.extend(trained.into_iter().zip(grads).map(|((name, _, sums), grad)| (name, numbers_of(&grad), sums)));
        Ok(all)
    }

    /// The error of a rounding, times what a sum of products has of them.
    fn tolerance(&self) -> f64 {
        match self.dtype {
            DType::F32 => 4e-5,
            DType::F64 => 1e-12,
            DType::F16 => 4e-3,
            _ => 3e-2,
        }
    }

    fn check(&self) {
        let tolerance = self.tolerance();
        let (largest, tiny) = match self.dtype {
            DType::F64 => (f64::MAX, 1e-290),
            DType::F16 => (65504.0, 1e-6),
            _ => (f64::from(f32::MAX), 1e-30),
        };
        for (name, got, expected) in self.run().unwrap() {
            assert_eq!(got.len(), expected.value.len());
            for (i, &got) in got.iter().enumerate() {
                let (value, size) = (expected.value[i], expected.size[i]);
                // A gradient can be larger than what the dtype can hold.
                if size > largest * 0.9 && !["context", "log-sum-exp"].contains(&name) || got == value {
                    continue;
                }
                let error = (got * 0.25 - value * 0.25).abs();
                assert!(
                    error <= 0.25 * (tolerance * size + tiny),
                    "{name} {i}: {got:e}, not {value:e} ± {size:e}\n{self:?}"
                );
            }
        }
    }
}

fn rounded(numbers: &[f64], dtype: DType) -> Vec<f64> {
    numbers_of(&Tensor::from_slice(numbers, numbers.len(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
}

fn numbers_of(x: &Tensor) -> Vec<f64> {
    numbers(x).unwrap()
}

/// The same 200 cases each time. If the environment variable `PROPTEST_CASES` is set, as many others.
fn config() -> ProptestConfig {
    let others = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() {
        return others;
    }
    ProptestConfig { cases: 200, rng_seed: RngSeed::Fixed(1), ..others }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn attention_is_its_definition_up_to_the_ends_of_the_types(case in cases()) {
        case.check();
    }
}
