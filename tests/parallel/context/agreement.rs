//! Ranks that disagree: every rank gets an error that names both sides, and none hangs.

use std::sync::Arc;

use candle_attention::adapter::{Adapt, AdapterChoice, LoraConfig};
use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
use candle_attention::parallel::{Communicator, ContextParallel, Order, Scheme, Split, threads};
use candle_attention::rotary::{Pairing, RotaryEmbedding};
use candle_attention::{
    AttentionError, AttentionOptions, Backend, Error, ForwardOptions, ForwardOutput, Mask, Result, SelfAttention,
    SelfAttentionConfig, scaled_dot_product_attention,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{randn, var};
use crate::layers::self_attention;

const LEN: usize = 9;

/// What makes a side another.
type Change = Box<dyn Fn(&mut Side) + Sync>;

/// One rank's side of a call.
struct Side {
    inputs: [Tensor; 3],
    options: AttentionOptions,
    split: Split,
    scheme: Scheme,
}

impl Side {
    fn new(rank: usize) -> Self {
        let split = Split::new(LEN, 3, Order::Contiguous).unwrap();
        let x = randn(1, (2, 6, split.rank_len(rank), 4), DType::F32).unwrap();
        let options = AttentionOptions { attn_mask: Mask::causal(), ..Default::default() };
        Self { inputs: [x.clone(), x.clone(), x], options, split, scheme: Scheme::Ring }
    }
}

/// The errors of all ranks, where `change` makes the side of rank 1 another.
fn errors(change: impl Fn(&mut Side) + Sync) -> Vec<Error> {
    let errors = threads(3, |communicator| {
        let mut side = Side::new(communicator.rank());
        if communicator.rank() == 1 {
            change(&mut side);
        }
        let Side { inputs: [q, k, v], options, split, scheme } = side;
        let options = AttentionOptions { parallel: Some(ContextParallel { communicator, split, scheme }), ..options };
        Ok(scaled_dot_product_attention(&q, &k, &v, &options).map(drop).unwrap_err())
    });
    errors.unwrap()
}

#[test]
fn context_disagreements_are_errors_on_every_rank() {
    let sized = |dims: [usize; 4], dtype| randn(2, dims.to_vec(), dtype).unwrap();
    let table = |seed| Mask::from_tensor(&randn(seed, (LEN, LEN), DType::F32).unwrap().gt(0.0).unwrap()).unwrap();
    let changes: Vec<(&str, &str, Change)> = vec![
        (
            "[2, 6, len, 4]",
            "[1, 6, len, 4]",
            Box::new(move |side| side.inputs = [0, 1, 2].map(|_| sized([1, 6, 3, 4], DType::F32))),
        ),
        (
            "[2, 6, len, 4]",
            "[2, 3, len, 4]",
            Box::new(move |side| side.inputs = [0, 1, 2].map(|_| sized([2, 3, 3, 4], DType::F32))),
        ),
        ("F32", "F64", Box::new(move |side| side.inputs = [0, 1, 2].map(|_| sized([2, 6, 3, 4], DType::F64)))),
        (
            "[2, 6, len, 4]",
            "3 tokens that the split gives",
            Box::new(move |side| side.inputs = [0, 1, 2].map(|_| sized([2, 6, 5, 4], DType::F32))),
        ),
        (
            "[2, 6, len, 4]",
            "as many axes as query",
            Box::new(move |side| side.inputs[1] = side.inputs[1].get(0).unwrap()),
        ),
        (
            "band of all before and 0 after",
            "band of 3 before and 0 after",
            Box::new(|side| side.options.attn_mask = Mask::sliding_window(4)),
        ),
        ("band", "tensor [1, 1, 9, 9]", Box::new(move |side| side.options.attn_mask = table(4))),
        ("band", "lengths: expected", Box::new(|side| side.options.attn_mask = Mask::key_lengths(&[3, 99]))),
        ("scale None", "scale Some(0.5)", Box::new(|side| side.options.scale = Some(0.5))),
        ("dropout 0 ", "dropout 0.1 ", Box::new(|side| side.options.dropout_p = 0.1)),
        ("causal", "bias", Box::new(|side| side.options.attn_bias = Some(randn(5, (LEN, LEN), DType::F32).unwrap()))),
        ("Auto", "Backend::Reference", Box::new(|side| side.options.backend = Backend::Reference)),
        (
            "without gradient",
            "with gradient",
            Box::new(|side| side.inputs[0] = Var::from_tensor(&side.inputs[0]).unwrap().into_inner()),
        ),
        ("Contiguous", "ZigZag", Box::new(|side| side.split = Split::new(LEN, 3, Order::ZigZag).unwrap())),
        ("9 tokens", "10 tokens", Box::new(|side| side.split = Split::new(LEN + 1, 3, Order::Contiguous).unwrap())),
        ("3 ranks", "2 ranks", Box::new(|side| side.split = Split::new(LEN, 2, Order::Contiguous).unwrap())),
        ("Ring", "Ulysses", Box::new(|side| side.scheme = Scheme::Ulysses)),
    ];
    for (first, second, change) in changes {
        for error in errors(change) {
            let text = error.to_string();
            assert!(matches!(error, Error::Attention(AttentionError::Ranks { .. })), "{text}");
            assert!(first == "causal" || text.contains(first), "{first}: {text}");
            assert!(text.contains(second) && text.contains("rank 0") && text.contains("rank 1"), "{second}: {text}");
        }
    }
}

#[test]
fn context_masks_with_other_data_are_errors_on_every_rank() {
    let tables = [7, 8].map(|seed| randn(seed, (LEN, LEN), DType::F32).unwrap().gt(0.0).unwrap());
    let errors = threads(2, |communicator| {
        let split = Split::new(LEN, 2, Order::Contiguous)?;
        let x = randn(1, (1, 1, split.rank_len(communicator.rank()), 4), DType::F32)?;
        let attn_mask = Mask::from_tensor(&tables[communicator.rank()])?;
        let parallel = Some(ContextParallel { communicator, split, scheme: Scheme::Ring });
        let options = AttentionOptions { attn_mask, parallel, ..Default::default() };
        Ok(scaled_dot_product_attention(&x, &x, &x, &options).map(drop).unwrap_err())
    });
    for error in errors.unwrap() {
        assert!(matches!(error, Error::Attention(AttentionError::Ranks { .. })), "{error}");
    }
}

/// What all ranks ask for and none serves is the same error on all of them.
#[test]
fn context_refuses_on_every_rank_alike() {
    let refusals: Vec<(&str, Change)> = vec![
        ("weights or scores", Box::new(|side| side.options.return_weights = true)),
        ("Backend::Reference", Box::new(|side| side.options.backend = Backend::Reference)),
        (
            "want a gradient",
            Box::new(|side| side.options.attn_bias = Some(var(1, (LEN, LEN), DType::F32).unwrap().into_inner())),
        ),
        (
            "scores that can't overflow",
            Box::new(|side| side.inputs = side.inputs.each_ref().map(|x| (x * 1e25).unwrap())),
        ),
        (
            "query heads that 3 ranks divide",
            Box::new(|side| {
                side.scheme = Scheme::Ulysses;
                side.inputs = side.inputs.each_ref().map(|x| x.narrow(1, 0, 5).unwrap());
            }),
        ),
    ];
    for (expected, change) in refusals {
        let texts = threads(3, |communicator| {
            let mut side = Side::new(communicator.rank());
            change(&mut side);
            let Side { inputs: [q, k, v], options, split, scheme } = side;
            let parallel = Some(ContextParallel { communicator, split, scheme });
            let options = AttentionOptions { parallel, ..options };
            Ok(scaled_dot_product_attention(&q, &k, &v, &options).map(drop).unwrap_err().to_string())
        });
        texts.unwrap().iter().for_each(|text| assert!(text.contains(expected), "{text}"));
    }
}

#[test]
fn context_layers_of_other_configs_are_errors_on_every_rank() {
    let texts = threads(2, |communicator| {
        let rank = communicator.rank();
        let config = SelfAttentionConfig { is_causal: rank == 0, ..SelfAttentionConfig::new(8, 2) };
        let layer = self_attention(&config, DType::F32)?;
        let x = randn(1, (3, 8), DType::F32)?;
        let split = Split::new(6, 2, Order::Contiguous)?;
        let options = |communicator| ForwardOptions {
            parallel: Some(ContextParallel { communicator, split, scheme: Scheme::Ring }),
            ..Default::default()
        };
        let of_config = layer.forward_with(&x, &options(communicator.clone())).unwrap_err();
        // An input that is wrong on one rank alone.
        let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
        let x = if rank == 0 { x } else { randn(1, (3, 7), DType::F32)? };
        let of_input = layer.forward_with(&x, &options(communicator)).unwrap_err();
        Ok([of_config.to_string(), of_input.to_string()])
    });
    for [config, input] in texts.unwrap() {
        assert!(config.contains("is_causal: true") && config.contains("is_causal: false"), "{config}");
        assert!(input.contains("[len, 8]") && input.contains("[len, 7]"), "{input}");
    }
}

/// A call of rank `communicator.rank()`.
type RankCall = Box<dyn Fn(&Arc<dyn Communicator>, &Tensor) -> Result<ForwardOutput> + Sync>;

/// What one rank alone refuses is an error on all of them, and the ranks can go on.
#[test]
fn context_refusals_of_one_rank_are_errors_on_every_rank() {
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) };
    let split = Split::new(6, 2, Order::Contiguous).unwrap();
    let options = move |communicator: &Arc<dyn Communicator>| {
        let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme: Scheme::Ring });
        ForwardOptions { parallel, ..Default::default() }
    };
    let of_block = TransformerBlockConfig::new(config.clone(), MlpConfig::new(8, 16), NormConfig::rms(1e-5));
    let block = TransformerBlock::new(&TransformerBlockConfig { dropout_p: 0.1, ..of_block }, vb()).unwrap();
    let wrong = block.clone();
    let layer = SelfAttention::new(&config, vb()).unwrap();
    let adapted = layer.with_lora("style", &LoraConfig::new(2, 4.0), vb()).unwrap();
    // Rows for the tokens of rank 0, and none for all of rank 1's.
    let angles = randn(3, (4, 2), DType::F32).unwrap();
    let tables = RotaryEmbedding::from_tables(&angles, &angles, 4, Pairing::HalfSplit).unwrap();
    let short = layer.clone().with_rotary(tables).unwrap();
    let calls: Vec<(&str, RankCall)> = vec![
        ("(len, 8)", Box::new(move |ranks, x| wrong.forward_with(&x.narrow(1, 0, 8 - ranks.rank())?, &options(ranks)))),
        (
            "dropout of its branches",
            Box::new(move |ranks, x| {
                block.forward_with(x, &ForwardOptions { train: ranks.rank() == 1, ..options(ranks) })
            }),
        ),
        (
            "style",
            Box::new(move |ranks, x| {
                let adapter = AdapterChoice::Named("style".to_string());
                let layer = if ranks.rank() == 0 { &adapted } else { &layer };
                layer.forward_with(x, &ForwardOptions { adapter, ..options(ranks) })
            }),
        ),
        ("rows of cos and sin", Box::new(move |ranks, x| short.forward_with(x, &options(ranks)))),
    ];
    for (expected, call) in calls {
        let texts = threads(2, |communicator| {
            let error = call(&communicator, &randn(1, (3, 8), DType::F32)?).map(drop).unwrap_err();
            assert!(matches!(error, Error::Attention(AttentionError::Ranks { .. })), "{expected}: {error}");
            communicator.agree("what comes next", "the same")?;
            Ok(error.to_string())
        });
        texts.unwrap().iter().for_each(|text| assert!(text.contains(expected), "{expected}: {text}"));
    }
}
