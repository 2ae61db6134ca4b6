//! Heat maps as an SVG picture.

use std::fmt::Write;

use crate::colours::{LIGHT, Rgb, Scale, colour, wants_dark_text};
use crate::font::Ruler;
use crate::limits::Limits;
use crate::number::{end_of_scale, two_decimals};
use crate::{Heatmap, HeatmapError};

/// Sizes in pixels.
const MARGIN: f64 = 24.0;
const GAP: f64 = 20.0;
const TITLE: f64 = 14.0;
const NOTE: f64 = 12.0;
const BAR: (f64, f64) = (200.0, 14.0);
/// The widest label. A longer token is cut.
const LABEL: f64 = 150.0;
const PAPER: &str = "#ffffff";
const INK: &str = "#1d2330";
const FAINT_INK: &str = "#5a6474";

const LIMITS: Limits = Limits {
    output: "SVG",
    // The labels of more tokens can't be read.
    max_tokens: 128,
    fewer_tokens: "show part of the sequence, or make a Page",
    // Viewers can't show a picture with more shapes.
    max_weights: 1 << 18,
    fewer_weights: "show some of the heads, or make a Page",
};

/// A square and a number, in a text that grows to twice its length.
const BYTES_PER_WEIGHT: usize = 320;

impl Heatmap {
    /// Draws a matrix for each head, and a bar that explains the colours, as an SVG picture.
    ///
    /// # Errors
    ///
    /// - [`HeatmapError::TooManyTokens`] for more than 128 queries or 128 keys.
    /// - [`HeatmapError::TooManyWeights`] for more than 2^18 weights in all heads together.
    /// - [`HeatmapError::Memory`] if there is too little memory.
    pub fn to_svg(&self) -> Result<String, HeatmapError> {
        Ok(self.picture()?.draw())
    }

    /// The layout of the picture, before it is drawn.
    pub(crate) fn picture(&self) -> Result<Picture<'_>, HeatmapError> {
        self.check(&LIMITS, BYTES_PER_WEIGHT)?;
        Ok(Picture::new(self))
    }
}

/// The layout of a picture, and the SVG that is written so far.
pub(crate) struct Picture<'a> {
    map: &'a Heatmap,
    ruler: Ruler,
    scale: Scale,
    /// The number of matrices in a row of the picture.
    columns: usize,
    /// The side of the square of one weight.
    cell: f64,
    /// The font size of the labels.
    font: f64,
    queries: Vec<String>,
    keys: Vec<String>,
    titles: Vec<String>,
    /// The upper left corner of the first matrix: (x, y).
    origin: (f64, f64),
    /// The distance from one matrix to the next: (x, y).
    pitch: (f64, f64),
    svg: String,
}

impl<'a> Picture<'a> {
    fn new(map: &'a Heatmap) -> Self {
        let ruler = Ruler::new();
        let heads = map.heads();
        // Up to four heads stand in one row. More heads form a square.
        let columns = if heads <= 4 { heads } else { (heads as f64).sqrt().ceil() as usize };
        let cell = cell_size(map.queries().len().max(map.keys().len()), heads);
        let font = (cell * 0.8).min(12.5);
        let cut = |labels: &[String], size, width| -> Vec<String> {
            labels.iter().map(|label| ruler.cut(label, size, width)).collect()
        };
        let (queries, keys) = (cut(map.queries(), font, LABEL), cut(map.keys(), font, LABEL));
        let titles = cut(&map.titles(), TITLE, 2.0 * LABEL);
        let widest = |labels: &[String], size| labels.iter().map(|label| ruler.width(label, size)).fold(0.0, f64::max);

        let title_height = if widest(&titles, TITLE) > 0.0 { TITLE * 1.7 } else { 0.0 };
        let origin = (MARGIN + widest(&queries, font) + 8.0, MARGIN + title_height + widest(&keys, font) + 8.0);
        let side = |tokens: usize| tokens as f64 * cell;
        let pitch =
            (side(map.keys().len()).max(widest(&titles, TITLE)) + GAP, side(map.queries().len()) + GAP + title_height);
        let scale = map.scale();
        Self { map, ruler, scale, columns, cell, font, queries, keys, titles, origin, pitch, svg: String::new() }
    }

    /// The width and the height of the picture, in pixels.
    pub(crate) fn size(&self) -> (f64, f64) {
        let notes = self.notes();
        let right = notes.iter().map(|(x, _, text)| x + self.ruler.width(text, NOTE)).fold(0.0, f64::max);
        let width = (self.origin.0 + self.columns as f64 * self.pitch.0 - GAP).max(right) + MARGIN;
        let height = self.bottom() + notes.iter().map(|&(_, y, _)| y).fold(0.0, f64::max) + MARGIN;
        (width.ceil(), height.ceil())
    }

    /// The y where the matrices end, and the bar begins.
    fn bottom(&self) -> f64 {
        let rows = self.map.heads().div_ceil(self.columns);
        self.origin.1 + rows as f64 * self.pitch.1
    }

    pub(crate) fn draw(mut self) -> String {
        let (width, height) = self.size();
        let below = self.bottom();
        let _ = write!(
            self.svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}">
<title>Attention weights</title>
<rect width="{width}" height="{height}" fill="{PAPER}"/>
"#
        );
        for head in 0..self.map.heads() {
            self.draw_head(head);
        }
        self.draw_bar(below);
        for (x, y, text) in self.notes() {
            let (y, text) = (below + y, escape(&text));
            let _ =
                writeln!(self.svg, r#"<text x="{x}" y="{y:.1}" font-size="{NOTE}" fill="{FAINT_INK}">{text}</text>"#);
        }
        self.svg.push_str("</svg>\n");
        self.svg
    }

    fn draw_head(&mut self, head: usize) {
        let (row, column) = (head / self.columns, head % self.columns);
        let x = self.origin.0 + column as f64 * self.pitch.0;
        let y = self.origin.1 + row as f64 * self.pitch.1;
        // All heads have the same tokens. The queries are written once at the left, the keys once on top.
        if column == 0 {
            for (i, label) in self.queries.iter().enumerate() {
                let y = y + (i as f64 + 0.5) * self.cell + 0.36 * self.font;
                let (x, font, label) = (x - 6.0, self.font, escape(label));
                let _ = writeln!(
                    self.svg,
                    r#"<text x="{x:.1}" y="{y:.1}" font-size="{font:.1}" text-anchor="end">{label}</text>"#
                );
            }
        }
        let mut title_y = y - 8.0;
        if row == 0 {
            for (i, label) in self.keys.iter().enumerate() {
                let (x, y) = (x + (i as f64 + 0.5) * self.cell + 0.36 * self.font, y - 6.0);
                let (font, label) = (self.font, escape(label));
                let _ = writeln!(
                    self.svg,
                    r#"<text transform="translate({x:.1} {y:.1}) rotate(-90)" font-size="{font:.1}">{label}</text>"#
                );
            }
            title_y = MARGIN + TITLE * 0.8;
        }
        if !self.titles[head].is_empty() {
            let title = escape(&self.titles[head]);
            let _ = writeln!(self.svg, r#"<text x="{x:.1}" y="{title_y:.1}" font-size="{TITLE}">{title}</text>"#);
        }
        self.draw_cells(head, x, y);
        self.draw_numbers(head, x, y);
    }

    /// Draws the squares, in units of a square. Neighbours of the same colour are one path.
    fn draw_cells(&mut self, head: usize, x: f64, y: f64) {
        let (q_len, kv_len) = (self.queries.len(), self.keys.len());
        let ground = self.colour(0.0);
        let _ = writeln!(
            self.svg,
            r#"<g transform="translate({x:.1} {y:.1}) scale({})" shape-rendering="crispEdges"><path d="M0 0h{kv_len}v{q_len}h-{kv_len}z" fill="{}"/>"#,
            self.cell,
            hex(ground)
        );
        for query in 0..q_len {
            let colours = self.map.row(head, query).iter().map(|&weight| self.colour(self.scale.fraction(weight)));
            let colours = colours.collect::<Vec<_>>();
            let mut start = 0;
            for run in colours.chunk_by(|a, b| a == b) {
                if run[0] != ground {
                    let (length, fill) = (run.len(), hex(run[0]));
                    let _ = write!(self.svg, r#"<path d="M{start} {query}h{length}v1h-{length}z" fill="{fill}"/>"#);
                }
                start += run.len();
            }
        }
        self.svg.push_str("</g>\n");
    }

    /// Writes the weights as numbers, if every one of them fits into its square.
    fn draw_numbers(&mut self, head: usize, x: f64, y: f64) {
        let size = (self.cell * 0.31).min(13.0);
        let fits = |weight: &f32| self.ruler.width(&two_decimals(*weight), size) <= self.cell - 4.0;
        if size < 10.0 || !self.map.weights().iter().all(fits) {
            return;
        }
        let _ = writeln!(self.svg, r#"<g font-size="{size:.1}" text-anchor="middle">"#);
        for query in 0..self.queries.len() {
            for (key, &weight) in self.map.row(head, query).iter().enumerate() {
                let dark = wants_dark_text(self.colour(self.scale.fraction(weight)));
                let ink = if dark { INK } else { PAPER };
                let (x, y) = (x + (key as f64 + 0.5) * self.cell, y + (query as f64 + 0.5) * self.cell + 0.36 * size);
                let number = two_decimals(weight);
                let _ = writeln!(self.svg, r#"<text x="{x:.1}" y="{y:.1}" fill="{ink}">{number}</text>"#);
            }
        }
        self.svg.push_str("</g>\n");
    }

    /// The texts below the matrices, as (x, y below the matrices, text): the ends of the scale, the axes, the caption.
    fn notes(&self) -> Vec<(f64, f64, String)> {
        let (low, high) = (end_of_scale(self.scale.low), end_of_scale(self.scale.high));
        let under = BAR.1 + NOTE * 1.3;
        let end = MARGIN + BAR.0 - self.ruler.width(&high, NOTE);
        let mut y = under + NOTE * 2.0;
        let mut notes = vec![(MARGIN, under, low), (end, under, high)];
        let lines = [Some("attention weight; a row is a query, a column a key".to_string()), self.map.caption()];
        for line in lines.into_iter().flatten() {
            notes.push((MARGIN, y, line));
            y += NOTE * 1.5;
        }
        notes
    }

    /// Draws the colours of the scale from the lowest to the highest weight.
    fn draw_bar(&mut self, y: f64) {
        let _ = write!(self.svg, r#"<defs><linearGradient id="weights">"#);
        for percent in (0..=100).step_by(25) {
            let stop = hex(self.colour(f64::from(percent) / 100.0));
            let _ = write!(self.svg, r#"<stop offset="{percent}%" stop-color="{stop}"/>"#);
        }
        let (width, height) = BAR;
        let _ = writeln!(
            self.svg,
            "</linearGradient></defs>\n<rect x=\"{MARGIN}\" y=\"{y:.1}\" width=\"{width}\" height=\"{height}\" fill=\"url(#weights)\"/>"
        );
    }

    fn colour(&self, fraction: f64) -> Rgb {
        colour(&LIGHT, fraction)
    }
}

/// The side of a square: large enough for a number if there are few tokens, and for a legible label if there are many.
fn cell_size(tokens: usize, heads: usize) -> f64 {
    let alone = match tokens {
        0..=8 => 48.0,
        9..=16 => 36.0,
        17..=32 => 20.0,
        33..=64 => 14.0,
        _ => 11.0,
    };
    if heads > 2 { f64::min(alone, 20.0) } else { alone }
}

fn hex([red, green, blue]: Rgb) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Escapes text for the content of an element or for an attribute.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
