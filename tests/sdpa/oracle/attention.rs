//! Attention and its gradients by their definitions, one score after the other, in f64.

/// One call. Tensors stand heads first, row by row, and hold numbers that the dtype can hold.
#[derive(Clone, Debug)]
pub struct Call {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub dim: usize,
    pub value_dim: usize,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub scale: f64,
    pub softcap: Option<f64>,
    /// With its four axes, each of which may be 1.
    pub bias: Option<([usize; 4], Vec<f64>)>,
    /// One for each head.
    pub slopes: Option<Vec<f64>>,
    pub sinks: Option<Vec<f64>>,
    /// Of each score: whether the mask shows it.
    pub allowed: Vec<bool>,
    /// Of each score: what dropout multiplies its weight by.
    pub dropout: Vec<f64>,
    /// Whether scores are rounded to f32.
    pub is_f32: bool,
    /// What a number of the context may be off by because its dtype has no smaller numbers.
    pub least_context: f64,
    pub grad_context: Vec<f64>,
    pub grad_logsumexp: Vec<f64>,
}

/// A result, and for each of its numbers the sum of the magnitudes of the terms that it is a sum of: rounding makes errors of
/// that size.
#[derive(Clone, Debug)]
pub struct Sums {
    pub value: Vec<f64>,
    pub size: Vec<f64>,
}

impl Sums {
    fn zeros(count: usize) -> Self {
        Self { value: vec![0.0; count], size: vec![0.0; count] }
    }

    fn add(&mut self, index: usize, term: f64, size: f64) {
        self.value[index] += term;
        self.size[index] += size;
    }
}

pub struct Results {
    pub context: Sums,
    pub logsumexp: Vec<f64>,
    pub q: Sums,
    pub k: Sums,
    pub v: Sums,
    pub bias: Option<Sums>,
    pub slopes: Option<Sums>,
    pub sinks: Option<Sums>,
}

impl Call {
    fn bias_index(&self, dims: [usize; 4], at: [usize; 4]) -> usize {
        (0..4).fold(0, |index, axis| index * dims[axis] + if dims[axis] == 1 { 0 } else { at[axis] })
    }

    /// The row of a key and value.
    fn key_row(&self, b: usize, h: usize, j: usize) -> usize {
        (b * self.kv_heads + h / (self.heads / self.kv_heads)) * self.kv_len + j
    }

    fn distance(&self, i: usize, j: usize) -> f64 {
        ((i + self.kv_len) as f64 - self.q_len as f64 - j as f64).abs()
    }

    /// Of each score: whether neither the mask nor a bias of minus infinity hides it.
    pub fn visible(&self) -> Vec<bool> {
        let Call { heads, q_len, kv_len, .. } = *self;
        let see = |index: usize| {
            let at = [
                index / (heads * q_len * kv_len),
                index / (q_len * kv_len) % heads,
                index / kv_len % q_len,
                index % kv_len,
            ];
            let bias = self.bias.as_ref().map_or(0.0, |(dims, bias)| bias[self.bias_index(*dims, at)]);
            self.allowed[index] && bias != f64::NEG_INFINITY
        };
        (0..self.allowed.len()).map(see).collect()
    }

    /// Rows of key and value that no query sees.
    pub fn hidden_rows(&self) -> Vec<usize> {
        let Call { batch, heads, kv_heads, q_len, kv_len, .. } = *self;
        let mut is_seen = vec![false; batch * kv_heads * kv_len];
        for (index, is_visible) in self.visible().into_iter().enumerate() {
            let (b, h, j) = (index / (heads * q_len * kv_len), index / (q_len * kv_len) % heads, index % kv_len);
            is_seen[self.key_row(b, h, j)] |= is_visible;
        }
        (0..is_seen.len()).filter(|&row| !is_seen[row]).collect()
    }

    pub fn results(&self) -> Results {
        let Call { batch, heads, q_len, dim, value_dim, .. } = *self;
        let gradient_of = |x: &Option<Vec<f64>>| x.as_ref().map(|x| Sums::zeros(x.len()));
        let mut results = Results {
            context: Sums::zeros(batch * heads * q_len * value_dim),
            logsumexp: vec![f64::NEG_INFINITY; batch * heads * q_len],
            q: Sums::zeros(batch * heads * q_len * dim),
            k: Sums::zeros(self.k.len()),
            v: Sums::zeros(self.v.len()),
            bias: self.bias.as_ref().map(|(_, bias)| Sums::zeros(bias.len())),
            slopes: gradient_of(&self.slopes),
            sinks: gradient_of(&self.sinks),
        };
        let visible = self.visible();
        for row in 0..batch * heads * q_len {
            self.row(row, &visible, &mut results);
        }
        results
    }

    /// One query.
    fn row(&self, row: usize, visible: &[bool], results: &mut Results) {
        let Call { heads, q_len, kv_len, dim, value_dim, .. } = *self;
        let (b, h, i) = (row / (heads * q_len), row / q_len % heads, row % q_len);
        let q = &self.q[row * dim..][..dim];
        let seen: Vec<usize> = (0..kv_len).filter(|&j| visible[row * kv_len + j]).collect();
        let scores: Vec<(f64, f64)> = seen.iter().map(|&j| self.score([b, h, i, j], q)).collect();
        let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks[h]);
        let largest = scores.iter().map(|(s, _)| *s).fold(sink, f64::max);
        if largest == f64::NEG_INFINITY {
            return;
        }
        let total: f64 = scores.iter().map(|(s, _)| (s - largest).exp()).sum::<f64>() + (sink - largest).exp();
        results.logsumexp[row] = largest + total.ln();
        let weights: Vec<f64> = scores.iter().map(|(s, _)| (s - largest).exp() / total).collect();

        // Smaller weights may be zero.
        let sizes: Vec<f64> =
            weights.iter().map(|weight| weight.max(if self.is_f32 { 1e-30 } else { 1e-290 })).collect();

        let grad = &self.grad_context[row * value_dim..][..value_dim];
        // (dp - δ) and the magnitude of its terms: those of all keys enter through δ.
        let (mut delta, mut delta_size) = (-self.grad_logsumexp[row], self.grad_logsumexp[row].abs());
        delta_size += grad.iter().map(|grad| grad.abs() * self.least_context).sum::<f64>();
        let mut dp = Vec::new();
        for ((&j, weight), weight_size) in seen.iter().zip(&weights).zip(&sizes) {
            let (v_row, drop) = (self.key_row(b, h, j), self.dropout[row * kv_len + j]);
            let v = &self.v[v_row * value_dim..][..value_dim];
            for c in 0..value_dim {
                let size = weight_size * drop;
                results.context.add(row * value_dim + c, weight * drop * v[c], (size * v[c]).abs());
                results.v.add(v_row * value_dim + c, weight * drop * grad[c], (size * grad[c]).abs());
            }
            let product = v.iter().zip(grad).map(|(v, grad)| v * grad).sum::<f64>() * drop;
            let size = v.iter().zip(grad).map(|(v, grad)| (v * grad).abs()).sum::<f64>() * drop;
            (delta, delta_size) = (delta + weight * product, delta_size + weight_size * size);
            dp.push((product, size));
        }
        // A sink is added after the softmax over the keys, whose own δ is larger.
        delta_size /= weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let terms = seen.iter().zip(weights.iter().zip(&sizes)).zip(dp).zip(&scores);
        for (((&j, (weight, weight_size)), (product, size)), (_, slope)) in terms {
            let (ds, size) = (weight * (product - delta), weight_size * (size + delta_size));
            if let (Some((dims, _)), Some(sums)) = (&self.bias, &mut results.bias) {
                sums.add(self.bias_index(*dims, [b, h, i, j]), ds, size);
            }
            if let Some(sums) = &mut results.slopes {
                sums.add(h, -ds * self.distance(i, j), size * self.distance(i, j));
            }
            // 1 - tanh² has the rounding error of 1.
            let (ds, size) = (ds * slope * self.scale, size * (slope.max(0.01) * self.scale).abs());
            let k_row = self.key_row(b, h, j);
            let k = &self.k[k_row * dim..][..dim];
            for c in 0..dim {
                results.q.add(row * dim + c, ds * k[c], size * k[c].abs());
                results.k.add(k_row * dim + c, ds * q[c], size * q[c].abs());
            }
        }
        if let Some(sums) = &mut results.sinks {
            let weight = (sink - largest).exp() / total;
            sums.add(h, -weight * delta, weight * delta_size);
        }
    }

    /// A score, and the slope of the softcap.
    fn score(&self, at: [usize; 4], q: &[f64]) -> (f64, f64) {
        let [b, h, i, j] = at;
        let rounded = |x: f64| if self.is_f32 { f64::from((x as f32).clamp(f32::MIN, f32::MAX)) } else { x };
        let k = &self.k[self.key_row(b, h, j) * self.dim..][..self.dim];
        let mut s = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * self.scale;
        let mut slope = 1.0;
        if let Some(cap) = self.softcap {
            let tanh = (s / cap).tanh();
            (s, slope) = (cap * tanh, 1.0 - tanh * tanh);
        }
        if let Some((dims, bias)) = &self.bias {
            s = rounded(s + bias[self.bias_index(*dims, at)]);
        }
        if let Some(slopes) = &self.slopes {
            s = rounded(s - slopes[h] * self.distance(i, j));
        }
        (s, slope)
    }
}
