//! Cross-entropy: gradients, extreme numbers, options and errors.

use candle_attention::block::{CrossEntropyOptions, Reduction, cross_entropy, linear_cross_entropy};
use candle_attention::{AttentionError, Error};
use candle_core::{D, DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_finite, assert_same_bits, check_gradients, gradients, numbers, randn, var};

fn targets(labels: &[i64]) -> Tensor {
    Tensor::new(labels, &Device::Cpu).unwrap()
}

fn every_option() -> Vec<CrossEntropyOptions> {
    let mut all = Vec::new();
    for (label_smoothing, reduction) in [(0.0, Reduction::Mean), (0.2, Reduction::Sum), (1.0, Reduction::Mean)] {
        for ignore_index in [None, Some(-100), Some(2)] {
            all.push(CrossEntropyOptions { label_smoothing, ignore_index, reduction });
        }
    }
    all
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for options in every_option() {
        let logits = var(1, (2, 3, 5), DType::F64).unwrap();
        let labels = match options.ignore_index {
            Some(-100) => [0, -100, 4, 2, -100, 2],
            _ => [0, 3, 4, 2, 1, 2],
        };
        let targets = targets(&labels).reshape((2, 3)).unwrap();
        let loss = || Ok(cross_entropy(&logits, &targets, &options)?);
        check_gradients(&[("logits", &logits)], loss, 1e-8, &format!("{options:?}"));

        let vars = [var(2, (2, 3, 4), DType::F64), var(3, (5, 4), DType::F64), var(4, 5, DType::F64)];
        let [hidden, weight, bias] = vars.map(Result::unwrap);
        let loss = || linear_cross_entropy(&hidden, &weight, Some(&bias), &targets, &options)?.affine(-0.7, 0.0);
        let named = [("hidden", &hidden), ("weight", &weight), ("bias", &bias)];
        check_gradients(&named, loss, 1e-8, &format!("{options:?}, linear"));
        let loss = || Ok(linear_cross_entropy(&hidden, &weight, None, &targets, &options)?);
        check_gradients(&named[..2], loss, 1e-8, &format!("{options:?}, linear without a bias"));
    }
}

#[test]
fn the_loss_of_a_linear_layer_is_that_of_its_logits() -> Result<()> {
    let targets = targets(&[7, -100, 0, 299, 3000, 2048]);
    for options in every_option().into_iter().filter(|options| options.ignore_index == Some(-100)) {
        let vars = [var(1, (6, 8), DType::F32)?, var(2, (3001, 8), DType::F32)?, var(3, 3001, DType::F32)?];
        let [hidden, weight, bias] = &vars;
        let logits = hidden.matmul(&weight.t()?)?.broadcast_add(bias)?;
        let apart = cross_entropy(&logits, &targets, &options)?;
        let fused = linear_cross_entropy(hidden, weight, Some(bias), &targets, &options)?;
        assert_close(&fused, &apart, 1e-6, "loss");
        let all = vars.iter().collect::<Vec<_>>();
        let pairs = gradients(&fused, &all)?.into_iter().zip(gradients(&apart, &all)?);
        pairs.for_each(|(fused, apart)| assert_close(&fused, &apart, 1e-5, "gradient"));
    }
    Ok(())
}

/// The second backward pass of a loss computes its gradients again, and gives the same bits.
#[test]
fn a_loss_may_go_backward_twice() -> Result<()> {
    let [hidden, weight] = [var(1, (6, 8), DType::F32)?, var(2, (300, 8), DType::F32)?];
    let targets = targets(&[7, 1, 0, 299, 30, 204]);
    let loss = linear_cross_entropy(&hidden, &weight, None, &targets, &CrossEntropyOptions::default())?;
    let [once, twice] = [(); 2].map(|()| gradients(&loss, &[&hidden, &weight]).unwrap());
    once.iter().zip(&twice).for_each(|(a, b)| assert_same_bits(a, b, "gradient"));
    Ok(())
}

#[test]
fn only_inputs_that_train_get_gradients() -> Result<()> {
    let [hidden, weight] = [var(1, (6, 8), DType::F32)?, var(2, (300, 8), DType::F32)?];
    let targets = targets(&[7, 1, 0, 299, 30, 204]);
    let options = CrossEntropyOptions::default();
    let both = linear_cross_entropy(&hidden, &weight, None, &targets, &options)?;
    for (h, w, trained) in
        [(hidden.as_tensor(), &weight.detach(), &hidden), (&hidden.detach(), weight.as_tensor(), &weight)]
    {
        let one = linear_cross_entropy(h, w, None, &targets, &options)?;
        assert_same_bits(&gradients(&one, &[trained])?[0], &gradients(&both, &[trained])?[0], "gradient");
    }
    assert!(!linear_cross_entropy(&hidden.detach(), &weight.detach(), None, &targets, &options)?.track_op());
    Ok(())
}

#[test]
fn results_have_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let [hidden, weight] = [var(1, (130, 40), DType::F32)?, var(2, (5001, 40), DType::F32)?];
    let logits = var(3, (130, 5001), DType::F32)?;
    let targets = targets(&(0..130).map(|i| i * 37 % 5001).collect::<Vec<_>>());
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| -> Result<Vec<Tensor>> {
            let options = CrossEntropyOptions { label_smoothing: 0.1, ..Default::default() };
            let fused = linear_cross_entropy(&hidden, &weight, None, &targets, &options)?;
            let of_logits = cross_entropy(&logits, &targets, &options)?;
            let mut all = vec![fused.detach(), of_logits.detach()];
            all.extend(gradients(&fused, &[&hidden, &weight])?);
            all.extend(gradients(&of_logits, &[&logits])?);
            Ok(all)
        })
    };
    run(1)?.iter().zip(run(3)?).for_each(|(one, three)| assert_same_bits(one, &three, "1 and 3 threads"));
    Ok(())
}

#[test]
fn if_all_rows_are_ignored_loss_and_gradients_are_zero() -> Result<()> {
    let options = CrossEntropyOptions { ignore_index: Some(-100), ..Default::default() };
    let [hidden, weight] = [var(1, (2, 8), DType::F32)?, var(2, (30, 8), DType::F32)?];
    let ignored = targets(&[-100, -100]);
    let logits = Var::from_tensor(&hidden.matmul(&weight.t()?)?)?;
    let loss = cross_entropy(&logits, &ignored, &options)?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.0);
    assert_same_bits(&gradients(&loss, &[&logits])?[0], &logits.zeros_like()?, "logits");
    let loss = linear_cross_entropy(&hidden, &weight, None, &ignored, &options)?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.0);
    for gradient in gradients(&loss, &[&hidden, &weight])? {
        assert!(numbers(&gradient)?.iter().all(|x| *x == 0.0));
    }
    let none = Tensor::zeros((0, 5), DType::F32, &Device::Cpu)?;
    assert_eq!(cross_entropy(&none, &targets(&[]), &options)?.to_scalar::<f32>()?, 0.0);
    Ok(())
}

#[test]
fn extreme_logits_give_no_nan() -> Result<()> {
    let inf = f32::INFINITY;
    for (row, label, expected) in [
        ([1e30, -1e30, 0.0], 0, 0.0),
        ([1e30, -1e30, 0.0], 1, 2e30),
        ([-inf, 2.0, -inf], 1, 0.0),
        ([-inf, 2.0, 2.0], 2, 2f32.ln()),
        ([-inf, 2.0, -inf], 0, inf),
        ([-inf; 3], 1, inf),
    ] {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let logits = Var::from_tensor(&Tensor::new(&[row], &Device::Cpu)?.to_dtype(dtype)?)?;
            let loss = cross_entropy(&logits, &targets(&[label]), &CrossEntropyOptions::default())?;
            let value = numbers(&loss)?[0];
            let is_right = value == f64::from(expected) || (value / f64::from(expected) - 1.0).abs() < 4e-3;
            assert!(is_right, "{row:?} {dtype:?}: {value}");
            assert_finite(&gradients(&loss, &[&logits])?[0], "gradient");
        }
    }
    Ok(())
}

/// In f16 a part of the gradient of a mean over many tokens would be zero.
#[test]
fn gradients_of_a_mean_over_many_tokens_do_not_vanish_in_f16() -> Result<()> {
    let tokens = 4096;
    let hidden = Tensor::ones((tokens, 1), DType::F16, &Device::Cpu)?;
    let weight = Var::zeros((1000, 1), DType::F16, &Device::Cpu)?;
    let targets = Tensor::zeros(tokens, DType::U32, &Device::Cpu)?;
    let loss = linear_cross_entropy(&hidden, &weight, None, &targets, &CrossEntropyOptions::default())?;
    let gradient = gradients(&loss, &[&weight])?.remove(0).narrow(0, 1, 999)?;
    assert_close(&gradient, &Tensor::full(1e-3f64, (999, 1), &Device::Cpu)?, 1e-6, "gradient of other labels");
    Ok(())
}

/// The probabilities of a row sum to 1: the gradient of a loss without smoothing sums to 0.
#[test]
fn gradients_of_a_row_sum_to_zero() -> Result<()> {
    let logits = Var::from_tensor(&(randn(1, (3, 50_257), DType::F32)? * 5.0)?)?;
    let options = CrossEntropyOptions { reduction: Reduction::Sum, ..Default::default() };
    let loss = cross_entropy(&logits, &targets(&[0, 50_256, 777]), &options)?;
    let sums = gradients(&loss, &[&logits])?[0].to_dtype(DType::F64)?.sum(D::Minus1)?.to_vec1::<f64>()?;
    assert!(sums.iter().all(|sum| sum.abs() < 1e-6), "{sums:?}");
    Ok(())
}

fn text(result: candle_attention::Result<Tensor>) -> String {
    match result {
        Err(Error::Attention(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn labels_and_logits_that_do_not_fit_are_refused() {
    let logits = randn(1, (2, 3), DType::F32).unwrap();
    let of = |targets: Tensor, ignore_index| {
        text(cross_entropy(&logits, &targets, &CrossEntropyOptions { ignore_index, ..Default::default() }))
    };
    let range = "targets: expected a label in 0..3, the size of the vocabulary";
    assert_eq!(of(targets(&[0, 3]), None), format!("{range}, got 3 at position 1"));
    assert_eq!(of(targets(&[-100, 1]), None), format!("{range}, got -100 at position 0"));
    assert_eq!(of(targets(&[-1, -2]), Some(-2)), format!("{range}, or the ignored -2, got -1 at position 0"));
    let shape = "targets: expected shape [2], one for each row of 3 logits";
    assert_eq!(of(targets(&[0, 1, 2]), None), format!("{shape}, got [3]"));
    assert_eq!(of(randn(1, 2, DType::F32).unwrap(), None), "targets: expected dtype U8, U32 or I64, got F32");
    let options = CrossEntropyOptions::default();
    let scalar = Tensor::new(1f32, &Device::Cpu).unwrap();
    let expected = "logits: expected at least 1 axis (..., vocabulary), got rank 0 with shape []";
    assert_eq!(text(cross_entropy(&scalar, &targets(&[]), &options)), expected);
    let whole = Tensor::zeros((2, 3), DType::U32, &Device::Cpu).unwrap();
    assert!(text(cross_entropy(&whole, &targets(&[0, 1]), &options)).starts_with("logits: expected dtype F16"));
    for label_smoothing in [-0.1, 1.1, f64::NAN] {
        let options = CrossEntropyOptions { label_smoothing, ..Default::default() };
        let error = cross_entropy(&logits, &targets(&[0, 1]), &options).unwrap_err();
        assert!(matches!(error, Error::Attention(AttentionError::Number { name: "label_smoothing", .. })), "{error}");
    }
}

#[test]
fn layers_that_do_not_fit_are_refused() {
    let x = |dims: &[usize], dtype| randn(1, dims, dtype).unwrap();
    let f32 = |dims: &[usize]| x(dims, DType::F32);
    let of = |hidden: Tensor, weight: Tensor, bias: Option<Tensor>| {
        let options = CrossEntropyOptions::default();
        text(linear_cross_entropy(&hidden, &weight, bias.as_ref(), &targets(&[0, 1]), &options))
    };
    let cases = [
        (of(f32(&[2, 4]), f32(&[3]), None), "weight: expected 2 axes (vocabulary, dim), got rank 1 with shape [3]"),
        (
            of(f32(&[2, 4]), f32(&[3, 5]), None),
            "hidden: expected shape (..., dim) with dim = 5, that of the weight, got [2, 4]",
        ),
        (
            of(f32(&[2, 4]), x(&[3, 4], DType::F64), None),
            "weight: expected dtype F32, that of the hidden states, got F64",
        ),
        (
            of(f32(&[2, 4]), f32(&[3, 4]), Some(f32(&[4]))),
            "bias: expected shape (vocabulary) = [3], as the weight has it, got [4]",
        ),
        (of(f32(&[3, 4]), f32(&[3, 4]), None), "targets: expected shape [3], one for each row of 3 logits, got [2]"),
    ];
    cases.iter().for_each(|(got, expected)| assert_eq!(got, expected));
}
