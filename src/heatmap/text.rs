//! A heat map made of characters.

use std::fmt::Write;
use std::io::IsTerminal;

use unicode_width::UnicodeWidthStr;

use super::{Heatmap, colour, wants_dark_text};

/// Characters in a line.
const LINE: usize = 80;
/// Characters of a weight: 0.00.
const NUMBER: usize = 4;
/// Without colour, a mark before the number does its work.
const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];

/// Whether text is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// 24-bit colour, by escape sequences.
    Always,
    /// Plain characters.
    Never,
}

impl Colour {
    /// Colour on a terminal, unless the environment variable `NO_COLOR` is set and not empty.
    pub fn for_stream(stream: &impl IsTerminal) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if stream.is_terminal() && !unwanted { Colour::Always } else { Colour::Never }
    }
}

impl Heatmap {
    /// The heat map as lines of at most 80 characters: queries downwards, keys across, continued below where the keys
    /// are too many for a line.
    pub fn to_text(&self, colour: Colour) -> String {
        let margin = self.words.iter().map(|word| word.width()).max().unwrap_or(0);
        let widths = self.words.iter().map(|word| word.width().max(NUMBER) + 1).collect::<Vec<_>>();
        let mut text = String::new();
        let mut start = 0;
        while start < self.words.len() {
            let mut end = start + 1;
            let mut used = margin + widths[start];
            while end < self.words.len() && used + widths[end] <= LINE {
                used += widths[end];
                end += 1;
            }
            if start > 0 {
                text.push('\n');
            }
            self.write_block(&mut text, margin, &widths, start..end, colour);
            start = end;
        }
        text
    }

    fn write_block(
        &self,
        text: &mut String,
        margin: usize,
        widths: &[usize],
        keys: std::ops::Range<usize>,
        style: Colour,
    ) {
        text.push_str(&" ".repeat(margin));
        for key in keys.clone() {
            push_right_aligned(text, &self.words[key], widths[key]);
        }
        text.push('\n');
        for (word, row) in self.words.iter().zip(&self.weights) {
            push_right_aligned(text, word, margin);
            for key in keys.clone() {
                push_cell(text, row[key], widths[key], style);
            }
            text.push('\n');
        }
    }
}

fn push_right_aligned(text: &mut String, word: &str, width: usize) {
    text.push_str(&" ".repeat(width.saturating_sub(word.width())));
    text.push_str(word);
}

fn push_cell(text: &mut String, weight: f32, width: usize, style: Colour) {
    // Writing to a String can't fail.
    let _ = match style {
        Colour::Always => {
            let [red, green, blue] = colour(weight);
            let ink = if wants_dark_text(weight) { 30 } else { 97 };
            write!(text, "\x1b[48;2;{red};{green};{blue}m\x1b[{ink}m{weight:>width$.2}\x1b[0m")
        }
        Colour::Never => {
            let shade = (weight.clamp(0.0, 1.0) * (SHADES.len() - 1) as f32).round() as usize;
            write!(text, "{}{weight:>rest$.2}", SHADES[shade], rest = width - 1)
        }
    };
}
