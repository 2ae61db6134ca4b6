//! Tokens as labels: made visible, measured, and shortened.

use ttf_parser::Face;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// DejaVu Sans, see `font/README.md`.
pub(super) const FONT: &[u8] = include_bytes!("font/DejaVuSans.ttf");

/// The token as a label: what can't be seen, or would act on the terminal or the page that shows it, is written out.
pub(super) fn visible(token: &str) -> String {
    let mut label = String::new();
    // Marks in a row without a width of their own. Two are a letter's business; a hundred grow over the labels above.
    let mut marks = 0;
    for c in token.chars() {
        marks = if c.width() == Some(0) { marks + 1 } else { 0 };
        if c.is_control() || (c.is_whitespace() && c != ' ') || acts(c) || marks > 3 {
            label.extend(c.escape_default());
        } else {
            label.push(c);
        }
    }
    if label.width() == 0 {
        return if token.is_empty() { "∅".to_string() } else { token.escape_unicode().to_string() };
    }
    // Spaces at the ends are part of a token, and would be lost in a picture.
    let start = label.len() - label.trim_start_matches(' ').len();
    let end = label.trim_end_matches(' ').len().max(start);
    format!("{}{}{}", "␣".repeat(start), &label[start..end], "␣".repeat(label.len() - end))
}

/// Whether a character moves others, breaks lines or stands for nothing. Joiners stay: they make one emoji of several.
fn acts(c: char) -> bool {
    matches!(u32::from(c), 0xAD | 0x61C | 0x180E | 0x200B | 0x200E | 0x200F | 0x2028..=0x202E | 0x2060..=0x206F)
        || matches!(u32::from(c), 0xFE00..=0xFE0E | 0xFEFF | 0xFFF0..=0xFFFB | 0xE0000..=0xE0FFF)
        || u32::from(c) & 0xFFFE == 0xFFFE
}

/// At most so many columns of a terminal.
pub(super) fn cut(label: &str, columns: usize) -> String {
    if label.width() <= columns {
        return label.to_string();
    }
    shorten(label, |text| text.width() <= columns)
}

/// As many of the first characters as fit, followed by an ellipsis.
fn shorten(label: &str, fits: impl Fn(&str) -> bool) -> String {
    let mut short = "…".to_string();
    for (end, c) in label.char_indices() {
        let longer = format!("{}…", &label[..end + c.len_utf8()]);
        if !fits(&longer) {
            break;
        }
        short = longer;
    }
    short
}

/// Measures text as the pictures' font has it.
pub(super) struct Ruler {
    face: Option<Face<'static>>,
}

impl Ruler {
    pub(super) fn new() -> Self {
        Self { face: Face::parse(FONT, 0).ok() }
    }

    /// Whether the font has all of these characters.
    #[cfg(feature = "png")]
    pub(super) fn knows(&self, text: &str) -> bool {
        text.chars().all(|c| c.is_control() || self.advance(c).is_some())
    }

    /// The width in pixels. Characters of other fonts get the room that the widest of those give them.
    pub(super) fn width(&self, text: &str, size: f64) -> f64 {
        let ems = text.chars().map(|c| self.advance(c).unwrap_or(1.3 / 2.0 * c.width().unwrap_or(0).max(1) as f64));
        ems.sum::<f64>() * size
    }

    /// The label, shortened to a width in pixels.
    pub(super) fn shorten(&self, label: &str, size: f64, width: f64) -> String {
        if self.width(label, size) <= width {
            return label.to_string();
        }
        shorten(label, |text| self.width(text, size) <= width)
    }

    /// In ems.
    fn advance(&self, c: char) -> Option<f64> {
        let face = self.face.as_ref()?;
        let advance = face.glyph_hor_advance(face.glyph_index(c)?)?;
        Some(f64::from(advance) / f64::from(face.units_per_em()))
    }
}
