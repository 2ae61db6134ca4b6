//! Files that hold other tensors than those of their config: one error names all of them.

use candle_core::{DType, Device, Result, Tensor};

use crate::layers::assert_error_says;

use super::files::Parts;

fn zeros(dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::zeros(dims, dtype, &Device::Cpu)
}

/// Checks that loading the small layer with another tensor of this name is an error with all these parts.
fn assert_refused(name: &str, tensor: Tensor, parts: &[&str]) -> Result<()> {
    let mut file = Parts::small()?;
    assert!(file.tensors.insert(name.to_string(), tensor).is_some(), "{name} was not there");
    assert_error_says(file.load(), parts);
    Ok(())
}

#[test]
fn missing_tensor_is_named() -> Result<()> {
    let names: Vec<String> = Parts::small()?.tensors.keys().cloned().collect();
    assert_eq!(names.len(), 8);
    for name in names {
        let mut file = Parts::small()?;
        file.tensors.remove(&name);
        let shape = if name.ends_with("bias") { "expected [4]" } else { "expected [4, 4]" };
        assert_error_says(file.load(), &[&format!("`{name}` is missing"), shape]);
    }
    Ok(())
}

#[test]
fn unexpected_tensor_is_named() -> Result<()> {
    for name in ["sinks", "q_norm.weight", "Q_PROJ.weight", "attention.q_proj.weight", "", "emoji 🦀"] {
        let mut file = Parts::small()?;
        file.tensors.insert(name.to_string(), zeros(&[4], DType::F32)?);
        assert_error_says(file.load(), &[&format!("`{name}` is unexpected")]);
    }
    Ok(())
}

#[test]
fn tensor_of_another_shape_is_named_with_both_shapes() -> Result<()> {
    for dims in [&[4usize, 5][..], &[5, 4], &[16], &[4, 4, 1], &[2, 8], &[0, 4], &[]] {
        let expected = ["`q_proj.weight`", "expected shape [4, 4]", &format!("got {dims:?}")];
        assert_refused("q_proj.weight", zeros(dims, DType::F32)?, &expected)?;
    }
    let expected = ["`o_proj.bias`", "expected shape [4]", "got [3]"];
    assert_refused("o_proj.bias", zeros(&[3], DType::F32)?, &expected)
}

#[test]
fn tensors_of_two_dtypes_are_refused() -> Result<()> {
    for dtype in [DType::F64, DType::F16, DType::BF16] {
        let expected = ["`v_proj.weight`", "expected dtype F32 as the others", &format!("got {dtype:?}")];
        assert_refused("v_proj.weight", zeros(&[4, 4], dtype)?, &expected)?;
    }
    Ok(())
}

#[test]
fn integers_are_refused() -> Result<()> {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let expected = ["`k_proj.bias`", "expected dtype F32", &format!("got {dtype:?}")];
        assert_refused("k_proj.bias", zeros(&[4], dtype)?, &expected)?;
    }
    let mut file = Parts::small()?;
    for tensor in file.tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::U32)?;
    }
    assert_error_says(file.load(), &["`q_proj.weight`", "expected dtype F16, BF16, F32 or F64", "got U32"]);
    Ok(())
}

#[test]
fn all_problems_are_named_at_once() -> Result<()> {
    let mut file = Parts::small()?;
    file.tensors.remove("q_proj.weight");
    file.tensors.remove("o_proj.bias");
    file.tensors.insert("k_proj.weight".into(), zeros(&[4, 3], DType::F32)?);
    file.tensors.insert("v_proj.bias".into(), zeros(&[4], DType::I64)?);
    file.tensors.insert("o_proj.weight".into(), zeros(&[4, 4], DType::F16)?);
    file.tensors.insert("lm_head.weight".into(), zeros(&[2], DType::F32)?);
    file.tensors.insert("embedding.weight".into(), zeros(&[2], DType::F32)?);
    let problems = [
        "`q_proj.weight` is missing",
        "`o_proj.bias` is missing",
        "`k_proj.weight`: expected shape [4, 4], got [4, 3]",
        "`v_proj.bias`: expected dtype F32 as the others, got I64",
        "`o_proj.weight`: expected dtype F32 as the others, got F16",
        "`lm_head.weight` is unexpected",
        "`embedding.weight` is unexpected",
    ];
    assert_error_says(file.load(), &problems);
    Ok(())
}

#[test]
fn file_without_tensors_misses_them_all() -> Result<()> {
    let mut file = Parts::small()?;
    let names: Vec<String> = std::mem::take(&mut file.tensors).into_keys().map(|name| format!("`{name}`")).collect();
    assert_error_says(file.load(), &names.iter().map(String::as_str).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn numbers_that_are_not_finite_are_named() -> Result<()> {
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let mut file = Parts::small()?;
            for tensor in file.tensors.values_mut() {
                *tensor = tensor.to_dtype(dtype)?;
            }
            for name in ["k_proj.bias", "o_proj.bias"] {
                let numbers = Tensor::new(&[0.5, 1.0, 2.0, number], &Device::Cpu)?.to_dtype(dtype)?;
                file.tensors.insert(name.into(), numbers);
            }
            let expected = ["k_proj.bias", "o_proj.bias"].map(|name| format!("`{name}`: expected finite numbers"));
            assert_error_says(file.load(), &expected.each_ref().map(String::as_str));
        }
    }
    Ok(())
}
