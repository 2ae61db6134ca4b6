//! Options of attention, each alone and all together, and attention in plain loops of f64.
#![allow(dead_code)] // each test uses a part

use std::sync::Arc;

use attention_kernels::dropout::kept_by_dropout;
use attention_kernels::mask::{PerSequence, Rule, ScoreShape, Table};
use attention_kernels::philox::uniform;
use attention_kernels::{
    BackwardOptions, BiasView, Dropout, Element, Gradients, Incoming, Layout, LogSumExp, Number, Output, Part, Problem,
    ProblemOptions, Saved, SimdFloat, View, backward, forward,
};

#[derive(Clone, Copy, Debug, PartialEq)]
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
    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.heads, self.q_len, self.dim]
    }

    pub fn k(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.dim]
    }

    pub fn v(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.value_dim]
    }

    pub fn context(&self) -> [usize; 4] {
        [self.batch, self.heads, self.q_len, self.value_dim]
    }
}

/// What is done to the scores, in f64.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub scale: f64,
    pub softcap: Option<f64>,
    pub rule: Rule,
    pub bias: Option<([usize; 4], Vec<f64>)>,
    pub slopes: Option<Vec<f64>>,
    pub dropout: Option<Dropout>,
    /// Whether the log-sum-exp has a gradient.
    pub grad_logsumexp: bool,
}

pub fn causal() -> Rule {
    Rule::Band { below: None, above: Some(0), offset: None }
}

/// One case for each option, and all options together.
pub fn cases(sizes: &Sizes) -> Vec<Case> {
    let Sizes { batch, heads, q_len, kv_len, dim, .. } = *sizes;
    let plain = Case {
        name: "plain",
        scale: 1.0 / (dim as f64).sqrt(),
        softcap: None,
        rule: Rule::Full,
        bias: None,
        slopes: None,
        dropout: None,
        grad_logsumexp: false,
    };
    let masked = |name, rule| Case { name, rule, ..plain.clone() };
    let bias_of = |seed, dims: [usize; 4]| Some((dims, uniform(seed, 2.0, dims.iter().product()).collect()));
    let biased = |name, seed, dims| Case { name, bias: bias_of(seed, dims), ..plain.clone() };
    // The first sequence has no keys at all.
    let lengths = Rule::FirstKeys(PerSequence::Each((0..batch).map(|b| (kv_len * b).min(kv_len - 1)).collect()));
    let allowed = uniform(7, 1.0, q_len * kv_len).map(|x| x > -0.3).collect();
    let table = Table::new([1, 1, q_len, kv_len], allowed).unwrap();
    let slopes = Some(uniform(9, 0.5, heads).map(f64::abs).collect::<Vec<_>>());
    let band = Rule::Band { below: Some(1), above: Some(0), offset: None };
    let prefix = Rule::FirstKeys(PerSequence::Same(2)) | causal();
    let mut all = vec![
        plain.clone(),
        Case { name: "log-sum-exp", grad_logsumexp: true, ..plain.clone() },
        masked("causal", causal()),
        masked("window", band),
        masked("prefix", prefix),
        masked("lengths", lengths.clone()),
        masked("table", Rule::Table(Arc::new(table))),
        Case { name: "softcap", softcap: Some(1.5), ..plain.clone() },
        biased("bias", 8, [1, heads, q_len, kv_len]),
        biased("key bias", 11, [batch, 1, 1, kv_len]),
        biased("query bias", 12, [1, 1, q_len, 1]),
        Case { name: "alibi", slopes: slopes.clone(), ..plain.clone() },
        Case { name: "dropout", dropout: Some(Dropout { p: 0.3, seed: 5, first: 0 }), ..plain.clone() },
    ];
    if q_len <= kv_len {
        let ids = PerSequence::Same((0..kv_len).map(|j| u32::from(j >= kv_len / 3)).collect());
        let documents = Rule::Documents { ids, offset: None };
        all.push(masked("documents", documents & causal()));
    }
    all.push(Case {
        name: "everything",
        scale: 0.15,
        softcap: Some(3.0),
        rule: causal() & lengths,
        bias: bias_of(8, [1, heads, q_len, kv_len]),
        slopes,
        dropout: Some(Dropout { p: 0.2, seed: 6, first: 1 << 33 }),
        grad_logsumexp: true,
    });
    all
}

/// Views of query, key, value and the gradient of the context.
pub type Views<'a, E> = [View<'a, E>; 4];

/// The number type's nearest numbers.
pub fn narrow<E: Number>(numbers: &[f64]) -> Vec<E> {
    numbers.iter().map(|&x| E::narrow(E::Float::from_f64(x))).collect()
}

pub fn to_f64<E: Number>(numbers: &[E]) -> Vec<f64> {
    numbers.iter().map(|x| x.widen().to_f64()).collect()
}

/// Log-sum-exps as numbers.
pub fn values<R: SimdFloat + Number>(logsumexp: &[LogSumExp<R>]) -> Vec<f64> {
    logsumexp.iter().map(|x| x.value().to_f64()).collect()
}

/// Both passes, with results of layout `layout`.
pub fn run<E: Element>(case: &Case, views: Views<E>, layout: Layout, bias_gradient: bool) -> (Output<E>, Gradients<E>) {
    with_problem(case, None, [views[0], views[1], views[2]], |problem| {
        let output = forward(problem, layout).unwrap();
        let dims = problem.context_dims();
        let context = View::new("context", &output.context, layout.strides(dims), dims).unwrap();
        let grad_logsumexp = case
            .grad_logsumexp
            .then(|| narrow::<E::Float>(&uniform(20, 1.0, output.logsumexp.len()).collect::<Vec<_>>()));
        let saved = Saved { context, logsumexp: &output.logsumexp };
        let incoming = Incoming { context: views[3], logsumexp: grad_logsumexp.as_deref() };
        let bias = bias_gradient && case.bias.is_some();
        let gradients = backward(problem, saved, incoming, BackwardOptions { layout, bias }).unwrap();
        (output, gradients)
    })
}

/// Calls `f` with the problem of a case, or a part of it.
pub fn with_problem<E: Element, T>(
    case: &Case,
    part: Option<Part>,
    [q, k, v]: [View<E>; 3],
    f: impl FnOnce(&Problem<E>) -> T,
) -> T {
    let floats = |numbers: &[f64]| narrow::<E::Float>(numbers);
    let bias = case.bias.as_ref().map(|(dims, numbers)| (*dims, floats(numbers)));
    let slopes = case.slopes.as_deref().map(floats);
    let bias = bias.as_ref().map(|(dims, data)| {
        let [batch, head, token] = Layout::HeadsFirst.strides(*dims);
        BiasView::new(data, *dims, [batch, head, token, 1]).unwrap()
    });
    let options = ProblemOptions {
        scale: Some(case.scale),
        softcap: case.softcap,
        mask: &case.rule,
        bias,
        slopes: slopes.as_deref(),
        dropout: case.dropout,
        part,
        heads: None,
    };
    f(&Problem::new(q, k, v, options).unwrap())
}

/// Results of the plain loops, heads first.
pub struct Naive {
    pub context: Vec<f64>,
    pub logsumexp: Vec<f64>,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub bias: Vec<f64>,
}

/// Attention and its gradient by their definitions, one score after the other; tensors stand heads first.
pub fn naive(sizes: &Sizes, case: &Case, [q, k, v, grad]: [&[f64]; 4]) -> Naive {
    let Sizes { batch, heads, kv_heads, q_len, kv_len, dim, value_dim } = *sizes;
    let shape = ScoreShape { batch, num_heads: heads, q_len, kv_len };
    let kept = case.dropout.map(|x| (x.p, kept_by_dropout(x, (batch, heads, q_len, kv_len)).unwrap()));
    let grad_logsumexp = uniform(20, 1.0, batch * heads * q_len).collect::<Vec<_>>();
    let bias_index = |dims: [usize; 4], at: [usize; 4]| {
        (0..4).fold(0, |index, axis| index * dims[axis] + if dims[axis] == 1 { 0 } else { at[axis] })
    };
    let bias_size = case.bias.as_ref().map_or(0, |(_, bias)| bias.len());
    let mut out = Naive {
        context: vec![0.0; grad.len()],
        logsumexp: vec![f64::NEG_INFINITY; batch * heads * q_len],
        q: vec![0.0; q.len()],
        k: vec![0.0; k.len()],
        v: vec![0.0; v.len()],
        bias: vec![0.0; bias_size],
    };
    for row in 0..batch * heads * q_len {
        let (b, h, i) = (row / (heads * q_len), row / q_len % heads, row % q_len);
        let key_row = |j: usize| (b * kv_heads + h / (heads / kv_heads)) * kv_len + j;
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let q = &q[row * dim..][..dim];
        let (mut scores, mut tanhs) = (vec![f64::NEG_INFINITY; kv_len], vec![0.0; kv_len]);
        for j in (0..kv_len).filter(|&j| case.rule.allows(&shape, b, h, i, j)) {
            let mut s = case.scale * dot(q, &k[key_row(j) * dim..][..dim]);
            if let Some(cap) = case.softcap {
                tanhs[j] = (s / cap).tanh();
                s = cap * tanhs[j];
            }
            s += case.bias.as_ref().map_or(0.0, |(dims, bias)| bias[bias_index(*dims, [b, h, i, j])]);
            let distance = (i + kv_len) as f64 - q_len as f64 - j as f64;
            scores[j] = s - case.slopes.as_ref().map_or(0.0, |slopes| slopes[h] * distance.abs());
        }
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if largest == f64::NEG_INFINITY {
            continue;
        }
        let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        out.logsumexp[row] = largest + total.ln();
        let drop = |j: usize| kept.as_ref().map_or(1.0, |(p, kept)| f64::from(kept[row * kv_len + j]) / (1.0 - p));
        let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp() / total).collect();
        let grad = &grad[row * value_dim..][..value_dim];
        for j in 0..kv_len {
            let v = &v[key_row(j) * value_dim..][..value_dim];
            for c in 0..value_dim {
                out.context[row * value_dim + c] += p[j] * drop(j) * v[c];
                out.v[key_row(j) * value_dim + c] += p[j] * drop(j) * grad[c];
            }
        }
        let delta = dot(grad, &out.context[row * value_dim..][..value_dim])
            - if case.grad_logsumexp { grad_logsumexp[row] } else { 0.0 };
        for j in 0..kv_len {
            let dp = drop(j) * dot(grad, &v[key_row(j) * value_dim..][..value_dim]);
            let mut ds = p[j] * (dp - delta);
            if let Some((dims, _)) = &case.bias {
                out.bias[bias_index(*dims, [b, h, i, j])] += ds;
            }
            ds *= case.scale * (1.0 - tanhs[j] * tanhs[j]);
            for c in 0..dim {
                out.q[row * dim + c] += ds * k[key_row(j) * dim + c];
                out.k[key_row(j) * dim + c] += ds * q[c];
            }
        }
    }
    out
}
