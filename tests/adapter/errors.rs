//! Bad input: one clear error, and nothing created.

use candle_attention::adapter::{Adapt, LoraConfig, Target};
use candle_attention::{Layout, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::layers::assert_error_says;
use crate::{adapted, blocks_common, config};

#[test]
fn configs_that_fit_no_layer_are_errors_and_create_nothing() -> Result<()> {
    let block = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let varmap = VarMap::new();
    let vb = || VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let with = |change: &dyn Fn(&mut LoraConfig)| {
        let mut config = config();
        change(&mut config);
        block.with_lora("default", &config, vb())
    };
    assert_error_says(with(&|c| c.rank = 0), &["rank", "at least 1", "0"]);
    assert_error_says(with(&|c| c.rank = 6), &["rank", "1 to 5", "mlp.up", "6"]);
    assert_error_says(with(&|c| c.alpha = f64::NAN), &["alpha", "finite", "NaN"]);
    assert_error_says(with(&|c| c.alpha = 1e300), &["alpha / rank", "F32 can hold"]);
    assert_error_says(with(&|c| c.dropout_p = 1.0), &["dropout_p", "[0, 1)", "1"]);
    assert_error_says(with(&|c| c.targets = vec![]), &["targets", "at least one"]);
    assert_error_says(with(&|c| c.targets = vec![Target::Up, Target::Up]), &["targets", "up twice"]);
    assert_error_says(with(&|c| c.targets = vec![Target::Gate]), &["targets", "mlp.down", "gate"]);
    assert_error_says(block.with_lora("", &config(), vb()), &["a name"]);
    let wide = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
    assert_error_says(block.with_lora("default", &config(), wide), &["F32", "F64"]);
    assert_eq!(varmap.all_vars().len(), 0);
    assert_error_says("w_q".parse::<Target>(), &["q_proj, k_proj", "w_q"]);
    Ok(())
}

#[test]
fn matrices_that_do_not_fit_are_errors() -> Result<()> {
    let block = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let good = block.with_lora("default", &config(), crate::vb(&block))?.adapter_parameters("default")?;
    let with = |name: &str, tensor: Option<Tensor>| {
        let mut tensors: std::collections::HashMap<_, _> = good.iter().cloned().collect();
        tensors.remove(name);
        tensors.extend(tensor.map(|tensor| (name.to_string(), tensor)));
        block.with_lora("default", &config(), VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
    };
    with("mlp.up.lora_A.weight", Some(Tensor::zeros((2, 6), DType::F32, &Device::Cpu)?))?;
    let name = "attention.q_proj.lora_A.weight";
    let nan = Tensor::full(f32::NAN, (2, 6), &Device::Cpu)?;
    assert_error_says(with(name, Some(nan)), &["attention.q_proj.lora_A.weight", "NaN"]);
    assert!(with(name, Some(Tensor::zeros((3, 6), DType::F32, &Device::Cpu)?)).is_err());
    assert!(with(name, None).is_err());
    Ok(())
}

#[test]
fn what_would_lose_an_adapter_is_an_error() -> Result<()> {
    let block = adapted(&blocks_common::block(&blocks_common::bert(), DType::F32)?, "default", &config(), 3)?;
    let says = ["adapter default", "merged"];
    assert_error_says(block.to_bytes(), &says);
    assert_error_says(block.to_layout(Layout::Bert), &says);
    assert_error_says(block.trainable(), &says);
    assert_error_says(block.attention().to_bytes(), &says);
    assert_error_says(block.attention().to_layout(Layout::Bert), &says);
    assert_error_says(block.attention().trainable(), &says);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("block.safetensors");
    assert_error_says(block.save(&path), &says);
    assert!(!path.exists());
    block.merge("default")?.save(&path)
}

#[test]
fn merging_into_infinity_is_an_error() -> Result<()> {
    let block = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let block = adapted(&block, "default", &LoraConfig { alpha: 1e38, ..config() }, 3)?;
    for (name, var) in crate::matrices(&block, "default")? {
        var.set(&Tensor::full(if name.contains("lora_A") { 1e3f32 } else { 1.0 }, var.shape(), &Device::Cpu)?)?;
    }
    assert_error_says(block.merge("default"), &["adapter default", "finite", "q_proj"]);
    Ok(())
}
