//! Metadata without a config, or with an invalid one.

use candle_attention::{Result, SelfAttentionConfig};
use candle_core::DType;
use serde_json::{Value, json};

use crate::layers::{assert_error_says, cross_attention, self_attention};

use super::files::{ENTRY, Parts};

fn assert_refused(change: impl FnOnce(&mut Value), parts: &[&str]) -> Result<()> {
    assert_error_says(Parts::small()?.with_config(change).load(), parts);
    Ok(())
}

/// Checks that the small layer is refused if one field of its config has another value.
fn assert_field_refused(field: &str, value: Value, parts: &[&str]) -> Result<()> {
    assert_refused(|config| config[field] = value, parts)
}

#[test]
fn metadata_that_is_no_json_is_quoted() -> Result<()> {
    for text in ["", "no JSON", "{", "null", "[]", "7", r#"{"layer": "self_attention"}"#] {
        let mut file = Parts::small()?;
        file.metadata.insert(ENTRY.to_string(), text.to_string());
        assert_error_says(file.load(), &["expected a config", ENTRY, text]);
    }
    Ok(())
}

#[test]
fn deeply_nested_metadata_is_refused() -> Result<()> {
    let mut file = Parts::small()?;
    file.metadata.insert(ENTRY.to_string(), "[".repeat(100_000));
    assert_error_says(file.load(), &["expected a config", ENTRY]);
    Ok(())
}

#[test]
fn unknown_kind_of_layer_is_refused() -> Result<()> {
    for layer in ["", "SelfAttention", "mixture_of_experts"] {
        let mut file = Parts::small()?;
        let header = json!({"layer": layer, "config": SelfAttentionConfig::new(4, 2)});
        file.metadata.insert(ENTRY.to_string(), header.to_string());
        assert_error_says(file.load(), &["expected a config", "self_attention"]);
    }
    Ok(())
}

#[test]
fn fields_of_another_type_are_refused() -> Result<()> {
    for value in [json!(-4), json!(4.5), json!("4"), Value::Null, json!([4]), json!(1e30)] {
        assert_field_refused("embed_dim", value, &["expected a config", ENTRY])?;
    }
    assert_field_refused("is_causal", json!("yes"), &["expected a config", ENTRY])?;
    assert_field_refused("rotary", json!({"pairing": "diagonal"}), &["expected a config", "diagonal"])
}

#[test]
fn unknown_and_missing_fields_are_named() -> Result<()> {
    assert_field_refused("num_layers", json!(3), &["expected a config", "num_layers"])?;
    let without_heads = |config: &mut Value| {
        config.as_object_mut().expect("an object").remove("num_heads");
    };
    assert_refused(without_heads, &["expected a config", "missing field `num_heads`"])
}

#[test]
fn zero_heads_are_refused() -> Result<()> {
    assert_field_refused("num_heads", json!(0), &["num_heads", "expected at least 1", "got 0"])
}

#[test]
fn sizes_that_do_not_fit_together_are_refused() -> Result<()> {
    assert_field_refused("num_heads", json!(3), &["embed_dim", "a multiple of num_heads 3", "got 4"])?;
    assert_field_refused("num_kv_heads", json!(3), &["num_heads 2", "num_kv_heads 3"])?;
    assert_field_refused("sliding_window", json!(0), &["sliding_window", "expected at least 1", "got 0"])
}

#[test]
fn numbers_out_of_range_are_refused() -> Result<()> {
    assert_field_refused("dropout_p", json!(1.0), &["dropout_p", "[0, 1)", "got 1"])?;
    assert_field_refused("softcap", json!(-1.0), &["softcap", "above 0", "got -1"])?;
    assert_field_refused("qk_norm_eps", json!(-1e-6), &["qk_norm_eps", "above 0"])?;
    assert_field_refused("rotary", json!({"dim": 3}), &["rotary.dim", "even", "got 3"])?;
    assert_field_refused("rotary", json!({"base": 0.0}), &["rotary.base", "above 0", "got 0"])?;
    let scaling = json!({"rope_type": "linear", "factor": 0.5});
    assert_field_refused("rotary", json!({ "scaling": scaling }), &["rotary.scaling.factor", "at least 1", "got 0.5"])?;
    let scaling = json!({"rope_type": "longrope", "factors": vec![1.0; 1000], "factor": 2.0,
        "original_max_position_embeddings": 64});
    assert_field_refused(
        "rotary",
        json!({ "scaling": scaling }),
        &["rotary.scaling.factors", "one for each of 1 pairs", "got 1000"],
    )
}

/// The parameters would take exabytes. No memory of that size may be requested.
#[test]
fn absurd_sizes_allocate_nothing() -> Result<()> {
    for field in ["embed_dim", "head_dim", "value_dim", "kv_dim"] {
        for size in [1u64 << 40, 1 << 60, 1 << 61, 1 << 62, 1 << 63, u64::MAX] {
            assert_field_refused(field, json!(size), &["expected", "got"])?;
        }
    }
    for heads in [1u64 << 40, 1 << 60, u64::MAX] {
        let change = |config: &mut Value| {
            config["num_heads"] = json!(heads);
            config["head_dim"] = json!(2);
            config["alibi"] = json!(true);
            config["sinks"] = json!(true);
        };
        assert_refused(change, &["expected", "got"])?;
    }
    Ok(())
}

#[test]
fn config_of_more_parameters_than_the_file_holds_names_them() -> Result<()> {
    assert_field_refused(
        "embed_dim",
        json!(1u64 << 28),
        &["`q_proj.weight`", "expected shape [268435456, 268435456]", "got [4, 4]"],
    )?;
    assert_field_refused("sinks", json!(true), &["`sinks` is missing, expected [2]"])?;
    assert_field_refused("qk_norm_eps", json!(1e-6), &["`q_norm.weight` is missing", "`k_norm.weight` is missing"])?;
    assert_field_refused("out_proj", json!(false), &["`o_proj.weight` is unexpected", "`o_proj.bias` is unexpected"])
}

/// A config that only one kind of layer refuses is refused in a file, too.
#[test]
fn config_of_the_other_kind_of_layer_is_refused() -> Result<()> {
    let cross = SelfAttentionConfig { kv_dim: Some(6), ..SelfAttentionConfig::new(4, 2) };
    let mut file = Parts::of(&cross_attention(&cross, DType::F32)?.to_bytes()?)?;
    let entry = file.metadata[ENTRY].replace("cross_attention", "self_attention");
    file.metadata.insert(ENTRY.to_string(), entry);
    assert_error_says(file.load(), &["kv_dim", "embed_dim 4", "got 6"]);

    let rotary = SelfAttentionConfig { rotary: Some(Default::default()), ..SelfAttentionConfig::new(4, 2) };
    let mut file = Parts::of(&self_attention(&rotary, DType::F32)?.to_bytes()?)?;
    let entry = file.metadata[ENTRY].replace("self_attention", "cross_attention");
    file.metadata.insert(ENTRY.to_string(), entry);
    let bytes = file.to_bytes()?;
    let loaded = candle_attention::CrossAttention::from_bytes(&bytes, &candle_core::Device::Cpu);
    assert_error_says(loaded, &["rotary", "expected none"]);
    Ok(())
}
