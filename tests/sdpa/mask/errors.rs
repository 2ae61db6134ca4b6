//! Masks that don't fit: each error names what was expected and what was found.

use candle_attention::{AttentionError, Error, Mask};
use candle_core::{DType, Device, Tensor};

/// Batch 2, two heads, three queries, five keys.
const SHAPE: (usize, usize, usize, usize) = (2, 2, 3, 5);

fn zeros(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(dims, dtype, &Device::Cpu).unwrap()
}

#[track_caller]
fn assert_names(error: Error, expected: &str, got: &str) {
    let text = error.to_string();
    assert!(text.contains(expected), "{expected:?} is not in {text:?}");
    assert!(text.contains(got), "{got:?} is not in {text:?}");
}

/// Checks that both `check` and `to_tensor` refuse a mask that doesn't fit.
#[track_caller]
fn refuses(mask: Mask, expected: &str, got: &str) {
    for error in [mask.check(SHAPE).unwrap_err(), mask.to_tensor(SHAPE, &Device::Cpu).unwrap_err()] {
        assert!(matches!(error, Error::Attention(AttentionError::Mask(_))), "{error:?}");
        assert_names(error, expected, got);
    }
}

#[test]
fn key_lengths_of_another_batch_are_refused() {
    refuses(Mask::key_lengths(&[5, 5, 5]), "expected one for each of 2 sequences", "got 3");
}

#[test]
fn key_length_beyond_the_keys_is_refused() {
    refuses(Mask::key_lengths(&[5, 6]), "expected at most kv_len 5", "got 6");
}

#[test]
fn documents_shorter_than_the_keys_are_refused() {
    refuses(Mask::documents(&[2, 2]), "expected documents of 5 keys together", "got 4 keys");
}

#[test]
fn documents_longer_than_the_keys_are_refused() {
    refuses(Mask::documents(&[5, 1]), "expected documents of 5 keys together", "got 6 keys");
}

#[test]
fn document_ids_of_another_batch_are_refused() {
    refuses(Mask::document_ids(&[[0; 5]; 3]), "expected one row for each of 2 sequences", "got 3 rows");
}

#[test]
fn document_ids_of_another_length_are_refused() {
    let ids: [&[u32]; 2] = [&[0; 5], &[0; 4]];
    refuses(Mask::document_ids(&ids), "expected documents of 5 keys together", "got 4 keys");
}

#[test]
fn offsets_for_another_number_of_sequences_are_refused() {
    for offsets in [&[][..], &[1], &[1, 2, 3]] {
        let (expected, got) = ("offsets: expected one for each of 2 sequences", format!("got {}", offsets.len()));
        refuses(Mask::causal().with_offsets(offsets), expected, &got);
        refuses((Mask::prefix(1) | Mask::sliding_window(2)).with_offsets(offsets), expected, &got);
        refuses(Mask::documents(&[2, 3]).with_offsets(offsets), expected, &got);
    }
    // A mask that doesn't depend on positions ignores offsets.
    Mask::prefix(1).with_offsets(&[1]).check(SHAPE).unwrap();
}

#[test]
fn tensor_of_another_size_is_refused() {
    let expected = "broadcasts to (batch, num_heads, q_len, kv_len) = [2, 2, 3, 5]";
    for dims in [&[4][..], &[3, 4], &[2, 5], &[3, 3, 5], &[3, 1, 3, 5], &[0, 5], &[2, 2, 3, 5 * 2]] {
        let mask = Mask::from_tensor(&zeros(dims, DType::U8)).unwrap();
        refuses(mask, expected, &format!("got {dims:?}"));
    }
}

#[test]
fn misfit_is_found_in_either_part_of_a_combination() {
    let misfit = || Mask::key_lengths(&[1]);
    for mask in [
        Mask::causal() & misfit(),
        misfit() & Mask::causal(),
        Mask::prefix(1) | (Mask::causal() & misfit()),
        (misfit() | Mask::causal()) & Mask::prefix(1),
    ] {
        refuses(mask, "expected one for each of 2 sequences", "got 1");
    }
}

#[test]
fn float_tensor_is_refused_and_pointed_to_attn_bias() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let (mask, got) = (zeros(&[3, 5], dtype), format!("got {dtype:?}"));
        assert_names(Mask::from_tensor(&mask).unwrap_err(), "attn_bias", &got);
        assert_names(Mask::from_blocked(&mask).unwrap_err(), "attn_bias", &got);
        assert_names(Mask::from_padding_mask(&mask).unwrap_err(), "expected dtype u8 or another integer", &got);
    }
}

#[test]
fn tensor_of_another_rank_is_refused() {
    let (mask, got) = (zeros(&[1, 2, 2, 3, 5], DType::U8), "got rank 5 with shape [1, 2, 2, 3, 5]");
    assert_names(Mask::from_tensor(&mask).unwrap_err(), "expected at most 4 axes", got);
    assert_names(Mask::from_blocked(&mask).unwrap_err(), "expected at most 4 axes", got);
}

#[test]
fn padding_mask_of_another_rank_is_refused() {
    let mask = zeros(&[2, 1, 5], DType::U8);
    let error = Mask::from_padding_mask(&mask).unwrap_err();
    assert_names(error, "expected 2 axes (batch, kv_len)", "got rank 3 with shape [2, 1, 5]");
}

#[test]
fn padding_mask_of_another_size_is_refused() {
    let mask = Mask::from_padding_mask(&zeros(&[2, 4], DType::U8)).unwrap();
    refuses(mask, "padding mask: expected a shape that broadcasts to (batch, kv_len) = [2, 5]", "got [2, 4]");
}

#[test]
fn more_extra_keys_than_keys_are_refused() {
    let error = Mask::causal().with_extra_keys(4).check((1, 1, 2, 3)).unwrap_err().to_string();
    assert!(error.contains("extra keys") && error.contains("at most kv_len 3") && error.contains("got 4"), "{error}");
    let error = Mask::full().with_hidden_keys(4).check((1, 1, 2, 3)).unwrap_err().to_string();
    assert!(error.contains("extra keys") && error.contains("at most kv_len 3") && error.contains("got 4"), "{error}");
    // The mask must fit the keys before the extra ones.
    assert!(Mask::key_lengths(&[3]).with_extra_keys(1).check((1, 1, 2, 3)).is_err());
    Mask::key_lengths(&[2]).with_extra_keys(1).check((1, 1, 2, 3)).unwrap();
}

#[test]
fn documents_of_more_tokens_than_can_be_counted_are_refused() {
    for lengths in [&[usize::MAX][..], &[usize::MAX, usize::MAX], &[1 << 63, 1 << 63, 5], &[1 << 36]] {
        refuses(Mask::documents(lengths), "expected documents of 5 keys together", " keys");
    }
}

/// `a & b & c` is one list. Where `&` and `|` alternate, masks lie inside one another, and no answer may overflow the stack.
#[test]
fn masks_are_combined_in_any_number_and_refused_beyond_a_bound() {
    let part = || Mask::sliding_window(2);
    let all = (0..50_000).fold(part(), |mask, _| mask & part());
    let any = (0..50_000).fold(part(), |mask, _| part() | mask);
    for mask in [all.clone(), any, all.with_extra_keys(1).with_offset(2)] {
        mask.check(SHAPE).unwrap();
    }
    let alternating = (0..50_000).fold(part(), |mask, i| if i % 2 == 0 { mask & part() } else { mask | part() });
    let nested = (0..50_000).fold(part(), |mask, _| (mask & part()).with_extra_keys(1));
    let doubled = (0..64).fold(part(), |mask, _| mask.clone() & mask);
    for mask in [alternating, nested, doubled] {
        refuses(mask.clone().with_offset(1), "combination: expected at most 65536 masks, and 256 changes", "got more");
        refuses(mask.clone() & Mask::full() & part(), "combination", "got more");
    }
}

/// Every constructor with the greatest numbers, over the greatest scores. Each mask fits or is refused.
#[test]
fn greatest_numbers_never_overflow() {
    let most = usize::MAX;
    let masks = [
        Mask::causal(),
        Mask::window(Some(most), Some(most)),
        Mask::window(Some(most), Some(0)),
        Mask::sliding_window(most),
        Mask::sliding_window(0),
        Mask::prefix(most),
        Mask::key_lengths(&[most]),
        Mask::documents(&[most, 1]),
    ];
    let shapes = [(1, 1, 3, 5), (1, 1, 5, 3), (1, most, most, most), (1, 1, most, 1), (1, 1, 1, most), (0, 0, 0, 0)];
    // Without keys there are no entries, however many queries there are.
    let none = Mask::full().to_tensor((1, 1, 1 << 40, 0), &Device::Cpu).unwrap();
    assert_eq!(none.dims(), [1, 1, 1 << 40, 0]);
    for mask in &masks {
        for offset in [0, 1, i64::MIN, i64::MAX] {
            for extra in [0, 1, most] {
                let moved = mask.clone().with_offset(offset);
                let moved = (moved.with_extra_keys(extra) | Mask::prefix(1)).with_offsets(&[offset]);
                for shape in shapes {
                    let fits = moved.check(shape).is_ok();
                    if fits && shape.2 < 6 && shape.3 < 6 {
                        moved.to_tensor(shape, &Device::Cpu).unwrap();
                    }
                }
            }
        }
    }
}
