//! Heat maps as text and as SVG.

use candle_attention::heatmap::{Colour, Heatmap, to_svg};
use candle_core::{Device, Tensor};

/// Weights that rise evenly from 0 to 1.
fn ramp(words: usize) -> Tensor {
    let cells = words * words;
    let weights = (0..cells).map(|cell| cell as f32 / (cells - 1).max(1) as f32).collect::<Vec<_>>();
    Tensor::from_vec(weights, (words, words), &Device::Cpu).unwrap()
}

fn words(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("word{i}")).collect()
}

#[test]
fn text_holds_every_word_and_weight_within_80_columns() {
    for count in [1, 2, 10, 13, 40, 64] {
        let text = Heatmap::new(&ramp(count), &words(count)).unwrap().to_text(Colour::Never);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for word in words(count) {
            assert!(text.contains(&word));
        }
        let numbers = text.split(|c: char| !(c.is_ascii_digit() || c == '.')).filter(|part| part.contains('.'));
        assert_eq!(numbers.count(), count * count);
    }
}

#[test]
fn colour_is_escape_sequences_around_the_same_text() {
    let heatmap = Heatmap::new(&ramp(4), &words(4)).unwrap();
    let coloured = heatmap.to_text(Colour::Always);
    assert!(coloured.contains("\x1b[48;2;"));
    let mut plain = String::new();
    let mut rest = coloured.as_str();
    while let Some(start) = rest.find('\x1b') {
        plain.push_str(&rest[..start]);
        rest = &rest[start + rest[start..].find('m').unwrap() + 1..];
    }
    plain.push_str(rest);
    let without_shades = heatmap.to_text(Colour::Never).replace(['░', '▒', '▓', '█'], " ");
    assert_eq!(plain, without_shades);
}

#[test]
fn wide_characters_keep_the_columns_straight() {
    let text = Heatmap::new(&ramp(2), &["猫猫猫", "a"]).unwrap().to_text(Colour::Never);
    let lines = text.lines().collect::<Vec<_>>();
    // Three characters of two columns each: the row of "a" is indented by five.
    assert!(lines[2].starts_with("     a"), "{text}");
}

#[test]
fn control_characters_in_a_word_are_shown_not_obeyed() {
    let heatmap = Heatmap::new(&ramp(1), &["a\x1b[2Jb\n"]).unwrap();
    let text = heatmap.to_text(Colour::Never);
    assert!(!text.contains('\x1b') && text.contains("\\u{1b}[2Jb\\n"), "{text}");
}

#[test]
fn svg_escapes_words_and_titles() {
    let heatmap = Heatmap::new(&ramp(1), &["<script>&"]).unwrap();
    let svg = to_svg(&[("a < b", &heatmap)]).unwrap();
    assert!(svg.contains("&lt;script&gt;&amp;") && svg.contains("a &lt; b") && !svg.contains("<script>"));
}

#[test]
fn svg_has_a_cell_for_every_weight_of_every_panel() {
    let (one, other) = (Heatmap::new(&ramp(3), &words(3)).unwrap(), Heatmap::new(&ramp(5), &words(5)).unwrap());
    let svg = to_svg(&[("one", &one), ("other", &other)]).unwrap();
    assert_eq!(svg.matches("text-anchor=\"middle\"").count(), 3 * 3 + 5 * 5);
    assert!(svg.contains("rgb(22,24,56)") && svg.contains("rgb(252,226,96)"), "the ends of the scale");
}

#[test]
fn weights_that_do_not_match_the_words_are_refused() {
    let message = Heatmap::new(&ramp(3), &words(2)).unwrap_err().to_string();
    assert!(message.contains("(2, 2)") && message.contains("[3, 3]"), "{message}");
}

#[test]
fn nan_is_refused() {
    let nan = Tensor::new(&[[f32::NAN]], &Device::Cpu).unwrap();
    let message = Heatmap::new(&nan, &["a"]).unwrap_err().to_string();
    assert!(message.contains("finite") && message.contains("NaN"), "{message}");
}

#[test]
fn picture_that_nobody_could_read_is_refused() {
    let heatmap = Heatmap::new(&ramp(129), &words(129)).unwrap();
    let message = to_svg(&[("large", &heatmap)]).unwrap_err().to_string();
    assert!(message.contains("at most 128") && message.contains("129"), "{message}");
}

#[test]
fn no_words_give_an_empty_map() {
    let none = Tensor::zeros((0, 0), candle_core::DType::F32, &Device::Cpu).unwrap();
    let heatmap = Heatmap::new(&none, &[] as &[&str]).unwrap();
    assert_eq!(heatmap.to_text(Colour::Always), "");
    assert!(to_svg(&[("none", &heatmap)]).unwrap().ends_with("</svg>\n"));
}
