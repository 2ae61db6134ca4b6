//! The font of the pictures, and the widths of texts in it.

use ttf_parser::Face;
use unicode_width::UnicodeWidthChar;

/// A subset of DejaVu Sans: see `font/README.md`.
pub(crate) const FONT: &[u8] = include_bytes!("font/DejaVuSans.ttf");

/// Measures text in the font of the pictures.
pub(crate) struct Ruler {
    face: Option<Face<'static>>,
}

impl Ruler {
    pub(crate) fn new() -> Self {
        Self { face: Face::parse(FONT, 0).ok() }
    }

    /// Whether the font has all of these characters.
    #[cfg(feature = "png")]
    pub(crate) fn knows(&self, text: &str) -> bool {
        text.chars().all(|c| c.is_control() || self.glyph_advance(c).is_some())
    }

    /// The width in pixels.
    pub(crate) fn width(&self, text: &str, size: f64) -> f64 {
        text.chars().map(|c| self.advance(c)).sum::<f64>() * size
    }

    /// The label, cut to at most this width in pixels. A cut label ends with an ellipsis. The work grows with the part
    /// that fits, not with the label.
    pub(crate) fn cut(&self, label: &str, size: f64, width: f64) -> String {
        let ellipsis = self.advance('…');
        let (mut advance, mut end) = (0.0, 0);
        for (start, c) in label.char_indices() {
            advance += self.advance(c);
            if advance * size > width {
                return format!("{}…", &label[..end]);
            }
            if (advance + ellipsis) * size <= width {
                end = start + c.len_utf8();
            }
        }
        label.to_string()
    }

    /// The advance width in ems. A character that the font lacks gets what the widest of the common fonts give it.
    fn advance(&self, c: char) -> f64 {
        self.glyph_advance(c).unwrap_or(1.3 / 2.0 * c.width().unwrap_or(0).max(1) as f64)
    }

    fn glyph_advance(&self, c: char) -> Option<f64> {
        let face = self.face.as_ref()?;
        let advance = face.glyph_hor_advance(face.glyph_index(c)?)?;
        Some(f64::from(advance) / f64::from(face.units_per_em()))
    }
}
