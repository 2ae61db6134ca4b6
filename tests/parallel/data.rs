//! Data parallelism: the mean over the ranks is the gradient of the whole batch.

use std::time::{Duration, Instant};

use candle_attention::parallel::{DataParallel, backward_from};
use candle_attention::{AttentionError, Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::laws::numbers;
use crate::{HANG, Ranks};

const BATCH: usize = 11;

/// Layers of 3 to 5, 5 to 4 and 4 to 2 entries, the same on all ranks.
fn parameters(dtype: DType) -> Result<Vec<(String, Var)>> {
    let shapes = [("first", [3, 5]), ("second", [5, 4]), ("third", [4, 2])];
    let var = |(i, (name, shape)): (usize, (&str, [usize; 2]))| {
        let numbers = (numbers(i, &shape, DType::F64)?.affine(0.01, 0.1)?.sin()? * 0.5)?;
        Ok((name.to_string(), Var::from_tensor(&numbers.to_dtype(dtype)?)?))
    };
    shapes.into_iter().enumerate().map(var).collect()
}

/// Some rows of the batch (rows, 3).
fn rows(rows: std::ops::Range<usize>, dtype: DType) -> Result<Tensor> {
    let batch = numbers(7, &[BATCH, 3], DType::F64)?.affine(0.037, 0.0)?.cos()?;
    Ok(batch.narrow(0, rows.start, rows.len())?.to_dtype(dtype)?)
}

fn loss(x: &Tensor, parameters: &[(String, Var)]) -> Result<Tensor> {
    let x = parameters.iter().try_fold(x.clone(), |x, (_, var)| x.matmul(var)?.tanh())?;
    Ok(x.sqr()?.sum(1)?.mean_all()?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// 11 rows are shared unevenly by every number of ranks but one. Buckets of one parameter, of two, and of all.
pub fn mean_is_the_gradient_of_the_whole_batch(ranks: Ranks) -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-6), (DType::BF16, 2e-2)] {
        let parameters = parameters(dtype)?;
        let whole = loss(&rows(0..BATCH, dtype)?, &parameters)?.backward()?;
        for bytes in [1, 100, 1 << 20] {
            let data_parallel = DataParallel::new(&parameters, ranks)?.with_bucket_bytes(bytes)?;
            let own = data_parallel.rows(BATCH);
            let gradients = loss(&rows(own.clone(), dtype)?, &parameters)?.backward()?;
            let means = data_parallel.average(&gradients, own.len() as f64)?;
            for (name, var) in &parameters {
                let (mean, expected) = (means.get(var).unwrap(), whole.get(var).unwrap());
                let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                assert_eq!((mean.dims(), mean.dtype()), (var.dims(), wide));
                let error = largest_difference(mean, expected)?;
                assert!(error < tolerance, "{name} in {dtype:?}, buckets of {bytes} bytes: {error}");
            }
        }
    }
    Ok(())
}

/// The backward pass in three segments, whose gradients are summed as they come.
pub fn segments_have_the_bits_of_one_backward_pass(ranks: Ranks) -> Result<()> {
    let parameters = parameters(DType::F32)?;
    let data_parallel = DataParallel::new(&parameters, ranks)?.with_bucket_bytes(1)?;
    let own = data_parallel.rows(BATCH);
    let x = rows(own.clone(), DType::F32)?;
    let expected = data_parallel.average(&loss(&x, &parameters)?.backward()?, own.len() as f64)?;

    let (mut x, mut segments) = (x, Vec::new());
    for (_, var) in &parameters[..2] {
        let output = x.matmul(var)?.tanh()?;
        let cut = Var::from_tensor(&output.detach())?;
        x = cut.as_tensor().clone();
        segments.push((output, cut));
    }
    let mut gradients = loss(&x, &parameters[2..])?.backward()?;
    let mut averaging = data_parallel.start(own.len() as f64)?;
    averaging.add(&gradients)?;
    for (output, cut) in segments.into_iter().rev() {
        gradients = backward_from(&output, gradients.get(&cut).unwrap())?;
        averaging.add(&gradients)?;
    }
    let means = averaging.finish()?;
    for (name, var) in &parameters {
        assert_eq!(largest_difference(means.get(var).unwrap(), expected.get(var).unwrap())?, 0.0, "{name}");
    }
    Ok(())
}

/// What has been added is summed on all ranks before anyone adds or finishes more.
pub fn a_bucket_is_summed_while_the_rest_is_computed(ranks: Ranks) -> Result<()> {
    let parameters = parameters(DType::F32)?;
    let data_parallel = DataParallel::new(&parameters, ranks)?.with_bucket_bytes(1)?;
    let gradients = loss(&rows(0..BATCH, DType::F32)?, &parameters)?.backward()?;
    let mut averaging = data_parallel.start(1.0)?;
    for (name, var) in parameters.iter().rev() {
        let mut segment = GradStore::default();
        segment.insert(var, gradients.get(var).unwrap().clone());
        let before = ranks.bytes_sent();
        averaging.add(&segment)?;
        // A bucket has the gradient, how many ranks have one, and the weight. A rank sends the others' parts, then its own to each.
        let entries = var.elem_count() + 2;
        let part = entries / ranks.size() + usize::from(ranks.rank() < entries % ranks.size());
        let bytes = (entries - part + (ranks.size() - 1) * part) * size_of::<f32>();
        let start = Instant::now();
        while ranks.bytes_sent() < before + bytes as u64 {
            assert!(start.elapsed() < HANG, "nobody sums {name}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let means = averaging.finish()?;
    for (name, var) in &parameters {
        assert!(largest_difference(means.get(var).unwrap(), gradients.get(var).unwrap())? < 1e-6, "{name}");
    }
    Ok(())
}

/// Neighbours of several types, in one bucket if they are computed in the same type.
pub fn parameters_may_have_several_dtypes(ranks: Ranks) -> Result<()> {
    let dtypes = [DType::F64, DType::BF16, DType::F32, DType::F16, DType::F64, DType::F64];
    let var = |(i, dtype): (usize, DType)| {
        let numbers = (numbers(i, &[3, 2], DType::F64)?.affine(0.01, 0.1)?.sin()? * 0.5)?;
        Ok((format!("{i}"), Var::from_tensor(&numbers.to_dtype(dtype)?)?))
    };
    let parameters = dtypes.into_iter().enumerate().map(var).collect::<Result<Vec<_>>>()?;
    let gradients = |rows_of: std::ops::Range<usize>| -> Result<GradStore> {
        let x = rows(rows_of, DType::F64)?;
        let products = parameters.iter().map(|(_, var)| x.matmul(&var.to_dtype(DType::F64)?)?.tanh());
        let products = products.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&products, 1)?.sqr()?.sum(1)?.mean_all()?.backward()?)
    };
    let whole = gradients(0..BATCH)?;
    for bytes in [1, 50, 1 << 20] {
        let data_parallel = DataParallel::new(&parameters, ranks)?.with_bucket_bytes(bytes)?;
        let own = data_parallel.rows(BATCH);
        let means = data_parallel.average(&gradients(own.clone())?, own.len() as f64)?;
        for ((name, var), dtype) in parameters.iter().zip(dtypes) {
            let mean = means.get(var).unwrap();
            let (wide, tolerance) = match dtype {
                DType::F64 => (DType::F64, 1e-12),
                DType::F32 => (DType::F32, 1e-6),
                // Each rank's gradients are rounded to the type before they are summed.
                DType::F16 => (DType::F32, 2e-3),
                _ => (DType::F32, 2e-2),
            };
            assert_eq!((mean.dims(), mean.dtype()), (var.dims(), wide), "{name}");
            let error = largest_difference(mean, whole.get(var).unwrap())?;
            assert!(error < tolerance, "{name} in {dtype:?}, buckets of {bytes} bytes: {error}");
        }
    }
    Ok(())
}

/// A gradient that only the last rank has is one of zeros on the others; one that no rank has stays missing.
pub fn missing_gradients_are_zeros_if_any_rank_has_one(ranks: Ranks) -> Result<()> {
    let [used, rare, unused] = [2f64, 3.0, 5.0].map(|x| Var::new(&[x, x], &Device::Cpu).unwrap());
    let parameters = [("used", &used), ("rare", &rare), ("unused", &unused)];
    let parameters = parameters.map(|(name, var)| (name.to_string(), var.clone()));
    let is_last = ranks.rank() + 1 == ranks.size();
    for bytes in [1, 1 << 20] {
        let data_parallel = DataParallel::new(&parameters, ranks)?.with_bucket_bytes(bytes)?;
        let loss = if is_last { (used.as_tensor() * rare.as_tensor())? } else { used.as_tensor().clone() };
        let means = data_parallel.average(&loss.sum_all()?.backward()?, 1.0)?;
        let size = ranks.size() as f64;
        let mean = |var: &Var| means.get(var).unwrap().to_vec1::<f64>();
        for (got, expected) in mean(&used)?.into_iter().chain(mean(&rare)?).zip([size + 2.0, size + 2.0, 2.0, 2.0]) {
            assert!((got - expected / size).abs() < 1e-12);
        }
        assert!(means.get(&unused).is_none());
    }
    Ok(())
}

/// More ranks than rows. The mean of nothing isn't a number.
pub fn ranks_without_rows_do_not_count(ranks: Ranks) -> Result<()> {
    let var = Var::new(&[1f32], &Device::Cpu)?;
    let data_parallel = DataParallel::new(&[("x".to_string(), var.clone())], ranks)?;
    let own = data_parallel.rows(2);
    assert_eq!(own.len(), if ranks.size() == 1 { 2 } else { usize::from(ranks.rank() < 2) });
    let nan = (var.as_tensor() * f64::NAN)?.backward()?;
    let gradients = if own.is_empty() { nan } else { (var.as_tensor() * 3.0)?.backward()? };
    let means = data_parallel.average(&gradients, own.len() as f64)?;
    assert_eq!(means.get(&var).unwrap().to_vec1::<f32>()?, [3.0]);
    let error = data_parallel.average(&gradients, 0.0).unwrap_err();
    assert!(matches!(error, Error::Attention(AttentionError::Number { name: "weight of all ranks", .. })), "{error}");
    ranks.agree("what comes next", "the same")
}

pub fn every_row_is_of_one_rank(ranks: Ranks) -> Result<()> {
    let data_parallel = DataParallel::new(&[], ranks)?;
    for rows in 0..20 {
        let own = data_parallel.rows(rows);
        let all = ranks.all_gather_bytes(&own.clone().map(|row| row as u8).collect::<Vec<_>>())?;
        assert!(all.concat().into_iter().eq(0..rows as u8));
        assert!(all.iter().all(|own| own.len().abs_diff(rows / ranks.size()) <= 1));
    }
    Ok(())
}

pub fn broadcast_makes_parameters_equal(ranks: Ranks) -> Result<()> {
    let var = Var::from_tensor(&Tensor::full(ranks.rank() as f32, (2, 3), &Device::Cpu)?)?;
    let data_parallel = DataParallel::new(&[("x".to_string(), var.clone())], ranks)?;
    let root = ranks.size() - 1;
    data_parallel.broadcast_parameters(root)?;
    assert_eq!(var.flatten_all()?.to_vec1::<f32>()?, [root as f32; 6]);
    Ok(())
}

/// Every rank names the first parameter that differs, with both sides.
pub fn other_parameters_are_errors_on_every_rank(ranks: Ranks) -> Result<()> {
    let is_last = ranks.rank() + 1 == ranks.size();
    let make =
        |name: &str, len: usize, dtype| -> Result<_> { Ok((name.to_string(), Var::zeros(len, dtype, &Device::Cpu)?)) };
    let same = make("same", 2, DType::F32)?;
    for (name, len, dtype, texts) in [
        ("b", 3, DType::F32, [r#""a", f32 [3]"#, r#""b", f32 [3]"#]),
        ("a", 4, DType::F32, [r#""a", f32 [3]"#, r#""a", f32 [4]"#]),
        ("a", 3, DType::BF16, [r#""a", f32 [3]"#, r#""a", bf16 [3]"#]),
        ("", 0, DType::F32, [r#""a", f32 [3]"#, "no parameter"]),
    ] {
        let other = if is_last { make(name, len, dtype) } else { make("a", 3, DType::F32) };
        let ours = [same.clone(), other?];
        let ours = if is_last && name.is_empty() { &ours[..1] } else { &ours[..] };
        let result = DataParallel::new(ours, ranks);
        if ranks.size() == 1 {
            result?;
            continue;
        }
        match result {
            Err(Error::Attention(AttentionError::Ranks { what, ranks: two, got })) => {
                assert_eq!((what.as_str(), two, got), ("parameter 1", [0, ranks.size() - 1], texts.map(String::from)));
            }
            other => panic!("expected an error of the ranks, got {other:?}"),
        }
    }
    ranks.agree("what comes next", "the same")
}

/// All ranks are wrong in the same way, and can go on.
pub fn wrong_gradients_are_named(ranks: Ranks) -> Result<()> {
    let var = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    let data_parallel = DataParallel::new(&[("x".to_string(), var.clone())], ranks)?;
    for weight in [-1.0, f64::NAN, f64::INFINITY, 1e-60] {
        let error = data_parallel.start(weight).err().unwrap();
        assert!(matches!(error, Error::Attention(AttentionError::Number { name: "weight", .. })), "{error}");
    }
    let gradients = var.sum_all()?.backward()?;
    let mut averaging = data_parallel.start(1.0)?;
    averaging.add(&gradients)?;
    let error = averaging.add(&gradients).unwrap_err();
    assert!(matches!(&error, Error::Attention(AttentionError::Gradient { name, .. }) if name == "x"), "{error}");
    drop(averaging);
    let mut wrong = gradients;
    wrong.insert(&var, Tensor::zeros(3, DType::F32, &Device::Cpu)?);
    let error = data_parallel.average(&wrong, 1.0).unwrap_err();
    assert!(matches!(&error, Error::Attention(AttentionError::Gradient { name, .. }) if name == "x"), "{error}");
    let whole = Var::new(&[1u32], &Device::Cpu)?;
    let error = DataParallel::new(&[("n".to_string(), whole)], ranks).unwrap_err();
    assert!(matches!(error, Error::Attention(AttentionError::DType { got: DType::U32, .. })), "{error}");
    ranks.agree("what comes next", "the same")
}
