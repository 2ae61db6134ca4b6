//! Properties of every mask.

use candle_attention::Mask;
use candle_core::{Device, Tensor};

use super::cases::{self, Case, Score, Shape};

/// What the definition allows, for every score in row-major order.
fn expected(case: &Case, shape: Shape) -> Vec<u8> {
    let mut allowed = Vec::new();
    for b in 0..shape.batch {
        for h in 0..shape.num_heads {
            for i in 0..shape.q_len {
                allowed.extend((0..shape.kv_len).map(|j| u8::from((case.allows)(Score { shape, b, h, i, j }))));
            }
        }
    }
    allowed
}

fn for_all(check: impl Fn(&Case, Shape)) {
    for shape in cases::shapes() {
        for case in cases::all(shape) {
            check(&case, shape);
        }
    }
}

#[test]
fn tensor_follows_the_definition() {
    for_all(|case, shape| {
        let tensor = case.mask.to_tensor(shape.dims(), &Device::Cpu).unwrap();
        let all = tensor.broadcast_as(shape.dims()).unwrap();
        let all = all.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        assert_eq!(all, expected(case, shape), "{} over {shape:?}", case.name);
    });
}

#[test]
fn tensor_has_one_sequence_and_head_where_all_are_alike() {
    let shape = (3, 2, 4, 4);
    let per_head = Mask::from_tensor(&Tensor::ones((2, 1, 4), candle_core::DType::U8, &Device::Cpu).unwrap()).unwrap();
    let per_sequence = Mask::key_lengths(&[1, 2, 3]);
    for (mask, sequences, heads) in [
        (Mask::full(), 1, 1),
        (Mask::causal() & Mask::prefix(2), 1, 1),
        (Mask::documents(&[2, 2]), 1, 1),
        (Mask::document_ids(&[[0; 4]; 3]), 3, 1),
        (per_sequence.clone(), 3, 1),
        (Mask::causal() & per_sequence.clone(), 3, 1),
        (per_head.clone(), 1, 2),
        (per_sequence | per_head, 3, 2),
    ] {
        assert_eq!(mask.to_tensor(shape, &Device::Cpu).unwrap().dims(), [sequences, heads, 4, 4], "{mask:?}");
    }
}

#[test]
fn full_changes_nothing_in_an_intersection_and_is_all_of_a_union() {
    assert!(Mask::default().is_full() && Mask::full().is_full());
    assert!((Mask::full() & Mask::full()).is_full());
    assert!((Mask::full() | Mask::causal()).is_full() && (Mask::causal() | Mask::full()).is_full());
    assert!(!(Mask::full() & Mask::causal()).is_full() && !(Mask::causal() & Mask::full()).is_full());
}

#[test]
fn tensor_with_other_strides_is_read_by_its_indices() {
    let tall = Tensor::new(&[[1u8, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0]], &Device::Cpu).unwrap();
    let mask = Mask::from_tensor(&tall.t().unwrap().narrow(0, 1, 3).unwrap()).unwrap();
    let seen = mask.to_tensor((1, 1, 3, 3), &Device::Cpu).unwrap();
    let seen = seen.reshape((3, 3)).unwrap().to_vec2::<u8>().unwrap();
    assert_eq!(seen, [[0, 0, 1], [1, 1, 1], [1, 0, 0]]);
}
