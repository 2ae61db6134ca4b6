//! Several adapters on one base, chosen by name for each call.

use std::collections::HashSet;

use candle_attention::adapter::{Adapt, AdapterChoice};
use candle_attention::block::TransformerBlock;
use candle_attention::{ForwardOptions, Result, SelfAttentionConfig};
use candle_core::DType;

use crate::common::{assert_same_bits, max_abs_difference, randn};
use crate::layers::assert_error_says;
use crate::{adapted, blocks_common, config, layers};

fn with(adapter: AdapterChoice) -> ForwardOptions {
    ForwardOptions { adapter, ..Default::default() }
}

#[test]
fn each_call_chooses_its_adapter() -> Result<()> {
    let base = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let (first, second) = (adapted(&base, "first", &config(), 3)?, adapted(&base, "second", &config(), 4)?);
    let both = adapted(&adapted(&base, "first", &config(), 3)?, "second", &config(), 4)?;
    assert_eq!(
        (both.adapters(), both.active_adapter()),
        (vec!["first".into(), "second".into()], Some("second".into()))
    );
    let x = randn(1, (2, 4, 6), DType::F32)?;
    let call = |adapter| Ok::<_, candle_attention::Error>(both.forward_with(&x, &with(adapter))?.output);
    assert_same_bits(&call(AdapterChoice::Named("first".into()))?, &first.forward(&x)?, "first");
    assert_same_bits(&call(AdapterChoice::Named("second".into()))?, &second.forward(&x)?, "second");
    assert_same_bits(&call(AdapterChoice::Active)?, &second.forward(&x)?, "active");
    assert_same_bits(&call(AdapterChoice::Base)?, &base.forward(&x)?, "base");
    assert!(max_abs_difference(&first.forward(&x)?, &second.forward(&x)?)? > 0.01);

    let changed = both.with_active_adapter(Some("first"))?;
    assert_same_bits(&changed.forward(&x)?, &first.forward(&x)?, "changed");
    assert_same_bits(&both.without_adapter("second")?.forward(&x)?, &base.forward(&x)?, "none is active");
    assert_same_bits(&changed.without_adapter("second")?.forward(&x)?, &first.forward(&x)?, "still active");
    assert_eq!(both.adapter_config("first")?, first.adapter_config("first")?);
    Ok(())
}

#[test]
fn names_that_no_adapter_has_are_errors() -> Result<()> {
    let base = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let block = adapted(&base, "first", &config(), 3)?;
    let x = randn(1, (2, 4, 6), DType::F32)?;
    let wrong = with(AdapterChoice::Named("frist".into()));
    assert_error_says(block.forward_with(&x, &wrong), &["adapter frist", "one of first"]);
    assert_error_says(base.forward_with(&x, &wrong), &["adapter frist", "no adapter"]);
    assert_error_says(block.with_active_adapter(Some("frist")), &["adapter frist", "one of first"]);
    assert_error_says(block.without_adapter("frist"), &["one of first"]);
    assert_error_says(block.merge("frist"), &["one of first"]);
    assert_error_says(block.adapter_parameters("frist"), &["one of first"]);
    assert_error_says(base.adapter_config("frist"), &["frist"]);
    Ok(())
}

#[test]
fn optimiser_gets_the_active_adapter_alone() -> Result<()> {
    let base = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let both = adapted(&adapted(&base, "first", &config(), 3)?, "second", &config(), 4)?;
    let ids = |block: &TransformerBlock| block.vars().iter().map(|var| var.id()).collect::<HashSet<_>>();
    let of = |name| -> Result<HashSet<_>> {
        Ok(both.adapter_parameters(name)?.into_iter().map(|(_, tensor)| tensor.id()).collect())
    };
    assert_eq!(ids(&both), of("second")?);
    assert_eq!(ids(&both.with_active_adapter(Some("first"))?), of("first")?);
    assert!(ids(&both.with_active_adapter(None)?).is_empty() && ids(&both.merge("first")?).is_empty());
    // After merging, what was active is active again.
    assert_eq!(both.merge("first")?.unmerge()?.active_adapter(), Some("second".into()));
    assert_error_says(both.merge("first")?.with_active_adapter(Some("second")), &["first", "unmerge"]);
    Ok(())
}

#[test]
fn two_adapters_have_matrices_of_their_own() -> Result<()> {
    let base = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let vb = crate::vb(&base);
    let first = base.with_lora("first", &config(), vb.clone())?;
    assert_error_says(first.with_lora("second", &config(), vb.clone()), &["adapter second", "prefix", "adapter first"]);
    assert_eq!(first.with_lora("second", &config(), vb.pp("second"))?.adapters(), ["first", "second"]);
    Ok(())
}

#[test]
fn projected_memory_has_the_adapter_of_the_calls_that_use_it() -> Result<()> {
    let base = layers::cross_attention(&SelfAttentionConfig::new(6, 2), DType::F64)?;
    let both = adapted(&adapted(&base, "first", &config(), 3)?, "second", &config(), 4)?;
    let (x, memory) = (randn(1, (2, 3, 6), DType::F64)?, randn(2, (2, 5, 6), DType::F64)?);
    let first = AdapterChoice::Named("first".into());
    let projected = both.project_with(&memory, &memory, &first)?;
    let options = with(first);
    let output = both.forward_projected_with(&x, &projected, &options)?.output;
    assert_same_bits(&output, &both.forward_with(&x, &memory, &options)?.output, "first");
    let says = ["adapter second", "projected memory, first"];
    assert_error_says(both.forward_projected(&x, &projected), &says);
    let base_says = ["adapter none", "projected memory, second"];
    let by_base = both.forward_projected_with(&x, &both.project(&memory)?, &with(AdapterChoice::Base));
    assert_error_says(by_base, &base_says);
    Ok(())
}

#[test]
fn cached_tokens_are_computed_with_the_adapter_of_their_call() -> Result<()> {
    let base = blocks_common::block(&blocks_common::llama(), DType::F64)?;
    let both = adapted(&adapted(&base, "first", &config(), 3)?, "second", &config(), 4)?;
    let (x, options) = (randn(1, (1, 4, 6), DType::F64)?, with(AdapterChoice::Named("first".into())));
    let mut cache = both.kv_cache(1)?;
    let cached = both.forward_cached_with(&x, &mut cache, &options)?.output;
    assert!(max_abs_difference(&cached, &both.forward_with(&x, &options)?.output)? < 1e-12);
    assert!(max_abs_difference(&cached, &both.forward(&x)?)? > 0.01);
    Ok(())
}

#[test]
fn merged_adapter_is_the_only_one() -> Result<()> {
    let base = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let both = adapted(&adapted(&base, "first", &config(), 3)?, "second", &config(), 4)?;
    let merged = both.merge("first")?;
    let x = randn(1, (2, 4, 6), DType::F32)?;
    assert_same_bits(
        &merged.forward(&x)?,
        &merged.forward_with(&x, &with(AdapterChoice::Named("first".into())))?.output,
        "it",
    );
    assert_error_says(
        merged.forward_with(&x, &with(AdapterChoice::Base)),
        &["adapter first", "merged", "without adapter"],
    );
    let second = with(AdapterChoice::Named("second".into()));
    assert_error_says(merged.forward_with(&x, &second), &["adapter first", "merged", "adapter second"]);
    assert_error_says(merged.merge("second"), &["first", "unmerge"]);
    assert_error_says(merged.without_adapter("second"), &["first", "unmerge"]);
    assert_error_says(merged.with_lora("third", &config(), crate::vb(&base)), &["first", "unmerge"]);
    let second = merged.unmerge()?.merge("second")?;
    assert!(max_abs_difference(&second.forward(&x)?, &both.forward(&x)?)? < 1e-5);
    Ok(())
}
