//! Heat maps as an SVG picture.

use std::fmt::Write;

use candle_core::Result;

use super::Heatmap;
use super::colours::{LIGHT, Rgb, Scale, colour, number, wants_dark_text};
use super::label::Ruler;

/// Sizes in pixels.
const MARGIN: f64 = 24.0;
const GAP: f64 = 20.0;
const TITLE: f64 = 14.0;
const NOTE: f64 = 12.0;
const BAR: (f64, f64) = (200.0, 14.0);
/// The longest label; more of a token is cut.
const LABEL: f64 = 150.0;
const PARCHMENT: &str = "#ffffff";
const INK: &str = "#1d2330";
const FAINT_INK: &str = "#5a6474";

/// Beyond these a viewer can't show the labels, or not the picture.
const MAX_TOKENS: (usize, &str) = (128, "at most 128 on either side; show part of the sequence, or make a Page");
const MAX_WEIGHTS: (usize, &str) = (1 << 18, "at most 262144; show some of the heads, or make a Page");

impl Heatmap {
    /// The heat map as a picture: a matrix for each head, in rows and columns, and a bar that explains the colours.
    ///
    /// # Errors
    ///
    /// More than 128 queries or keys, or than 2^18 weights.
    pub fn to_svg(&self) -> Result<String> {
        self.check_size(MAX_TOKENS, MAX_WEIGHTS)?;
        Ok(Picture::new(self).draw())
    }
}

/// A heat map on its way to SVG: where its parts go, and what is drawn so far.
struct Picture<'a> {
    map: &'a Heatmap,
    ruler: Ruler,
    scale: Scale,
    /// Matrices side by side.
    columns: usize,
    /// Side of a weight's square.
    cell: f64,
    /// Size of the labels.
    font: f64,
    queries: Vec<String>,
    keys: Vec<String>,
    titles: Vec<String>,
    /// Upper left corner of the first matrix.
    origin: (f64, f64),
    /// From one matrix to the next.
    pitch: (f64, f64),
    svg: String,
}

impl<'a> Picture<'a> {
    fn new(map: &'a Heatmap) -> Self {
        let ruler = Ruler::new();
        let heads = map.heads();
        // Up to four heads in a row, more in a square.
        let columns = if heads <= 4 { heads } else { (heads as f64).sqrt().ceil() as usize };
        let cell = cell_size(map.queries.len().max(map.keys.len()), heads);
        let font = (cell * 0.8).min(12.5);
        let cut = |labels: &[String], size, width| -> Vec<String> {
            labels.iter().map(|label| ruler.shorten(label, size, width)).collect()
        };
        let (queries, keys) = (cut(&map.queries, font, LABEL), cut(&map.keys, font, LABEL));
        let titles = cut(&map.titles, TITLE, 2.0 * LABEL);
        let widest = |labels: &[String], size| labels.iter().map(|label| ruler.width(label, size)).fold(0.0, f64::max);

        let title_height = if widest(&titles, TITLE) > 0.0 { TITLE * 1.7 } else { 0.0 };
        let origin = (MARGIN + widest(&queries, font) + 8.0, MARGIN + title_height + widest(&keys, font) + 8.0);
        let side = |tokens: usize| tokens as f64 * cell;
        let pitch =
            (side(map.keys.len()).max(widest(&titles, TITLE)) + GAP, side(map.queries.len()) + GAP + title_height);
        let scale = map.scale();
        Self { map, ruler, scale, columns, cell, font, queries, keys, titles, origin, pitch, svg: String::new() }
    }

    fn draw(mut self) -> String {
        let rows = self.map.heads().div_ceil(self.columns);
        let notes = self.notes();
        let below = self.origin.1 + rows as f64 * self.pitch.1;
        let right = notes.iter().map(|(x, _, text)| x + self.ruler.width(text, NOTE)).fold(0.0, f64::max);
        let width = (self.origin.0 + self.columns as f64 * self.pitch.0 - GAP).max(right) + MARGIN;
        let height = below + notes.iter().map(|&(_, y, _)| y).fold(0.0, f64::max) + MARGIN;
        let (width, height) = (width.ceil(), height.ceil());
        let _ = write!(
            self.svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}">
<title>Attention weights</title>
<rect width="{width}" height="{height}" fill="{PARCHMENT}"/>
"#
        );
        for head in 0..self.map.heads() {
            self.draw_head(head);
        }
        self.draw_bar(below);
        for (x, y, text) in &notes {
            let (y, text) = (below + y, escape(text));
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
        // Heads share their tokens: the labels stand to the left and on top of all.
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

    /// The squares, in units of a square. Neighbours of one colour are one path.
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
            let colours = self.map.row(head, query).iter().map(|&weight| self.colour(self.scale.place(weight)));
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

    /// The weights as numbers, where they fit.
    fn draw_numbers(&mut self, head: usize, x: f64, y: f64) {
        let size = (self.cell * 0.31).min(13.0);
        let fits = |weight: &f32| self.ruler.width(&number(*weight), size) <= self.cell - 4.0;
        if size < 10.0 || !self.map.weights.iter().all(fits) {
            return;
        }
        let _ = writeln!(self.svg, r#"<g font-size="{size:.1}" text-anchor="middle">"#);
        for query in 0..self.queries.len() {
            for (key, &weight) in self.map.row(head, query).iter().enumerate() {
                let dark = wants_dark_text(self.colour(self.scale.place(weight)));
                let ink = if dark { INK } else { PARCHMENT };
                let (x, y) = (x + (key as f64 + 0.5) * self.cell, y + (query as f64 + 0.5) * self.cell + 0.36 * size);
                let number = number(weight);
                let _ = writeln!(self.svg, r#"<text x="{x:.1}" y="{y:.1}" fill="{ink}">{number}</text>"#);
            }
        }
        self.svg.push_str("</g>\n");
    }

    /// The text below the matrices, each with its place: the ends of the scale, what is shown, what is to be said.
    fn notes(&self) -> Vec<(f64, f64, String)> {
        let (low, high) = (tidy(self.scale.low), tidy(self.scale.high));
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

    /// The colours from the lowest to the highest.
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

    fn colour(&self, place: f64) -> Rgb {
        colour(&LIGHT, place)
    }
}

/// A square large enough for a number where there are few tokens, and for a legible label where there are many.
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

/// The end of a scale: two digits that count.
fn tidy(weight: f64) -> String {
    if weight == 0.0 || weight == 1.0 {
        format!("{weight}")
    } else if (0.1..9.995).contains(&weight.abs()) {
        format!("{weight:.2}")
    } else if (0.001..0.1).contains(&weight.abs()) {
        format!("{weight:.4}")
    } else {
        format!("{weight:.1e}")
    }
}

fn hex([red, green, blue]: Rgb) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Safe between tags and in an attribute.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
