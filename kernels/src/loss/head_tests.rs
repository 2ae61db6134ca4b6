use half::{bf16, f16};

use super::*;
use crate::loss::{cross_entropy, cross_entropy_gradient};

fn numbers<E: Number>(count: usize, seed: u32) -> Vec<E> {
    let number =
        |i: usize| f64::from((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed * 97) % 1009) / 504.0 - 1.0;
    (0..count).map(|i| E::narrow(E::Float::from_f64(number(i)))).collect()
}

/// Everything by loops in f64: the sum of the losses, and the gradients of hidden, weight and bias.
fn by_loops(head: &Head<f64>, labels: &[u32], smoothing: f64, scale: f64) -> (f64, [Vec<f64>; 3]) {
    let [tokens, vocabulary, dim] = head.dims;
    let mut logits = Vec::new();
    for hidden in head.hidden.chunks(dim) {
        for (v, weight) in head.weight.chunks(dim).enumerate() {
            let bias = head.bias.map_or(0.0, |bias| bias[v]);
            logits.push(hidden.iter().zip(weight).map(|(x, y)| x * y).sum::<f64>() + bias);
        }
    }
    let dims = [tokens, vocabulary];
    let loss = cross_entropy(&logits, dims, labels, smoothing).unwrap();
    let of_logits = cross_entropy_gradient(&logits, dims, labels, smoothing, &loss.denominators, scale).unwrap();
    let (mut hidden, mut weight, mut bias) =
        (vec![0.0; tokens * dim], vec![0.0; vocabulary * dim], vec![0.0; vocabulary]);
    for (i, gradient) in of_logits.iter().enumerate() {
        let (token, label) = (i / vocabulary, i % vocabulary);
        bias[label] += gradient;
        for d in 0..dim {
            hidden[token * dim + d] += gradient * head.weight[label * dim + d];
            weight[label * dim + d] += gradient * head.hidden[token * dim + d];
        }
    }
    (loss.sum, [hidden, weight, bias])
}

fn check<E: MatmulElement>(dims: [usize; 3], smoothing: f64, tolerance: f64) {
    let [tokens, vocabulary, dim] = dims;
    let (hidden, weight) = (numbers::<E>(tokens * dim, 1), numbers::<E>(vocabulary * dim, 2));
    let bias = numbers::<E>(vocabulary, 3);
    let labels: Vec<u32> =
        (0..tokens).map(|i| if i % 5 == 2 { IGNORED } else { (i * 977 % vocabulary) as u32 }).collect();
    let [wide_hidden, wide_weight, wide_bias] =
        [&hidden, &weight, &bias].map(|x| x.iter().map(|x| x.widen().to_f64()).collect::<Vec<_>>());
    for bias in [None, Some(&bias[..])] {
        let wide_head = Head { hidden: &wide_hidden, weight: &wide_weight, bias: bias.map(|_| &wide_bias[..]), dims };
        let (sum, [of_hidden, of_weight, of_bias]) = by_loops(&wide_head, &labels, smoothing, 0.5);
        let head = Head { hidden: &hidden, weight: &weight, bias, dims };
        let wanted = Wanted { hidden: true, weight: true, bias: bias.is_some() };
        let loss = linear_cross_entropy(&head, &labels, smoothing, 0.5, wanted).unwrap();
        assert_eq!(loss.counted, labels.iter().filter(|label| **label != IGNORED).count());
        assert!((loss.sum - sum).abs() <= tolerance * sum, "{} {sum}", loss.sum);
        let (sum, counted) = (loss.sum, loss.counted);
        let [of_hidden_now, of_weight_now, of_bias_now] = loss.gradients::<E>(1.0).unwrap();
        let close = |what: &str, ours: &[E], theirs: &[f64]| {
            let largest = theirs.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            let error = ours.iter().zip(theirs).map(|(x, y)| (x.widen().to_f64() - y).abs()).fold(0.0, f64::max);
            assert!(
                ours.len() == theirs.len() && error <= tolerance * largest,
                "{dims:?} {what}: {error} of {largest}"
            );
        };
        close("hidden", &of_hidden_now.unwrap(), &of_hidden);
        close("weight", &of_weight_now.unwrap(), &of_weight);
        assert_eq!(of_bias_now.is_some(), bias.is_some());
        of_bias_now.iter().for_each(|gradient| close("bias", gradient, &of_bias));
        // Without gradients the loss is the same.
        let alone = linear_cross_entropy(&head, &labels, smoothing, 0.5, Wanted::default()).unwrap();
        assert_eq!((alone.sum, alone.counted), (sum, counted));
        assert!(alone.gradients::<E>(1.0).unwrap().iter().all(Option::is_none));
    }
}

#[test]
fn loss_and_gradients_are_those_of_separate_steps() {
    let sizes: &[[usize; 3]] =
        if cfg!(miri) { &[[3, 20, 2]] } else { &[[1, 1, 1], [7, 20, 5], [20, 2 * BLOCK + 300, 6], [130, 33, 9]] };
    for (&dims, smoothing) in sizes.iter().flat_map(|dims| [(dims, 0.0), (dims, 0.2)]) {
        check::<f64>(dims, smoothing, 1e-12);
        check::<f32>(dims, smoothing, 3e-6);
        check::<f16>(dims, smoothing, 3e-3);
        check::<bf16>(dims, smoothing, 2e-2);
    }
}

#[test]
fn tokens_in_several_chunks_are_those_in_one() {
    let dims = if cfg!(miri) { [5, 9, 2] } else { [20, 77, 6] };
    let [tokens, vocabulary, dim] = dims;
    let (hidden, weight) = (numbers::<f64>(tokens * dim, 1), numbers::<f64>(vocabulary * dim, 2));
    let head = Head { hidden: &hidden, weight: &weight, bias: None, dims };
    let labels: Vec<u32> = (0..tokens).map(|i| (i * 5 % vocabulary) as u32).collect();
    let wanted = Wanted { hidden: true, weight: true, bias: true };
    let [one, several] = [tokens, 3].map(|chunk| by_chunks(&head, &labels, (0.1, 0.5), wanted, chunk).unwrap());
    assert!((one.sum - several.sum).abs() < 1e-12 * one.sum);
    let pairs = one.gradients::<f64>(1.0).unwrap().into_iter().zip(several.gradients::<f64>(1.0).unwrap());
    for (one, several) in pairs.map(|(one, several)| (one.unwrap(), several.unwrap())) {
        assert!(one.iter().zip(&several).all(|(x, y)| (x - y).abs() < 1e-14));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |hidden: &[f32], bias, labels: &[u32]| {
        let head = Head { hidden, weight: &[0.0; 6], bias, dims: [2, 3, 2] };
        linear_cross_entropy(&head, labels, 0.0, 1.0, Wanted::default()).unwrap_err().to_string()
    };
    let text = "the hidden states: expected 4, from dims [2, 3, 2], got 3 elements";
    assert_eq!(refused(&[0.0; 3], None, &[0, 0]), text);
    assert_eq!(
        refused(&[0.0; 4], Some(&[0.0; 2]), &[0, 0]),
        text.replace("hidden states: expected 4", "bias: expected 3").replace("got 3", "got 2")
    );
    assert_eq!(
        refused(&[0.0; 4], None, &[0]),
        text.replace("hidden states: expected 4", "labels: expected 2").replace("got 3", "got 1")
    );
    assert_eq!(refused(&[0.0; 4], None, &[0, 3]), "the labels: expected numbers below 3, got 3 at position 1");
}

#[test]
fn no_tokens_and_no_dimensions_are_no_panic() {
    let wanted = Wanted { hidden: true, weight: true, bias: false };
    for dims in [[0, 3, 2], [2, 3, 0], [0, 0, 0]] {
        let (hidden, weight) = (vec![0f32; dims[0] * dims[2]], vec![0f32; dims[1] * dims[2]]);
        let head = Head { hidden: &hidden, weight: &weight, bias: None, dims };
        let loss = linear_cross_entropy(&head, &vec![1; dims[0]], 0.0, 1.0, wanted).unwrap();
        let [of_hidden, of_weight, _] = loss.gradients::<f32>(1.0).unwrap();
        assert_eq!((of_hidden.unwrap(), of_weight.unwrap()), (hidden, weight));
    }
}
