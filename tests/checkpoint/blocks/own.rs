//! The file of a block holds its config and its parameters, and gives the same block again.

use candle_attention::block::{MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig};
use candle_attention::rotary::{Pairing, RotaryEmbedding};
use candle_attention::{CrossAttention, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::blocks_common::{bert, block, grid, llama, randomise, variable};
use crate::common::{assert_same_bits, max_abs_difference, randn};
use crate::layers::{assert_error_says, cross_attention, everything, self_attention};
use crate::own::files::{ENTRY, Parts};

fn again(block: &TransformerBlock) -> Result<TransformerBlock> {
    Ok(TransformerBlock::from_bytes(&block.to_bytes()?, &Device::Cpu)?)
}

#[track_caller]
fn assert_same_parameters(found: &TransformerBlock, expected: &TransformerBlock, what: &str) {
    let (found, expected) = (found.parameters(), expected.parameters());
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
        assert_eq!(name, expected_name, "{what}");
        assert_same_bits(found, expected, &format!("{what}: {name}"));
    }
}

#[test]
fn blocks_of_every_config_come_back() -> Result<()> {
    let x = randn(1, (2, 4, 6), DType::F64)?;
    for (what, config) in grid() {
        let made = block(&config, DType::F64)?;
        let loaded = again(&made)?;
        assert_eq!(loaded.config(), &config, "{what}");
        assert_same_parameters(&loaded, &made, &what);
        assert_same_bits(&loaded.forward(&x)?, &made.forward(&x)?, &what);
        assert_eq!(loaded.vars().len(), made.parameters().len(), "{what}");
    }
    Ok(())
}

#[test]
fn blocks_of_every_dtype_come_back() -> Result<()> {
    let attention = SelfAttentionConfig { alibi: false, seed: u64::MAX, ..everything() };
    let mlp = MlpConfig { seed: 1 << 63, ..MlpConfig::swiglu(10, 7) };
    let config = TransformerBlockConfig {
        placement: NormPlacement::Sandwich,
        dropout_p: 0.1 + 0.2,
        ..TransformerBlockConfig::new(attention, mlp, NormConfig { unit_offset: true, ..NormConfig::rms(1.0 / 3.0) })
    };
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let made = block(&config, dtype)?;
        let loaded = again(&made)?;
        assert_eq!(loaded.config(), &config);
        assert_same_parameters(&loaded, &made, &format!("{dtype:?}"));
    }
    Ok(())
}

#[test]
fn file_of_a_block_has_the_same_bytes_each_time() -> anyhow::Result<()> {
    let block = block(&bert(), DType::F32)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("block.safetensors");
    for _ in 0..3 {
        block.save(&path)?;
        assert_eq!(std::fs::read(&path)?, block.to_bytes()?);
    }
    let loaded = TransformerBlock::load(&path, &Device::Cpu)?;
    assert_same_parameters(&loaded, &block, "loaded");
    assert_eq!(loaded.to_bytes()?, block.to_bytes()?);
    let missing = folder.path().join("nowhere.safetensors");
    assert_error_says(TransformerBlock::load(&missing, &Device::Cpu), &[&missing.display().to_string(), "can't read"]);
    Ok(())
}

#[test]
fn header_says_what_the_file_holds() -> Result<()> {
    let parts = Parts::of(&block(&llama(), DType::F32)?.to_bytes()?)?;
    let header: serde_json::Value = serde_json::from_str(&parts.metadata[ENTRY]).expect("JSON");
    assert_eq!(header["layer"], "transformer_block");
    assert_eq!(header["config"]["mlp"]["hidden_dim"], 5);
    assert_eq!(header["config"]["placement"], "pre");
    assert_eq!(header["config"]["norm"]["kind"], "rms");
    Ok(())
}

#[test]
fn file_of_another_kind_of_layer_is_refused() -> Result<()> {
    let of_block = block(&bert(), DType::F32)?.to_bytes()?;
    let of_self = self_attention(&SelfAttentionConfig::new(6, 2), DType::F32)?.to_bytes()?;
    let of_cross = cross_attention(&SelfAttentionConfig::new(6, 2), DType::F32)?.to_bytes()?;
    let (block, layer) = ("a TransformerBlock", "a SelfAttention");
    assert_error_says(SelfAttention::from_bytes(&of_block, &Device::Cpu), &["expected a SelfAttention", block]);
    assert_error_says(CrossAttention::from_bytes(&of_block, &Device::Cpu), &["expected a CrossAttention", block]);
    assert_error_says(TransformerBlock::from_bytes(&of_self, &Device::Cpu), &["expected a TransformerBlock", layer]);
    let parts = ["expected a TransformerBlock", "got a CrossAttention"];
    assert_error_says(TransformerBlock::from_bytes(&of_cross, &Device::Cpu), &parts);
    Ok(())
}

/// Changes the config in the file of a block.
#[track_caller]
fn refused(change: impl FnOnce(&mut serde_json::Value), parts: &[&str]) {
    let file = Parts::of(&block(&llama(), DType::F32).unwrap().to_bytes().unwrap()).unwrap().with_config(change);
    assert_error_says(TransformerBlock::from_bytes(&file.to_bytes().unwrap(), &Device::Cpu), parts);
}

#[test]
fn config_that_no_block_can_have_is_refused() {
    refused(|c| c["attention"]["num_heads"] = 4.into(), &["expected a valid config", "embed_dim"]);
    refused(|c| c["mlp"]["embed_dim"] = 7.into(), &["expected a valid config", "mlp.embed_dim", "got 7"]);
    refused(|c| c["mlp"]["hidden_dim"] = 0.into(), &["expected a valid config", "mlp.hidden_dim"]);
    refused(
        |c| c["mlp"]["hidden_dim"] = u64::MAX.into(),
        &["expected a valid config", "mlp.embed_dim and mlp.hidden_dim"],
    );
    refused(|c| c["norm"]["eps"] = 0.into(), &["expected a valid config", "norm.eps"]);
    refused(|c| c["norm"]["eps"] = 1e-300.into(), &["norm.eps", "also in f32"]);
    refused(|c| c["dropout_p"] = 1.into(), &["expected a valid config", "dropout_p"]);
    refused(|c| c["attention"]["kv_dim"] = 5.into(), &["expected a valid config", "kv_dim", "got 5"]);
    refused(|c| c["more"] = 1.into(), &["expected a config", "unknown field `more`"]);
    refused(|c| c["norm"]["more"] = 1.into(), &["expected a config", "unknown field `more`"]);
    refused(|c| c["placement"] = "between".into(), &["expected a config", "unknown variant `between`"]);
    refused(|c| c["mlp"] = serde_json::Value::Null, &["expected a config"]);
    // Other valid sizes than those of the tensors.
    refused(|c| c["mlp"]["hidden_dim"] = 4.into(), &["`mlp.up.weight`: expected shape [4, 6], got [5, 6]"]);
    refused(|c| c["placement"] = "sandwich".into(), &["`mlp_post_norm.weight` is missing"]);
}

#[test]
fn parameters_that_no_block_could_load_are_not_saved() -> anyhow::Result<()> {
    let block = block(&bert(), DType::F32)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("block.safetensors");
    block.save(&path)?;
    let before = std::fs::read(&path)?;
    for name in ["mlp.down.weight", "attention_norm.bias"] {
        let var = variable(&block, name);
        var.set(&(var.as_tensor() * f64::NAN)?)?;
    }
    let parts = ["`mlp.down.weight`: expected finite numbers", "`attention_norm.bias`: expected finite numbers"];
    assert_error_says(block.save(&path), &parts);
    assert_eq!(std::fs::read(&path)?, before);
    Ok(())
}

#[test]
fn trainable_copy_has_variables_of_its_own() -> Result<()> {
    let mut config = TransformerBlockConfig { dropout_p: 0.4, ..llama() };
    config.attention.dropout_p = 0.2;
    let made = block(&config, DType::F32)?;
    let tensors = made.parameters().into_iter().map(|(name, tensor)| (format!("h.{name}"), tensor.detach()));
    let constant = VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu);
    let constant = TransformerBlock::new(&config, constant.pp("h"))?;
    assert!(constant.vars().is_empty());
    let x = randn(1, (2, 4, 6), DType::F32)?;
    constant.forward_t(&x, true)?;
    let copy = constant.trainable()?;
    assert_eq!(copy.vars().len(), constant.parameters().len());
    assert_same_parameters(&copy, &constant, "copy");
    // Dropout goes on as in the block that was copied, and apart from it.
    assert_eq!(copy.dropout_calls(), [1, 1]);
    assert_same_bits(&copy.forward_t(&x, true)?, &constant.forward_t(&x, true)?, "the second pass");
    copy.forward_t(&x, true)?;
    assert_eq!((copy.dropout_calls(), constant.dropout_calls()), ([3, 3], [2, 2]));
    randomise(&copy, 5)?;
    assert_same_parameters(&constant, &made, "the block that was copied");
    Ok(())
}

#[test]
fn rotary_tables_are_not_lost_unnoticed() -> Result<()> {
    let angles = Tensor::new(&[[0f32], [1.], [2.]], &Device::Cpu)?;
    let rotary = RotaryEmbedding::from_tables(&angles.cos()?, &angles.sin()?, 2, Pairing::HalfSplit)?;
    let attention = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(4, 2) };
    let config = TransformerBlockConfig::new(attention, MlpConfig::new(4, 3), NormConfig::layer(1e-5));
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let plain = TransformerBlock::new(&config, vb)?;
    let rotated = plain.clone().with_rotary(rotary)?;
    let x = randn(1, (3, 4), DType::F32)?;
    let expected = rotated.forward(&x)?;
    assert!(max_abs_difference(&expected, &plain.forward(&x)?)? > 1e-3);
    assert_error_says(rotated.to_bytes(), &["rotary", "tables"]);
    assert_same_bits(&rotated.trainable()?.forward(&x)?, &expected, "trainable copy");
    Ok(())
}
