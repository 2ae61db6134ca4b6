//! Training of adapters: gradients of A and B and of nothing else, and a base that stays as it is.

use candle_attention::adapter::{Adapt, LoraConfig};
use candle_attention::train::{AdamW, AdamWConfig, named_variables};
use candle_attention::{Result, SelfAttentionConfig};
use candle_core::{DType, Device, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{assert_finite, assert_same_bits, check_gradients, randn, var};
use crate::{adapted, all_of, blocks_common, config, grids, layers, matrices};

#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    for (name, config) in blocks_common::grid() {
        let block = adapted(&blocks_common::block(&config, DType::F64)?, "default", &crate::config(), 3)?;
        let (x, c) = (var(1, (1, 3, 6), DType::F64)?, randn(9, (1, 3, 6), DType::F64)?);
        let matrices = matrices(&block, "default")?;
        let mut vars: Vec<(&str, &Var)> = matrices.iter().map(|(name, var)| (name.as_str(), var)).collect();
        vars.push(("x", &x));
        check_gradients(&vars, || block.forward(&x)? * &c, 1e-7, &name);
    }
    Ok(())
}

#[test]
fn every_matrix_learns_in_every_attention() -> Result<()> {
    for (name, attention, _) in grids::self_attention() {
        let layer = adapted(&layers::self_attention(&attention, DType::F64)?, "default", &config(), 3)?;
        let x = randn(1, (2, 4, attention.embed_dim), DType::F64)?;
        let y = layer.forward_t(&x, true)?;
        let grads = (&y * randn(9, y.shape(), DType::F64)?)?.backward()?;
        for (matrix, var) in matrices(&layer, "default")? {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name}: no gradient of {matrix}"));
            assert_finite(grad, &matrix);
            assert!(grad.abs()?.max_all()?.to_scalar::<f64>()? > 0.0, "{name}: {matrix}");
        }
    }
    Ok(())
}

/// The base was built on a `VarMap`, so its parameters are variables; with an adapter they are constants.
#[test]
fn training_changes_the_adapter_and_no_bit_of_the_base() -> Result<()> {
    for config in [blocks_common::bert(), blocks_common::llama(), blocks_common::gemma2()] {
        let base = blocks_common::block(&config, DType::F32)?;
        let before: Vec<_> =
            base.parameters().into_iter().map(|(name, x)| Ok((name, x.copy()?))).collect::<Result<_>>()?;
        let (varmap, lora) = (VarMap::new(), LoraConfig { targets: all_of(&base)?, ..crate::config() });
        let block = base.with_lora("default", &lora, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
        assert_eq!(block.vars().len(), 2 * lora.targets.len());
        assert_eq!(named_variables(&varmap).len(), 2 * lora.targets.len());
        let mut optimizer = AdamW::new(&named_variables(&varmap), AdamWConfig { lr: 0.05, ..Default::default() })?;
        let (x, target) = (randn(1, (2, 4, 6), DType::F32)?, randn(2, (2, 4, 6), DType::F32)?);
        let mut losses = Vec::new();
        for _ in 0..30 {
            let loss = (block.forward_t(&x, true)? - &target)?.sqr()?.mean_all()?;
            losses.push(loss.to_scalar::<f32>()?);
            let gradients = loss.backward()?;
            assert!(base.vars().iter().all(|var| gradients.get(var).is_none()), "no gradient of the base");
            optimizer.step(&gradients)?;
        }
        assert!(losses[29] < 0.8 * losses[0], "{losses:?}");
        for ((name, before), (_, after)) in before.iter().zip(block.parameters()) {
            assert_same_bits(after, before, name);
        }
    }
    Ok(())
}

#[test]
fn initial_matrices_are_those_of_the_seed_and_the_name() -> Result<()> {
    let layer = layers::self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let new = |seed| {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        layer
            .with_lora("default", &LoraConfig { seed, ..LoraConfig::new(4, 4.0) }, vb.pp("h.0"))?
            .adapter_parameters("default")
    };
    let [first, again, other] = [new(1)?, new(1)?, new(2)?];
    for (((name, a), (_, b)), (_, c)) in first.iter().zip(&again).zip(&other) {
        assert_same_bits(a, b, name);
        let a = a.flatten_all()?.to_vec1::<f32>()?;
        if name.ends_with("lora_B.weight") {
            assert!(a.iter().all(|&x| x == 0.0), "{name}");
        } else {
            assert_ne!(a, c.flatten_all()?.to_vec1::<f32>()?, "{name}");
            // PEFT's bound: kaiming_uniform_ with a = sqrt(5).
            let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            assert!(largest <= 8f32.powf(-0.5) && largest > 0.8 * 8f32.powf(-0.5), "{name}: {largest}");
        }
    }
    assert_ne!(
        crate::common::numbers(&first[0].1)?,
        crate::common::numbers(&first[2].1)?,
        "other names, other numbers"
    );
    Ok(())
}
