//! The gradients of a block are those of finite differences, on every path through it, and are the same whenever and by how many
//! threads they are computed.

use candle_attention::block::TransformerBlockConfig;
use candle_attention::{Backend, ForwardOptions, Mask, ScoreStage};
use candle_core::{DType, Result, Tensor, Var};

use crate::blocks_common::{PLACEMENTS, bert, block, gemma2, gpt2, grid, llama};
use crate::common::{assert_same_bits, check_gradients, gradients, randn, var};

use super::{rotated_llama, run, training, with_threads};

/// How far gradients may be from finite differences. The norms of a sandwich divide by small numbers, and the third derivatives of
/// the loss, which a step of 1e-5 leaves in the difference, are large.
const TOLERANCE: f64 = 1e-6;

/// Checks the gradients of x and of every parameter in this call.
#[track_caller]
fn check(what: &str, config: &TransformerBlockConfig, options: &ForwardOptions, more: &[(&str, &Var)]) -> Result<()> {
    let (block, x) = (block(config, DType::F64)?, var(1, (2, 4, 6), DType::F64)?);
    let names = block.parameters().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let vars = block.vars();
    let mut all: Vec<(&str, &Var)> = names.iter().map(String::as_str).zip(&vars).collect();
    all.push(("x", &x));
    all.extend(more);
    let c = randn(9, (2, 4, 6), DType::F64)?;
    let loss = || {
        block.set_dropout_calls([0, 0]);
        let output = block.forward_with(&x, options)?;
        let loss = (output.output * &c)?.sum_all()?;
        match output.weights {
            Some(weights) => loss + weights.sqr()?.sum_all()?,
            None => Ok(loss),
        }
    };
    check_gradients(&all, loss, TOLERANCE, what);
    Ok(())
}

/// Each placement with each norm and one MLP of those that the grid has, so that every pair of parts that touch is there.
#[test]
fn gradients_of_every_config_are_those_of_finite_differences() -> Result<()> {
    let every = grid().into_iter().enumerate().filter(|(i, _)| (i / 10) % 5 == (i / 2) % 5);
    for (_, (what, config)) in every {
        check(&what, &config, &training(), &[])?;
    }
    Ok(())
}

#[test]
fn gradients_on_the_general_path_are_those_of_finite_differences() -> Result<()> {
    let calls = [
        ("weights", ForwardOptions { return_weights: true, ..training() }),
        ("reference", ForwardOptions { backend: Backend::Reference, ..training() }),
        ("fused", ForwardOptions { return_logsumexp: true, backend: Backend::Fused, ..training() }),
        ("scores", ForwardOptions { return_scores: Some(ScoreStage::Softcapped), ..training() }),
    ];
    for (what, options) in calls {
        for (name, config) in [("BERT", bert()), ("GPT-2", gpt2()), ("Llama", rotated_llama()), ("Gemma 2", gemma2())] {
            let config = TransformerBlockConfig { dropout_p: 0.2, ..config };
            check(&format!("{what}, {name}"), &config, &options, &[])?;
        }
    }
    Ok(())
}

#[test]
fn gradients_with_every_feature_of_attention_are_those_of_finite_differences() -> Result<()> {
    for placement in PLACEMENTS {
        let with = |change: &dyn Fn(&mut TransformerBlockConfig)| {
            let mut config = TransformerBlockConfig { placement, ..rotated_llama() };
            change(&mut config);
            config
        };
        for (what, config) in [
            ("rotary and grouped queries", with(&|_| ())),
            (
                "softcap and a window",
                with(&|c| (c.attention.softcap, c.attention.sliding_window) = (Some(2.0), Some(2))),
            ),
            ("QK-norm", with(&|c| c.attention.qk_norm_eps = Some(1e-3))),
            ("sinks", with(&|c| c.attention.sinks = true)),
            ("ALiBi", with(&|c| c.attention.alibi = true)),
            ("extra keys", with(&|c| (c.attention.add_bias_kv, c.attention.add_zero_attn) = (true, true))),
            ("wider values", with(&|c| c.attention.value_dim = Some(3))),
            ("biases of some", with(&|c| (c.attention.qkv_bias, c.attention.k_bias) = (true, false))),
        ] {
            check(&format!("{placement:?}, {what}"), &config, &ForwardOptions::default(), &[])?;
        }
        let bias = var(7, (1, 2, 4, 4), DType::F64)?;
        let options = ForwardOptions { attn_bias: Some(bias.as_tensor().clone()), ..Default::default() };
        check(&format!("{placement:?}, bias"), &with(&|_| ()), &options, &[("bias", &bias)])?;
    }
    Ok(())
}

/// A query that sees no key has a log-sum-exp of -inf.
#[test]
fn gradients_of_queries_that_see_no_key_are_those_of_finite_differences() -> Result<()> {
    let allowed = Tensor::new(&[[[[0u8, 0, 1, 1]]], [[[0, 1, 0, 1]]]], &candle_core::Device::Cpu)?;
    let attn_mask = Mask::from_tensor(&allowed)?;
    for placement in PLACEMENTS {
        let options = ForwardOptions { attn_mask: attn_mask.clone(), ..training() };
        let config = TransformerBlockConfig { placement, dropout_p: 0.2, ..llama() };
        check(&format!("{placement:?}"), &config, &options, &[])?;
    }
    Ok(())
}

#[test]
fn graph_can_be_gone_through_twice() -> Result<()> {
    for (what, config) in grid() {
        let (block, x) = (block(&config, DType::F32)?, var(1, (2, 4, 6), DType::F32)?);
        for block in [block.clone(), block.with_recompute(true)] {
            let loss = block.forward_t(&x, true)?.sqr()?;
            let vars = block.vars();
            let vars = [&x].into_iter().chain(&vars).collect::<Vec<_>>();
            let (first, second) = (gradients(&loss, &vars)?, gradients(&loss, &vars)?);
            for (first, second) in first.iter().zip(&second) {
                assert_same_bits(first, second, &what);
            }
        }
    }
    Ok(())
}

/// Two blocks in one graph: the gradients of one aren't those of the other.
#[test]
fn block_that_is_called_twice_gets_the_sum_of_its_gradients() -> Result<()> {
    for (what, config) in grid().into_iter().filter(|(_, config)| config.dropout_p == 0.0) {
        let (block, x) = (block(&config, DType::F64)?, randn(1, (2, 4, 6), DType::F64)?);
        let vars = block.vars();
        let vars = vars.iter().collect::<Vec<_>>();
        let loss = |x: &Tensor| block.forward(x)?.sqr();
        let (a, b) = (x.narrow(0, 0, 1)?, x.narrow(0, 1, 1)?);
        let both = gradients(&(loss(&a)?.sum_all()? + loss(&b)?.sum_all()?)?, &vars)?;
        let (of_a, of_b) = (gradients(&loss(&a)?, &vars)?, gradients(&loss(&b)?, &vars)?);
        for ((both, a), b) in both.iter().zip(&of_a).zip(&of_b) {
            crate::common::assert_close(both, &(a + b)?, 1e-12, &what);
        }
    }
    Ok(())
}

#[test]
fn numbers_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let mut config = rotated_llama();
    (config.attention.embed_dim, config.attention.num_heads, config.attention.num_kv_heads) = (72, 6, Some(3));
    config.attention.head_dim = Some(16);
    config.mlp = candle_attention::block::MlpConfig::swiglu(72, 200);
    for placement in PLACEMENTS {
        let config = TransformerBlockConfig { placement, dropout_p: 0.1, ..config.clone() };
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let (block, x) = (block(&config, dtype)?, var(1, (3, 130, 72), dtype)?);
            let one = with_threads(1, || run(&block, &x, &training()))?;
            for threads in [2, 5] {
                let many = with_threads(threads, || run(&block, &x, &training()))?;
                for (many, one) in many.iter().zip(&one) {
                    assert_same_bits(many, one, &format!("{placement:?}, {dtype:?}, {threads} threads"));
                }
            }
        }
    }
    Ok(())
}
