//! What holds of every mask.

use candle_attention::{Coverage, Mask, ScoreShape};
use candle_core::{Device, Tensor};

use crate::cases::{self, Case, Place};

/// Everything the definition says, in row-major order.
fn expected(case: &Case, shape: ScoreShape) -> Vec<u8> {
    let mut allowed = Vec::new();
    for b in 0..shape.batch {
        for h in 0..shape.num_heads {
            for i in 0..shape.q_len {
                allowed.extend((0..shape.kv_len).map(|j| u8::from((case.allows)(Place { shape, b, h, i, j }))));
            }
        }
    }
    allowed
}

fn for_all(check: impl Fn(&Case, ScoreShape)) {
    for shape in cases::shapes() {
        for case in cases::all(shape) {
            check(&case, shape);
        }
    }
}

#[test]
fn tensor_follows_the_definition() {
    for_all(|case, shape| {
        let tensor = case.mask.to_tensor(shape, &Device::Cpu).unwrap();
        let ScoreShape { batch, num_heads, q_len, kv_len } = shape;
        let all = tensor.broadcast_as((batch, num_heads, q_len, kv_len)).unwrap();
        let all = all.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        assert_eq!(all, expected(case, shape), "{} over {shape:?}", case.name);
    });
}

/// All non-empty ranges within 0..len.
fn ranges(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len).flat_map(move |start| (start + 1..=len).map(move |end| start..end))
}

/// Every tile of one head, against the head's entries.
fn check_tiles(case: &Case, shape: ScoreShape, (b, h): (usize, usize)) {
    for queries in ranges(shape.q_len) {
        for keys in ranges(shape.kv_len) {
            let says = case.mask.tile(shape, (b, h), queries.clone(), keys.clone()).unwrap();
            let places = queries.clone().flat_map(|i| keys.clone().map(move |j| Place { shape, b, h, i, j }));
            let allowed = places.clone().filter(|&at| (case.allows)(at)).count();
            let certain = match allowed {
                0 => Coverage::None,
                all if all == places.count() => Coverage::All,
                _ => Coverage::Some,
            };
            let place = format!("{} over {shape:?}, head {b}, {h}, {queries:?} x {keys:?}", case.name);
            if case.exact || says != Coverage::Some {
                assert_eq!(says, certain, "{place}");
            }
        }
    }
}

#[test]
fn tile_follows_the_definition_and_is_exact_for_single_rules() {
    for_all(|case, shape| {
        for b in 0..shape.batch {
            for h in 0..shape.num_heads {
                check_tiles(case, shape, (b, h));
            }
        }
    });
}

/// A causal mask over packed documents is what training uses; tiles off the diagonal must cost nothing.
#[test]
fn tile_between_two_documents_is_none() {
    let mask = Mask::documents(&[4, 4]) & Mask::causal();
    let tile = |queries, keys| mask.tile((1, 1, 8, 8), (0, 0), queries, keys).unwrap();
    assert_eq!(tile(4..8, 0..4), Coverage::None);
    assert_eq!(tile(0..4, 4..8), Coverage::None);
    assert_eq!(tile(4..8, 4..5), Coverage::All);
    assert_eq!(tile(4..8, 4..8), Coverage::Some);
}

#[test]
fn tile_without_area_is_none() {
    for mask in [Mask::full(), Mask::causal(), Mask::documents(&[2, 1]), Mask::prefix(1)] {
        for (queries, keys) in [(0..0, 0..3), (1..3, 2..2), (2..2, 1..1)] {
            assert_eq!(mask.tile((1, 1, 3, 3), (0, 0), queries, keys).unwrap(), Coverage::None);
        }
    }
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
