//! Weights and tokens that make no picture, and files that can't be written.

use candle_attention::heatmap::{Colour, Heatmap, Page};
use candle_core::{DType, Device, Tensor};

use super::{heads, ramp, softmax, words};

fn message<T>(result: candle_core::Result<T>) -> String {
    result.err().expect("this was accepted").to_string()
}

#[test]
fn weights_that_do_not_match_the_tokens_are_refused() {
    let message = |weights: &Tensor| message(Heatmap::new(weights, &words(2)));
    let wrong = message(&ramp(3));
    assert!(wrong.contains("(2, 2)") && wrong.contains("(heads, 2, 2)") && wrong.contains("[3, 3]"), "{wrong}");
    assert!(message(&softmax(2, 3, 2)).contains("[2, 3, 2]"));
    assert!(message(&softmax(2, 2, 2).unsqueeze(0).unwrap()).contains("[1, 2, 2, 2]"));
    assert!(message(&Tensor::new(1f32, &Device::Cpu).unwrap()).contains("[]"));
}

#[test]
fn queries_and_keys_may_not_change_places() {
    let weights = softmax(1, 2, 3);
    assert!(Heatmap::between(&weights, &words(2), &words(3)).is_ok());
    assert!(Heatmap::between(&weights, &words(3), &words(2)).is_err());
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let weights = Tensor::new(&[[bad]], &Device::Cpu).unwrap();
        let message = message(Heatmap::new(&weights, &["a"]));
        assert!(message.contains("finite") && message.contains(&bad.to_string()), "{message}");
    }
}

#[test]
fn nothing_to_show_is_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let none: [&str; 0] = [];
    assert!(message(Heatmap::new(&zeros(&[0, 0]), &none)).contains("at least one"));
    assert!(message(Heatmap::new(&zeros(&[0, 2, 2]), &words(2))).contains("at least one"));
    assert!(message(Heatmap::between(&zeros(&[2, 0]), &words(2), &none)).contains("at least one"));
    assert!(message(Page::new("empty").to_html()).contains("at least one"));
}

#[test]
fn what_nobody_could_look_at_is_refused_with_what_to_do() {
    let large = Heatmap::new(&Tensor::zeros((4096, 4096), DType::F32, &Device::Cpu).unwrap(), &words(4096)).unwrap();
    let page = Page::new("large").layer("0", large.clone());
    for message in [message(large.to_svg()), message(large.to_text(Colour::Never)), message(page.to_html())] {
        assert!(message.contains("at most") && message.contains("4096") && message.contains("show part"), "{message}");
    }
    let many = heads(65, 64);
    let message = message(many.to_svg());
    assert!(
        message.contains("262144") && message.contains("266240") && message.contains("some of the heads"),
        "{message}"
    );
}

#[test]
fn titles_that_do_not_match_the_heads_are_refused() {
    assert!(message(heads(3, 2).titled(&["a", "b"])).contains("one for each head, got 2"));
}

#[test]
fn rows_that_do_not_sum_to_1_are_shown_and_said() {
    assert_eq!(heads(4, 16).caption(), None);
    let odd = Tensor::new(&[[0.5f32, 0.5], [0.25, 0.25]], &Device::Cpu).unwrap();
    let odd = Heatmap::new(&odd, &words(2)).unwrap();
    let caption = odd.caption().unwrap();
    assert_eq!(caption, "1 of 2 rows doesn't sum to 1, but to 0.50");
    assert!(odd.to_text(Colour::Never).unwrap().contains(&caption));
    assert!(odd.to_svg().unwrap().contains(&caption));
    assert!(Page::new("odd").layer("0", odd).to_html().unwrap().contains(&caption));
}

#[test]
fn half_precision_is_no_reason_to_say_anything() {
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        let weights = softmax(2, 128, 128).to_dtype(dtype).unwrap();
        assert_eq!(Heatmap::new(&weights, &words(128)).unwrap().caption(), None);
    }
}

#[test]
fn any_finite_numbers_can_be_drawn() {
    for weights in [[-1f32, 2.0], [f32::MAX, f32::MIN], [0.0, 0.0], [1e-30, 1e-38], [-3.0, -2.0]] {
        let heatmap = Heatmap::between(&Tensor::new(&[weights], &Device::Cpu).unwrap(), &["q"], &["a", "b"]).unwrap();
        let svg = heatmap.to_svg().unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let text = heatmap.to_text(Colour::Always).unwrap();
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        let page = Page::new("any").layer("0", heatmap).to_html().unwrap();
        assert!(!page.contains(r#""low":null"#) && !page.contains(r#""high":null"#));
    }
}

#[test]
fn file_that_cannot_be_written_is_named_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("missing/picture.svg");
    let message = message(heads(1, 2).save_svg(&nowhere));
    assert!(message.contains("missing/picture.svg") && message.contains("can't write"), "{message}");
    assert!(Page::new("a").layer("0", heads(1, 2)).save(folder.path()).is_err(), "a folder is no file");
    assert!(heads(1, 200).save_svg(folder.path().join("large.svg")).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
