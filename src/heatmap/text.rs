//! A heat map made of characters.

use std::fmt::Write;
use std::io::IsTerminal;
use std::ops::Range;

use candle_core::Result;
use unicode_width::UnicodeWidthStr;

use super::Heatmap;
use super::colours::{DARK, Scale, colour, number, wants_dark_text};
use super::label::cut;

/// Columns of a line.
const LINE: usize = 80;
/// Columns of a label, longer ones being cut.
const LABEL: usize = 16;
/// Up to here a matrix of numbers stays in sight; more keys get a mark each instead of a number.
const NUMBERS: usize = 24;
/// A screen's height, a few times over.
const MAX_TOKENS: (usize, &str) = (512, "at most 512 on either side; show part of the sequence");
const MAX_WEIGHTS: (usize, &str) = (1 << 20, "at most 1048576; show some of the heads");
/// Without colour, a mark does its work.
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
    /// Colour on a terminal, unless the environment variable `NO_COLOR` is set and not empty, or `TERM` is `dumb`.
    pub fn for_stream(stream: &impl IsTerminal) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let incapable = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        if stream.is_terminal() && !unwanted && !incapable { Colour::Always } else { Colour::Never }
    }
}

impl Heatmap {
    /// The heat map as lines of at most 80 characters: queries downwards, keys across, continued below where the keys
    /// are too many for a line. More than 24 keys get a mark instead of a number each, and a row names its strongest key.
    ///
    /// # Errors
    ///
    /// More than 512 queries or keys, or than 2^20 weights.
    pub fn to_text(&self, colour: Colour) -> Result<String> {
        self.check_size(MAX_TOKENS, MAX_WEIGHTS)?;
        let cut = |labels: &[String]| labels.iter().map(|label| cut(label, LABEL)).collect::<Vec<_>>();
        let table = Table {
            map: self,
            queries: cut(&self.queries),
            keys: cut(&self.keys),
            scale: self.scale(),
            colour,
            text: String::new(),
        };
        Ok(table.write())
    }
}

/// A heat map on its way to text. Writing to a String can't fail.
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
        for (head, title) in self.map.titles.iter().enumerate() {
            if head > 0 {
                self.text.push('\n');
            }
            if !title.is_empty() {
                let _ = writeln!(self.text, "{}", cut(title, LINE));
            }
            if self.keys.len() <= NUMBERS { self.write_numbers(head) } else { self.write_marks(head) }
        }
        if self.keys.len() > NUMBERS && self.map.keys != self.map.queries {
            self.write_key_names();
        }
        if let Some(caption) = self.map.caption() {
            let _ = writeln!(self.text, "\n{caption}");
        }
        self.text
    }

    /// A number for each weight, under its key.
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
                    let place = self.scale.place(weight);
                    self.text.push_str(&cell(&number(weight), widths[key], place, self.colour));
                }
                self.text.push('\n');
            }
        }
    }

    /// A mark for each weight, under a ruler that counts the keys, and the name and weight of the strongest.
    fn write_marks(&mut self, head: usize) {
        let count_width = digits(self.queries.len());
        let number_width = self.number_width(head);
        let name_width = widest(&self.keys).max("strongest".len() - 1 - number_width.min(4));
        let margin = count_width + 1 + widest(&self.queries) + 1;
        // Name and number of the strongest key, with a space before each.
        let tail = 1 + name_width + 1 + number_width;
        let room = LINE - margin - tail;
        for start in (0..self.keys.len()).step_by(room) {
            let keys = start..self.keys.len().min(start + room);
            if start > 0 {
                self.text.push('\n');
            }
            let strongest = format!(" {:>width$}", "strongest", width = tail - 1);
            let _ = writeln!(self.text, "{}{}{strongest}", " ".repeat(margin), ruler(&keys));
            for (query, label) in self.queries.iter().enumerate() {
                let _ = write!(self.text, "{query:>count_width$} ");
                push_right_aligned(&mut self.text, label, margin - count_width - 2);
                self.text.push(' ');
                let row = &self.map.row(head, query)[keys.clone()];
                for &weight in row {
                    self.text.push_str(&cell("", 1, self.scale.place(weight), self.colour));
                }
                let strongest = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
                // In a causal row, none of the later keys is.
                if row[strongest] != 0.0 {
                    push_right_aligned(&mut self.text, &self.keys[start + strongest], name_width + 1);
                    let _ = write!(self.text, " {:>number_width$}", number(row[strongest]));
                }
                self.text.push('\n');
            }
        }
    }

    /// Of the widest number.
    fn number_width(&self, head: usize) -> usize {
        let weights = (0..self.queries.len()).flat_map(|query| self.map.row(head, query));
        weights.map(|&weight| number(weight).len()).max().unwrap_or(0)
    }

    /// Which key has which place, as no row says it.
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

/// Of the numbers below this one.
fn digits(count: usize) -> usize {
    count.saturating_sub(1).max(1).ilog10() as usize + 1
}

/// As many neighbours in a line as fit, and then the next.
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

/// Every tenth key's number, as far as it fits.
fn ruler(keys: &Range<usize>) -> String {
    let mut ruler = String::new();
    for key in keys.clone() {
        let label = key.to_string();
        if key % 10 == 0 && ruler.len() + label.len() <= keys.len() {
            ruler.push_str(&label);
        } else if ruler.len() <= key - keys.start {
            ruler.push(' ');
        }
    }
    ruler
}

fn push_right_aligned(text: &mut String, label: &str, width: usize) {
    text.push_str(&" ".repeat(width.saturating_sub(label.width())));
    text.push_str(label);
}

/// A weight's number on its colour, or behind its shade.
fn cell(number: &str, width: usize, place: f64, style: Colour) -> String {
    match style {
        Colour::Always => {
            let background = colour(&DARK, place);
            let [red, green, blue] = background;
            let ink = if wants_dark_text(background) { 30 } else { 97 };
            format!("\x1b[48;2;{red};{green};{blue}m\x1b[{ink}m{number:>width$}\x1b[0m")
        }
        Colour::Never => {
            let shade = SHADES[(place * (SHADES.len() - 1) as f64).round() as usize];
            format!("{shade}{number:>rest$}", rest = width - 1)
        }
    }
}
