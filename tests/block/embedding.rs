//! Rows of a trained table.

use candle_attention::block::{Embedding, embedding};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{Golden, assert_same_bits, check_gradients, gradients, max_abs_difference, randn, var};

fn rows(weight: &Var, ids: &Tensor) -> Tensor {
    Embedding::new(weight.as_tensor().clone()).unwrap().forward(ids).unwrap()
}

#[test]
fn rows_and_gradients_are_those_of_pytorch() -> anyhow::Result<()> {
    let golden = Golden::load("training")?;
    let (ids, scale) = (golden.raw("embedding.ids"), golden.raw("embedding.scale"));
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let part = |name: &str| golden.expect("embedding", dtype, name);
        let weight = Var::from_tensor(part("in.weight"))?;
        let scaled = (rows(&weight, ids) * scale.to_dtype(dtype)?)?;
        assert_same_bits(&scaled, part("torch.result"), "rows");
        let gradient = gradients(&scaled, &[&weight])?.remove(0);
        let truth = part("truth.grad_weight");
        let [ours, theirs] = [&gradient, part("torch.grad_weight")].map(|x| max_abs_difference(x, truth).unwrap());
        assert!(ours <= 2.0 * theirs + 1e-14, "{dtype:?}: {ours:e}, PyTorch {theirs:e}");
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let weight = var(1, (5, 3), DType::F64).unwrap();
    let ids = Tensor::new(&[[0u32, 4], [4, 2], [4, 0]], &Device::Cpu).unwrap();
    let loss = || (rows(&weight, &ids).sqr()? * randn(2, (3, 2, 3), DType::F64)?)?.sum_all();
    check_gradients(&[("weight", &weight)], loss, 1e-8, "embedding");
}

#[test]
fn ids_may_have_any_shape_and_whole_dtype() -> Result<()> {
    let weight = var(1, (5, 3), DType::F32)?;
    let ids = Tensor::new(&[[1u32, 0], [4, 2]], &Device::Cpu)?;
    let expected = weight.index_select(&ids.flatten_all()?, 0)?.reshape((2, 2, 3))?;
    for dtype in [DType::U8, DType::U32, DType::I64] {
        assert_same_bits(&rows(&weight, &ids.to_dtype(dtype)?), &expected, "a matrix of ids");
    }
    assert_same_bits(&rows(&weight, &ids.t()?), &expected.transpose(0, 1)?.contiguous()?, "ids with strides");
    assert_same_bits(&rows(&weight, &Tensor::new(4u32, &Device::Cpu)?), &weight.get(4)?.copy()?, "one id");
    let none = Tensor::zeros((2, 0), DType::U32, &Device::Cpu)?;
    assert_eq!(rows(&weight, &none).dims(), [2, 0, 3]);
    let gradient = gradients(&rows(&weight, &none), &[&weight])?.remove(0);
    assert_same_bits(&gradient, &weight.zeros_like()?, "gradient of no ids");
    Ok(())
}

/// A weight with strides is copied, and its gradient finds the way back.
#[test]
fn a_transposed_weight_has_the_same_rows() -> Result<()> {
    let weight = var(1, (3, 5), DType::F64)?;
    let ids = Tensor::new(&[1u32, 4, 1], &Device::Cpu)?;
    let x = Embedding::new(weight.t()?)?.forward(&ids)?;
    assert_same_bits(&x, &weight.t()?.contiguous()?.index_select(&ids, 0)?, "rows");
    let gradient = gradients(&x, &[&weight])?.remove(0).to_vec2::<f64>()?;
    assert_eq!(gradient[0], [0.0, 2.0, 0.0, 0.0, 1.0]);
    Ok(())
}

#[test]
fn the_gradient_has_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let weight = var(1, (300, 320), DType::F32)?;
    let ids = Tensor::from_vec((0..2000u32).map(|i| i * i % 17).collect(), 2000, &Device::Cpu)?;
    let scale = randn(2, (2000, 320), DType::F32)?;
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| gradients(&(rows(&weight, &ids) * &scale)?, &[&weight])).unwrap().remove(0)
    };
    assert_same_bits(&run(1), &run(3), "1 and 3 threads");
    Ok(())
}

#[test]
fn a_new_embedding_is_drawn_and_named() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let tokens = embedding(50, 40, vb.pp("tokens"))?;
    assert_eq!(tokens.weight().dims(), [50, 40]);
    assert!(varmap.data().lock().unwrap().contains_key("tokens.weight"));
    let variance = tokens.weight().sqr()?.mean_all()?.to_scalar::<f32>()?;
    assert!((variance - 1.0).abs() < 0.15, "{variance}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() {
    let weight = var(1, (5, 3), DType::F32).unwrap();
    let refused =
        |ids: Tensor| Embedding::new(weight.as_tensor().clone()).unwrap().forward(&ids).unwrap_err().to_string();
    let ids = |ids: &[i64]| Tensor::new(ids, &Device::Cpu).unwrap();
    assert_eq!(refused(ids(&[0, 5])), "ids: expected an id in 0..5, the rows of the weight, got 5 at position 1");
    assert_eq!(refused(ids(&[-1])), "ids: expected an id in 0..5, the rows of the weight, got -1 at position 0");
    let floats = Tensor::new(&[0f32], &Device::Cpu).unwrap();
    assert_eq!(refused(floats), "ids: expected dtype U8, U32 or I64, got F32");
    let error = Embedding::new(randn(1, 3, DType::F32).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "weight: expected 2 axes (vocabulary, dim), got rank 1 with shape [3]");
    let whole = Tensor::zeros((2, 2), DType::U32, &Device::Cpu).unwrap();
    assert!(Embedding::new(whole).unwrap_err().to_string().starts_with("weight: expected dtype F16"));
}
