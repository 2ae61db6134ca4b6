//! A heat map made of characters.

use std::fmt::Write;
use std::io::IsTerminal;
use std::ops::Range;

use unicode_width::UnicodeWidthStr;

use crate::colours::{DARK, Scale, colour, wants_dark_text};
use crate::label::cut;
use crate::limits::Limits;
use crate::number::two_decimals;
use crate::{Heatmap, HeatmapError};

/// The most columns of a line.
const LINE: usize = 80;
/// The most columns of a label. A longer label is cut.
const LABEL: usize = 16;
/// Up to this many keys, every weight is a number. With more keys the matrix would not fit a screen, and every weight
/// is a mark.
const NUMBERS: usize = 24;
const LIMITS: Limits = Limits {
    output: "text",
    // Several screens high.
    max_tokens: 512,
    fewer_tokens: "show part of the sequence",
    max_weights: 1 << 20,
    fewer_weights: "show some of the heads",
};
/// A coloured cell, in a text that grows to twice its length.
const BYTES_PER_WEIGHT: usize = 128;
/// Shades for weights from the lowest to the highest, where there is no colour.
const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];

/// Whether the text is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// 24-bit colour, as escape sequences.
    Always,
    /// Plain characters.
    Never,
}

impl Colour {
    /// [`Colour::Always`] if the stream is a terminal. [`Colour::Never`] otherwise, and also if the environment
    /// variable
    /// `NO_COLOR` is set and not empty, or if `TERM` is `dumb`.
    pub fn for_stream(stream: &impl IsTerminal) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let incapable = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        if stream.is_terminal() && !unwanted && !incapable { Colour::Always } else { Colour::Never }
    }
}

impl Heatmap {
    /// The heat map as lines of at most 80 columns. A row is a query, a column a key. Keys that don't fit into one line
    /// continue below.
    ///
    /// Up to 24 keys, every weight is a number. With more keys, every weight is a mark, and each row names the key with
    /// the largest weight.
    ///
    /// # Errors
    ///
    /// - [`HeatmapError::TooManyTokens`] for more than 512 queries or 512 keys.
    /// - [`HeatmapError::TooManyWeights`] for more than 2^20 weights in all heads together.
    /// - [`HeatmapError::Memory`] if there is too little memory.
    pub fn to_text(&self, colour: Colour) -> Result<String, HeatmapError> {
        self.check(&LIMITS, BYTES_PER_WEIGHT)?;
        let cut = |labels: &[String]| labels.iter().map(|label| cut(label, LABEL)).collect::<Vec<_>>();
        let table = Table {
            map: self,
            queries: cut(self.queries()),
            keys: cut(self.keys()),
            scale: self.scale(),
            colour,
            text: String::new(),
        };
        Ok(table.write())
    }
}

/// The labels of a table, and the text that is written so far. Writing to a String can't fail.
struct Table<'a> {
    map: &'a Heatmap,
    queries: Vec<String>,
    keys: Vec<String>,
    scale: Scale,
    colour: Colour,
    text: String,
}

impl Table<'_> {
    fn write(mut self) -> String {
        for (head, title) in self.map.titles().iter().enumerate() {
            if head > 0 {
                self.text.push('\n');
            }
            if !title.is_empty() {
                let _ = writeln!(self.text, "{}", cut(title, LINE));
            }
            if self.keys.len() <= NUMBERS { self.write_numbers(head) } else { self.write_marks(head) }
        }
        if self.keys.len() > NUMBERS && self.map.keys() != self.map.queries() {
            self.write_key_names();
        }
        if let Some(caption) = self.map.caption() {
            let _ = writeln!(self.text, "\n{caption}");
        }
        self.text
    }

    /// Writes each weight as a number, under its key.
    fn write_numbers(&mut self, head: usize) {
        let margin = widest(&self.queries);
        let number_width = self.number_width(head);
        let widths = self.keys.iter().map(|key| key.width().max(number_width) + 1).collect::<Vec<_>>();
        for (block, keys) in blocks(&widths, LINE - margin).into_iter().enumerate() {
            if block > 0 {
                self.text.push('\n');
            }
            self.text.push_str(&" ".repeat(margin));
            for key in keys.clone() {
                push_right_aligned(&mut self.text, &self.keys[key], widths[key]);
            }
            self.text.push('\n');
            for (query, label) in self.queries.iter().enumerate() {
                push_right_aligned(&mut self.text, label, margin);
                for key in keys.clone() {
                    let weight = self.map.row(head, query)[key];
                    let fraction = self.scale.fraction(weight);
                    self.text.push_str(&cell(&two_decimals(weight), widths[key], fraction, self.colour));
                }
                self.text.push('\n');
            }
        }
    }

    /// Writes each weight as a mark, under the indices of the keys. Behind the row stand the label and the weight of
    /// its strongest key.
    fn write_marks(&mut self, head: usize) {
        let index_width = digits(self.queries.len());
        let number_width = self.number_width(head);
        let name_width = widest(&self.keys).max("strongest".len() - 1 - number_width.min(4));
        let margin = index_width + 1 + widest(&self.queries) + 1;
        // The label and the weight of the strongest key, with a space before each.
        let tail = 1 + name_width + 1 + number_width;
        let room = LINE - margin - tail;
        for start in (0..self.keys.len()).step_by(room) {
            let keys = start..self.keys.len().min(start + room);
            if start > 0 {
                self.text.push('\n');
            }
            let strongest = format!(" {:>width$}", "strongest", width = tail - 1);
            let _ = writeln!(self.text, "{}{}{strongest}", " ".repeat(margin), key_indices(&keys));
            for (query, label) in self.queries.iter().enumerate() {
                let _ = write!(self.text, "{query:>index_width$} ");
                push_right_aligned(&mut self.text, label, margin - index_width - 2);
                self.text.push(' ');
                let row = &self.map.row(head, query)[keys.clone()];
                for &weight in row {
                    self.text.push_str(&cell("", 1, self.scale.fraction(weight), self.colour));
                }
                let strongest = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
                // The keys of this block may all have weight 0, as in a causal row.
                if row[strongest] != 0.0 {
                    push_right_aligned(&mut self.text, &self.keys[start + strongest], name_width + 1);
                    let _ = write!(self.text, " {:>number_width$}", two_decimals(row[strongest]));
                }
                self.text.push('\n');
            }
        }
    }

    /// The columns of the widest weight of a head.
    fn number_width(&self, head: usize) -> usize {
        let weights = (0..self.queries.len()).flat_map(|query| self.map.row(head, query));
        weights.map(|&weight| two_decimals(weight).len()).max().unwrap_or(0)
    }

    /// Writes the index and the label of each key, as the rows show only the labels of the queries.
    fn write_key_names(&mut self) {
        let names = self.keys.iter().enumerate().map(|(i, key)| format!(" {i} {key}")).collect::<Vec<_>>();
        let widths = names.iter().map(|name| name.width()).collect::<Vec<_>>();
        self.text.push_str("\nkeys:");
        for (line, range) in blocks(&widths, LINE - "keys:".len()).into_iter().enumerate() {
            self.text.push_str(if line == 0 { "" } else { "     " });
            self.text.extend(names[range].iter().map(String::as_str));
            self.text.push('\n');
        }
    }
}

fn widest(labels: &[String]) -> usize {
    labels.iter().map(|label| label.width()).max().unwrap_or(0)
}

/// The number of digits of the largest index, if there are `count`.
fn digits(count: usize) -> usize {
    count.saturating_sub(1).max(1).ilog10() as usize + 1
}

/// Splits columns of these widths into lines: each line takes as many as fit into `room`, at least one.
fn blocks(widths: &[usize], room: usize) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let mut start = 0;
    while start < widths.len() {
        let mut used = 0;
        let fitting = widths[start..].iter().take_while(|&&width| {
            used += width;
            used <= room
        });
        let end = start + fitting.count().max(1);
        blocks.push(start..end);
        start = end;
    }
    blocks
}

/// A line with the index of every tenth key above its column, as far as it fits.
fn key_indices(keys: &Range<usize>) -> String {
    let mut line = String::new();
    for key in keys.clone() {
        let label = key.to_string();
        if key % 10 == 0 && line.len() + label.len() <= keys.len() {
            line.push_str(&label);
        } else if line.len() <= key - keys.start {
            line.push(' ');
        }
    }
    line
}

fn push_right_aligned(text: &mut String, label: &str, width: usize) {
    text.push_str(&" ".repeat(width.saturating_sub(label.width())));
    text.push_str(label);
}

/// A number on the colour of its weight, or behind the shade of its weight.
fn cell(number: &str, width: usize, fraction: f64, style: Colour) -> String {
    match style {
        Colour::Always => {
            let background = colour(&DARK, fraction);
            let [red, green, blue] = background;
            let ink = if wants_dark_text(background) { 30 } else { 97 };
            format!("\x1b[48;2;{red};{green};{blue}m\x1b[{ink}m{number:>width$}\x1b[0m")
        }
        Colour::Never => {
            let shade = SHADES[(fraction * (SHADES.len() - 1) as f64).round() as usize];
            format!("{shade}{number:>rest$}", rest = width - 1)
        }
    }
}
