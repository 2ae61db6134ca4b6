//! Text for the terminal.

use attention_heatmap::{Colour, Heatmap};
use unicode_width::UnicodeWidthStr;

use super::{HOSTILE, heads, hostile, identity, ramp, softmax, words};

fn plain(heatmap: &Heatmap) -> String {
    heatmap.to_text(Colour::Never).unwrap()
}

fn without_colour(coloured: &str) -> String {
    let mut plain = String::new();
    let mut rest = coloured;
    while let Some(start) = rest.find('\x1b') {
        plain.push_str(&rest[..start]);
        rest = &rest[start + rest[start..].find('m').unwrap() + 1..];
    }
    plain + rest
}

#[test]
fn lines_are_never_longer_than_80_columns() {
    let other = Heatmap::between(&softmax(3, 5, 200), &HOSTILE[..5], &words(200)).unwrap();
    let maps = [1, 2, 10, 13, 24, 25, 40, 64, 128, 300].map(|tokens| heads(1, tokens));
    for heatmap in maps.iter().chain([&hostile(), &other, &heads(12, 30)]) {
        let text = plain(heatmap);
        for line in text.lines() {
            assert!(line.width() <= 80, "{} columns: {line}", line.width());
        }
    }
}

#[test]
fn short_sequences_show_every_word_and_weight() {
    for count in [1, 2, 10, 13, 24] {
        let text = plain(&heads(1, count));
        for word in words(count) {
            assert!(text.contains(&word), "{word}: {text}");
        }
        let numbers = text.split(|c: char| !(c.is_ascii_digit() || c == '.')).filter(|part| part.contains('.'));
        assert_eq!(numbers.count(), count * count, "{text}");
    }
}

#[test]
fn long_sequences_have_a_mark_for_each_weight_and_name_the_strongest_key() {
    let count = 40;
    let text = plain(&Heatmap::new(&identity(count), &words(count)).unwrap());
    assert_eq!(text.matches('█').count(), count);
    for (i, word) in words(count).iter().enumerate() {
        let line = text.lines().skip(1).find(|line| line.trim_start().starts_with(&format!("{i} "))).unwrap();
        assert!(line.contains(&format!("{word} 1.00")), "{line}");
    }
}

#[test]
fn keys_that_are_no_queries_are_named_below_their_numbers() {
    let text = plain(&Heatmap::between(&softmax(1, 2, 30), &["x", "y"], &words(30)).unwrap());
    let names = text.split("keys:").nth(1).unwrap();
    for (i, word) in words(30).iter().enumerate() {
        assert!(names.contains(&format!(" {i} {word}")), "{text}");
    }
}

#[test]
fn every_head_stands_under_its_title() {
    let text = plain(&heads(3, 4));
    assert!(["head 0", "head 1", "head 2"].iter().all(|title| text.lines().any(|line| line == *title)), "{text}");
    let titled = heads(2, 4).titled(&["before", "after"]).unwrap();
    assert!(plain(&titled).contains("\nafter\n") && !plain(&titled).contains("head"));
}

#[test]
fn colour_is_escape_sequences_around_the_same_text() {
    for tokens in [4, 40] {
        let heatmap = heads(2, tokens);
        let coloured = heatmap.to_text(Colour::Always).unwrap();
        assert!(coloured.contains("\x1b[48;2;"));
        assert_eq!(without_colour(&coloured), plain(&heatmap).replace(['░', '▒', '▓', '█'], " "));
    }
}

#[test]
fn the_same_weight_has_the_same_colour_in_every_head() {
    let text = Heatmap::new(&[0.5, 1.0], &["a"]).unwrap().to_text(Colour::Always).unwrap();
    let half = Heatmap::new(&[0.5], &["a"]).unwrap().to_text(Colour::Always).unwrap();
    let colour = |text: &str| text.split("48;2;").nth(1).unwrap().split('m').next().unwrap().to_string();
    assert_ne!(colour(&text), colour(&half), "0.5 alone is the largest weight, beside 1 it isn't");
}

#[test]
fn wide_characters_keep_the_columns_straight() {
    let text = plain(&Heatmap::new(&ramp(2), &["猫猫猫", "a"]).unwrap());
    let lines = text.lines().collect::<Vec<_>>();
    // Three characters of two columns each: the row of "a" is indented by five.
    assert!(lines[2].starts_with("     a"), "{text}");
}

#[test]
fn control_characters_are_shown_not_obeyed() {
    let text = plain(&hostile());
    assert!(!text.contains(['\x1b', '\0', '\t', '\u{202e}', '\u{2028}', '\u{feff}']), "{text}");
    let text = plain(&Heatmap::new(&ramp(1), &["a\x1b[2Jb\n"]).unwrap());
    assert!(text.contains("\\u{1b}[2Jb\\n"), "{text}");
}

#[test]
fn no_token_is_invisible() {
    for token in ["", " ", "\u{200b}", "\u{301}", "\u{200d}", "\u{fe0f}", "\u{a0}", "\u{3000}"] {
        let text = plain(&Heatmap::new(&ramp(1), &[token]).unwrap());
        assert!(text.lines().next().unwrap().trim().width() > 0, "{token:?}: {text}");
    }
    assert!(plain(&Heatmap::new(&ramp(1), &[" the"]).unwrap()).contains("␣the"));
}
