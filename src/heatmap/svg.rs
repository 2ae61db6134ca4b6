//! Heat maps as an SVG picture.

use std::fmt::Write;

use candle_core::Result;

use super::{Heatmap, colour, wants_dark_text};
use crate::error::AttentionError;

/// Sizes in pixels. A cell holds a number of four characters, a character being about 0.6 of the font size wide.
const CELL: usize = 36;
const FONT: usize = 13;
const CHARACTER: usize = 8;
const GAP: usize = 24;
const TITLE: usize = 28;
const BAR: usize = 14;

/// Above this, a picture has more cells than a viewer shows at once, and its numbers can't be read.
const MAX_WORDS: usize = 128;

/// One picture of several heat maps side by side, each under its title, with a bar that explains the colours.
///
/// # Errors
///
/// A heat map of more than 128 words.
pub fn to_svg(panels: &[(&str, &Heatmap)]) -> Result<String> {
    if let Some((_, panel)) = panels.iter().find(|(_, panel)| panel.words.len() > MAX_WORDS) {
        let expected = "at most 128; show part of the sequence";
        return Err(
            AttentionError::Number { name: "words in a heat map", expected, got: panel.words.len() as f64 }.into()
        );
    }
    let margin =
        |panel: &Heatmap| panel.words.iter().map(|word| word.chars().count()).max().unwrap_or(0) * CHARACTER + 8;
    let side = |panel: &Heatmap| panel.words.len() * CELL;
    let deepest = panels.iter().map(|(_, panel)| TITLE + margin(panel) + side(panel)).max().unwrap_or(0);
    let width = panels.iter().map(|(_, panel)| margin(panel) + side(panel) + GAP).sum::<usize>() + GAP;
    let height = deepest + 3 * GAP + BAR;

    let mut svg = String::new();
    // Writing to a String can't fail.
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" font-size="{FONT}">
<rect width="100%" height="100%" fill="#ffffff"/>
"##
    );
    let mut left = GAP;
    for (title, panel) in panels {
        let margin = margin(panel);
        draw_panel(&mut svg, title, panel, left, margin);
        left += margin + side(panel) + GAP;
    }
    draw_bar(&mut svg, deepest + GAP);
    svg.push_str("</svg>\n");
    Ok(svg)
}

fn draw_panel(svg: &mut String, title: &str, panel: &Heatmap, left: usize, margin: usize) {
    let (x0, y0) = (left + margin, TITLE + margin);
    let middle = CELL / 2 + FONT / 3;
    let _ = writeln!(svg, r#"<text x="{x0}" y="{TITLE}" font-weight="bold">{}</text>"#, escape(title));
    for (i, word) in panel.words.iter().enumerate() {
        let word = escape(word);
        let (x, y) = (x0 - 6, y0 + i * CELL + middle);
        let _ = writeln!(svg, r#"<text x="{x}" y="{y}" text-anchor="end">{word}</text>"#);
        let (x, y) = (x0 + i * CELL + middle, y0 - 6);
        let _ = writeln!(svg, r#"<text transform="translate({x} {y}) rotate(-90)">{word}</text>"#);
    }
    for (i, row) in panel.weights.iter().enumerate() {
        for (j, &weight) in row.iter().enumerate() {
            let (x, y) = (x0 + j * CELL, y0 + i * CELL);
            let [red, green, blue] = colour(weight);
            let ink = if wants_dark_text(weight) { "#000000" } else { "#ffffff" };
            let _ = writeln!(
                svg,
                r#"<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="rgb({red},{green},{blue})"/><text x="{}" y="{}" fill="{ink}" font-size="11" text-anchor="middle">{weight:.2}</text>"#,
                x + CELL / 2,
                y + middle
            );
        }
    }
}

/// The colours from 0 to 1.
fn draw_bar(svg: &mut String, y: usize) {
    let _ = write!(svg, r#"<defs><linearGradient id="weights">"#);
    for percent in (0..=100).step_by(10) {
        let [red, green, blue] = colour(percent as f32 / 100.0);
        let _ = write!(svg, r#"<stop offset="{percent}%" stop-color="rgb({red},{green},{blue})"/>"#);
    }
    let (end, labels) = (GAP + 200, y + BAR + FONT + 2);
    let _ = writeln!(
        svg,
        r#"</linearGradient></defs>
<rect x="{GAP}" y="{y}" width="200" height="{BAR}" fill="url(#weights)"/>
<text x="{GAP}" y="{labels}">0</text><text x="{end}" y="{labels}" text-anchor="end">1</text>
<text x="{}" y="{}">attention weight: rows are queries, columns are keys</text>"#,
        end + 12,
        y + BAR - 2
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
