//! Tokens of any length. The work must grow linearly with the length, or these tests take minutes.

use attention_heatmap::{Colour, Heatmap, Page};
use unicode_width::UnicodeWidthStr;

use super::ramp;

fn heatmap(token: &str) -> Heatmap {
    Heatmap::new(&ramp(2), &[token, "mat"]).unwrap()
}

/// The label of the first query in the SVG.
fn drawn_label(heatmap: &Heatmap) -> String {
    let svg = heatmap.to_svg().unwrap();
    let label = svg.split("text-anchor=\"end\">").nth(1).unwrap().split('<').next().unwrap();
    label.to_string()
}

/// The label of the first query in the text.
fn printed_label(heatmap: &Heatmap) -> String {
    let text = heatmap.to_text(Colour::Never).unwrap();
    for line in text.lines() {
        assert!(line.width() <= 80, "{} columns", line.width());
    }
    // The last lines are the rows and a caption below an empty line. The first weight is 0, so its shade is a space.
    let row = text.lines().rev().nth(3).unwrap();
    row.trim_start().split(' ').next().unwrap().to_string()
}

/// The page doesn't cut labels. Its script does.
fn page_length(heatmap: Heatmap) -> usize {
    Page::new("long tokens").layer("0", heatmap).to_html().unwrap().len()
}

#[test]
fn joiners_alone_are_escaped_and_cut() {
    let joiners = "\u{200d}".repeat(20_000);
    let heatmap = heatmap(&joiners).titled(&[joiners]).unwrap();
    assert_eq!(printed_label(&heatmap), "\u{200d}\u{200d}\u{200d}\\u{200d}\\u{200d…");
    let drawn = drawn_label(&heatmap);
    assert!(drawn.contains("\\u{200d}") && drawn.ends_with('…'), "{drawn}");
    assert!(page_length(heatmap) > 20_000 * "\\u{200d}".len());
}

/// A terminal shows all of these as one emoji of two columns.
#[test]
fn emoji_with_joiners_count_as_one_emoji() {
    let family = "👩\u{200d}".repeat(20_000);
    let alone = heatmap(&family);
    assert!(printed_label(&alone) == family, "not the whole label");
    assert!(page_length(alone) > 20_000 * "👩\u{200d}".len());
}

/// Every prefix of the emoji fits, so this is the longest search.
#[test]
fn text_behind_emoji_with_joiners_is_cut() {
    let family = "👩\u{200d}".repeat(20_000) + "👩";
    let heatmap = heatmap(&(family.clone() + &"a".repeat(100)));
    assert!(printed_label(&heatmap) == family + &"a".repeat(13) + "…", "not cut to 16 columns");
    // The picture's font has no emoji. There each counts as a character of its own.
    assert!(drawn_label(&heatmap).chars().count() < 40);
}

#[test]
fn letters_with_joiners_are_cut_to_the_columns() {
    let printed = printed_label(&heatmap(&"a\u{200d}".repeat(20_000)));
    assert_eq!(printed, "a\u{200d}".repeat(15) + "…");
}

#[test]
fn a_million_combining_marks_are_escaped_and_cut() {
    let heatmap = heatmap(&("a".to_string() + &"\u{301}".repeat(1_000_000)));
    let label = "a\u{301}\u{301}\u{301}\\u{301}\\u{301}";
    assert_eq!(printed_label(&heatmap), format!("{label}…"));
    let drawn = drawn_label(&heatmap);
    assert!(drawn.starts_with(label) && drawn.ends_with('…'), "{drawn}");
    assert!(page_length(heatmap) > 1_000_000 * "\\u{301}".len() - 100);
}

#[test]
fn a_million_letters_are_cut() {
    let heatmap = heatmap(&"W".repeat(1_000_000));
    assert_eq!(printed_label(&heatmap).matches('W').count(), 15);
    let drawn = drawn_label(&heatmap).matches('W').count();
    assert!((8..16).contains(&drawn), "{drawn}");
}
