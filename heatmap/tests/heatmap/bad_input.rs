//! Weights and tokens that can't be shown, and files that can't be written.

use attention_heatmap::{Colour, Heatmap, HeatmapError, Page};

use super::{heads, ramp, softmax, words};

fn error<T>(result: Result<T, HeatmapError>) -> HeatmapError {
    result.err().expect("this was accepted")
}

#[test]
fn weights_that_do_not_match_the_tokens_are_refused() {
    for (weights, got) in [(ramp(3), 9), (softmax(1, 3, 2), 6), (vec![1.0], 1), (vec![0.5; 7], 7)] {
        let error = error(Heatmap::new(&weights, &words(2)));
        assert_eq!(error, HeatmapError::Shape { q_len: 2, kv_len: 2, got });
        let text = error.to_string();
        assert!(text.contains("(heads, 2, 2)") && text.contains("multiple of 4"), "{text}");
        assert!(text.contains(&format!("got {got} numbers")), "{text}");
    }
}

/// Tokens that take no memory: a slice of them may be so long that `q_len * kv_len` overflows.
#[test]
fn more_tokens_than_numbers_can_count_are_refused() {
    #[derive(Clone, Copy)]
    struct Nameless;
    impl AsRef<str> for Nameless {
        fn as_ref(&self) -> &str {
            ""
        }
    }
    let tokens = [Nameless; usize::MAX];
    let error = error(Heatmap::new(&[1.0], &tokens));
    assert_eq!(error, HeatmapError::Shape { q_len: usize::MAX, kv_len: usize::MAX, got: 1 });
    assert!(error.to_string().contains(&(u64::MAX as u128 * u64::MAX as u128).to_string()), "{error}");
}

#[test]
fn the_number_of_weights_says_how_many_heads_there_are() {
    for heads in [1, 2, 7] {
        let svg = Heatmap::between(&softmax(heads, 2, 3), &words(2), &words(3)).unwrap().to_svg().unwrap();
        assert_eq!(svg.matches("<g transform").count(), heads);
    }
}

/// Both orders have the same number of weights. The sums of the rows tell them apart.
#[test]
fn queries_and_keys_may_not_change_places() {
    let weights = softmax(1, 2, 3);
    assert_eq!(Heatmap::between(&weights, &words(2), &words(3)).unwrap().caption(), None);
    let caption = Heatmap::between(&weights, &words(3), &words(2)).unwrap().caption();
    assert!(caption.is_some_and(|caption| caption.contains("don't sum to 1")));
    assert_eq!(error(Heatmap::new(&weights, &words(2))), HeatmapError::Shape { q_len: 2, kv_len: 2, got: 6 });
    assert_eq!(error(Heatmap::new(&weights, &words(3))), HeatmapError::Shape { q_len: 3, kv_len: 3, got: 6 });
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weights = softmax(3, 2, 4);
        weights[2 * 8 + 4 + 3] = bad;
        let error = error(Heatmap::between(&weights, &words(2), &words(4)));
        let HeatmapError::NonFinite { head: 2, query: 1, key: 3, weight } = error else { panic!("{error:?}") };
        assert_eq!(weight.to_bits(), bad.to_bits());
        let text = error.to_string();
        assert!(text.contains("finite") && text.contains(&bad.to_string()), "{text}");
    }
}

#[test]
fn nothing_to_show_is_refused() {
    let none: [&str; 0] = [];
    let empty = |weights, q_len, kv_len| HeatmapError::Empty { weights, q_len, kv_len };
    let errors = [
        (error(Heatmap::new(&[], &none)), empty(0, 0, 0)),
        (error(Heatmap::new(&[], &words(2))), empty(0, 2, 2)),
        (error(Heatmap::between(&[], &words(2), &none)), empty(0, 2, 0)),
        (error(Heatmap::between(&[1.0], &none, &words(2))), empty(1, 0, 2)),
        (error(Page::new("empty").to_html()), HeatmapError::NoLayers),
    ];
    for (error, expected) in errors {
        assert_eq!(error, expected);
        assert!(error.to_string().contains("at least one"), "{error}");
    }
}

#[test]
fn what_nobody_could_look_at_is_refused_with_what_to_do() {
    let large = Heatmap::new(&vec![0.0; 4096 * 4096], &words(4096)).unwrap();
    let page = Page::new("large").layer("0", large.clone());
    let errors = [
        (error(large.to_svg()), "SVG", 128),
        (error(large.to_text(Colour::Never)), "text", 512),
        (error(page.to_html()), "page", 1024),
    ];
    for (error, name, limit) in errors {
        let HeatmapError::TooManyTokens { output, max, got: 4096, .. } = error else { panic!("{error:?}") };
        assert_eq!((output, max), (name, limit));
        let text = error.to_string();
        assert!(text.contains("at most") && text.contains("4096") && text.contains("show part"), "{text}");
    }
    let error = error(heads(65, 64).to_svg());
    let HeatmapError::TooManyWeights { output: "SVG", max: 262_144, got: 266_240, .. } = error else {
        panic!("{error:?}")
    };
    let text = error.to_string();
    assert!(text.contains("262144") && text.contains("266240") && text.contains("some of the heads"), "{text}");
}

#[test]
fn a_page_counts_the_weights_of_all_its_layers() {
    let map = Heatmap::new(&vec![0.0; 1 << 23], &["a"]).unwrap();
    let page = Page::new("large").layer("0", map.clone()).layer("1", map).layer("2", heads(1, 1));
    let error = error(page.to_html());
    let HeatmapError::TooManyWeights { output: "page", max: 16_777_216, got: 16_777_217, advice } = error else {
        panic!("{error:?}")
    };
    assert!(advice.contains("layers"), "{advice}");
}

#[test]
fn titles_that_do_not_match_the_heads_are_refused() {
    let error = error(heads(3, 2).titled(&["a", "b"]));
    assert_eq!(error, HeatmapError::Titles { heads: 3, got: 2 });
    assert!(error.to_string().contains("one for each head, got 2"), "{error}");
}

#[test]
fn rows_that_do_not_sum_to_1_are_shown_and_said() {
    assert_eq!(heads(4, 16).caption(), None);
    let odd = Heatmap::new(&[0.5, 0.5, 0.25, 0.25], &words(2)).unwrap();
    let caption = odd.caption().unwrap();
    assert_eq!(caption, "1 of 2 rows doesn't sum to 1, but to 0.50");
    assert!(odd.to_text(Colour::Never).unwrap().contains(&caption));
    assert!(odd.to_svg().unwrap().contains(&caption));
    assert!(Page::new("odd").layer("0", odd).to_html().unwrap().contains(&caption));
}

/// A row of half-precision weights doesn't sum to 1 exactly.
#[test]
fn half_precision_is_no_reason_to_say_anything() {
    let rounded: [fn(f32) -> f32; 3] = [
        |weight| half::bf16::from_f32(weight).to_f32(),
        |weight| half::f16::from_f32(weight).to_f32(),
        |weight| weight,
    ];
    for round in rounded {
        let weights = softmax(2, 128, 128).into_iter().map(round).collect::<Vec<_>>();
        assert_eq!(Heatmap::new(&weights, &words(128)).unwrap().caption(), None);
    }
}

#[test]
fn any_finite_numbers_can_be_drawn() {
    for weights in [[-1f32, 2.0], [f32::MAX, f32::MIN], [0.0, 0.0], [1e-30, 1e-38], [-3.0, -2.0]] {
        let heatmap = Heatmap::between(&weights, &["q"], &["a", "b"]).unwrap();
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
    let missing = error(heads(1, 2).save_svg(&nowhere));
    let text = missing.to_string();
    assert!(text.contains("missing/picture.svg") && text.contains("can't write"), "{text}");
    let HeatmapError::File(file) = missing else { panic!("{missing:?}") };
    assert_eq!((file.path, file.action), (nowhere, "write"));
    let folder_as_file = error(Page::new("a").layer("0", heads(1, 2)).save(folder.path()));
    assert!(matches!(folder_as_file, HeatmapError::File(_)), "a folder is no file: {folder_as_file:?}");
    assert!(heads(1, 200).save_svg(folder.path().join("large.svg")).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
