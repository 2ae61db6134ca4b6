//! Laws over random shapes, masks, options and strides.

use candle_attention::{Backend, scaled_dot_product_attention};
use candle_core::{DType, Tensor};
use proptest::prelude::*;
use proptest::sample::select;

use crate::common::assert_same_bits;

use super::laws::{assert_same_results, with_threads};
use super::masks::MaskKind;
use super::problem::{Bias, Case, Memory, Sizes, error};

fn sizes() -> impl Strategy<Value = Sizes> {
    let counts = (1..=3usize, 1..=3usize, 1..=4usize);
    // Lengths below and above a block of 96 keys and a task of 128 queries.
    let lengths = (1..=140usize, 1..=220usize, 1..=70usize, 1..=70usize);
    (counts, lengths).prop_map(|((batch, kv_heads, group), (q_len, kv_len, dim, value_dim))| Sizes {
        batch,
        heads: kv_heads * group,
        kv_heads,
        q_len,
        kv_len,
        dim,
        value_dim,
    })
}

fn masks() -> impl Strategy<Value = MaskKind> {
    let axes = || select(vec!["k", "bk", "qk", "hqk", "bhqk"]);
    let side = || proptest::option::of(0..60usize);
    let one = prop_oneof![
        Just(MaskKind::Full),
        Just(MaskKind::Causal),
        (-50..100i64).prop_map(MaskKind::CausalAt),
        (-100..200i64).prop_map(MaskKind::CausalAtEach),
        (side(), side()).prop_map(|(left, right)| MaskKind::Window(left, right)),
        (0..120usize).prop_map(MaskKind::Sliding),
        Just(MaskKind::KeyLengths),
        (0..200usize).prop_map(MaskKind::Prefix),
        Just(MaskKind::Documents),
        Just(MaskKind::DocumentIds),
        axes().prop_map(MaskKind::Allowed),
        axes().prop_map(MaskKind::Blocked),
        Just(MaskKind::Padding),
    ];
    one.prop_recursive(2, 4, 2, |inner| {
        let pair = (inner.clone(), inner);
        prop_oneof![
            pair.clone().prop_map(|(a, b): (MaskKind, MaskKind)| a.and(b)),
            pair.prop_map(|(a, b): (MaskKind, MaskKind)| a.or(b))
        ]
    })
}

fn memory() -> impl Strategy<Value = Memory> {
    use Memory::*;
    select(vec![Contiguous, ByToken, Narrow, SharedBatch, SharedHead, ByColumn])
}

fn cases() -> impl Strategy<Value = Case> {
    let axes = || select(vec!["bhqk", "hqk", "qk", "bk", "h", "bhq"]);
    let bias = prop_oneof![
        3 => Just(None),
        1 => axes().prop_map(|axes| Some(Bias::Constant(axes))),
        1 => axes().prop_map(|axes| Some(Bias::Trained(axes))),
    ];
    let numbers = (proptest::option::of(-0.5..0.5f64), proptest::option::of(0.5..10f64), select(vec![0.0, 0.0, 0.4]));
    let memory = [memory(), memory(), memory()];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (sizes(), memory, masks(), bias, numbers, flags).prop_map(|(sizes, memory, mask, bias, numbers, flags)| {
        let (scale, softcap, dropout_p) = numbers;
        let (alibi, sinks, logsumexp) = flags;
        Case { sizes, memory, mask, bias, scale, softcap, alibi, sinks, dropout_p, logsumexp, train_slopes: false }
    })
}

fn dtypes() -> impl Strategy<Value = DType> {
    select(vec![DType::F32, DType::F64, DType::F16, DType::BF16])
}

/// Fewer cases than proptest's 256, since each computes attention several times. Failures are not stored in files.
fn few() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) }
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn fused_equals_the_reference(case in cases()) {
        let inputs = case.inputs(DType::F64).unwrap();
        let fused = case.run(&inputs, Backend::Fused).unwrap();
        for ((name, fused), (_, exact)) in fused.iter().zip(case.run(&inputs, Backend::Reference).unwrap()) {
            // The floor and the tolerance of thousands of roundings allow for gradients whose terms cancel.
            let error = error(fused, &exact, 0.1).unwrap();
            prop_assert!(error < 1e-12, "{name} differs by {error:e}");
        }
    }

    #[test]
    fn weights_change_no_other_number(case in cases(), dtype in dtypes()) {
        let inputs = case.inputs(dtype).unwrap();
        let [q, k, v] = case.views(&inputs).unwrap();
        let mut options = case.options(&inputs, Backend::Fused).unwrap();
        let without = scaled_dot_product_attention(&q, &k, &v, &options).unwrap();
        options.return_weights = true;
        let with = scaled_dot_product_attention(&q, &k, &v, &options).unwrap();
        prop_assert!(without.weights.is_none() && with.weights.is_some());
        assert_same_bits(&with.context, &without.context, "context");
        if let (Some(a), Some(b)) = (&with.logsumexp, &without.logsumexp) {
            assert_same_bits(a, b, "log-sum-exp");
        }
    }

    #[test]
    fn threads_change_no_bit(case in cases(), dtype in dtypes(), threads in 2..6usize) {
        let inputs = case.inputs(dtype).unwrap();
        let one = with_threads(1, || case.run(&inputs, Backend::Fused)).unwrap();
        let many = with_threads(threads, || case.run(&inputs, Backend::Fused)).unwrap();
        assert_same_results(&many, &one, &format!("{threads} threads"));
    }

    #[test]
    fn memory_changes_no_bit(case in cases(), dtype in dtypes()) {
        let inputs = case.inputs(dtype).unwrap();
        let options = case.options(&inputs, Backend::Fused).unwrap();
        let [q, k, v] = case.views(&inputs).unwrap();
        let views = scaled_dot_product_attention(&q, &k, &v, &options).unwrap();
        let [q, k, v] = [q, k, v].map(|x| x.contiguous().unwrap());
        let copies = scaled_dot_product_attention(&q, &k, &v, &options).unwrap();
        assert_same_bits(&views.context, &copies.context, "context");
    }

    #[test]
    fn sequence_alone_equals_itself_in_a_batch(case in cases()) {
        // Dropout depends on the index of the sequence, so it would drop other weights of the sequence alone.
        let case = Case { dropout_p: 0.0, logsumexp: true, ..case };
        let inputs = case.inputs(DType::F64).unwrap();
        let views = case.views(&inputs).unwrap();
        let together = scaled_dot_product_attention(
            &views[0], &views[1], &views[2], &case.options(&inputs, Backend::Fused).unwrap(),
        ).unwrap();
        let alone = Case { sizes: Sizes { batch: 1, ..case.sizes }, ..case.clone() };
        for b in 0..case.sizes.batch {
            let one = |x: &Tensor| x.narrow(0, b, 1).unwrap();
            let mut options = alone.options_from(&inputs, Backend::Fused, b).unwrap();
            options.attn_bias = options.attn_bias.map(|bias| if bias.dim(0).unwrap() == 1 { bias } else { one(&bias) });
            let [q, k, v] = views.each_ref().map(one);
            let output = scaled_dot_product_attention(&q, &k, &v, &options).unwrap();
            let pairs = [(output.context, &together.context), (output.logsumexp.unwrap(), together.logsumexp.as_ref().unwrap())];
            for (alone, together) in pairs {
                let error = error(&alone, &one(together), 0.1).unwrap();
                prop_assert!(error < 1e-13, "sequence {b} differs by {error:e}");
            }
        }
    }
}
